// SPDX-License-Identifier: GPL-2.0-only
/*
 * On the balancer: wraps what the sidecar's health checks send to a service, as the balancer wraps
 * clients' packets, towards the one real that a check is of, and sends it to the balancer's own
 * gateway. Decapsulation, the service's address on that host and the way there are checked with it,
 * which a connection to the host's own address cannot. The answer comes straight from the real, as
 * clients' answers do.
 *
 * A check's socket is known by its cookie, so that no packet mark is taken from the host's own rules.
 * tcx: Linux 6.6.
 */
#include "../abi/check.h"
#include "../abi/handover.h"

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "../lib/csum.h"

#define TTL 64
#define IP_DF 0x4000

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u64);
	__type(value, struct check_path);
	__uint(max_entries, CHECK_SOCKETS);
} check_paths SEC(".maps");

const volatile __u16 gue_port = 6080; /* host order; Katran's GUE_DPORT */

static __always_inline struct udphdr udp_of(__u32 length)
{
	return (struct udphdr){
		.source = bpf_htons(gue_port),
		.dest = bpf_htons(gue_port),
		.len = bpf_htons(sizeof(struct udphdr) + length),
		/* No checksum: of IPv4 as it may be, of IPv6 as tunnels may do (RFC 6935). */
	};
}

/* Returns what is to become of the packet. */
static __always_inline int wrap4(struct __sk_buff *skb, const struct check_path *path, __u32 inner,
				 __u8 protocol)
{
	struct {
		struct iphdr ip;
		struct udphdr udp;
	} outer = {};
	__u32 size = sizeof(outer.ip) + (path->gue ? sizeof(outer.udp) : 0);
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 |
		      (path->gue ? BPF_F_ADJ_ROOM_ENCAP_L4_UDP : 0);

	outer.ip.version = 4;
	outer.ip.ihl = sizeof(outer.ip) / 4;
	outer.ip.tot_len = bpf_htons(size + inner);
	outer.ip.frag_off = bpf_htons(IP_DF);
	outer.ip.ttl = TTL;
	outer.ip.protocol = path->gue ? IPPROTO_UDP : protocol;
	outer.ip.saddr = path->src[0];
	outer.ip.daddr = path->dst[0];
	outer.ip.check = ~csum_fold(sum_words((__be32 *)&outer.ip, sizeof(outer.ip) / 4, 0));
	outer.udp = udp_of(inner);
	if (bpf_skb_adjust_room(skb, size, BPF_ADJ_ROOM_MAC, flags) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN, &outer, path->gue ? sizeof(outer) : sizeof(outer.ip),
				0))
		return TC_ACT_SHOT;
	return TC_ACT_UNSPEC;
}

static __always_inline int wrap6(struct __sk_buff *skb, const struct check_path *path, __u32 inner,
				 __u8 protocol)
{
	struct {
		struct ipv6hdr ip;
		struct udphdr udp;
	} outer = {};
	__u32 size = sizeof(outer.ip) + (path->gue ? sizeof(outer.udp) : 0);
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 |
		      (path->gue ? BPF_F_ADJ_ROOM_ENCAP_L4_UDP : 0);
	__be16 ethertype = bpf_htons(ETH_P_IPV6);

	outer.ip.version = 6;
	outer.ip.payload_len = bpf_htons(size - sizeof(outer.ip) + inner);
	outer.ip.nexthdr = path->gue ? IPPROTO_UDP : protocol;
	outer.ip.hop_limit = TTL;
	__builtin_memcpy(&outer.ip.saddr, path->src, sizeof(outer.ip.saddr));
	__builtin_memcpy(&outer.ip.daddr, path->dst, sizeof(outer.ip.daddr));
	outer.udp = udp_of(inner);
	if (bpf_skb_adjust_room(skb, size, BPF_ADJ_ROOM_MAC, flags) ||
	    bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &ethertype,
				sizeof(ethertype), 0) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN, &outer, path->gue ? sizeof(outer) : sizeof(outer.ip),
				0))
		return TC_ACT_SHOT;
	return TC_ACT_UNSPEC;
}

/* Where the balancer puts it: see abi/handover.h. */
static __always_inline void put_mark(struct __sk_buff *skb, bool v6)
{
	__u32 offset = ETH_HLEN + (v6 ? 2 : offsetof(struct iphdr, id));
	__be16 was, is = bpf_htons(MARK);

	if (bpf_skb_load_bytes(skb, offset, &was, sizeof(was)))
		return;
	if (!v6)
		bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check), was, is,
				    sizeof(is));
	bpf_skb_store_bytes(skb, offset, &is, sizeof(is), 0);
}

SEC("tcx/egress")
int wrap_check(struct __sk_buff *skb)
{
	__u64 cookie = bpf_get_socket_cookie(skb);
	const struct check_path *path = bpf_map_lookup_elem(&check_paths, &cookie);
	__u8 protocol;

	if (!path)
		return TC_ACT_UNSPEC;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		protocol = IPPROTO_IPIP;
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		protocol = IPPROTO_IPV6;
	else
		return TC_ACT_UNSPEC;
	if (path->answered)
		put_mark(skb, protocol == IPPROTO_IPV6);
	if (path->has_mac)
		bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_dest), path->mac,
				    sizeof(path->mac), 0);
	if (path->v6)
		return wrap6(skb, path, skb->len - ETH_HLEN, protocol);
	return wrap4(skb, path, skb->len - ETH_HLEN, protocol);
}

char _license[] SEC("license") = "GPL";
