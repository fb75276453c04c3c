/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Rescue: what a misrouted client sends from the PUBLISH on that belongs elsewhere goes to the sidecar
 * instead of nowhere. The broker's connection is ended as by cut.h. From there on this end speaks TCP with
 * the client, so that all of a message comes, however long it is, and all that the client sends
 * until it notices: what the sidecar has is acknowledged, what it has no room for is not, and
 * comes again (rescued.h).
 */
#ifndef MQTT_FWD_RESCUE_H
#define MQTT_FWD_RESCUE_H

#include "../../lib/clock.h"
#include "../flow/cache.h"
#include "truncate.h"
#include "../flow/flow.h"
#include "../share.h"
#include "../tcp_segment.h"

static __always_inline const struct rescuer *rescuer_alive(void)
{
	__u32 zero = 0;
	const struct rescuer *r = bpf_map_lookup_elem(&rescuer, &zero);

	return r && bpf_ktime_get_boot_ns() < READ_ONCE(r->until) ? r : NULL;
}

/*
 * Only of clients without credentials: the sidecar publishes as one of those. Only where a cookie has proved
 * that the client is at its address, and of no address more than its share. Not of a PUBLISH whose first bytes its broker has already.
 * Global (see event.h).
 */
__noinline int rescue_possible(const struct conn *c, const struct flow *f,
			       const struct service *svc, __u32 inside)
{
	const struct rescuer *r;

	if (!c || !f || !svc || svc->on_misprediction != MISPREDICTION_RESCUE)
		return false;
	r = rescuer_alive();
	if (!inside && f->connect & FLOW_ANONYMOUS && f->bound_by != BOUND_BY_PREDICTION && r &&
	    !READ_ONCE(r->full) && share_take(c, SHARE_OF_RESCUES, RESCUES_PER_ADDRESS) &&
	    budget_take(&budgets, BUDGET_RESCUES, rescues_per_window))
		return true;
	count(REASON_NOT_RESCUED);
	return false;
}

/* Whether the segment's TCP checksum is right. Global (see event.h). */
__noinline int segment_right(struct xdp_md *ctx, const struct conn *c)
{
	struct scratch *w = scratch();
	__u32 sum = 0;

	if (!c || !w)
		return false;
	if (c->payload_length)
		sum = frame_sum(ctx, w, c->payload, c->payload_length);
	return checksum_right(ctx, c, sum);
}

/*
 * Hands the segment's bytes from sequence number `from` on to the sidecar; false: there is no room.
 * Global (see event.h).
 */
__noinline int rescue_copy(struct xdp_md *ctx, const struct conn *c, struct flow *f, __u32 from,
			   __u32 fin)
{
	struct scratch *w = scratch();
	__u32 skip, length;

	if (!c || !f || !w)
		return false;
	skip = from - c->seq;
	if (skip > c->payload_length)
		return false;
	length = c->payload_length - skip;
	barrier_var(length);
	if (length >= SEGMENT_MAX)
		return false;
	w->rescue = (struct rescue){
		.time_ns = bpf_ktime_get_boot_ns(),
		.client_port = c->key.port,
		.service = c->key.service,
		.start = f->end_seq,
		.seq = from,
		.length = length,
		.flags = (c->v6 ? RESCUE_V6 : 0) | (f->connect & FLOW_MQTT5 ? RESCUE_MQTT5 : 0) |
			 (fin ? RESCUE_LAST : 0),
	};
	__builtin_memcpy(w->rescue.client, c->key.addr, sizeof(w->rescue.client));
	if (length && !frame_copy(ctx, c->payload + skip, w->segment, length, SEGMENT_MAX))
		return false;
	barrier_var(length);
	if (bpf_ringbuf_output(&rescues, &w->rescue,
			       sizeof(w->rescue) + (length & (SEGMENT_MAX - 1)), 0)) {
		count(REASON_RESCUE_FULL);
		return false;
	}
	flow_next(f, c, c->seq + c->payload_length);
	return true;
}

/* For how long the flow has been rescued, in ms. */
static __always_inline __u32 rescue_age(const struct flow *f)
{
	return now_ms() - f->rescue_began_ms;
}

/* Whether this sidecar has had the flow's rescue from its beginning: no other can go on with it. */
static __always_inline bool rescue_known(const struct flow *f, const struct rescuer *r)
{
	return r && READ_ONCE(r->instance) == f->rescue_instance;
}

/*
 * The segment that ended the flow, before it is cut. Its checksum is verified: nobody behind will do that.
 * False: it is damaged, and nothing has happened.
 */
static __always_inline bool rescue_begin(struct xdp_md *ctx, const struct conn *c, struct flow *f,
					 bool fin)
{
	const struct rescuer *r = rescuer_alive();
	const struct scratch *w = scratch();

	if (!segment_right(ctx, c)) {
		if (w)
			f->end = w->end_before;
		f->flags &= ~(FLOW_ENDED | FLOW_RESCUED);
		f->parser = PARSER_TYPE;
		flow_topic(f, 0, 0);
		flow_next(f, c, f->end_seq);
		count(REASON_RESCUE_DAMAGED);
		return false;
	}
	if (r && rescue_copy(ctx, c, f, f->end_seq, fin)) {
		f->candidates = 0;
		f->rescue_began_ms = now_ms();
		f->rescue_instance = READ_ONCE(r->instance);
		count(REASON_FLOW_RESCUED);
		return true;
	}
	f->flags &= ~FLOW_RESCUED;
	count(REASON_PUBLISH_LOST);
	return true;
}

/*
 * The segment that ended its flow, or a later one: what its broker is not to see is taken off. False: its
 * checksum is wrong, the flow is as before, and it is to be dropped. Global (see event.h).
 */
__noinline int end_segment(struct xdp_md *ctx, struct conn *c, struct flow *f,
			   const struct service_table *t, __u32 fin)
{
	if (!c || !f || !t)
		return true;
	if (f->flags & FLOW_RESCUED) {
		cache_correct(c, t, 0);
		if (!rescue_begin(ctx, c, f, fin))
			return false;
	}
	if (f->flags & FLOW_ENDED)
		truncate_segment(ctx, c, f);
	return true;
}

#endif /* MQTT_FWD_RESCUE_H */
