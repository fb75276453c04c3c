/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Maps of mqtt_fwd. Sizes are defaults: the loader sets what the configuration says.
 * IPv4 and IPv6 have maps of their own, so that IPv4 does not hash IPv6's key size.
 */
#ifndef MQTT_FWD_MAPS_H
#define MQTT_FWD_MAPS_H

#include <stdbool.h>

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "reason.h"
#include "shared.h"
#include "siphash.h"

#define MAP(name, map_type, key_type, value_type, entries)                                      \
	struct {                                                                                \
		__uint(type, map_type);                                                         \
		__type(key, key_type);                                                          \
		__type(value, value_type);                                                      \
		__uint(max_entries, entries);                                                   \
	} name SEC(".maps")

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
	__uint(max_entries, ROOT_ARRAY_SIZE);
} root_array SEC(".maps");

/* ---- configuration: read here, written by user space ---- */

/* The one switch between the two generations of services and routes. */
MAP(generation, BPF_MAP_TYPE_ARRAY, __u32, __u32, 1);
MAP(services, BPF_MAP_TYPE_ARRAY, __u32, struct service_table, 2);
MAP(groups, BPF_MAP_TYPE_ARRAY, __u32, struct group, 1024);

/*
 * Routes, as an automaton over topic levels. States of both generations share the maps;
 * their numbers do not overlap, so a walk stays within the generation it started in.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct route_edge);
	__type(value, __u32);
	__uint(max_entries, 1 << 20);
} mqtt_topic_to_vip SEC(".maps");
MAP(route_states, BPF_MAP_TYPE_ARRAY, __u32, struct route_state, 1 << 19);

/*
 * Not read here: the balancer puts the service's address back with it. It lives in this
 * object so that it exists, pinned, whichever of the two is loaded first.
 */
MAP(mqtt_service_vips, BPF_MAP_TYPE_HASH, struct vip_definition, struct vip_definition,
    MAX_GROUP_VIPS);

/* ---- state: written here ---- */

/* Kernel names end after 15 characters, hence not mqtt_client_ip6_to_topic. */
MAP(mqtt_client_ip_to_topic, BPF_MAP_TYPE_LRU_HASH, struct client4, struct client, 1 << 20);
MAP(mqtt_client6_to_topic, BPF_MAP_TYPE_LRU_HASH, struct client6, struct client, 1 << 20);
MAP(topics, BPF_MAP_TYPE_LRU_HASH, __u64, struct topic, 1 << 16);

MAP(flows, BPF_MAP_TYPE_LRU_HASH, struct flow4, struct flow, 1 << 20);
MAP(flows6, BPF_MAP_TYPE_LRU_HASH, struct flow6, struct flow, 1 << 20);
/*
 * Flows that saw FIN or RST. They still forward late segments, but compete for room only
 * with each other, so that a wave of short connections does not push out standing ones.
 */
MAP(flows_closing, BPF_MAP_TYPE_LRU_HASH, struct flow4, struct flow, 1 << 16);
MAP(flows6_closing, BPF_MAP_TYPE_LRU_HASH, struct flow6, struct flow, 1 << 16);

/* Bindings of flows of both families, in front of the maps above (see binding.h). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	/* Its elements begin on a page then, so that each set is one cache line. */
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct binding_set);
	__uint(max_entries, 1 << 16);
} bindings SEC(".maps");

/* A topic in the hands of the parser. */
struct topic_stream {
	struct siphash_stream whole;
	struct siphash_stream level;
	__u32 state; /* of the route automaton */
	__u32 generation;
	__u8 text[TOPIC_TEXT_MAX];
};

/* Topics that are split over segments, between the segments. */
MAP(topic_streams, BPF_MAP_TYPE_LRU_HASH, struct flow6, struct topic_stream, 1 << 14);

/*
 * One packet's working memory. A map value rather than the stack: there is more room, and
 * the verifier takes what it reads from here as unknown, which keeps loops cheap to verify.
 */
struct work {
	__u32 offset; /* of the next unread byte, from the start of the frame */
	__u32 end; /* of the payload, likewise */
	__u32 tile; /* like offset, for the look ahead */
	__u32 tiles;
	struct topic_stream stream;
	struct topic topic;
	struct client client;
};
MAP(work, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct work, 1);

/* ---- reports ---- */

MAP(counters, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, __u64, REASONS);

struct event_budget {
	__u64 window; /* number of the running time window */
	__u64 used;
};
MAP(event_budgets, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct event_budget, 1);

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
} events SEC(".maps");

static __always_inline void count(enum reason reason)
{
	__u32 key = reason;
	__u64 *counter = bpf_map_lookup_elem(&counters, &key);

	if (counter)
		*counter += 1;
}

static __always_inline const struct group *group_alive(__u16 group, __u16 epoch)
{
	__u32 key = group;
	const struct group *g = bpf_map_lookup_elem(&groups, &key);

	return g && epoch && g->epoch == epoch ? g : NULL;
}

#endif /* MQTT_FWD_MAPS_H */
