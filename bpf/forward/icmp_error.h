/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ICMP errors from the path between real and client: they name only the service, to which they
 * are addressed, and quote a packet that went service → client. Both the quoted source and the
 * outer destination become the group VIP, by which the balancer finds the real; the ICMP checksum
 * is right again once it has put the service back in both places.
 *
 * Not inlined: rare, and large.
 */
#ifndef MQTT_FWD_ICMP_ERROR_H
#define MQTT_FWD_ICMP_ERROR_H

#include "../maps/scratch.h"
#include "emit.h"
#include "flow/flow.h"
#include "services.h"

/* The quoted header of an ICMP error about a service's TCP segment. */
static __always_inline struct iphdr *quoted4(struct xdp_md *ctx, struct cursor *c)
{
	struct ethhdr *eth;
	struct iphdr *ip, *quoted;
	struct icmphdr *icmp;

	*c = cursor_of(ctx);
	eth = parse_eth(c);
	ip = parse_ipv4(c);
	icmp = parse_icmp(c);
	quoted = parse_ipv4(c);
	if (!eth || !ip || !icmp || !quoted || icmp->type != ICMP_DEST_UNREACH ||
	    quoted->protocol != IPPROTO_TCP || quoted->ihl != 5 ||
	    quoted->frag_off & bpf_htons(IP_FRAGMENT_MASK) || quoted->saddr != ip->daddr)
		return NULL;
	return quoted;
}

static __always_inline struct ipv6hdr *quoted6(struct xdp_md *ctx, struct cursor *c)
{
	struct ethhdr *eth;
	struct ipv6hdr *ip, *quoted;
	struct icmp6hdr *icmp;

	*c = cursor_of(ctx);
	eth = parse_eth(c);
	ip = parse_ipv6(c);
	icmp = parse_icmp6(c);
	quoted = parse_ipv6(c);
	if (!eth || !ip || !icmp || !quoted || quoted->nexthdr != IPPROTO_TCP ||
	    (icmp->icmp6_type != ICMPV6_PKT_TOOBIG && icmp->icmp6_type != ICMPV6_DEST_UNREACH) ||
	    !addr6_equal(ip->daddr.in6_u.u6_addr32, quoted->saddr.in6_u.u6_addr32))
		return NULL;
	return quoted;
}

/* The group of the flow that is quoted: its destination is the client. */
static __always_inline const struct group *
quoted_group(struct conn *c, const struct service_table *t, const struct service *svc)
{
	struct scratch *w = scratch();
	const struct flow *f;

	if (!w)
		return NULL;
	c->key.service = svc->id;
	c->tag = flow_tag(flow_id_of(c, t));
	w->tail_args.slot = svc->slot;
	f = flow_find(c, t);
	return f ? group_of(flow_binding(f, c)) : NULL;
}

/* SEGMENT: the error is addressed to its flow's group; else its verdict. Global (see event.h). */
__noinline int icmp_to_group4(struct xdp_md *ctx, const struct service_table *t)
{
	struct conn conn = {};
	struct cursor c;
	struct iphdr *quoted = quoted4(ctx, &c);
	const struct service *svc;
	const struct group *g;
	__be16 *ports = c.pos;

	if (!t || !quoted || (void *)(ports + 2) > c.end)
		return unchanged(REASON_NOT_SERVICE);
	conn.key.addr[0] = quoted->saddr;
	svc = service_at(t, service_slot(t, &conn, ports[0]));
	if (!svc)
		return unchanged(REASON_NOT_SERVICE);
	conn.key.addr[0] = quoted->daddr;
	conn.key.port = ports[1];
	g = quoted_group(&conn, t, svc);
	if (!g)
		return unchanged(REASON_NO_GROUP_VIP);
	quoted->saddr = g->vip[0];
	set_dst4(ctx, g->vip[0]);
	return SEGMENT;
}

__noinline int icmp_to_group6(struct xdp_md *ctx, const struct service_table *t)
{
	struct conn conn = {.v6 = true};
	struct cursor c;
	struct ipv6hdr *quoted = quoted6(ctx, &c);
	const struct service *svc;
	const struct group *g;
	__be16 *ports = c.pos;

	if (!t || !quoted || (void *)(ports + 2) > c.end)
		return unchanged(REASON_NOT_SERVICE);
	copy_addr6(conn.key.addr, &quoted->saddr);
	svc = service_at(t, service_slot(t, &conn, ports[0]));
	if (!svc)
		return unchanged(REASON_NOT_SERVICE);
	copy_addr6(conn.key.addr, &quoted->daddr);
	conn.key.port = ports[1];
	g = quoted_group(&conn, t, svc);
	if (!g)
		return unchanged(REASON_NO_GROUP_VIP);
	__builtin_memcpy(&quoted->saddr, g->vip, sizeof(quoted->saddr));
	set_dst6(ctx, g->vip);
	return SEGMENT;
}

/* Undoes icmp_to_group4() or icmp_to_group6(). */
static __noinline int icmp_restore(struct xdp_md *ctx, const struct service_table *t, __u32 v6)
{
	const struct scratch *w = scratch();
	const struct service *svc = w ? service_at(t, w->tail_args.slot) : NULL;
	struct cursor c = cursor_of(ctx);

	if (!svc || !set_dst(ctx, svc->addr, v6) || !parse_eth(&c))
		return 0;
	if (v6) {
		struct ipv6hdr *ip = parse_ipv6(&c);
		struct icmp6hdr *icmp = parse_icmp6(&c);
		struct ipv6hdr *quoted = parse_ipv6(&c);
		if (ip && icmp && quoted)
			__builtin_memcpy(&quoted->saddr, svc->addr, sizeof(quoted->saddr));
		return 0;
	}
	struct iphdr *ip = parse_ipv4(&c);
	struct icmphdr *icmp = parse_icmp(&c);
	struct iphdr *quoted = parse_ipv4(&c);
	if (ip && icmp && quoted)
		quoted->saddr = svc->addr[0];
	return 0;
}

static __always_inline int handle_icmp(struct xdp_md *ctx, const struct service_table *t, bool v6)
{
	int verdict = v6 ? icmp_to_group6(ctx, t) : icmp_to_group4(ctx, t);

	if (verdict != SEGMENT)
		return verdict;
	count(REASON_ICMP_ERROR);
	bpf_tail_call(ctx, &root_array, POSITION_BALANCER);
	count(REASON_NO_BALANCER);
	icmp_restore(ctx, t, v6);
	return XDP_PASS;
}

#endif /* MQTT_FWD_ICMP_ERROR_H */
