/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Reports to user space, at a bounded rate, each kind with a budget of its own: what a stranger
 * can cause in numbers must not hide what is rare.
 */
#ifndef MQTT_FWD_EVENT_H
#define MQTT_FWD_EVENT_H

#include "../maps/state.h"
#include "../maps/counters.h"
#include "flow/conn.h"

enum report_how {
	REPORT_BY_PREDICTION = 1 << 0,
	REPORT_ENDED = 1 << 1,
	REPORT_BOUND_BY_SHIFT = 8, /* enum bound_by */
	REPORT_FALLBACK_SHIFT = 16, /* enum fallback_reason */
};

_Static_assert(REASON_EVENT_LOST_UNFRAMED - REASON_EVENT_LOST_BOUND == EVENT_KINDS - 1,
	       "a counter for each kind of event, in the same order");

/* The two groups of a report, in one argument: there are five at most. */
static __always_inline __u32 from_to(__u16 from, __u16 to)
{
	return from | (__u32)to << 16;
}

/*
 * Global rather than static, like the other functions that are not inlined: the verifier
 * checks a global function once, by its types, not at each call. The price is that every
 * pointer may be NULL to it, and that before 6.6 what it points to can be no map's key.
 */
__noinline int report_event(const struct conn *c, __u32 kind, __u32 from_to, __u64 topic, __u32 how)
{
	struct event *e = NULL;

	if (!c || kind >= EVENT_KINDS)
		return 0;
	if (budget_take(&budgets, BUDGET_EVENTS + kind, events_per_window))
		e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		count(REASON_EVENT_LOST_BOUND + kind);
		return 0;
	}
	*e = (struct event){
		.time_ns = bpf_ktime_get_boot_ns(),
		.client_port = c->key.port,
		.service = c->key.service,
		.kind = kind,
		.from_group = from_to,
		.to_group = from_to >> 16,
		.v6 = c->v6,
		.by_prediction = how & REPORT_BY_PREDICTION ? 1 : 0,
		.ended = how & REPORT_ENDED ? 1 : 0,
		.bound_by = how >> REPORT_BOUND_BY_SHIFT,
		.topic = READ_ONCE(
			topic), /* a key: it is in memory, and in no second place of the stack */
		.fallback_reason = how >> REPORT_FALLBACK_SHIFT,
	};
	__builtin_memcpy(e->client, c->key.addr, sizeof(e->client));

	const struct topic *text = READ_ONCE(topic) ? bpf_map_lookup_elem(&topics, &topic) : NULL;
	const struct server_name *name =
		READ_ONCE(topic) && !text ? bpf_map_lookup_elem(&server_names, &topic) : NULL;
	if (text) {
		e->topic_length = text->length;
		__builtin_memcpy(e->text, text->text, sizeof(e->text));
	} else if (name) {
		e->topic_length = name->length;
		__builtin_memcpy(e->text, name->text, sizeof(name->text));
	}
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* About the flow itself: it stays with its group. */
static __always_inline void report_flow(const struct conn *c, const struct flow *f, __u32 kind)
{
	__u16 group = READ_ONCE(f->bound);

	report_event(c, kind, from_to(group, group), 0, 0);
}

#endif /* MQTT_FWD_EVENT_H */
