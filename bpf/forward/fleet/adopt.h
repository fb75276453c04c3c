/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the sidecar has found out of a segment's connection (miss.h): it runs this program on the segment, with that in
 * front. So all that is known of flows is written here, by the one who writes flows.
 *
 *   a broker host has it   a flow, bound to that host alone; the segment goes on
 *   the store has it       its CONNECT is kept here now; the segment is what it waits for
 *   nobody has it          RST, to data and FIN
 *   another balancer does  what is kept here is forgotten
 */
#ifndef MQTT_FWD_FLEET_ADOPT_H
#define MQTT_FWD_FLEET_ADOPT_H

#include "../handshake/answer.h"
#include "../handshake/handovers.h"
#include "../flow/delayed.h"
#include "../services.h"

/* Seconds in which the last segments of a connection may still come, once the next one on its addresses has begun. */
#define LAST_SEGMENTS_S 2

static __always_inline bool is_far_from(const struct handover *h, const struct conn *c)
{
	return c->seq - h->start + FLOW_WINDOW > 2 * FLOW_WINDOW;
}

/* Whether a connection on these addresses has just begun, and the segment is of the last one. */
static __always_inline bool has_next_begun(const struct conn *c)
{
	const struct handover *h = handover_find(c);

	return h && now_s() - h->born_s < LAST_SEGMENTS_S && is_far_from(h, c);
}

/*
 * Forgets what is known of these addresses; if it `may_stay`, not what is far from the segment: that may be a late one,
 * of a connection that is over, and the next one on its addresses has begun. Global (see event.h).
 */
__noinline int adopt_forget(const struct conn *c, const struct service_table *t, __u32 may_stay)
{
	const struct flow *f;
	const struct handover *h;

	if (!c || !t)
		return 0;
	f = flow_find(c, t);
	h = handover_find(c);
	if (may_stay && ((f && is_far(f, c)) || (h && is_far_from(h, c))))
		return 0;
	flow_remove(c, t);
	handover_remove(c);
	cache_correct(c, t, 0);
	return 0;
}

/* Whether a connection waits here for what lies before the segment: that was lost on its way, and TCP repeats it. */
static __always_inline bool is_waited_for(const struct conn *c)
{
	const struct handover *h = handover_find(c);

	return h && h->state <= HANDOVER_SILENT && c->ack - h->server <= HANDOVER_CONNACK &&
	       c->seq - h->start < FLOW_WINDOW;
}

/* A flow that is bound to the one broker host that has its connection; false: none. Global (see event.h). */
__noinline int adopt_flow(const struct conn *c, const struct service_table *t, __u32 binding)
{
	struct flow *f, *known;

	if (!c || !t || has_next_begun(c))
		return false;
	known = flow_find(c, t);
	/* Several of its segments were held. */
	if (known && known->bound_by == BOUND_BY_REAL && flow_binding(known, c) == binding &&
	    !is_far(known, c))
		return true;
	adopt_forget(c, t, false);
	f = flow_claim(c, t, RANK_STANDING, REASON_MAP_FULL);
	if (!f)
		return false;
	f->bound = tagged(c, binding);
	f->next = tagged(c, c->seq);
	f->end = c->seq;
	f->ack = c->ack;
	/* Where its control packets begin will show; what it published before is not known. */
	f->flags = FLOW_UNSYNCED;
	f->bound_by = BOUND_BY_REAL;
	flow_name(f, c, t);
	count(REASON_ADOPTED_FROM_REAL);
	report_event(c, EVENT_BOUND, from_to(NO_GROUP, binding), 0,
		     BOUND_BY_REAL << REPORT_BOUND_BY_SHIFT);
	return true;
}

/* Its kept CONNECT is in scratch.handover. Global (see event.h). */
__noinline int adopt_waiting(const struct conn *c, const struct service_table *t)
{
	struct scratch *w = scratch();

	if (!c || !t || !w)
		return 0;
	adopt_forget(c, t, false);
	w->handover.born_s = now_s();
	handover_put(c, &w->handover);
	count(REASON_ADOPTED_FROM_STORE);
	return 0;
}

SEC("xdp")
int mqtt_adopt(struct xdp_md *ctx)
{
	const struct service_table *t = current_table();
	struct scratch *w = scratch();
	struct adoption *a;
	struct conn c = {};
	__u32 kind, binding, answers;

	if (!t || !w)
		return XDP_DROP;
	a = frame_start(ctx);
	if ((void *)(a + 1) > frame_end(ctx))
		return XDP_DROP;
	__builtin_memcpy(c.key.addr, a->client, sizeof(a->client));
	c.key.port = a->client_port;
	c.key.service = a->service;
	c.seq = a->seq;
	c.ack = a->ack;
	c.payload_length = a->payload_length;
	c.v6 = a->v6;
	c.tag = flow_tag(flow_id(&c, t));
	kind = a->kind;
	binding = a->binding;
	answers = !a->rst;
	bool fin = a->fin;
	if (kind == ADOPTED_FROM_STORE &&
	    bpf_xdp_load_bytes(ctx, __builtin_offsetof(struct adoption, handover), &w->handover,
			       sizeof(w->handover)))
		return XDP_DROP;
	if (bpf_xdp_adjust_head(ctx, sizeof(struct adoption)))
		return XDP_DROP;

	switch (kind) {
	case ADOPTED_FROM_REAL:
		if (!group_of(binding) || !adopt_flow(&c, t, binding))
			return XDP_DROP;
		break;
	case ADOPTED_FROM_STORE:
		adopt_waiting(&c, t);
		break;
	case ADOPTED_ELSEWHERE:
		adopt_forget(&c, t, true);
		return XDP_DROP;
	default:
		if (answers && is_waited_for(&c))
			return XDP_DROP;
		adopt_forget(&c, t, true);
		count(REASON_NOBODY_HAS_IT);
		/* An acknowledgement alone is the last of a connection, or the first, whose CONNECT is still to come. */
		if (!answers || !(c.payload_length || fin) || !answer_reset(ctx, &c, fin))
			return XDP_DROP;
		count(REASON_REFUSED);
		return XDP_TX;
	}
	bpf_tail_call(ctx, &stages, STAGE_FORWARD);
	return XDP_DROP;
}

#endif /* MQTT_FWD_FLEET_ADOPT_H */
