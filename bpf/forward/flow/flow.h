/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Flows: the only file that adds, moves and removes them. Framing and judging change what a flow
 * has learned of its stream through the pointer that flow_find() gives.
 */
#ifndef MQTT_FWD_FLOW_H
#define MQTT_FWD_FLOW_H

#include "../../maps/counters.h"
#include "../../maps/state.h"
#include "conn.h"

/* How far a segment may begin behind the last byte seen and still move flow.end. */
#define FLOW_WINDOW (1 << 20)

static __always_inline __u64 tagged(const struct conn *c, __u32 word)
{
	return word | (__u64)c->tag << 32;
}

/* A challenger's first sequence number and binding: see flow.challenger. */
static __always_inline __u32 challenger_seq(__u64 challenger)
{
	return challenger;
}

static __always_inline binding_t challenger_binding(__u64 challenger)
{
	return challenger >> 32;
}

static __always_inline __u64 challenger_of(__u32 seq, binding_t binding)
{
	return seq | (__u64)binding << 32;
}

/* Key in `client_ids` of the flow's client; 0: it is identified by its address. */
static __always_inline __u64 flow_client(const struct flow *f)
{
	return f->bound_by == BOUND_BY_PREDICTION ? 0 : f->client_id;
}

/* Another connection on the flow's addresses; 0: there is none. */
static __always_inline __u64 flow_challenger(const struct flow *f)
{
	return f->bound_by == BOUND_BY_PREDICTION ? f->challenger : 0;
}

/* The flow's binding; 0 if its entry is another flow's meanwhile. */
static __always_inline binding_t flow_binding(const struct flow *f, const struct conn *c)
{
	__u64 bound = READ_ONCE(f->bound);

	return bound >> 32 == c->tag ? bound : 0;
}

static __always_inline void flow_bind(struct flow *f, const struct conn *c, binding_t binding)
{
	WRITE_ONCE(f->bound, tagged(c, binding));
}

static __always_inline void flow_next(struct flow *f, const struct conn *c, __u32 next)
{
	WRITE_ONCE(f->next, tagged(c, next));
}

/* Not in global functions: before Linux 6.6, what they are passed by pointer can be no map's key. */
static __always_inline struct flow *flow_find(const struct conn *c)
{
	struct flow *f;

	if (c->v6) {
		f = bpf_map_lookup_elem(&flows6, &c->key);
		return f ? f : bpf_map_lookup_elem(&flows6_probation, &c->key);
	}
	struct flow4 key = flow4_of(c);
	f = bpf_map_lookup_elem(&flows, &key);
	return f ? f : bpf_map_lookup_elem(&flows_probation, &key);
}

static __always_inline long flow_put(const struct conn *c, const struct flow *f, bool probation)
{
	long failed;

	if (c->v6) {
		struct flow6 key = c->key;
		failed = probation ? bpf_map_update_elem(&flows6_probation, &key, f, BPF_ANY)
				   : bpf_map_update_elem(&flows6, &key, f, BPF_ANY);
	} else {
		struct flow4 key = flow4_of(c);
		failed = probation ? bpf_map_update_elem(&flows_probation, &key, f, BPF_ANY)
				   : bpf_map_update_elem(&flows, &key, f, BPF_ANY);
	}
	if (failed)
		count(REASON_MAP_FULL);
	else
		map_used((probation ? TRACKED_FLOWS_PROBATION : TRACKED_FLOWS) + !!c->v6, 1, 0);
	return failed;
}

static __always_inline void flow_remove(const struct conn *c, bool probation)
{
	long failed;

	if (c->v6) {
		struct flow6 key = c->key;
		failed = probation ? bpf_map_delete_elem(&flows6_probation, &key)
				   : bpf_map_delete_elem(&flows6, &key);
	} else {
		struct flow4 key = flow4_of(c);
		failed = probation ? bpf_map_delete_elem(&flows_probation, &key)
				   : bpf_map_delete_elem(&flows, &key);
	}
	if (!failed)
		map_used((probation ? TRACKED_FLOWS_PROBATION : TRACKED_FLOWS) + !!c->v6, 0, 1);
}

/*
 * A new flow. Above the rate it is not stored, for another would have to go: it is bound by
 * prediction, packet by packet, as long as nothing changes that.
 */
static __always_inline bool flow_add(const struct conn *c, const struct flow *f)
{
	if (!budget_take(&budgets, BUDGET_FLOWS, flows_per_window)) {
		count(REASON_FLOW_NOT_STORED);
		return false;
	}
	return !flow_put(c, f, f->flags & FLOW_PROBATION);
}

/*
 * Between the maps: to those on probation when it is closing, out of them when it has shown that it is
 * MQTT. It stays where it is if there is no room.
 */
__noinline int flow_move(const struct conn *c, struct flow *f, __u32 probation)
{
	if (!c || !f)
		return 0;
	if (probation)
		f->flags |= FLOW_CLOSING;

	struct flow moved = *f;

	moved.flags = probation ? moved.flags | FLOW_PROBATION : moved.flags & ~FLOW_PROBATION;
	if (!flow_put(c, &moved, probation))
		flow_remove(c, !probation);
	return 0;
}

/* How far the flow has been seen; what lies far off is not its own. */
static __always_inline void flow_seen(struct flow *f, const struct conn *c, __u32 length)
{
	__u32 end = c->seq + length;

	if (seq_before(f->end, end) && end - f->end < FLOW_WINDOW)
		f->end = end;
}

#endif /* MQTT_FWD_FLOW_H */
