/* SPDX-License-Identifier: GPL-2.0-only */
/* From the balancer: segments for a listener, for the connection itself, for an older one. */
#ifndef MQTT_FWD_TAKEOVER_INGRESS_H
#define MQTT_FWD_TAKEOVER_INGRESS_H

#include "../vips.h"
#include "kernel.h"
#include "segment.h"

/* How far a segment of the same connection may lie from what its socket expects. */
#define SAME_CONNECTION (1 << 24)

/* How long a segment may wander through the network: TIME_WAIT, as the kernel has it. */
#define REPLAY_S 60

/* The balancer marks less than this. */
#define ACK_AHEAD_MAX 16

/* A marked segment for which there is only a listener. */
static __always_inline int for_listener(struct __sk_buff *skb, const struct segment *s,
					struct bpf_sock *listener)
{
	const struct tcp_options *o = options_of(skb, s);
	struct bpf_tcp_req_attrs attrs = {};
	__u32 cookie = s->ack - 1;
	struct tcp_sock *sk;

	if (!o)
		return TC_ACT_UNSPEC;
	if (!s->payload || !segment_has_cookie(s, o)) {
		__u32 held = s->mark & MARK_HANDOVER ? 0 : s->mark & MARK_ACK_MASK;

		/*
		 * What makes the connection may be right before it, in this very batch: so TCP gets it,
		 * as if it acknowledged the SYN-ACK, and if it is lost, answers no RST.
		 */
		count(s->payload && !held ? TAKEOVER_NO_COOKIE : TAKEOVER_EARLY);
		skb->mark = SKB_MARK_SUPPRESS_RST;
		if (held)
			set_word(skb, s, ACK_OFFSET, s->ack, s->ack - held);
		return TC_ACT_UNSPEC;
	}
	/*
	 * TCP remembers connections that ended, but only one of both ends does (TIME_WAIT, RFC 9293
	 * §3.6.1). A first segment that the network doubled must not become another connection, and
	 * its messages not come twice.
	 */
	struct taken_over_key key = taken_over_key_of(s->tuple.src, s->tuple.sport, s->tuple.dport);
	const struct taken_over_conn *before = bpf_map_lookup_elem(&taken_over, &key);
	if (before && before->seq == s->ack && before->state == TAKEN_OVER_DONE &&
	    (__u16)(now_s16() - before->done_s) < REPLAY_S) {
		count(TAKEOVER_REPLAYED);
		return TC_ACT_SHOT;
	}
	attrs.mss = cookie_mss(cookie, s->v6);
	if ((cookie & COOKIE_WSCALE_MASK) != COOKIE_NO_WSCALE) {
		attrs.wscale_ok = 1;
		attrs.snd_wscale = cookie & COOKIE_WSCALE_MASK;
		attrs.rcv_wscale = HANDOVER_WSCALE;
	}
	attrs.sack_ok = !!(cookie & COOKIE_SACK);
	if (o->has_timestamps) {
		attrs.tstamp_ok = 1;
		attrs.rcv_tsval = o->tsval;
		attrs.rcv_tsecr = o->tsecr;
	}
	sk = bpf_skc_to_tcp_sock(listener);
	if (!sk)
		return TC_ACT_UNSPEC;
	int error = bpf_sk_assign_tcp_reqsk(skb, (struct sock *)sk, &attrs, sizeof(attrs));
	if (error) {
		__u32 last_error = TAKEOVER_ERROR;
		__u64 *last = bpf_map_lookup_elem(&takeover_counters, &last_error);
		if (last)
			*last = -error;
		count(TAKEOVER_REFUSED);
		return TC_ACT_SHOT;
	}
	count(TAKEOVER_DONE);
	struct taken_over_conn conn = {
		.seq = s->ack,
		.state = s->mark & MARK_HANDOVER ? TAKEN_OVER_ANSWERED : TAKEN_OVER_OPEN,
	};
	bpf_map_update_elem(&taken_over, &key, &conn, BPF_ANY);
	return TC_ACT_UNSPEC;
}

/* The segment goes round once more; this copy ends the older socket that would have taken it. */
static __always_inline int end_older(struct __sk_buff *skb, const struct segment *s, __u32 rcv_nxt)
{
	count(TAKEOVER_OLD_SOCKET);
	skb->mark = SKB_MARK_REINJECTED;
	bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
	set_word(skb, s, SEQ_OFFSET, s->seq, rcv_nxt);
	set_flags(skb, s, s->flags | bpf_htons(TCP_RST));
	return TC_ACT_UNSPEC;
}

static __always_inline int from_balancer(struct __sk_buff *skb)
{
	struct bpf_sock_tuple tuple = {};
	struct segment s;
	struct bpf_sock *sk;
	struct address vip = {};
	int verdict = TC_ACT_UNSPEC;
	__u32 mark = read_mark(skb);

	if (!mark || !read_segment(skb, &s) || s.flags & bpf_htons(TCP_SYN | TCP_RST) ||
	    !(s.flags & bpf_htons(TCP_ACK)))
		return TC_ACT_UNSPEC;
	s.mark = mark;
	__builtin_memcpy(vip.addr, s.tuple.dst, sizeof(vip.addr));
	if (!bpf_map_lookup_elem(&decap_vips, &vip))
		return TC_ACT_UNSPEC;
	if (s.v6) {
		__builtin_memcpy(tuple.ipv6.saddr, s.tuple.src, 16);
		__builtin_memcpy(tuple.ipv6.daddr, s.tuple.dst, 16);
		tuple.ipv6.sport = s.tuple.sport;
		tuple.ipv6.dport = s.tuple.dport;
		sk = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	} else {
		tuple.ipv4.saddr = s.tuple.src[0];
		tuple.ipv4.daddr = s.tuple.dst[0];
		tuple.ipv4.sport = s.tuple.sport;
		tuple.ipv4.dport = s.tuple.dport;
		sk = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk) {
		/* Nobody listens: the client is told so, though it has an answer to its CONNECT. */
		if (s.mark & MARK_HANDOVER)
			skb->mark = SKB_MARK_RST_PAST_CONNACK;
		return TC_ACT_UNSPEC;
	}

	if (sk->state == BPF_TCP_LISTEN) {
		verdict = for_listener(skb, &s, sk);
		bpf_sk_release(sk);
		return verdict;
	}

	__u32 rcv_nxt = 0, write_seq = 0;
	bool older = false, ours = false;
	if (sk->state == BPF_TCP_TIME_WAIT) {
		struct tcp_timewait_sock *tw = bpf_skc_to_tcp_timewait_sock(sk);
		if (tw) {
			rcv_nxt = time_wait_rcv_nxt(tw);
			older = true;
		}
	} else if (sk->state != BPF_TCP_NEW_SYN_RECV) {
		struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
		if (tp) {
			rcv_nxt = tp->rcv_nxt;
			write_seq = tp->write_seq;
			__s32 ahead = s.seq - rcv_nxt, acked = s.ack - tp->snd_una;
			older = ahead > 0 || ahead < -SAME_CONNECTION || acked > SAME_CONNECTION ||
				acked < -SAME_CONNECTION;
			ours = true;
		}
	}
	bpf_sk_release(sk);

	if (older && s.payload && skb->mark != SKB_MARK_REINJECTED) {
		const struct tcp_options *o = options_of(skb, &s);
		if (o && segment_has_cookie(&s, o))
			return end_older(skb, &s, rcv_nxt);
	}
	if (ours && seq_before(write_seq, s.ack) && s.ack - write_seq <= ACK_AHEAD_MAX) {
		set_word(skb, &s, ACK_OFFSET, s.ack, write_seq);
		count(TAKEOVER_ACK_HELD);
	}
	return TC_ACT_UNSPEC;
}

#endif /* MQTT_FWD_TAKEOVER_INGRESS_H */
