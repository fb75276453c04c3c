/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Binding at the SYN, which tells nothing but the client's address: by what that address
 * published before. For broker hosts whose kernels cannot take over a connection.
 */
#ifndef MQTT_FWD_BIND_PREDICTED_H
#define MQTT_FWD_BIND_PREDICTED_H

#include "bind.h"

/* A new flow; `probation`: it is first seen in its middle. */
__noinline __u64 flow_open(const struct conn *c, const struct service_table *t,
			   const struct service *svc, __u32 probation)
{
	if (!c || !t || !svc)
		return 0;

	/* Seen from its middle: its group may still be known, if `flows` is too small. */
	__u64 binding = probation ? cache_binding(c, t) : 0;
	struct client *client;
	struct flow *f;

	if (!binding)
		binding = predict(c, t, svc, 0);
	f = flow_new(c, t, probation ? RANK_CLOSING : RANK_STANDING + flow_idle,
		     probation ? REASON_FLOW_NOT_STORED : REASON_MAP_FULL);
	if (f) {
		f->bound = tagged(c, binding);
		f->next = tagged(c, c->seq + 1);
		f->end = c->seq + (probation ? c->payload_length : 1);
		f->ack = c->ack;
		f->flags = (probation ? FLOW_UNSYNCED | FLOW_PROBATION : FLOW_TRUSTED) |
			   (binding & PREDICTED ? FLOW_PREDICTED : 0);
		flow_name(f, c, t);
	}
	/* Else cache_binding() has just found it, or nothing. */
	if (!probation)
		cache_correct(c, t, binding);

	client = binding & PREDICTED ? client_find(c, true) : NULL;
	report_event(c, EVENT_BOUND, from_to(NO_GROUP, binding), client ? client->topic : 0,
		     binding & PREDICTED ? REPORT_BY_PREDICTION : 0);
	return binding;
}

/*
 * A SYN on the addresses of an existing flow: its client has opened another connection, or
 * somebody wants us to think so. The flow keeps its group; the challenger is bound by prediction, and
 * takes the flow's place when a segment comes with its own numbers.
 */
__noinline __u64 challenger_open(const struct conn *c, const struct service_table *t,
				 const struct service *svc, struct flow *f)
{
	__u64 binding = predict(c, t, svc, 0);

	if (!c || !t || !f)
		return 0;
	flow_challenge(f, challenger_of(c->seq + 1, binding));
	f->bound_by = BOUND_BY_PREDICTION;
	f->flags |= FLOW_REUSED_PORT;
	/* Segments without data have to look here now. */
	cache_correct(c, t, 0);
	return binding;
}

/*
 * The challenger proved itself. The flow becomes it, and the other way round: if it was no client's
 * doing, the client's next segment brings the flow back, though its framing is lost. One that had been closed does not
 * come back.
 */
__noinline int challenger_takes_over(const struct conn *c, struct flow *f)
{
	if (!c || !f)
		return 0;

	binding_t old = flow_binding(f, c), challenger = challenger_binding(f->challenger);
	__u32 old_end = f->end, start = challenger_seq(f->challenger);
	bool proven = f->flags & FLOW_REUSED_PORT;
	__u16 probation = f->flags & FLOW_PROBATION;
	bool closed = f->flags & FLOW_CLOSING;

	__builtin_memset(&f->bound, 0,
			 __builtin_offsetof(struct flow, key) -
				 __builtin_offsetof(struct flow, bound));
	f->v6 = c->v6;
	f->seen = flow_clock();
	flow_bind(f, c, challenger);
	flow_next(f, c, start);
	f->end = start;
	f->ack = c->ack;
	f->flags = proven ? FLOW_TRUSTED : FLOW_UNSYNCED | probation;
	if (!closed)
		flow_challenge(f, challenger_of(old_end, old));
	count(REASON_FLOW_REPLACED);
	return 0;
}

/* A segment without a flow. */
static __always_inline void bind_unknown(struct bind_decision *b, const struct conn *c,
					 const struct service_table *t, const struct service *svc)
{
	__u64 binding;

	if (is_syn(c)) {
		binding = flow_open(c, t, svc, false);
		b->verdict = binding & PREDICTED ? REASON_FLOW_PREDICTED : REASON_FLOW_NEW;
	} else if (is_end(c)) {
		binding = cache_binding(c, t) ?: predict(c, t, svc, 0);
		b->verdict = REASON_UNTRACKED;
	} else {
		binding = flow_open(c, t, svc, true);
		b->verdict = REASON_FLOW_ADOPTED;
	}
	b->binding = binding;
}

/*
 * All but the segments of a flow without a challenger. Returns the flow that is to be framed; NULL: there is
 * none, or nothing to frame. Binding and verdict are in scratch.decision: the caller has no stack to spare.
 */
static __noinline struct flow *bind_predicted(const struct conn *c, const struct service_table *t,
					      const struct service *svc, struct flow *f)
{
	struct scratch *w = scratch();
	struct bind_decision *b;
	__u64 other;
	binding_t challenger;

	if (!w)
		return NULL;
	b = &w->decision;
	b->verdict = c->payload_length ? REASON_DATA : REASON_NO_DATA;
	if (!f) {
		bind_unknown(b, c, t, svc);
		return NULL;
	}
	other = flow_challenger(f);
	challenger = challenger_binding(other);
	if (is_syn(c)) {
		if ((__u32)READ_ONCE(f->next) == c->seq + 1 && !(f->flags & FLOW_CLOSING)) {
			b->verdict = REASON_SYN_AGAIN;
		} else if (challenger && challenger_seq(other) == c->seq + 1 &&
			   group_of(challenger)) {
			b->verdict = REASON_SYN_AGAIN;
			b->binding = challenger;
			return NULL;
		} else {
			b->verdict = REASON_SYN_REUSED_PORT;
			b->binding = challenger_open(c, t, svc, f);
			return NULL;
		}
	} else if (challenger) {
		if (challenger_seq(other) == c->seq && !(is_end(c) && c->seq == f->end)) {
			challenger_takes_over(c, f);
		} else if (c->payload_length && c->seq == f->end && f->flags & FLOW_REUSED_PORT) {
			flow_challenge(f,
				       0); /* the flow goes on, so the SYN was not its client's */
		}
	}
	b->binding = binding_of_flow(c, t, svc, f);
	return f;
}

#endif /* MQTT_FWD_BIND_PREDICTED_H */
