/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Configuration: written by user space, read here. Sizes are defaults: the loader sets what the
 * configuration says (src/kernel/catalog.rs).
 */
#ifndef MQTT_FWD_MAPS_CONFIG_H
#define MQTT_FWD_MAPS_CONFIG_H

#include "../abi/config.h"
#include "../abi/handover.h"
#include "../abi/rescue.h"
#include "../abi/state.h"
#include "../lib/map.h"

/* The one switch between the two generations of services and routes. */
MAP(generation, BPF_MAP_TYPE_ARRAY, __u32, __u32, 1);
CACHELINE_ARRAY(services, struct service_table, 2);
CACHELINE_ARRAY(groups, struct group, 1024);

/*
 * Routes, as an automaton over topic levels. States of both generations share the maps;
 * their numbers do not overlap, so a walk stays within the generation it started in.
 */
MAP_WITH_FLAGS(route_edges, BPF_MAP_TYPE_HASH, BPF_F_NO_PREALLOC, struct route_edge, __u32,
	       1 << 20);
MAP_WITH_FLAGS(client_routes, BPF_MAP_TYPE_LPM_TRIE, BPF_F_NO_PREALLOC, struct client_route, __u32,
	       1 << 16);
MAP_WITH_FLAGS(members, BPF_MAP_TYPE_HASH, BPF_F_NO_PREALLOC, struct member_slot, struct member,
	       1 << 20);
MAP(route_states, BPF_MAP_TYPE_ARRAY, __u32, struct route_state, 1 << 19);

/*
 * Group VIP → service: the balancer puts the service's address back with it. It lives in this
 * object so that it exists, pinned, whichever of the two is loaded first.
 */
MAP(vip_inner_dst, BPF_MAP_TYPE_HASH, struct vip_definition, struct vip_definition, MAX_GROUP_VIPS);

/* Keys of the cookies of delayed binding. */
MAP(handover_keys, BPF_MAP_TYPE_ARRAY, __u32, struct handover_keys, 1);

/* The sidecar's sign of life, by which rescues begin. */
MAP(rescuer, BPF_MAP_TYPE_ARRAY, __u32, struct rescuer, 1);

/* ---- bindings ---- */

static __always_inline binding_t binding_of(__u16 group, __u16 epoch)
{
	return epoch ? group | (__u32)epoch << 16 : 0;
}

static __always_inline __u16 binding_group(binding_t binding)
{
	return binding;
}

/* The group that a binding means, if it is still there. */
static __always_inline const struct group *group_of(binding_t binding)
{
	__u32 key = binding_group(binding);
	const struct group *g = bpf_map_lookup_elem(&groups, &key);

	return g && binding && READ_ONCE(g->epoch) == binding >> 16 ? g : NULL;
}

/* Whether a flow that is bound so belongs to a group: it may be bound to one of its reals. */
static __always_inline bool belongs_to(binding_t bound, __u16 group)
{
	__u32 key = binding_group(bound);
	const struct group *g;

	if (key == group)
		return true;
	g = bpf_map_lookup_elem(&groups, &key);
	return g && READ_ONCE(g->parent) == group;
}

/* A binding to whatever group has this number now; 0: none has. */
static __always_inline binding_t binding_now(__u16 group)
{
	__u32 key = group;
	const struct group *g = bpf_map_lookup_elem(&groups, &key);

	return g ? binding_of(group, READ_ONCE(g->epoch)) : 0;
}

/* The binding to a service's relay; 0: it has none. */
static __always_inline binding_t relay_of(const struct service *svc)
{
	return svc->relay == NO_GROUP ? 0 : binding_now(svc->relay);
}

#endif /* MQTT_FWD_MAPS_CONFIG_H */
