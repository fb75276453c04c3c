/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Counters, budgets, and the rings to user space.
 */
#ifndef MQTT_FWD_MAPS_COUNTERS_H
#define MQTT_FWD_MAPS_COUNTERS_H

#include "../abi/event.h"
#include "../abi/reason.h"
#include "../abi/state.h"
#include "../lib/map.h"
#include "../lib/ratelimit.h"

enum budget_kind {
	BUDGET_EVENTS, /* one each kind of event */
	BUDGET_FLOWS = BUDGET_EVENTS + EVENT_KINDS,
	BUDGET_TOPICS,
	BUDGET_RESCUES,
	BUDGET_HANDOVERS,
	BUDGET_CLIENTS,
	BUDGET_MISSES,
	BUDGETS,
};
MAP(budgets, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct budget, BUDGETS);

/* Per CPU and window of 0.1 s (lib/ratelimit.h). */
const volatile __u32 events_per_window = 200; /* of each kind; 0 turns events off */
const volatile __u32 flows_per_window = 10000; /* as Katran's is_under_flood, but for the rate */
const volatile __u32 topics_per_window = 1000;
const volatile __u32 rescues_per_window = 50;
const volatile __u32 handovers_per_window = 300;
const volatile __u32 clients_per_window = 80;
const volatile __u32 misses_per_window = 2500;

/* Of all CPUs together, a second; of an address, a share of it (forward/share.h). */
const volatile __u32 handovers_per_second = 6000;
const volatile __u32 clients_per_second = 1600;

/* New connections of an address, a second; 0: as many as it likes. */
const volatile __u32 connections_per_address = 1000;

/* PUBLISHes of a client, a second; 0: as many as it likes. */
const volatile __u32 messages_per_client = 1000;

/* All in one value: a packet that counts twice looks for it once. */
struct counters {
	__u64 of[REASONS]; /* enum reason */
};
MAP(counters, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct counters, 1);
/* Of each tracked map, and, behind those, what user space added and removed itself. */
MAP(map_uses, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct map_use, 2 * TRACKED_MAPS);

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
} events SEC(".maps");

/* What a fleet's sidecar is to ask for, and to keep for others (abi/report.h). */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
} fleet_reports SEC(".maps");

/* ClientHellos that come in several segments, for the sidecar (abi/report.h). */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} hellos SEC(".maps");

/* What misrouted clients sent, for the sidecar (abi/rescue.h). */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
} rescues SEC(".maps");

static __always_inline void count_many(enum reason reason, __u32 times)
{
	__u32 zero = 0;
	struct counters *c = bpf_map_lookup_elem(&counters, &zero);
	__u64 i = reason;

	if (!c)
		return;
	if (__builtin_constant_p(reason)) {
		c->of[reason] += times;
		return;
	}
	/* What is compared is to be what is used, which the verifier before 6.13 does not see otherwise. */
	barrier_var(i);
	if (i < REASONS)
		c->of[i] += times;
}

static __always_inline void count(enum reason reason)
{
	count_many(reason, 1);
}

/* A verdict, and a note beside it. */
static __always_inline void count_both(enum reason verdict, enum reason note)
{
	__u32 zero = 0;
	struct counters *c = bpf_map_lookup_elem(&counters, &zero);

	if (c) {
		c->of[verdict]++;
		c->of[note]++;
	}
}

static __always_inline void map_used(enum tracked_map map, __u32 added, __u32 removed)
{
	__u32 key = map;
	struct map_use *use = bpf_map_lookup_elem(&map_uses, &key);

	if (use) {
		use->added += added;
		use->removed += removed;
	}
}

#endif /* MQTT_FWD_MAPS_COUNTERS_H */
