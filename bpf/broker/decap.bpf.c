// SPDX-License-Identifier: GPL-2.0-only
/*
 * On a real (broker host): takes off what the balancer put around a client's packet, so that
 * the host's TCP sees it as it was sent: from the client, to the service. IPIP, IP6IP6, IPv4
 * in IPv6, and GUE variant 1 (Katran's other encapsulation).
 *
 * Only packets for a service of this host are unwrapped. Everything else stays as it is: a
 * host that unwraps whatever it gets lets strangers send from any address.
 */
#include "../abi/config.h"
#include "../lib/parse.h"
#include "vips.h"

enum decap_counter { DECAP_UNWRAPPED, DECAP_REFUSED, DECAP_COUNTERS };

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

static __always_inline int unwrap(struct xdp_md *ctx, struct cursor *c, __u32 outer)
{
	__be16 proto;
	struct ethhdr mac;

	if (!inner_wanted(c, &proto)) {
		count(DECAP_REFUSED);
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
	return XDP_PASS;
}

static __always_inline int unwrap_by(struct xdp_md *ctx, struct cursor *c, __u8 protocol,
				     __u32 outer)
{
	if (protocol == IPPROTO_IPIP || protocol == IPPROTO_IPV6)
		return unwrap(ctx, c, outer);
	if (protocol == IPPROTO_UDP) {
		const struct udphdr *udp = parse_udp(c);
		if (udp && udp->dest == bpf_htons(gue_port))
			return unwrap(ctx, c, outer + sizeof(*udp));
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
		return unwrap_by(ctx, &c, ip->protocol, sizeof(*ip));
	}
	if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		const struct ipv6hdr *ip = parse_ipv6(&c);
		if (!ip)
			return XDP_PASS;
		return unwrap_by(ctx, &c, ip->nexthdr, sizeof(*ip));
	}
	return XDP_PASS;
}

char _license[] SEC("license") = "GPL";
