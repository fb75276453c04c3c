/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A connection whose group is decided: it gets a flow, and goes back to mqtt_fwd, which frames it like
 * any other segment.
 */
#ifndef MQTT_FWD_HANDSHAKE_BOUND_H
#define MQTT_FWD_HANDSHAKE_BOUND_H

#include "../emit.h"
#include "../event.h"
#include "../flow/bind.h"
#include "../learn/predict.h"
#include "handovers.h"
#include "untracked_place.h"

static __always_inline struct bind_decision *decision_begin(struct scratch *w, __u32 next,
							    __u32 flags)
{
	w->decision = (struct bind_decision){.next = next, .flags = flags};
	return &w->decision;
}

/* Adds the flow of a connection as scratch.decision has it; false: it is not stored. Global (see event.h). */
__noinline int flow_bound(const struct conn *c, const struct service_table *t)
{
	struct scratch *w = scratch();
	const struct bind_decision *v;
	struct flow *f;

	if (!c || !t || !w)
		return false;
	v = &w->decision;
	f = flow_new(c, t, RANK_STANDING, REASON_MAP_FULL);
	if (!f)
		return false;
	f->bound = tagged(c, v->binding);
	f->next = tagged(c, v->next);
	f->end = v->next;
	f->ack = c->ack;
	f->first_ack = v->first_ack;
	f->flags = v->flags | FLOW_UNCONFIRMED | (v->flags & FLOW_OPAQUE ? 0 : FLOW_TRUSTED);
	f->client_id = w->id;
	f->bound_by = v->bound_by;
	f->fallback_reason = v->fallback_reason;
	/* Else the framing of its CONNECT will tell; who was answered here has no credentials. */
	f->connect = v->flags & FLOW_CONNECTED ? FLOW_CONNECT_READ | FLOW_ANONYMOUS
		     : v->flags & FLOW_OPAQUE  ? FLOW_CONNECT_READ
					       : 0;
	flow_name(f, c, t);
	count(REASON_BOUND_MESSAGE + v->bound_by - BOUND_BY_MESSAGE);
	if (v->fallback_reason)
		count(REASON_FALLBACK_NOT_CONNECT + v->fallback_reason - FALLBACK_NOT_CONNECT);
	report_event(c, EVENT_BOUND, from_to(NO_GROUP, v->binding),
		     v->flags & FLOW_OPAQUE ? w->id : 0,
		     (v->flags & FLOW_PREDICTED ? REPORT_BY_PREDICTION : 0) |
			     v->bound_by << REPORT_BOUND_BY_SHIFT |
			     v->fallback_reason << REPORT_FALLBACK_SHIFT);
	return true;
}

_Static_assert(REASON_BOUND_UNANSWERED - REASON_BOUND_MESSAGE ==
		       BOUND_BY_UNANSWERED - BOUND_BY_MESSAGE,
	       "a counter for each way, in the same order");
_Static_assert(REASON_FALLBACK_HELLO_CUT - REASON_FALLBACK_NOT_CONNECT ==
		       FALLBACK_HELLO_CUT - FALLBACK_NOT_CONNECT,
	       "a counter for each reason, in the same order");

/* The place of the topic that chooses among a group's reals: the connection's own, or its client's last. */
static __always_inline __u64 place_of(const struct conn *c, struct scratch *w, __u8 bound_by)
{
	const struct client *client;

	if (bound_by == BOUND_BY_MESSAGE || bound_by == BOUND_BY_ANSWERED)
		return w->publish.place;
	client = client_find(c, true);
	return client ? topic_place(w, client->topic) : 0;
}

/* On by a binding that leaves no flow. */
static __always_inline int handshake_forward(struct xdp_md *ctx, const struct conn *c,
					     const struct service *svc, binding_t binding,
					     enum reason verdict)
{
	const struct group *g = group_of(binding);

	if (!g)
		return pass_on(ctx, REASON_NO_GROUP_VIP);
	return to_group(ctx, g, svc, c->v6, verdict);
}

/*
 * Bound: back to mqtt_fwd, with a flow. Without one, nothing would tell the broker host to take the
 * connection over: above the rate of new flows, the segment is dropped, and TCP repeats it.
 * `waiting`: the connection's place in `handovers`, if CONNECT is kept there.
 */
static __always_inline int bound(struct xdp_md *ctx, struct conn *c, struct scratch *w,
				 const struct service_table *t, const struct service *svc,
				 struct handover *waiting)
{
	struct bind_decision *v = &w->decision;
	const struct group *g;

	if (svc->has_members)
		v->binding = member_of(c, t, svc, v->binding, place_of(c, w, v->bound_by));
	g = group_of(v->binding);
	v->first_ack = waiting ? waiting->server : c->ack;

	/* What was on these addresses before is over: the cookie says so. */
	flow_remove(c, t);
	untracked_forget(c);
	if (!g)
		return pass_on(ctx, REASON_NO_GROUP_VIP);
	if (flow_bound(c, t)) {
		if (waiting) {
			waiting->state = HANDOVER_REPEAT;
			if (fleet == FLEET_WITH_STORE)
				report_waiting(c, REPORT_GIVEN);
		}
		bpf_tail_call(ctx, &stages, STAGE_FORWARD);
	}
	count(REASON_HANDOVER_FAILED);
	return XDP_DROP;
}

/* By what was learned of the client: the last resort, which never fails while there is a default group. */
static __always_inline void decide_by_prediction(const struct conn *c, struct scratch *w,
						 const struct service_table *t,
						 const struct service *svc, __u32 fallback)
{
	struct bind_decision *v = &w->decision;
	__u64 binding = predict(c, t, svc, w->id);

	v->binding = binding;
	v->flags |= binding & PREDICTED ? FLOW_PREDICTED : 0;
	v->bound_by = BOUND_BY_UNANSWERED;
	v->fallback_reason = fallback;
}

#endif /* MQTT_FWD_HANDSHAKE_BOUND_H */
