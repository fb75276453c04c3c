/* SPDX-License-Identifier: GPL-2.0-only */
/* The segments with data or FIN of a flow that is being rescued, after the one that ended it. */
#ifndef MQTT_FWD_RESCUED_H
#define MQTT_FWD_RESCUED_H

#include "cut.h"
#include "delayed/answer.h"
#include "emit.h"
#include "rescue.h"
#include "services.h"

/* Offered to the client, which may scale it: Linux's brokers by 2^7 and more. */
#define RESCUE_WINDOW 1024

/* Acknowledges the client's stream up to `next`, in its broker's name. Global (see event.h). */
__noinline int answer_ack(struct xdp_md *ctx, const struct conn *c, __u32 next)
{
	struct work *w = work_of_cpu();
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

static __always_inline int rescued(struct xdp_md *ctx, struct work *w)
{
	const struct service_table *t = table_in_force();
	const struct service *svc = t ? service_at(t, w->handed.slot) : NULL;
	const struct group *g = group_of(w->handed.binding);
	struct conn c = w->handed.conn;
	const struct tcphdr *tcp = tcp_of(ctx, c.v6);
	struct flow *f = flow_find(&c);
	__u32 end = c.seq + c.payload_length, next;
	bool fin, all;

	if (!svc || !g || !tcp || !f)
		return pass_on(ctx, REASON_NO_GROUP_VIP);
	fin = tcp->fin;
	flow_seen(f, &c, c.payload_length);
	next = f->next;
	/* In order, and with something new. */
	if (!seq_before(next, c.seq) && (seq_before(next, end) ||
					 (next == end && fin && !(f->flags & FLOW_CLOSING))))
		rescue_copy(ctx, &c, f, next, fin);
	next = f->next;

	if (!seq_before(f->cut_seq, c.seq)) {
		/* Repeated: its broker may not know yet that the connection has ended. */
		cut_segment(ctx, &c, f);
		if (f->flags & FLOW_UNCONFIRMED)
			hand_to(ctx, &c, svc, w->handed.binding, STEP_HANDOVER);
		return to_group(ctx, g, svc, c.v6, REASON_DATA);
	}
	/*
	 * Nothing is acknowledged before the client has something new from its broker, which is FIN most
	 * likely: until then it must go on repeating the segment that tells that broker to end.
	 */
	bool told = c.ack != f->ack;

	all = fin && end == next;
	if (all && told && !(f->flags & FLOW_CLOSING)) {
		count(REASON_FLOW_CLOSED);
		if (f->flags & FLOW_WEAK)
			f->flags |= FLOW_CLOSING;
		else
			flow_move(&c, f, true);
	}
	count(REASON_RESCUED);
	return told && answer_ack(ctx, &c, next + all) ? XDP_TX : XDP_DROP;
}

SEC("xdp")
int mqtt_rescue(struct xdp_md *ctx)
{
	struct work *w = work_of_cpu();

	return w ? rescued(ctx, w) : XDP_DROP;
}

#endif /* MQTT_FWD_RESCUED_H */
