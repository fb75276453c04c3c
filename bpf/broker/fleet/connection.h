/* SPDX-License-Identifier: GPL-2.0-only */
/* Which connection this host has on a pair of addresses, and whether a segment is of that. */
#ifndef MQTT_FWD_FLEET_CONNECTION_H
#define MQTT_FWD_FLEET_CONNECTION_H

#include "../../abi/ask.h"
#include "../../lib/parse.h"
#include "../kernel.h"

/* A segment, by what matters of it. */
struct probe {
	struct bpf_sock_tuple tuple;
	__u32 v6;
	__u32 seq;
	__u32 ack;
	__u32 expected; /* what the socket expects next, if there is one */
};

static __always_inline bool is_near(__u32 a, __u32 b)
{
	return a - b + ASK_NEAR < 2 * ASK_NEAR;
}

static __always_inline struct bpf_sock *socket_of(struct xdp_md *ctx, struct probe *p)
{
	return bpf_skc_lookup_tcp(ctx, &p->tuple,
				  p->v6 ? sizeof(p->tuple.ipv6) : sizeof(p->tuple.ipv4),
				  BPF_F_CURRENT_NETNS, 0);
}

/*
 * One that has ended and is remembered (TIME_WAIT) is had, and so is one whose SYN was answered. Of a connection that
 * is being handed over, the client may acknowledge what its broker has not sent yet: that is near.
 */
static __always_inline enum asked_state find_connection(struct xdp_md *ctx, struct probe *p)
{
	struct bpf_sock *sk = socket_of(ctx, p);
	enum asked_state state = ASKED_NONE;
	bool near = false;

	if (!sk)
		return ASKED_NONE;
	if (sk->state == BPF_TCP_TIME_WAIT) {
		struct tcp_timewait_sock *tw = bpf_skc_to_tcp_timewait_sock(sk);
		if (tw) {
			p->expected = time_wait_rcv_nxt(tw);
			near = is_near(p->seq, p->expected);
			state = ASKED_OTHER;
		}
	} else if (sk->state == BPF_TCP_NEW_SYN_RECV) {
		struct tcp_request_sock *request = bpf_skc_to_tcp_request_sock(sk);
		if (request) {
			p->expected = request->rcv_isn + 1;
			near = is_near(p->seq, p->expected) && is_near(p->ack, request->snt_isn);
			state = ASKED_OTHER;
		}
	} else if (sk->state != BPF_TCP_LISTEN) {
		struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
		if (tp) {
			p->expected = tp->rcv_nxt;
			near = is_near(p->seq, p->expected) && is_near(p->ack, tp->snd_una);
			state = ASKED_OTHER;
		}
	}
	bpf_sk_release(sk);
	return near ? ASKED_HAS : state;
}

#endif /* MQTT_FWD_FLEET_CONNECTION_H */
