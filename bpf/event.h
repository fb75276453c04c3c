/* SPDX-License-Identifier: GPL-2.0-only */
/* Reports to user space, at a bounded rate: a flood of flows must not become one of events. */
#ifndef MQTT_FWD_EVENT_H
#define MQTT_FWD_EVENT_H

#include "conn.h"

#define EVENT_WINDOW_NS 100000000ULL /* 0.1 s */

/* Per CPU and window; 0 turns events off. */
const volatile __u32 events_per_window = 200;

static __always_inline bool event_allowed(__u64 now)
{
	__u32 zero = 0;
	struct event_budget *budget = bpf_map_lookup_elem(&event_budgets, &zero);

	if (!budget)
		return false;
	if (budget->window != now / EVENT_WINDOW_NS) {
		budget->window = now / EVENT_WINDOW_NS;
		budget->used = 0;
	}
	return budget->used++ < events_per_window;
}

enum report_how {
	REPORT_BY_PREDICTION = 1 << 0,
	REPORT_RESET = 1 << 1,
};

/* The two groups of a report, in one argument: there are five at most. */
static __always_inline __u32 from_to(__u16 from, __u16 to)
{
	return from | (__u32)to << 16;
}

/*
 * Global rather than static, like the other functions that are not inlined: the verifier
 * checks a global function once, by its types, not at each call. The price is that every
 * pointer may be NULL to it.
 */
__noinline int report_event(const struct conn *c, enum event_kind kind, __u32 from_to, __u64 topic,
			    enum report_how how)
{
	__u64 now = bpf_ktime_get_boot_ns();
	struct event *e = NULL;

	if (!c)
		return 0;
	if (event_allowed(now))
		e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		count(REASON_EVENT_LOST);
		return 0;
	}
	*e = (struct event){
		.time_ns = now,
		.client_port = c->key.port,
		.service = c->key.service,
		.kind = kind,
		.from_group = from_to,
		.to_group = from_to >> 16,
		.v6 = c->v6,
		.by_prediction = how & REPORT_BY_PREDICTION ? 1 : 0,
		.reset = how & REPORT_RESET ? 1 : 0,
		.topic = topic,
	};
	__builtin_memcpy(e->client, c->key.addr, sizeof(e->client));

	const struct topic *text = topic ? bpf_map_lookup_elem(&topics, &topic) : NULL;
	if (text) {
		e->topic_length = text->length;
		__builtin_memcpy(e->text, text->text, sizeof(e->text));
	}
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* About the flow itself: it stays with its group. */
static __always_inline void report_flow(const struct conn *c, const struct flow *f,
					enum event_kind kind)
{
	report_event(c, kind, from_to(f->group, f->group), 0, 0);
}

#endif /* MQTT_FWD_EVENT_H */
