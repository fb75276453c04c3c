/* SPDX-License-Identifier: GPL-2.0-only */
/* A SYN is answered, and nothing is kept. */
#ifndef MQTT_FWD_HANDSHAKE_SYN_H
#define MQTT_FWD_HANDSHAKE_SYN_H

#include "../flow/predicted.h"
#include "answer.h"
#include "bound.h"

/* There is no key yet: as with predicted binding. */
static __always_inline int handshake_without_key(struct xdp_md *ctx, struct conn *c,
						 struct scratch *w, const struct service_table *t,
						 const struct service *svc)
{
	struct bind_decision *b = decision_begin(w, 0, 0);

	bind_unknown(b, c, t, svc);
	return handshake_forward(ctx, c, svc, b->binding, b->verdict);
}

static __always_inline int handshake_syn(struct xdp_md *ctx, struct conn *c, struct scratch *w,
					 const struct service_table *t, const struct service *svc,
					 const struct tcphdr *tcp)
{
	struct flow *f;

	if (tcp->ack || tcp->fin || tcp->rst) {
		count(REASON_WAIT_DROPPED);
		return XDP_DROP;
	}
	/* No more than a hint: anybody can send one. */
	f = flow_find(c, t);
	if (f && !(f->flags & FLOW_REUSED_PORT))
		f->flags |= FLOW_REUSED_PORT;
	/*
	 * The cache may remember a flow that the table does not: it would send the acknowledgement of this SYN-ACK to that
	 * flow's broker, which answers RST, or asks a fleet who has it, and nobody has yet.
	 */
	cache_correct(c, t, 0);
	if (answer_syn(ctx, c, svc)) {
		count(REASON_SYN_ANSWERED);
		return XDP_TX;
	}
	return handshake_without_key(ctx, c, w, t, svc);
}

#endif /* MQTT_FWD_HANDSHAKE_SYN_H */
