/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Budgets: so many a CPU and window, then no more until the next. Coarser than a token bucket,
 * and one division cheaper; what they taken_over_conn are floods, not shapes.
 */
#ifndef MQTT_FWD_RATELIMIT_H
#define MQTT_FWD_RATELIMIT_H

#include "map.h"

#define BUDGET_WINDOW_NS 100000000ULL /* 0.1 s */

struct budget {
	__u64 window; /* number of the running window */
	__u64 used;
};

/* Takes one of `limit` from the CPU's budget; false if there is none left. */
static __always_inline bool budget_take(void *budgets, __u32 kind, __u32 limit)
{
	struct budget *b = bpf_map_lookup_elem(budgets, &kind);
	__u64 window = bpf_ktime_get_boot_ns() / BUDGET_WINDOW_NS;

	if (!b)
		return false;
	if (b->window != window) {
		b->window = window;
		b->used = 0;
	}
	return b->used++ < limit;
}

#endif /* MQTT_FWD_RATELIMIT_H */
