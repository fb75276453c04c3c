/* SPDX-License-Identifier: GPL-2.0-only */
/* The segments of a flow that is being rescued, after the one that ended it. */
#ifndef MQTT_FWD_RESCUED_H
#define MQTT_FWD_RESCUED_H

#include "truncate.h"
#include "../handshake/answer.h"
#include "../emit.h"
#include "begin_rescue.h"
#include "../services.h"

/* Offered to the client, which may scale it: Linux's brokers by 2^7 and more. */
#define RESCUE_WINDOW 1024

/* Acknowledges the client's stream up to `next`, in its broker's name. Global (see event.h). */
__noinline int answer_ack(struct xdp_md *ctx, const struct conn *c, __u32 next)
{
	struct scratch *w = scratch();
	struct answer *a;

	if (!c || !w)
		return false;
	read_options(ctx, c);
	a = answer_begin(w, TCP_ACK);
	a->seq = c->ack;
	a->ack = next;
	a->window = RESCUE_WINDOW;
	if (w->options.o.has_timestamps) {
		/* The broker's clock is not known here; its last value is never too old. */
		answer_word(a, option(TCP_OPTION_NOP, TCP_OPTION_NOP, TCP_OPTION_TIMESTAMPS, 10));
		answer_word(a, bpf_htonl(w->options.o.tsecr));
		answer_word(a, bpf_htonl(w->options.o.tsval));
	}
	a->options = a->words;
	return answer(ctx, c);
}

/* So long the client is answered in its broker's name; then it gets RST, if it has noticed nothing else. */
#define RESCUE_MS 15000
/* So long its segments without data go on to its broker, which waits for the acknowledgement of its FIN; then that
 * broker would answer them with RST. */
#define RESCUE_BARE_MS 1000

/* A rescue that is over, or another sidecar's: the client gets RST for whatever asks for an answer. */
static __always_inline int rescue_over(struct xdp_md *ctx, const struct conn *c, bool fin)
{
	if ((c->payload_length || fin) && answer_reset(ctx, c, fin)) {
		count(REASON_REFUSED);
		return XDP_TX;
	}
	count(REASON_RESCUED);
	return XDP_DROP;
}

static __always_inline int rescued(struct xdp_md *ctx, struct scratch *w)
{
	const struct service_table *t = current_table();
	const struct service *svc = t ? service_at(t, w->tail_args.slot) : NULL;
	const struct group *g = group_of(w->tail_args.binding);
	struct conn c = w->tail_args.conn;
	const struct tcphdr *tcp = tcp_of(ctx, c.v6);
	struct flow *f;
	__u32 end = c.seq + c.payload_length, next, age;
	__u64 wanted;
	bool fin, all;

	if (!svc || !g || !tcp)
		return pass_on(ctx, REASON_NO_GROUP_VIP);
	fin = tcp->fin;
	f = flow_find(&c, t);
	if (!f)
		return pass_on(ctx, REASON_NO_GROUP_VIP);
	age = rescue_age(f);
	wanted = READ_ONCE(f->rescue_next);
	if (!c.payload_length && !fin && age < RESCUE_BARE_MS)
		return to_group(ctx, g, svc, c.v6, REASON_NO_DATA);
	if (!rescue_known(f, rescuer_alive()) || age > RESCUE_MS || wanted >> 32 != c.tag)
		return rescue_over(ctx, &c, fin);
	if (!segment_right(ctx, &c)) {
		count(REASON_RESCUE_DAMAGED);
		count(REASON_RESCUED);
		return XDP_DROP;
	}
	flow_seen(f, &c, c.payload_length);
	next = wanted;
	/* In order, and with something new. */
	if (!seq_before(next, c.seq) &&
	    (seq_before(next, end) || (next == end && fin && !(f->flags & FLOW_CLOSING))))
		rescue_copy(ctx, &c, f, next, fin);
	next = f->rescue_next;

	if (c.payload_length && !seq_before(f->end_seq + goodbye_length(f), c.seq)) {
		/* Repeated, or a piece of it: its broker may not know yet that the connection has ended. */
		truncate_segment(ctx, &c, f);
		if (f->flags & FLOW_UNCONFIRMED)
			tail_call_stage(ctx, &c, svc, w->tail_args.binding, STAGE_HANDOVER);
		return to_group(ctx, g, svc, c.v6, REASON_DATA);
	}
	/*
	 * Nothing is acknowledged before the client has something new from its broker, which is FIN most
	 * likely: until then it must go on repeating the segment that tells that broker to end.
	 */
	bool told = seq_before(f->ack, c.ack);

	all = fin && end == next;
	if (all && told && !(f->flags & FLOW_CLOSING)) {
		count(REASON_FLOW_CLOSED);
		flow_close(f);
	}
	count(REASON_RESCUED);
	return told && (c.payload_length || fin) && answer_ack(ctx, &c, next + all) ? XDP_TX
										    : XDP_DROP;
}

SEC("xdp")
int mqtt_rescue(struct xdp_md *ctx)
{
	struct scratch *w = scratch();

	return w ? rescued(ctx, w) : XDP_DROP;
}

#endif /* MQTT_FWD_RESCUED_H */
