/* SPDX-License-Identifier: GPL-2.0-only */
/* How packets leave: on to the balancer, unchanged or under a group's VIP. */
#ifndef MQTT_FWD_EMIT_H
#define MQTT_FWD_EMIT_H

#include "../abi/handover.h"
#include "../lib/csum.h"
#include "../lib/parse.h"
#include "../maps/config.h"
#include "../maps/counters.h"
#include "../maps/programs.h"

/*
 * A verdict is an XDP action (enum xdp_action, 0 to 4), SEGMENT, or UNCHANGED with the reason why the
 * packet goes on as it came: pass_on() then stands in one place, behind everything else, and not between
 * what each packet executes.
 */
enum verdict {
	SEGMENT = 0x100, /* for a service: to be handled */
	UNCHANGED = 0x200,
	VERDICT_REASON = 0xff,
};

_Static_assert((int)REASONS <= (int)VERDICT_REASON, "a verdict has room for any reason");

static __always_inline int unchanged(enum reason reason)
{
	return UNCHANGED | reason;
}

static __always_inline bool is_unchanged(int verdict)
{
	return verdict & UNCHANGED;
}

static __always_inline enum reason reason_of(int verdict)
{
	return verdict & VERDICT_REASON;
}

/* On to the balancer; what follows the tail call runs only if there is none. */
static __always_inline int pass_on(struct xdp_md *ctx, enum reason reason)
{
	count(reason);
	bpf_tail_call(ctx, &root_array, POSITION_BALANCER);
	count(REASON_NO_BALANCER);
	return XDP_PASS;
}

/*
 * A mark is this program's word to a broker host (abi/handover.h), which then sends no RST. One
 * packet in 256 looks marked as it comes from its client, by chance or on purpose: it gets another
 * identification, one bit away. Whether it was a broker host's word, that it has no such connection: a
 * hint, as anybody can send one.
 */
#define MARK_CLEARED 0x8000

static __always_inline bool looks_marked(__be16 word)
{
	return (word & bpf_htons(MARK_MASK)) == bpf_htons(MARK);
}

static __always_inline bool clear_mark4(struct iphdr *ip)
{
	__be16 was = ip->id;

	if (!looks_marked(was) || !(ip->frag_off & bpf_htons(IP_DF)))
		return false;
	ip->check = csum_replace2(ip->check, was, was ^ bpf_htons(MARK_CLEARED));
	ip->id = was ^ bpf_htons(MARK_CLEARED);
	return was == bpf_htons(MARK_RETURNED);
}

/* All packets of the flow get the same flow label, still (RFC 6437 §3). */
static __always_inline bool clear_mark6(struct ipv6hdr *ip)
{
	__be16 *label = (__be16 *)ip + 1, was = *label;

	if (!looks_marked(was))
		return false;
	*label = was ^ bpf_htons(MARK_CLEARED);
	return was == bpf_htons(MARK_RETURNED);
}

/*
 * dst ← addr. The TCP checksum is left wrong on purpose: it is right again once the balancer
 * has put the service's address back.
 */
static __always_inline void put_dst4(struct iphdr *ip, __be32 addr)
{
	ip->check = csum_replace4(ip->check, ip->daddr, addr);
	ip->daddr = addr;
}

static __always_inline void put_dst6(struct ipv6hdr *ip, const __be32 addr[4])
{
	__builtin_memcpy(&ip->daddr, addr, sizeof(ip->daddr));
}

static __always_inline bool set_dst4(struct xdp_md *ctx, __be32 addr)
{
	struct cursor c = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&c);
	struct iphdr *ip = parse_ipv4(&c);

	if (!eth || !ip)
		return false;
	put_dst4(ip, addr);
	return true;
}

static __always_inline bool set_dst6(struct xdp_md *ctx, const __be32 addr[4])
{
	struct cursor c = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&c);
	struct ipv6hdr *ip = parse_ipv6(&c);

	if (!eth || !ip)
		return false;
	put_dst6(ip, addr);
	return true;
}

static __always_inline bool set_dst(struct xdp_md *ctx, const __be32 addr[4], bool v6)
{
	return v6 ? set_dst6(ctx, addr) : set_dst4(ctx, addr[0]);
}

/* On to the balancer, under a group's VIP; back to what it was if no balancer takes it. */
static __always_inline int to_balancer(struct xdp_md *ctx, const struct service *svc, bool v6)
{
	bpf_tail_call(ctx, &root_array, POSITION_BALANCER);
	count(REASON_NO_BALANCER);
	set_dst(ctx, svc->addr, v6);
	return XDP_PASS;
}

static __always_inline int to_group(struct xdp_md *ctx, const struct group *g,
				    const struct service *svc, bool v6, enum reason reason)
{
	set_dst(ctx, g->vip, v6);
	count(reason);
	return to_balancer(ctx, svc, v6);
}

/* Likewise, of a segment that is counted, and whose TCP header is at hand, behind an IP header without options. */
static __always_inline int to_group_at(struct xdp_md *ctx, struct tcphdr *tcp,
				       const struct group *g, const struct service *svc, bool v6)
{
	if (v6)
		put_dst6((struct ipv6hdr *)tcp - 1, g->vip);
	else
		put_dst4((struct iphdr *)tcp - 1, g->vip[0]);
	return to_balancer(ctx, svc, v6);
}

#endif /* MQTT_FWD_EMIT_H */
