/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A segment that a balancer sent here and that is of no connection of this host's: it goes back to where it came from,
 * marked, and whatever balancer it comes to asks who has it (forward/fleet/miss.h). The kernel would answer RST,
 * and end a connection that another broker may have.
 *
 * Only while somebody asks this host: without a fleet, or once it is gone, RST is right.
 */
#ifndef MQTT_FWD_FLEET_RETURNED_H
#define MQTT_FWD_FLEET_RETURNED_H

#include "../../abi/handover.h"
#include "../../lib/csum.h"
#include "../../lib/tcp.h"
#include "answer.h"

#define ASKED_LATELY_NS 10000000000ULL

/* What a balancer that knows of no fleets makes of the mark (forward/emit.h): it would send it here again. */
#define RETURNED_CLEARED (MARK_RETURNED ^ 0x8000)

static __always_inline bool asked_lately(void)
{
	__u32 zero = 0;
	const __u64 *at = bpf_map_lookup_elem(&asked_at, &zero);
	__u64 last = at ? READ_ONCE(*at) : 0;

	return last && bpf_ktime_get_boot_ns() - last < ASKED_LATELY_NS;
}

/* Marks that a balancer put on it, or that came back, are the takeover's, or the kernel's, to see. */
static __always_inline bool is_marked(__be16 word)
{
	__u16 mark = bpf_ntohs(word);

	return (mark & MARK_MASK) == MARK || mark == RETURNED_CLEARED;
}

/* Under a flood of SYNs the listener remembers nothing, and the acknowledgement proves itself. */
static __always_inline bool is_syn_cookie(struct xdp_md *ctx, struct probe *p)
{
	struct bpf_sock *sk = socket_of(ctx, p);
	struct cursor c = cursor_of(ctx);
	struct tcphdr *tcp;
	bool valid = false;

	if (!sk)
		return false;
	if (sk->state == BPF_TCP_LISTEN && parse_eth(&c)) {
		if (p->v6) {
			struct ipv6hdr *ip = parse_ipv6(&c);
			tcp = ip ? parse_tcp(&c) : NULL;
			if (tcp)
				valid = !bpf_tcp_check_syncookie(sk, ip, sizeof(*ip), tcp,
								 sizeof(*tcp));
		} else {
			struct iphdr *ip = parse_ipv4(&c);
			tcp = ip ? parse_tcp(&c) : NULL;
			if (tcp)
				valid = !bpf_tcp_check_syncookie(sk, ip, sizeof(*ip), tcp,
								 sizeof(*tcp));
		}
	}
	bpf_sk_release(sk);
	return valid;
}

/* Whether the packet, without its outer headers now, is to go back; marked and turned round if so. */
static __always_inline bool return_to_balancer(struct xdp_md *ctx)
{
	struct cursor c = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&c);
	struct probe p = {};
	struct tcphdr *tcp;

	if (!eth || !asked_lately())
		return false;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = parse_ipv4(&c);
		if (!ip || ip->protocol != IPPROTO_TCP || ip->ihl != 5 ||
		    ip->frag_off & bpf_htons(IP_FRAGMENT_MASK) ||
		    (ip->frag_off & bpf_htons(IP_DF) && is_marked(ip->id)))
			return false;
		tcp = parse_tcp(&c);
		if (!tcp)
			return false;
		p.tuple.ipv4.saddr = ip->saddr;
		p.tuple.ipv4.daddr = ip->daddr;
		p.tuple.ipv4.sport = tcp->source;
		p.tuple.ipv4.dport = tcp->dest;
	} else {
		struct ipv6hdr *ip = parse_ipv6(&c);
		if (!ip || ip->nexthdr != IPPROTO_TCP || is_marked(((__be16 *)ip)[1]))
			return false;
		tcp = parse_tcp(&c);
		if (!tcp)
			return false;
		__builtin_memcpy(p.tuple.ipv6.saddr, &ip->saddr, 16);
		__builtin_memcpy(p.tuple.ipv6.daddr, &ip->daddr, 16);
		p.tuple.ipv6.sport = tcp->source;
		p.tuple.ipv6.dport = tcp->dest;
		p.v6 = true;
	}
	if (tcp->syn || tcp->rst)
		return false;
	p.seq = bpf_ntohl(tcp->seq);
	p.ack = bpf_ntohl(tcp->ack_seq);
	if (find_connection(ctx, &p) == ASKED_HAS || is_syn_cookie(ctx, &p))
		return false;

	c = cursor_of(ctx);
	eth = parse_eth(&c);
	if (!eth)
		return false;
	if (p.v6) {
		struct ipv6hdr *ip = parse_ipv6(&c);
		if (!ip)
			return false;
		((__be16 *)ip)[1] = bpf_htons(MARK_RETURNED);
	} else {
		struct iphdr *ip = parse_ipv4(&c);
		if (!ip)
			return false;
		ip->check = csum_replace2(ip->check, ip->id, bpf_htons(MARK_RETURNED));
		ip->id = bpf_htons(MARK_RETURNED);
		ip->check = csum_replace2(ip->check, ip->frag_off, bpf_htons(IP_DF));
		ip->frag_off = bpf_htons(IP_DF);
	}
	send_back(eth);
	return true;
}

#endif /* MQTT_FWD_FLEET_RETURNED_H */
