/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The table of flows: the only file that adds and removes them.
 *
 * A flow has two sets of places, of which its id says the numbers, so a look-up is one access to memory most of the
 * time, where a hash map has two that wait for each other, and a call. It gets a free place of either set, or one whose
 * flow closed a while ago, which nobody need free; without one it displaces, in this order: what is closing or on
 * probation, what has not sent CONNECT yet, what had no segment for the longest time. A SYN, which anybody can send,
 * displaces no flow that had a segment of late, and a segment of no flow none that stands at all: neither a wave of short
 * connections nor a stranger's packets push out standing flows.
 *
 * A place is claimed, written, and then named, each by one CPU.
 */
#ifndef MQTT_FWD_FLOW_TABLE_H
#define MQTT_FWD_FLOW_TABLE_H

#include "../../maps/counters.h"
#include "../../maps/state.h"
#include "conn.h"

const volatile __u32 flow_sets = 2;

/* After so many units of flow.seen without a segment, of a minute in all at least, a flow may make room for a SYN. */
const volatile __u32 flow_idle = 16;

/* One of a flow's places, the likelier ones first. */
static __always_inline struct flow *flow_place(__u64 id, __u32 i)
{
	__u32 half = i < FLOW_WAYS ? id >> 32 : id, place;

	place = (((__u64)half * flow_sets) >> 32) * FLOW_WAYS + ((half + i) & (FLOW_WAYS - 1));
	return bpf_map_lookup_elem(&flows, &place);
}

/* Which of a flow's places is its own, behind the first two, where most flows are; 0: none. Global (see event.h). */
__noinline __u32 flow_search(__u64 id)
{
	for (__u32 i = 2; i < 2 * FLOW_WAYS; i++) {
		const struct flow *f = flow_place(id, i);

		if (f && READ_ONCE(f->id) == id)
			return i;
	}
	return 0;
}

static __always_inline struct flow *flow_by_id(__u64 id)
{
	struct flow *f = flow_place(id, 0);
	__u32 place;

	if (f && READ_ONCE(f->id) == id)
		return f;
	f = flow_place(id, 1);
	if (f && READ_ONCE(f->id) == id)
		return f;
	place = flow_search(id);
	f = place ? flow_place(id, place) : NULL;
	return f && READ_ONCE(f->id) == id ? f : NULL;
}

/* As flow_id(), where the code of an IPv6 flow's hash is too much to have once more. Global (see event.h). */
__noinline __u64 flow_id_of(const struct conn *c, const struct service_table *t)
{
	return c && t ? flow_id(c, t) : FLOW_FREE;
}

static __always_inline struct flow *flow_find(const struct conn *c, const struct service_table *t)
{
	return flow_by_id(flow_id_of(c, t));
}

/* After so many units of flow.seen, a place whose flow is closing, or still on probation, is as good as free. */
#define FLOW_CLOSED 2

/* Units of flow.seen. */
static __always_inline __u16 flow_clock(void)
{
	return bpf_jiffies64() >> 12;
}

static __always_inline void flow_touch(struct flow *f)
{
	__u16 now = flow_clock();

	if (f->seen != now)
		f->seen = now;
}

/*
 * How soon a place may be another's: one of these, and the age of its flow in units of flow.seen. Whoever wants a place
 * says what it may displace at least.
 */
enum rank {
	RANK_STANDING = 1 << 16,
	RANK_OPENING = 2 << 16, /* has not sent CONNECT yet */
	RANK_CLOSING = 3 << 16, /* or on probation */
	RANK_FREE = 4 << 16,
};

static __always_inline __u32 flow_rank(const struct flow *f, __u64 own, __u16 now)
{
	__u32 age = (__u16)(now - f->seen);
	__u64 id = READ_ONCE(f->id);

	/* Another CPU has just put it there, for a segment of the same flow: there is to be one of it. */
	if (id == own)
		return RANK_FREE + 1;
	if (id == FLOW_FREE)
		return RANK_FREE;
	if (id == FLOW_CLAIMED)
		return 0;
	if (f->flags & (FLOW_CLOSING | FLOW_PROBATION))
		return age < FLOW_CLOSED ? RANK_CLOSING + age : RANK_FREE;
	if ((f->flags & (FLOW_TRUSTED | FLOW_CONNECTED | FLOW_OPAQUE)) == FLOW_TRUSTED)
		return RANK_OPENING + age;
	return RANK_STANDING + age;
}

/*
 * The place of a set, which begins with one of the flow's places, that is given away soonest: how many places of the
 * set are not free << 24 | its rank * FLOW_WAYS | how many places of the set lie behind it. Global, so that the verifier
 * looks at it once, and does not know that `zero` is 0: it would follow each order of ranks.
 */
__noinline __u32 flow_soonest(__u64 id, __u32 first, __u32 zero)
{
	__u32 soonest = zero, taken = zero;
	__u16 now = flow_clock();

	for (__u32 i = 0; i < FLOW_WAYS; i++) {
		const struct flow *f = flow_place(id, first + i);
		__u32 rank = (f ? flow_rank(f, id, now) : 0) + zero;

		taken += rank < RANK_FREE;
		rank = rank * FLOW_WAYS + FLOW_WAYS - 1 - i;
		if (rank > soonest)
			soonest = rank;
	}
	return taken << 24 | soonest;
}

/*
 * An empty place for a new flow, which flow_name() makes known; NULL: there is none, which is counted as `refused`.
 * Flows of the first set are found sooner; it is taken unless it is nearly full, so that with half of all places taken,
 * one flow in 20,000 finds none. Global functions cannot return it.
 */
static __noinline struct flow *flow_claim(const struct conn *c, const struct service_table *t,
					  __u32 least, enum reason refused)
{
	__u64 own = flow_id_of(c, t), id;
	__u32 first = flow_soonest(own, 0, 0), second = flow_soonest(own, FLOW_WAYS, 0), place,
	      rank;
	bool crowded = first >> 24 >= FLOW_WAYS - 1;
	struct flow *f;

	place = FLOW_WAYS - 1 - first % FLOW_WAYS;
	rank = first % (1 << 24) / FLOW_WAYS;
	second %= 1 << 24;
	if (second / FLOW_WAYS > rank || (crowded && second / FLOW_WAYS == rank)) {
		place = 2 * FLOW_WAYS - 1 - second % FLOW_WAYS;
		rank = second / FLOW_WAYS;
	}
	f = rank < least ? NULL : flow_place(own, place);
	if (!f) {
		count(refused);
		return NULL;
	}
	id = READ_ONCE(f->id);
	if (flow_rank(f, own, flow_clock()) != rank ||
	    __sync_val_compare_and_swap(&f->id, id, FLOW_CLAIMED) != id) {
		/* Another CPU was faster. */
		count(REASON_MAP_FULL);
		return NULL;
	}
	if (rank < RANK_OPENING)
		map_used(TRACKED_FLOWS, 0, 1);
	__builtin_memset(&f->bound, 0, sizeof(*f) - __builtin_offsetof(struct flow, bound));
	return f;
}

/* The claimed place is the flow's. */
static __always_inline void flow_name(struct flow *f, const struct conn *c,
				      const struct service_table *t)
{
	f->key = c->key;
	f->v6 = c->v6;
	f->seen = flow_clock();
	/* With all that was written before it. */
	__sync_lock_test_and_set(&f->id, flow_id_of(c, t));
}

/*
 * A place for a new flow. Above the rate it is not stored, for another would have to go: it is bound by
 * prediction, packet by packet, as long as nothing changes that.
 */
static __always_inline struct flow *flow_new(const struct conn *c, const struct service_table *t,
					     __u32 least, enum reason refused)
{
	if (!budget_take(&budgets, BUDGET_FLOWS, flows_per_window)) {
		count(REASON_FLOW_NOT_STORED);
		return NULL;
	}
	return flow_claim(c, t, least, refused);
}

static __always_inline void flow_remove(const struct conn *c, const struct service_table *t)
{
	__u64 id = flow_id_of(c, t);
	struct flow *f = flow_by_id(id);

	if (f)
		__sync_val_compare_and_swap(&f->id, id, FLOW_FREE);
}

#endif /* MQTT_FWD_FLOW_TABLE_H */
