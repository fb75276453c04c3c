/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ICMP errors from the way between real and client: they name only the service, to which they
 * are addressed, and quote a packet that went service → client. Both the quoted source and the
 * outer destination become the group VIP, by which the balancer finds the real; the ICMP checksum
 * is right again once it has put the service back in both places.
 */
#ifndef MQTT_FWD_ICMP_ERROR_H
#define MQTT_FWD_ICMP_ERROR_H

#include "emit.h"
#include "flow.h"
#include "services.h"

static __always_inline int handle_icmp4(struct xdp_md *ctx, struct cursor *c, const struct iphdr *ip,
					const struct service_table *t)
{
	struct icmphdr *icmp = parse_icmp(c);
	if (!icmp || icmp->type != ICMP_DEST_UNREACH)
		return unchanged(REASON_NOT_SERVICE);

	struct iphdr *quoted = parse_ipv4(c);
	if (!quoted || quoted->protocol != IPPROTO_TCP || quoted->ihl != 5 ||
	    quoted->saddr != ip->daddr || quoted->frag_off & bpf_htons(IP_FRAGMENT_MASK))
		return unchanged(REASON_NOT_SERVICE);

	__be16 *ports = c->pos;
	if ((void *)(ports + 2) > c->end)
		return unchanged(REASON_NOT_SERVICE);

	const struct service *svc = service_find4(t, quoted->saddr, ports[0]);
	if (!svc)
		return unchanged(REASON_NOT_SERVICE);

	struct conn conn = {
		.key = { .addr[0] = quoted->daddr, .port = ports[1], .service = svc->id }
	};
	conn.tag = conn_tag(&conn.key);
	const struct flow *f = flow_find(&conn);
	const struct group *g = f ? group_of(flow_binding(f, &conn)) : NULL;
	if (!g)
		return unchanged(REASON_NO_GROUP_VIP);

	quoted->saddr = g->vip[0];
	set_dst4(ctx, g->vip[0]);
	count(REASON_ICMP_ERROR);
	bpf_tail_call(ctx, &root_array, POSITION_BALANCER);

	count(REASON_NO_BALANCER);
	set_dst4(ctx, svc->addr[0]);
	*c = cursor_of(ctx);
	c->pos += sizeof(struct ethhdr) + sizeof(struct iphdr) + sizeof(struct icmphdr);
	quoted = parse_ipv4(c);
	if (quoted)
		quoted->saddr = svc->addr[0];
	return XDP_PASS;
}

static __always_inline int handle_icmp6(struct xdp_md *ctx, struct cursor *c,
					const struct ipv6hdr *ip, const struct service_table *t)
{
	struct icmp6hdr *icmp = parse_icmp6(c);
	struct conn conn = { .v6 = true };
	__be32 outer[4];
	if (!icmp ||
	    (icmp->icmp6_type != ICMPV6_PKT_TOOBIG && icmp->icmp6_type != ICMPV6_DEST_UNREACH))
		return unchanged(REASON_NOT_SERVICE);

	struct ipv6hdr *quoted = parse_ipv6(c);
	if (!quoted || quoted->nexthdr != IPPROTO_TCP)
		return unchanged(REASON_NOT_SERVICE);

	__be16 *ports = c->pos;
	if ((void *)(ports + 2) > c->end)
		return unchanged(REASON_NOT_SERVICE);

	copy_addr6(outer, &ip->daddr);
	copy_addr6(conn.key.addr, &quoted->saddr);
	if (!addr6_equal(outer, conn.key.addr))
		return unchanged(REASON_NOT_SERVICE);
	const struct service *svc = service_find6(t, conn.key.addr, ports[0]);
	if (!svc)
		return unchanged(REASON_NOT_SERVICE);

	copy_addr6(conn.key.addr, &quoted->daddr);
	conn.key.port = ports[1];
	conn.key.service = svc->id;
	conn.tag = conn_tag(&conn.key);
	const struct flow *f = flow_find(&conn);
	const struct group *g = f ? group_of(flow_binding(f, &conn)) : NULL;
	if (!g)
		return unchanged(REASON_NO_GROUP_VIP);

	__builtin_memcpy(&quoted->saddr, g->vip, sizeof(quoted->saddr));
	set_dst6(ctx, g->vip);
	count(REASON_ICMP_ERROR);
	bpf_tail_call(ctx, &root_array, POSITION_BALANCER);

	count(REASON_NO_BALANCER);
	set_dst6(ctx, svc->addr);
	*c = cursor_of(ctx);
	c->pos += sizeof(struct ethhdr) + sizeof(struct ipv6hdr) + sizeof(struct icmp6hdr);
	quoted = parse_ipv6(c);
	if (quoted)
		__builtin_memcpy(&quoted->saddr, svc->addr, sizeof(quoted->saddr));
	return XDP_PASS;
}

#endif /* MQTT_FWD_ICMP_ERROR_H */
