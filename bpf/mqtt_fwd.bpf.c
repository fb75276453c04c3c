// SPDX-License-Identifier: GPL-2.0-only
/*
 * mqtt_fwd: the group of an MQTT flow, in front of the balancer.
 *
 *   ethernet → IP → TCP → service? → flow → MQTT control packets → group
 *                     no │                                          │ dst: service → group VIP
 *                        └──────────────► balancer ◄────────────────┘
 *
 * Every packet ends in verdict() or in too_big_*(), each with one reason.
 */
#include "binding.h"
#include "conn.h"
#include "csum.h"
#include "icmp.h"
#include "learn.h"
#include "maps.h"
#include "parse.h"
#include "stream.h"

struct exported_types {
	struct event event;
	enum limits limits;
	enum client_flags client_flags;
	enum event_kind event_kind;
	enum flow_flags flow_flags;
	enum misprediction_policy misprediction_policy;
	enum parser parser;
	enum reason reason;
};
EXPORT_TYPES(exported_types);

/* The generation of services and routes that is in force. */
static __always_inline const struct service_table *table_in_force(void)
{
	__u32 zero = 0, side;
	const __u32 *current = bpf_map_lookup_elem(&generation, &zero);

	if (!current)
		return NULL;
	side = *current & 1;
	return bpf_map_lookup_elem(&services, &side);
}

static __always_inline const struct service *service_at(const struct service_table *t, __u32 slot)
{
	return slot < MAX_SERVICES ? &t->service[slot & (MAX_SERVICES - 1)] : NULL;
}

static __always_inline const struct service *service_find4(const struct service_table *t,
							   __be32 addr, __be16 port)
{
	__u64 key = addr | (__u64)port << 32;
	__u32 found = MAX_SERVICES;

	/* Not leaving the loop early keeps it one path for the verifier, not one a service. */
	for (__u32 i = 0; i < MAX_SERVICES; i++) {
		if (i >= t->v4)
			break;
		if (t->v4_key[i] == key)
			found = t->service[i].slot;
	}
	return service_at(t, found);
}

static __always_inline bool addr6_equal(const __be32 a[4], const __be32 b[4])
{
	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]));
}

static __always_inline const struct service *service_find6(const struct service_table *t,
							   const __be32 addr[4], __be16 port)
{
	__u32 found = MAX_SERVICES;

	for (__u32 i = 0; i < MAX_SERVICES; i++) {
		if (i >= t->count)
			break;
		if (i >= t->v4 && t->service[i].port == port &&
		    addr6_equal(t->service[i].addr, addr))
			found = t->service[i].slot;
	}
	return service_at(t, found);
}

/* On to the balancer; what follows the tail call runs only if nobody is there. */
static __always_inline int verdict(struct xdp_md *ctx, enum reason reason)
{
	count(reason);
	bpf_tail_call(ctx, &root_array, POSITION_BALANCER);
	count(REASON_NO_BALANCER);
	return XDP_PASS;
}

/*
 * dst ← addr. The TCP checksum is left wrong on purpose: it is right again once the balancer
 * has put the service's address back.
 */
static __always_inline bool set_dst4(struct xdp_md *ctx, __be32 addr)
{
	struct cursor c = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&c);
	struct iphdr *ip = parse_ipv4(&c);

	if (!eth || !ip)
		return false;
	ip->check = csum_replace4(ip->check, ip->daddr, addr);
	ip->daddr = addr;
	return true;
}

static __always_inline bool set_dst6(struct xdp_md *ctx, const __be32 addr[4])
{
	struct cursor c = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&c);
	struct ipv6hdr *ip = parse_ipv6(&c);

	if (!eth || !ip)
		return false;
	__builtin_memcpy(&ip->daddr, addr, sizeof(ip->daddr));
	return true;
}

static __always_inline bool set_dst(struct xdp_md *ctx, const __be32 addr[4], bool v6)
{
	return v6 ? set_dst6(ctx, addr) : set_dst4(ctx, addr[0]);
}

/* To the group, under its VIP; back to what it was if no balancer takes it. */
static __always_inline int to_group(struct xdp_md *ctx, const struct group *g,
				    const struct service *svc, bool v6, enum reason reason)
{
	set_dst(ctx, g->vip, v6);
	count(reason);
	bpf_tail_call(ctx, &root_array, POSITION_BALANCER);
	count(REASON_NO_BALANCER);
	set_dst(ctx, svc->addr, v6);
	return XDP_PASS;
}

/* A flow's first packet, or the first that is seen of it. */
__noinline int flow_open(const struct conn *c, const struct service_table *t,
			 const struct service *svc, bool syn, struct binding *b)
{
	if (!c || !t || !svc || !b)
		return 0;

	struct flow f = { .next_seq = c->seq + 1, .ack = c->ack };
	/* Seen from its middle: its group may be known all the same, if `flows` is too small. */
	__u32 known = syn ? 0 : binding_find(c, t);
	const struct group *g = group_of_binding(known);
	struct client *client;

	if (g) {
		b->group = binding_group(known);
		b->epoch = g->epoch;
	} else {
		predict(c, t, svc, b);
	}
	f.group = b->group;
	f.epoch = b->epoch;
	f.flags = syn ? FLOW_SYN_SEEN : FLOW_UNSYNCED;
	if (b->predicted)
		f.flags |= FLOW_PREDICTED;
	if (flow_store(c, &f))
		count(REASON_MAP_FULL);
	binding_correct(c, t, b->group, b->epoch);

	client = b->predicted ? client_find(c) : NULL;
	report_event(c, EVENT_BOUND, from_to(NO_GROUP, b->group), client ? client->topic : 0,
		     b->predicted ? REPORT_BY_PREDICTION : 0);
	return 0;
}

/* The group that a flow was bound to is gone: the configuration was changed. */
__noinline int flow_rebind(const struct conn *c, const struct service_table *t,
			   const struct service *svc, struct flow *f)
{
	struct binding b = {};

	if (!c || !t || !svc || !f)
		return 0;
	predict(c, t, svc, &b);
	f->group = b.group;
	f->epoch = b.epoch;
	count(REASON_GROUP_GONE);
	return 0;
}

/*
 * One segment without data in 64, as good as at random, looks into `flows` all the same: a flow
 * that only acknowledges, a subscriber's, would be the first to be forgotten there otherwise.
 */
#define TOUCH_BITS 6

static __always_inline int handle_segment(struct xdp_md *ctx, struct conn *c,
					  const struct service_table *t,
					  const struct service *svc, const struct tcphdr *tcp,
					  const bool v6)
{
	bool syn = tcp->syn, ends = tcp->fin || tcp->rst;
	bool bare = !c->payload_length && !syn && !ends;
	enum reason reason = c->payload_length ? REASON_DATA : REASON_NO_DATA;
	const struct group *g;
	struct flow *f;

	if (bare && (tcp->check ^ c->ack * 0x9e3779b1U) >> (32 - TOUCH_BITS)) {
		g = group_of_binding(binding_find(c, t));
		if (g)
			return to_group(ctx, g, svc, v6, reason);
	}

	if (v6) {
		f = bpf_map_lookup_elem(&flows6, &c->key);
		if (!f)
			f = bpf_map_lookup_elem(&flows6_closing, &c->key);
	} else {
		struct flow4 key = flow4_of(c);
		f = bpf_map_lookup_elem(&flows, &key);
		if (!f)
			f = bpf_map_lookup_elem(&flows_closing, &key);
	}

	if (syn && f && f->next_seq == c->seq + 1 && !(f->flags & FLOW_CLOSING)) {
		reason = REASON_SYN_AGAIN;
	} else if (syn || !f) {
		struct binding b = {};

		if (f)
			flow_reopen(c, f);
		flow_open(c, t, svc, syn, &b);
		if (syn)
			reason = b.predicted ? REASON_FLOW_PREDICTED : REASON_FLOW_NEW;
		else
			reason = REASON_FLOW_ADOPTED;
		g = group_alive(b.group, b.epoch);
		if (!g)
			return verdict(ctx, REASON_NO_GROUP_VIP);
		return to_group(ctx, g, svc, v6, reason);
	} else if (c->payload_length) {
		mqtt_segment(ctx, f, c, t, svc);
	} else if (bare && !(f->flags & FLOW_CLOSING)) {
		binding_keep(c, t, f->group, f->epoch);
	}

	g = group_alive(f->group, f->epoch);
	if (!g) {
		flow_rebind(c, t, svc, f);
		g = group_alive(f->group, f->epoch);
		if (!g)
			return verdict(ctx, REASON_NO_GROUP_VIP);
	}
	if (ends && !(f->flags & FLOW_CLOSING)) {
		flow_close(c, f);
		binding_correct(c, t, 0, 0);
	}
	return to_group(ctx, g, svc, v6, reason);
}

/* TCP header and payload of a packet whose IP header says that they end at `end` (offset). */
static __always_inline bool conn_of(struct conn *c, const struct tcphdr *tcp, __u32 tcp_offset,
				    __u32 end)
{
	__u32 header = tcp->doff * 4;

	if (header < sizeof(*tcp) || tcp_offset + header > end)
		return false;
	c->key.port = tcp->source;
	c->seq = bpf_ntohl(tcp->seq);
	c->ack = bpf_ntohl(tcp->ack_seq);
	c->payload = tcp_offset + header;
	c->payload_length = end - c->payload;
	return true;
}

/*
 * An error that names one of our flows: the quoted packet went service → client. Both its
 * source and the outer destination become the group VIP, by which the balancer finds the
 * real; the ICMP checksum is right again once it has put the service back in both places.
 */
static __always_inline int handle_icmp4(struct xdp_md *ctx, struct cursor *c,
					const struct service_table *t)
{
	struct icmphdr *icmp = parse_icmp(c);
	if (!icmp || icmp->type != ICMP_DEST_UNREACH)
		return verdict(ctx, REASON_NOT_SERVICE);

	struct iphdr *quoted = parse_ipv4(c);
	if (!quoted || quoted->protocol != IPPROTO_TCP || quoted->ihl != 5)
		return verdict(ctx, REASON_NOT_SERVICE);

	__be16 *ports = c->pos;
	if ((void *)(ports + 2) > c->end)
		return verdict(ctx, REASON_NOT_SERVICE);

	const struct service *svc = service_find4(t, quoted->saddr, ports[0]);
	if (!svc)
		return verdict(ctx, REASON_NOT_SERVICE);

	struct flow4 key = { .addr = quoted->daddr, .port = ports[1], .service = svc->id };
	const struct flow *f = bpf_map_lookup_elem(&flows, &key);
	if (!f)
		f = bpf_map_lookup_elem(&flows_closing, &key);
	const struct group *g = f ? group_alive(f->group, f->epoch) : NULL;
	if (!g)
		return verdict(ctx, REASON_NO_GROUP_VIP);

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
					const struct service_table *t)
{
	struct icmp6hdr *icmp = parse_icmp6(c);
	struct flow6 key = {};
	if (!icmp ||
	    (icmp->icmp6_type != ICMPV6_PKT_TOOBIG && icmp->icmp6_type != ICMPV6_DEST_UNREACH))
		return verdict(ctx, REASON_NOT_SERVICE);

	struct ipv6hdr *quoted = parse_ipv6(c);
	if (!quoted || quoted->nexthdr != IPPROTO_TCP)
		return verdict(ctx, REASON_NOT_SERVICE);

	__be16 *ports = c->pos;
	if ((void *)(ports + 2) > c->end)
		return verdict(ctx, REASON_NOT_SERVICE);

	copy_addr6(key.addr, &quoted->saddr);
	const struct service *svc = service_find6(t, key.addr, ports[0]);
	if (!svc)
		return verdict(ctx, REASON_NOT_SERVICE);

	copy_addr6(key.addr, &quoted->daddr);
	key.port = ports[1];
	key.service = svc->id;
	const struct flow *f = bpf_map_lookup_elem(&flows6, &key);
	if (!f)
		f = bpf_map_lookup_elem(&flows6_closing, &key);
	const struct group *g = f ? group_alive(f->group, f->epoch) : NULL;
	if (!g)
		return verdict(ctx, REASON_NO_GROUP_VIP);

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

static __always_inline int handle_ipv4(struct xdp_md *ctx, struct cursor *cur,
				       const struct service_table *t)
{
	struct iphdr *ip = parse_ipv4(cur);

	if (!ip)
		return verdict(ctx, REASON_TRUNCATED);
	if (ip->protocol != IPPROTO_TCP) {
		if (ip->protocol == IPPROTO_ICMP && ip->ihl == 5 &&
		    !(ip->frag_off & bpf_htons(IP_FRAGMENT_MASK)))
			return handle_icmp4(ctx, cur, t);
		return verdict(ctx, REASON_NOT_SERVICE);
	}
	if (ip->frag_off & bpf_htons(IP_FRAGMENT_MASK))
		return verdict(ctx, REASON_IP_FRAGMENT);
	if (ip->ihl != 5)
		return verdict(ctx, REASON_IP_OPTIONS);

	struct tcphdr *tcp = parse_tcp(cur);
	if (!tcp)
		return verdict(ctx, REASON_TRUNCATED);

	const struct service *svc = service_find4(t, ip->daddr, tcp->dest);
	if (!svc)
		return verdict(ctx, REASON_NOT_SERVICE);

	__u32 length = bpf_ntohs(ip->tot_len);
	struct conn c = { .key.addr[0] = ip->saddr, .key.service = svc->id };
	if (sizeof(struct ethhdr) + length > ctx->data_end - ctx->data ||
	    !conn_of(&c, tcp, sizeof(struct ethhdr) + sizeof(*ip), sizeof(struct ethhdr) + length))
		return verdict(ctx, REASON_TRUNCATED);

	if (length > svc->max_packet) {
		if (ip->frag_off & bpf_htons(IP_DF)) {
			count(REASON_TOO_BIG);
			return send_too_big4(ctx, svc->max_packet);
		}
		count(REASON_TOO_BIG_NO_DF);
	}
	return handle_segment(ctx, &c, t, svc, tcp, false);
}

static __always_inline int handle_ipv6(struct xdp_md *ctx, struct cursor *cur,
				       const struct service_table *t)
{
	struct ipv6hdr *ip = parse_ipv6(cur);
	struct conn c = { .v6 = true };

	if (!ip)
		return verdict(ctx, REASON_TRUNCATED);
	switch (ip->nexthdr) {
	case IPPROTO_TCP:
		break;
	case IPPROTO_ICMPV6:
		return handle_icmp6(ctx, cur, t);
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_FRAGMENT:
	case IPPROTO_AH:
	case IPPROTO_DSTOPTS:
		return verdict(ctx, REASON_IPV6_EXTENSION);
	default:
		return verdict(ctx, REASON_NOT_SERVICE);
	}

	struct tcphdr *tcp = parse_tcp(cur);
	if (!tcp)
		return verdict(ctx, REASON_TRUNCATED);

	copy_addr6(c.key.addr, &ip->daddr);
	const struct service *svc = service_find6(t, c.key.addr, tcp->dest);
	if (!svc)
		return verdict(ctx, REASON_NOT_SERVICE);

	__u32 length = sizeof(*ip) + bpf_ntohs(ip->payload_len);
	copy_addr6(c.key.addr, &ip->saddr);
	c.key.service = svc->id;
	if (sizeof(struct ethhdr) + length > ctx->data_end - ctx->data ||
	    !conn_of(&c, tcp, sizeof(struct ethhdr) + sizeof(*ip), sizeof(struct ethhdr) + length))
		return verdict(ctx, REASON_TRUNCATED);

	if (length > svc->max_packet) {
		count(REASON_TOO_BIG);
		return send_too_big6(ctx, svc->max_packet);
	}
	return handle_segment(ctx, &c, t, svc, tcp, true);
}

SEC("xdp")
int mqtt_fwd(struct xdp_md *ctx)
{
	struct cursor c = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&c);
	const struct service_table *t = table_in_force();

	if (!eth || !t)
		return verdict(ctx, REASON_TRUNCATED);
	if (eth->h_proto == bpf_htons(ETH_P_IP))
		return handle_ipv4(ctx, &c, t);
	if (eth->h_proto == bpf_htons(ETH_P_IPV6))
		return handle_ipv6(ctx, &c, t);
	return verdict(ctx, REASON_NOT_IP);
}

char _license[] SEC("license") = "GPL";
