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

#include "flow.h"

/*
 * Only of clients without credentials: the sidecar publishes as one of those. Not of a PUBLISH whose first
 * bytes its broker has already. Global (see event.h).
 */
__noinline int rescue_possible(const struct flow *f, const struct service *svc, __u32 inside)
{
	__u32 zero = 0;
	const __u64 *until;

	if (!f || !svc || svc->on_misprediction != MISPREDICTION_RESCUE)
		return false;
	until = bpf_map_lookup_elem(&rescue_until, &zero);
	if (!inside && f->connect & FLOW_ANONYMOUS && until &&
	    bpf_ktime_get_boot_ns() < READ_ONCE(*until) &&
	    budget_take(&budgets, BUDGET_RESCUES, rescues_per_window))
		return true;
	count(REASON_NOT_RESCUED);
	return false;
}

/*
 * Hands the segment's bytes from sequence number `from` on to the sidecar; false: there is no room.
 * Global (see event.h).
 */
__noinline int rescue_copy(struct xdp_md *ctx, const struct conn *c, struct flow *f, __u32 from,
			   __u32 fin)
{
	struct work *w = work_of_cpu();
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
		.start = f->cut_seq,
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

/* The segment that ended the flow, before it is cut. Without room for it, it is lost. */
static __always_inline void rescue_begin(struct xdp_md *ctx, const struct conn *c, struct flow *f,
					 bool fin)
{
	if (rescue_copy(ctx, c, f, f->cut_seq, fin)) {
		count(REASON_FLOW_RESCUED);
		return;
	}
	f->flags &= ~FLOW_RESCUED;
	count(REASON_PUBLISH_LOST);
}

#endif /* MQTT_FWD_RESCUE_H */
