/* SPDX-License-Identifier: GPL-2.0-only */
/* From the broker: its first CONNACK, its end, and the RSTs that were not to be sent. */
#ifndef MQTT_FWD_TAKEOVER_EGRESS_H
#define MQTT_FWD_TAKEOVER_EGRESS_H

#include "segment.h"

enum reply {
	REPLY_OTHER,
	REPLY_CONNACK, /* its payload begins as one */
	REPLY_END, /* FIN or RST, without payload */
};

#define MQTT_CONNACK_TYPE 0x20

/*
 * Whether a packet is one to look at more closely. As little as says so: every packet of the
 * broker's is asked, and its payload need not be where its headers are.
 */
static __always_inline enum reply classify_reply(struct __sk_buff *skb)
{
	struct cursor cur = {.pos = skb_start(skb), .end = skb_end(skb)};
	const struct ethhdr *eth = parse_eth(&cur);
	const struct tcphdr *tcp;
	__u32 offset;
	__u8 first;

	if (!eth)
		return REPLY_OTHER;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		const struct iphdr *ip = parse_ipv4(&cur);
		if (!ip || ip->protocol != IPPROTO_TCP)
			return REPLY_OTHER;
		offset = sizeof(*eth) + sizeof(*ip);
	} else {
		const struct ipv6hdr *ip = parse_ipv6(&cur);
		if (eth->h_proto != bpf_htons(ETH_P_IPV6) || !ip || ip->nexthdr != IPPROTO_TCP)
			return REPLY_OTHER;
		offset = sizeof(*eth) + sizeof(*ip);
	}
	tcp = parse_tcp(&cur);
	if (!tcp)
		return REPLY_OTHER;
	bool ends = tcp->fin || tcp->rst;
	offset += tcp->doff * 4;
	if (skb->len <= offset)
		return ends ? REPLY_END : REPLY_OTHER;
	if (bpf_skb_load_bytes(skb, offset, &first, 1) || first != MQTT_CONNACK_TYPE)
		return REPLY_OTHER;
	return REPLY_CONNACK;
}

#define PAYLOAD_MAX 2048 /* of a segment that is turned into RST */

struct payload_sum {
	struct __sk_buff *skb;
	__u32 offset;
	__u32 sum;
};

static long payload_step(__u32 i, void *arg)
{
	struct payload_sum *p = arg;
	__be32 word;

	if (bpf_skb_load_bytes(p->skb, p->offset + 4 * i, &word, 4))
		return 1;
	p->sum = csum_fold((__u64)p->sum + word);
	return 0;
}

/* Turns the segment into RST, where the client takes the connection to be. Global, so that the verifier looks at it once. */
__noinline int reset(struct __sk_buff *skb, const struct segment *s, __u32 seq)
{
	struct payload_sum p = {.skb = skb};
	__u32 left, sum;
	__be32 word = 0;

	if (!s || s->payload > PAYLOAD_MAX)
		return TC_ACT_SHOT;
	p.offset = s->tcp + s->header;
	if (p.offset + s->payload > skb->len)
		return TC_ACT_SHOT;
	left = s->payload & 3;
	bpf_loop(s->payload / 4, payload_step, &p, 0);
	if (left && bpf_skb_load_bytes(skb, p.offset + s->payload - left, &word, left))
		return TC_ACT_SHOT;
	sum = csum_fold((__u64)p.sum + word);

	/* The payload goes out of the sum, and its length out of the pseudo header's. */
	bpf_l4_csum_replace(skb, s->tcp + CHECK_OFFSET, 0, (__u16)~sum, 0);
	bpf_l4_csum_replace(skb, s->tcp + CHECK_OFFSET, bpf_htons(s->header + s->payload),
			    bpf_htons(s->header), BPF_F_PSEUDO_HDR | 2);
	set_word(skb, s, SEQ_OFFSET, s->seq, seq);
	/* TCP's answer to a segment of no connection acknowledges nothing. */
	__be16 ack = s->flags & bpf_htons(TCP_RST) ? s->flags & bpf_htons(TCP_ACK)
						   : bpf_htons(TCP_ACK);
	set_flags(skb, s, (s->flags & ~bpf_htons(TCP_FLAGS_ALL)) | bpf_htons(TCP_RST) | ack);

	__be16 length;
	if (s->v6) {
		length = bpf_htons(s->header);
		bpf_skb_store_bytes(skb, sizeof(struct ethhdr) + 4, &length, 2, 0);
	} else {
		__be16 was = bpf_htons(sizeof(struct iphdr) + s->header + s->payload);

		length = bpf_htons(sizeof(struct iphdr) + s->header);
		bpf_l3_csum_replace(skb, sizeof(struct ethhdr) + 10, was, length, 2);
		bpf_skb_store_bytes(skb, sizeof(struct ethhdr) + 2, &length, 2, 0);
	}
	return bpf_skb_change_tail(skb, s->tcp + s->header, 0) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

static __always_inline int from_broker(struct __sk_buff *skb)
{
	struct segment s;
	__u8 connack[HANDOVER_CONNACK] = {};

	if (skb->mark == SKB_MARK_RST_PAST_CONNACK) {
		if (read_segment(skb, &s) && s.flags & bpf_htons(TCP_RST))
			set_word(skb, &s, SEQ_OFFSET, s.seq, s.seq + HANDOVER_CONNACK);
		return TC_ACT_UNSPEC;
	}
	if (skb->mark == SKB_MARK_SUPPRESS_RST) {
		if (!read_segment(skb, &s) || !(s.flags & bpf_htons(TCP_RST)))
			return TC_ACT_UNSPEC;
		count(TAKEOVER_RESET_HELD);
		return TC_ACT_SHOT;
	}
	enum reply reply = classify_reply(skb);

	if (reply == REPLY_OTHER || !read_segment(skb, &s) || !s.payload != (reply == REPLY_END))
		return TC_ACT_UNSPEC;
	struct taken_over_key key = taken_over_key_of(s.tuple.dst, s.tuple.dport, s.tuple.sport);
	struct taken_over_conn *conn = bpf_map_lookup_elem(&taken_over, &key);
	if (!conn || conn->seq != s.seq || conn->state == TAKEN_OVER_DONE)
		return TC_ACT_UNSPEC;
	__u32 at = conn->seq, state = conn->state;
	conn->done_s = now_s16();
	conn->state = TAKEN_OVER_DONE;
	/*
	 * RST without ACK is TCP's answer to a segment of no connection: where addresses are translated, the
	 * kernel takes the socket from the segment again (nf_nat_ipv4_local_in(), which finds no port in it).
	 */
	bool forgotten = s.flags & bpf_htons(TCP_RST) && !(s.flags & bpf_htons(TCP_ACK));
	if (forgotten)
		count(TAKEOVER_FORGOTTEN);
	if (state == TAKEN_OVER_OPEN)
		return TC_ACT_UNSPEC;
	if (!s.payload) {
		if (!forgotten)
			count(TAKEOVER_CONNACK_NONE);
		return reset(skb, &s, at + HANDOVER_CONNACK);
	}
	if (s.payload >= HANDOVER_CONNACK &&
	    !bpf_skb_load_bytes(skb, s.tcp + s.header, connack, sizeof(connack)) &&
	    connack[1] == 2 && !connack[2] && !connack[3]) {
		count(TAKEOVER_CONNACK_SAME);
		return TC_ACT_UNSPEC;
	}
	count(TAKEOVER_CONNACK_DIFFERENT);
	return reset(skb, &s, at + HANDOVER_CONNACK);
}

#endif /* MQTT_FWD_TAKEOVER_EGRESS_H */
