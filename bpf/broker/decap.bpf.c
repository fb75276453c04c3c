// SPDX-License-Identifier: GPL-2.0-only
/*
 * On a real (broker host): takes off what the balancer put around a client's packet, so that
 * the host's TCP sees it as it was sent: from the client, to the service. IPIP, IP6IP6, IPv4
 * in IPv6, and GUE variant 1 (Katran's other encapsulation).
 *
 * Only packets for a service of this host, and from where a balancer sends, are unwrapped.
 * Everything else stays as it is: a host that unwraps whatever it gets lets strangers send from any
 * address.
 *
 * In a fleet of balancers, it also says which connections this host has (fleet/answer.h), and sends back what is of
 * none of them (fleet/returned.h).
 */
#include "../abi/config.h"
#include "../lib/parse.h"
#include "fleet/returned.h"
#include "vips.h"

enum decap_counter {
	DECAP_UNWRAPPED,
	DECAP_OTHER_SERVICE,
	DECAP_OTHER_SOURCE,
	DECAP_RETURNED,
	DECAP_ANSWERED,
	DECAP_DENIED,
	DECAP_COUNTERS,
};

struct exported_types {
	struct source source;
	enum decap_counter decap_counter;
	struct ask ask;
	struct asked asked;
	enum ask_kind ask_kind;
	enum ask_limits ask_limits;
	enum asked_state asked_state;
};
EXPORT_TYPES(exported_types);

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct source);
	__type(value, __u8);
	__uint(max_entries, 256);
} decap_sources SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, DECAP_COUNTERS);
} decap_counters SEC(".maps");

const volatile __u16 gue_port =
	6080; /* host order; Katran's GUE_DPORT, unless built with another */

static __always_inline void count(__u32 counter)
{
	__u64 *n = bpf_map_lookup_elem(&decap_counters, &counter);

	if (n)
		*n += 1;
}

/* What lies inside, by its own version field (GUE variant 1 has no other sign of it). */
static __always_inline bool inner_wanted(struct cursor *c, __be16 *proto)
{
	struct address dst = {};
	const __u8 *version = c->pos;

	if ((void *)(version + 1) > c->end)
		return false;
	if (*version >> 4 == 6) {
		const struct ipv6hdr *ip = parse_ipv6(c);
		if (!ip)
			return false;
		copy_addr6(dst.addr, &ip->daddr);
		*proto = bpf_htons(ETH_P_IPV6);
	} else {
		const struct iphdr *ip = parse_ipv4(c);
		if (!ip || ip->version != 4)
			return false;
		dst.addr[0] = ip->daddr;
		*proto = bpf_htons(ETH_P_IP);
	}
	return bpf_map_lookup_elem(&decap_vips, &dst);
}

static __always_inline struct source source_of4(__be32 addr)
{
	return (struct source){.prefix_length = 128, .addr = {0, 0, bpf_htonl(0xffff), addr}};
}

static __always_inline struct source source_of6(const struct in6_addr *addr)
{
	struct source s = {.prefix_length = 128};

	copy_addr6(s.addr, addr);
	return s;
}

static __always_inline int unwrap(struct xdp_md *ctx, struct cursor *c, __u32 outer,
				  const struct source *from)
{
	__be16 proto;
	struct ethhdr mac;

	if (!inner_wanted(c, &proto)) {
		count(DECAP_OTHER_SERVICE);
		return XDP_PASS;
	}
	if (!bpf_map_lookup_elem(&decap_sources, from)) {
		count(DECAP_OTHER_SOURCE);
		return XDP_PASS;
	}

	*c = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(c);
	if (!eth)
		return XDP_PASS;
	mac = *eth;
	mac.h_proto = proto;
	if (bpf_xdp_adjust_head(ctx, outer))
		return XDP_PASS;
	*c = cursor_of(ctx);
	eth = parse_eth(c);
	if (!eth)
		return XDP_DROP;
	*eth = mac;
	count(DECAP_UNWRAPPED);
	if (return_to_balancer(ctx)) {
		count(DECAP_RETURNED);
		return XDP_TX;
	}
	return XDP_PASS;
}

static __always_inline int answer(struct xdp_md *ctx, bool v6)
{
	switch (answer_question(ctx, v6)) {
	case ASK_ANSWERED:
		count(DECAP_ANSWERED);
		return XDP_TX;
	case ASK_DENIED:
		count(DECAP_DENIED);
		return XDP_DROP;
	default:
		return XDP_PASS;
	}
}

static __always_inline int unwrap_by(struct xdp_md *ctx, struct cursor *c, __u8 protocol,
				     __u32 outer, const struct source *from)
{
	if (protocol == IPPROTO_IPIP || protocol == IPPROTO_IPV6)
		return unwrap(ctx, c, outer, from);
	if (protocol == IPPROTO_UDP) {
		const struct udphdr *udp = parse_udp(c);
		if (udp && udp->dest == bpf_htons(gue_port))
			return unwrap(ctx, c, outer + sizeof(*udp), from);
		if (udp && udp->dest == bpf_htons(ask_port))
			return answer(ctx, outer == sizeof(struct ipv6hdr));
	}
	return XDP_PASS;
}

SEC("xdp")
int decap(struct xdp_md *ctx)
{
	struct cursor c = cursor_of(ctx);
	const struct ethhdr *eth = parse_eth(&c);

	if (!eth)
		return XDP_PASS;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		const struct iphdr *ip = parse_ipv4(&c);
		if (!ip || ip->ihl != 5 || ip->frag_off & bpf_htons(IP_FRAGMENT_MASK))
			return XDP_PASS;
		struct source from = source_of4(ip->saddr);
		return unwrap_by(ctx, &c, ip->protocol, sizeof(*ip), &from);
	}
	if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		const struct ipv6hdr *ip = parse_ipv6(&c);
		if (!ip)
			return XDP_PASS;
		struct source from = source_of6(&ip->saddr);
		return unwrap_by(ctx, &c, ip->nexthdr, sizeof(*ip), &from);
	}
	return XDP_PASS;
}

char _license[] SEC("license") = "GPL";
