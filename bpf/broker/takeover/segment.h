/* SPDX-License-Identifier: GPL-2.0-only */
/* TCP segments in tc's skbs: what is read of them, and what is changed. */
#ifndef MQTT_FWD_TAKEOVER_SEGMENT_H
#define MQTT_FWD_TAKEOVER_SEGMENT_H

#include "../../lib/cookie.h"
#include "../../lib/csum.h"
#include "../../lib/parse.h"
#include "../../lib/tcp.h"
#include "state.h"

#include <linux/pkt_cls.h>

/* A TCP segment to or from a service of this host. */
struct segment {
	struct cookie_tuple tuple;
	__u32 v6;
	__u32 tcp; /* offset */
	__u32 header; /* length of the TCP header, options included */
	__u32 payload; /* length */
	__u32 seq;
	__u32 ack;
	__u32 mark; /* what the balancer says of it; ingress only */
	__be16 flags;
	__u16 pad;
};

static __always_inline void *skb_start(const struct __sk_buff *skb)
{
	return (void *)(long)skb->data;
}

static __always_inline void *skb_end(const struct __sk_buff *skb)
{
	return (void *)(long)skb->data_end;
}

static __always_inline __u32 mark_of(__u16 word)
{
	return (word & MARK_MASK) == MARK ? word : 0;
}

/* The balancer's mark in a packet's IP header; 0: not marked. */
static __always_inline __u32 read_mark(struct __sk_buff *skb)
{
	struct cursor cur = {.pos = skb_start(skb), .end = skb_end(skb)};
	const struct ethhdr *eth = parse_eth(&cur);

	if (!eth)
		return 0;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		const struct iphdr *ip = parse_ipv4(&cur);
		return ip && ip->frag_off & bpf_htons(IP_DF) ? mark_of(bpf_ntohs(ip->id)) : 0;
	}
	if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		const struct ipv6hdr *ip = parse_ipv6(&cur);
		return ip ? mark_of(bpf_ntohs(((__be16 *)ip)[1])) : 0;
	}
	return 0;
}

static __always_inline bool read_segment(struct __sk_buff *skb, struct segment *s)
{
	struct cursor cur = {.pos = skb_start(skb), .end = skb_end(skb)};
	struct ethhdr *eth = parse_eth(&cur);
	struct tcphdr *tcp;
	__u32 length;

	*s = (struct segment){};
	if (!eth)
		return false;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = parse_ipv4(&cur);
		if (!ip || ip->protocol != IPPROTO_TCP || ip->ihl != 5 ||
		    ip->frag_off & bpf_htons(IP_FRAGMENT_MASK))
			return false;
		s->tuple.src[0] = ip->saddr;
		s->tuple.dst[0] = ip->daddr;
		s->tcp = sizeof(*eth) + sizeof(*ip);
		length = bpf_ntohs(ip->tot_len) - sizeof(*ip);
	} else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = parse_ipv6(&cur);
		if (!ip || ip->nexthdr != IPPROTO_TCP)
			return false;
		copy_addr6(s->tuple.src, &ip->saddr);
		copy_addr6(s->tuple.dst, &ip->daddr);
		s->v6 = true;
		s->tcp = sizeof(*eth) + sizeof(*ip);
		length = bpf_ntohs(ip->payload_len);
	} else {
		return false;
	}
	tcp = parse_tcp(&cur);
	if (!tcp)
		return false;
	s->tuple.sport = tcp->source;
	s->tuple.dport = tcp->dest;
	s->seq = bpf_ntohl(tcp->seq);
	s->ack = bpf_ntohl(tcp->ack_seq);
	s->flags = ((__be16 *)tcp)[6];
	s->header = tcp->doff * 4;
	if (s->header < sizeof(*tcp) || s->header > length)
		return false;
	s->payload = length - s->header;
	return true;
}

#define TCP_FLAGS_ALL 0x3f

#define SEQ_OFFSET 4
#define ACK_OFFSET 8
#define FLAGS_OFFSET 12
#define CHECK_OFFSET 16

/* Works with checksums that a network card has yet to finish, too: those cover no field of the header. */
static __always_inline void set_word(struct __sk_buff *skb, const struct segment *s, __u32 offset,
				     __u32 from, __u32 to)
{
	__be32 was = bpf_htonl(from), is = bpf_htonl(to);

	bpf_l4_csum_replace(skb, s->tcp + CHECK_OFFSET, was, is, sizeof(is));
	bpf_skb_store_bytes(skb, s->tcp + offset, &is, sizeof(is), 0);
}

static __always_inline void set_flags(struct __sk_buff *skb, const struct segment *s, __be16 flags)
{
	bpf_l4_csum_replace(skb, s->tcp + CHECK_OFFSET, s->flags, flags, sizeof(flags));
	bpf_skb_store_bytes(skb, s->tcp + FLAGS_OFFSET, &flags, sizeof(flags), 0);
}

/* A segment's options on their way through the parser (lib/tcp.h). */
MAP(option_scan, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct tcp_option_scan, 1);

static __always_inline struct tcp_options *options_of(struct __sk_buff *skb,
						      const struct segment *s)
{
	__u32 zero = 0, length = s->header - sizeof(struct tcphdr);
	struct tcp_option_scan *scan = bpf_map_lookup_elem(&option_scan, &zero);

	if (!scan || length > TCP_OPTIONS_MAX)
		return NULL;
	scan->length = length;
	barrier_var(length);
	if (length &&
	    (length > TCP_OPTIONS_MAX ||
	     bpf_skb_load_bytes(skb, s->tcp + sizeof(struct tcphdr), scan->bytes, length)))
		return NULL;
	tcp_options_scan(scan);
	return &scan->o;
}

struct cookie_search {
	const struct handover_keys *keys;
	const struct cookie_tuple *tuple;
	struct cookie_proof proof;
	__u32 now;
	__u32 found;
};

/* The nearest period first: 0, -1, 1, -2, 2, … */
static long cookie_step(__u32 i, void *arg)
{
	struct cookie_search *s = arg;
	__u32 off = (i + 1) / 2, odd = i & 1;

	s->found = cookie_valid(s->keys, s->tuple, &s->proof, s->now + ((off ^ -odd) + odd));
	return s->found;
}

/* Global, so that the verifier looks at it once. */
__noinline int segment_has_cookie(const struct segment *s, const struct tcp_options *o)
{
	__u32 zero = 0;

	if (!s || !o)
		return false;
	struct cookie_search search = {
		.keys = bpf_map_lookup_elem(&handover_keys, &zero),
		.tuple = &s->tuple,
		.proof = {.client_isn = s->seq - 1,
			  .cookie = s->ack - 1,
			  .tsecr = o->tsecr,
			  .timestamps = o->has_timestamps,
			  .v6 = s->v6},
		.now = cookie_period(),
	};

	if (!search.keys || !cookie_has_key(search.keys, search.proof.cookie))
		return false;
	bpf_loop(2 * COOKIE_SKEW + 1, cookie_step, &search, 0);
	return search.found;
}

#endif /* MQTT_FWD_TAKEOVER_SEGMENT_H */
