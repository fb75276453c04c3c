/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Binding at the SYN, when nothing is known of the flow but its client's address: by what that
 * address published before. For broker hosts whose kernels cannot take over a connection.
 */
#ifndef MQTT_FWD_BIND_PREDICTED_H
#define MQTT_FWD_BIND_PREDICTED_H

#include "bind.h"

/* A flow that is not known; `weak`: it is first seen in its middle. */
__noinline __u64 flow_open(const struct conn *c, const struct service_table *t,
			   const struct service *svc, __u32 weak)
{
	if (!c || !t || !svc)
		return 0;

	struct flow f = { .end = c->seq + 1, .ack = c->ack };
	/* Seen from its middle: its group may be known all the same, if `flows` is too small. */
	__u64 binding = weak ? cache_binding(c, t) : 0;
	struct client *client;

	if (!binding)
		binding = predict(c, t, svc, 0);
	f.bound = tagged(c, binding);
	f.next = tagged(c, c->seq + 1);
	f.flags = weak ? FLOW_UNSYNCED | FLOW_WEAK : FLOW_TRUSTED;
	if (weak)
		f.end = c->seq + c->payload_length;
	if (binding & PREDICTED)
		f.flags |= FLOW_PREDICTED;
	flow_add(c, &f);
	/* Else cache_binding() has just found it, or nothing. */
	if (!weak)
		cache_correct(c, t, binding);

	client = binding & PREDICTED ? client_find(c, true) : NULL;
	report_event(c, EVENT_BOUND, from_to(NO_GROUP, binding), client ? client->topic : 0,
		     binding & PREDICTED ? REPORT_BY_PREDICTION : 0);
	return binding;
}

/*
 * A SYN on the addresses of a flow that is known: its client has opened another connection, or
 * somebody wants us to think so. The flow keeps its group; the rival is bound by prediction, and
 * takes the flow's place when a segment comes with its own numbers.
 */
__noinline __u64 rival_open(const struct conn *c, const struct service_table *t,
			    const struct service *svc, struct flow *f)
{
	__u64 binding = predict(c, t, svc, 0);

	if (!c || !t || !f)
		return 0;
	f->own = rival_of(c->seq + 1, binding);
	f->flags |= FLOW_RIVAL_SYN;
	/* Segments without data have to look here now. */
	cache_correct(c, t, 0);
	return binding;
}

/*
 * The rival proved itself. The flow becomes it, and the other way round: if it was no client's
 * doing, the client's next segment brings the flow back, though its framing is lost.
 */
__noinline int rival_takes_over(const struct conn *c, struct flow *f)
{
	if (!c || !f)
		return 0;

	binding_t old = flow_binding(f, c), rival = rival_binding(f->own);
	__u32 old_end = f->end, start = rival_seq(f->own);
	bool proven = f->flags & FLOW_RIVAL_SYN;
	__u16 weak = f->flags & FLOW_WEAK;

	*f = (struct flow){
		.bound = tagged(c, rival),
		.next = tagged(c, start),
		.end = start,
		.ack = c->ack,
		.flags = (proven ? FLOW_TRUSTED : FLOW_UNSYNCED) | weak,
		.own = rival_of(old_end, old),
	};
	count(REASON_FLOW_REPLACED);
	return weak && proven ? flow_move(c, f, false) : 0;
}

/* A segment of a flow that nobody knows. */
static __always_inline void bind_unknown(struct bound *b, const struct conn *c,
					 const struct service_table *t, const struct service *svc,
					 bool syn, bool ends)
{
	__u64 binding;

	if (syn) {
		binding = flow_open(c, t, svc, false);
		b->reason = binding & PREDICTED ? REASON_FLOW_PREDICTED : REASON_FLOW_NEW;
	} else if (ends) {
		binding = cache_binding(c, t) ?: predict(c, t, svc, 0);
		b->reason = REASON_STRAY;
	} else {
		binding = flow_open(c, t, svc, true);
		b->reason = REASON_FLOW_ADOPTED;
	}
	b->flow = NULL;
	b->binding = binding;
}

static __always_inline void bind_predicted(struct xdp_md *ctx, struct bound *b,
					   const struct conn *c, const struct service_table *t,
					   const struct service *svc, struct flow *f, bool syn,
					   bool ends)
{
	b->flow = NULL;
	if (!f) {
		/* During an upgrade, flows that are not here yet are the last program's. */
		if (!syn && has_predecessor)
			bpf_tail_call(ctx, &predecessor, 0);
		bind_unknown(b, c, t, svc, syn, ends);
		return;
	}

	binding_t rival = rival_binding(f->own);
	if (syn) {
		if ((__u32)READ_ONCE(f->next) == c->seq + 1 && !(f->flags & FLOW_CLOSING)) {
			b->reason = REASON_SYN_AGAIN;
			b->binding = flow_binding(f, c);
		} else if (rival && rival_seq(f->own) == c->seq + 1 && group_of(rival)) {
			b->reason = REASON_SYN_AGAIN;
			b->binding = rival;
			return;
		} else {
			b->reason = REASON_SYN_RIVAL;
			b->binding = rival_open(c, t, svc, f);
			return;
		}
	} else if (rival) {
		if (rival_seq(f->own) == c->seq && !(ends && c->seq == f->end)) {
			rival_takes_over(c, f);
			/* It may be in another map by now. */
			f = flow_find(c);
			if (!f) {
				b->binding = rival;
				return;
			}
		} else if (c->payload_length && c->seq == f->end && f->flags & FLOW_RIVAL_SYN) {
			f->own = 0; /* the flow goes on, so the SYN was not its client's */
		}
	}

	b->flow = f;
	b->binding = flow_binding(f, c);
	if (!group_of(b->binding))
		b->binding = flow_rebind(c, t, svc, f);
}

#endif /* MQTT_FWD_BIND_PREDICTED_H */
