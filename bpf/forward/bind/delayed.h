/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Delayed binding: SYNs are answered here, and a connection gets its group, and a flow, when CONNECT and
 * what follows it have been read. Everything up to there is another program's (delayed/greet.h).
 * From there on a flow is a flow; until its broker has answered, a third program says how its
 * segments leave (delayed/handover.h).
 *
 *            SYN ─► SYN-ACK from here, nothing kept
 *        CONNECT ─► bound at once (WAY_MESSAGE, _CLIENT_ID, _ROUTE, _UNANSWERED),
 *                   or CONNACK from here, `handovers` keeps CONNECT: WAIT
 *   next message ─► bound (WAY_ANSWERED); goes to the broker with CONNECT in front
 *           then ─► FLOW_UNCONFIRMED, until the client acknowledges what only the broker can have sent
 */
#ifndef MQTT_FWD_BIND_DELAYED_H
#define MQTT_FWD_BIND_DELAYED_H

#include "../delayed/proof.h"
#include "bind.h"

/* What the next program needs to know. Global (see event.h): the caller has no stack to spare. */
__noinline int hand_over(const struct conn *c, const struct service *svc, __u32 binding)
{
	struct work *w = work_of_cpu();

	if (!w || !c || !svc)
		return 0;
	w->handed.conn = *c;
	w->handed.slot = svc->slot;
	w->handed.binding = binding;
	return 0;
}

static __always_inline void hand_to(struct xdp_md *ctx, const struct conn *c,
				    const struct service *svc, binding_t binding, enum step step)
{
	hand_over(c, svc, binding);
	bpf_tail_call(ctx, &steps, step);
}

/* Whether a segment is too far from where the flow is, or behind its end, to be the flow's own. */
static __always_inline bool is_far(const struct flow *f, const struct conn *c)
{
	__u32 ahead = c->seq - f->end;

	if (f->flags & FLOW_CLOSING && ahead < 1U << 31)
		return true;
	return ahead + FLOW_WINDOW > 2 * FLOW_WINDOW;
}

static __always_inline void bind_delayed(struct xdp_md *ctx, struct bound *b, struct conn *c,
					 const struct service_table *t, const struct service *svc,
					 struct flow *f, bool syn)
{
	b->flow = NULL;
	if (!f && !syn && has_predecessor)
		bpf_tail_call(ctx, &predecessor, 0);
	/*
	 * After a SYN on a flow's addresses, a segment may be of another connection. The flow itself
	 * shows by its next byte that it goes on; and what lies a little before that may well be
	 * its own CONNECT, doubled by the network, cookie and all.
	 */
	if (f && !syn && f->flags & FLOW_RIVAL_SYN && c->seq == f->end && c->payload_length)
		f->flags &= ~FLOW_RIVAL_SYN;
	if (!f || syn ||
	    (f->flags & FLOW_RIVAL_SYN && c->seq != f->end &&
	     (is_far(f, c) || (seq_before(f->end, c->seq) && has_cookie(ctx, c, false))))) {
		hand_to(ctx, c, svc, 0, STEP_GREET);
		b->binding = 0;
		return;
	}
	b->flow = f;
	b->binding = flow_binding(f, c);
	if (!group_of(b->binding))
		b->binding = flow_rebind(c, t, svc, f);
}

#endif /* MQTT_FWD_BIND_DELAYED_H */
