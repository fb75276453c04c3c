/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ICMP "too big" on behalf of a service, for what would not fit once encapsulated. If there is no
 * room for the answer, the packet goes on as it came.
 */
#ifndef MQTT_FWD_TOO_BIG_H
#define MQTT_FWD_TOO_BIG_H

#include "../lib/csum.h"
#include "emit.h"

/*
 * As much of the offending packet as keeps the error within 576 bytes (RFC 1812 §4.3.2.3) or
 * the minimum IPv6 MTU (RFC 4443 §2.4 c). Packets that are too big are longer than that.
 */
#define QUOTE4 (576 - sizeof(struct iphdr) - sizeof(struct icmphdr))
#define QUOTE6 (1280 - sizeof(struct ipv6hdr) - sizeof(struct icmp6hdr))

/* bpf_csum_diff takes 512 bytes at a time. */
static __always_inline __s64 csum_add(void *from, __u32 length, __s64 sum)
{
#pragma unroll
	for (__u32 done = 0; done < length; done += 512) {
		__u32 part = length - done < 512 ? length - done : 512;
		sum = bpf_csum_diff(NULL, 0, from + done, part, sum);
	}
	return sum;
}

static __always_inline void swap_macs(struct ethhdr *to, const struct ethhdr *from)
{
	__u8 dest[ETH_ALEN];

	__builtin_memcpy(dest, from->h_source, ETH_ALEN);
	__builtin_memcpy(to->h_source, from->h_dest, ETH_ALEN);
	__builtin_memcpy(to->h_dest, dest, ETH_ALEN);
}

/* The head first: room in front can be given back, what is cut off behind cannot. */
static __always_inline bool make_room(struct xdp_md *ctx, __u32 room, __u32 length, __u32 quoted)
{
	if (bpf_xdp_adjust_head(ctx, -(int)room))
		return false;
	if (!bpf_xdp_adjust_tail(ctx, (int)quoted - (int)length))
		return true;
	bpf_xdp_adjust_head(ctx, room);
	return false;
}

/* Makes the answer of the packet; false: the packet is as it was. */
static __noinline int too_big4(struct xdp_md *ctx, __u32 mtu)
{
	const __u32 room = sizeof(struct iphdr) + sizeof(struct icmphdr);
	const __u32 length = ctx->data_end - ctx->data;

	if (!make_room(ctx, room, length, sizeof(struct ethhdr) + QUOTE4))
		return false;

	struct cursor c = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&c);
	struct iphdr *ip = parse_ipv4(&c);
	struct icmphdr *icmp = parse_icmp(&c);
	if (!eth || !ip || !icmp)
		return false;
	struct ethhdr *old_eth = frame_start(ctx) + room;
	struct iphdr *quoted = (void *)(icmp + 1);
	if ((void *)quoted + QUOTE4 > c.end || (void *)(old_eth + 1) > c.end)
		return false;

	swap_macs(eth, old_eth);
	eth->h_proto = bpf_htons(ETH_P_IP);
	*ip = (struct iphdr){
		.version = 4,
		.ihl = 5,
		.tos = 0xc0, /* internetwork control (RFC 1812 §4.3.2.5) */
		.tot_len = bpf_htons(room + QUOTE4),
		.ttl = 64,
		.protocol = IPPROTO_ICMP,
		.saddr = quoted->daddr,
		.daddr = quoted->saddr,
	};
	*icmp = (struct icmphdr){
		.type = ICMP_DEST_UNREACH,
		.code = ICMP_FRAG_NEEDED,
		.mtu = bpf_htons(mtu),
	};
	icmp->checksum = ~csum_fold(csum_add(icmp, sizeof(*icmp) + QUOTE4, 0));
	ip->check = ~csum_fold(csum_add(ip, sizeof(*ip), 0));
	return true;
}

/* Makes the answer of the packet; false: the packet is as it was. */
static __noinline int too_big6(struct xdp_md *ctx, __u32 mtu)
{
	const __u32 room = sizeof(struct ipv6hdr) + sizeof(struct icmp6hdr);
	const __u32 length = ctx->data_end - ctx->data;

	if (!make_room(ctx, room, length, sizeof(struct ethhdr) + QUOTE6))
		return false;

	struct cursor c = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&c);
	struct ipv6hdr *ip = parse_ipv6(&c);
	struct icmp6hdr *icmp = parse_icmp6(&c);
	if (!eth || !ip || !icmp)
		return false;
	struct ethhdr *old_eth = frame_start(ctx) + room;
	struct ipv6hdr *quoted = (void *)(icmp + 1);
	if ((void *)quoted + QUOTE6 > c.end || (void *)(old_eth + 1) > c.end)
		return false;

	swap_macs(eth, old_eth);
	eth->h_proto = bpf_htons(ETH_P_IPV6);
	*ip = (struct ipv6hdr){
		.version = 6,
		.payload_len = bpf_htons(sizeof(*icmp) + QUOTE6),
		.nexthdr = IPPROTO_ICMPV6,
		.hop_limit = 64,
	};
	__builtin_memcpy(&ip->saddr, &quoted->daddr, sizeof(ip->saddr));
	__builtin_memcpy(&ip->daddr, &quoted->saddr, sizeof(ip->daddr));
	*icmp = (struct icmp6hdr){
		.icmp6_type = ICMPV6_PKT_TOOBIG,
		.icmp6_dataun.un_data32[0] = bpf_htonl(mtu), /* RFC 4443 §3.2 */
	};

	/* Pseudo header (RFC 8200 §8.1): addresses, upper-layer length, next header. */
	__s64 sum = csum_add(&ip->saddr, 2 * sizeof(ip->saddr), 0);
	sum = csum_add(icmp, sizeof(*icmp) + QUOTE6, sum);
	__be32 tail[2] = {bpf_htonl(sizeof(*icmp) + QUOTE6), bpf_htonl(IPPROTO_ICMPV6)};
	sum = bpf_csum_diff(NULL, 0, tail, sizeof(tail), sum);
	icmp->icmp6_cksum = ~csum_fold(sum & 0xffffffff);
	return true;
}

static __always_inline int answer_too_big(struct xdp_md *ctx, __u32 mtu, const bool v6)
{
	if (v6 ? too_big6(ctx, mtu) : too_big4(ctx, mtu)) {
		count(REASON_TOO_BIG);
		return XDP_TX;
	}
	count(REASON_TOO_BIG_UNANSWERED);
	return unchanged(REASON_NO_GROUP_VIP);
}

#endif /* MQTT_FWD_TOO_BIG_H */
