/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Flows' bindings once more, for segments without data: those need nothing else of a flow. With a
 * million flows, what a packet costs is cache and TLB misses, and a hash table with LRU has two
 * that wait for each other, in memory too large for either. This table has one, and is small: a
 * set is a cache line, a slot 8 bytes.
 *
 * What is not in it is in `flows`, and whatever binds a flow again writes it here, too, unless the
 * old group is gone: its epoch tells. Of a flow that `flows` has evicted, it may still know the
 * group.
 *
 * A flow is 56 bits here. IPv4: 0, service, port and address, which is all of it, so that no flow
 * can be taken for another. IPv6: 1 and 55 bits of a keyed hash. They are mixed, one to one; the
 * set and the 40 bits in the slot together are all of them again. A slot is one word, written and
 * read at once.
 */
#ifndef MQTT_FWD_CACHE_H
#define MQTT_FWD_CACHE_H

#include "../../maps/config.h"
#include "../../maps/state.h"
#include "conn.h"

#define FLOW_BITS 56
#define FLOW_MASK ((1ULL << FLOW_BITS) - 1)
#define SLOT_GROUP_BITS 12
#define SLOT_EPOCH_BITS 12
#define SLOT_FLOW_SHIFT (SLOT_GROUP_BITS + SLOT_EPOCH_BITS)
#define CACHE_SET_BITS_MIN 16

_Static_assert(MAX_GROUP_VIPS <= 1 << SLOT_GROUP_BITS, "a slot holds any group's number");
_Static_assert(FLOW_BITS - CACHE_SET_BITS_MIN <= 64 - SLOT_FLOW_SHIFT, "set and slot are the flow");
_Static_assert(48 + 4 <= FLOW_BITS - 1 && MAX_SERVICES <= 1 << 4, "an IPv4 flow is its own key");

/* log2 of the sets: CACHE_SET_BITS_MIN or more. */
const volatile __u32 cache_set_bits = CACHE_SET_BITS_MIN;

static __always_inline __u64 cache_flow(const struct conn *c, const struct service_table *t)
{
	__u64 flow;

	if (c->v6) {
		struct siphash h;

		siphash_init(&h, t->topic_key[0], t->topic_key[1]);
		siphash_word(&h, c->key.addr[0] | (__u64)c->key.addr[1] << 32);
		siphash_word(&h, c->key.addr[2] | (__u64)c->key.addr[3] << 32);
		flow = siphash_final(&h, c->key.port | (__u32)c->key.service << 16, sizeof(c->key));
		flow = (flow & FLOW_MASK) | 1ULL << (FLOW_BITS - 1);
	} else {
		flow = c->key.addr[0] | (__u64)c->key.port << 32 | (__u64)c->key.service << 48;
	}
	/* Each step can be undone: xor, multiplication by an odd number, xor of the upper half. */
	flow = (flow ^ t->topic_key[0]) & FLOW_MASK;
	flow = flow * 0x9e3779b97f4a7c15ULL & FLOW_MASK;
	flow ^= flow >> (FLOW_BITS / 2);
	return flow * 0xc2b2ae3d27d4eb4fULL & FLOW_MASK;
}

static __always_inline struct cache_set *cache_set_of(__u64 flow)
{
	__u32 set = flow >> ((FLOW_BITS - cache_set_bits) & 63);

	return bpf_map_lookup_elem(&binding_cache, &set);
}

/* A slot of this flow, with a binding whose epoch has fewer bits than usual. */
static __always_inline __u64 slot_of(__u64 flow, binding_t binding)
{
	__u32 epoch = (binding >> 16) & ((1 << SLOT_EPOCH_BITS) - 1);

	return flow << SLOT_FLOW_SHIFT | epoch << SLOT_GROUP_BITS | binding_group(binding);
}

static __always_inline bool slot_is(__u64 slot, __u64 flow)
{
	return !((slot ^ flow << SLOT_FLOW_SHIFT) >> SLOT_FLOW_SHIFT);
}

/* Group and epoch as they are in a flow's slot; 0: it is not known here. */
static __always_inline __u32 cache_find(const struct conn *c, const struct service_table *t)
{
	__u64 flow = cache_flow(c, t), found = 0;
	const struct cache_set *set = cache_set_of(flow);

	if (!set)
		return 0;
	for (int i = 0; i < CACHE_WAYS; i++) {
		__u64 slot = READ_ONCE(set->slot[i]);
		if (slot_is(slot, flow))
			found = slot;
	}
	return found & ((1 << SLOT_FLOW_SHIFT) - 1);
}

/* The group that a flow has by its slot, if it is still there. */
static __always_inline const struct group *group_of_slot(__u32 slot)
{
	__u32 key = slot & ((1 << SLOT_GROUP_BITS) - 1), epoch = slot >> SLOT_GROUP_BITS;
	const struct group *g = bpf_map_lookup_elem(&groups, &key);

	return g && epoch && (READ_ONCE(g->epoch) & ((1 << SLOT_EPOCH_BITS) - 1)) == epoch ? g
											   : NULL;
}

/* A flow's binding as far as it is known here; else 0. Global (see event.h). */
__noinline __u32 cache_binding(const struct conn *c, const struct service_table *t)
{
	__u32 slot;

	if (!c || !t)
		return 0;
	slot = cache_find(c, t);
	return group_of_slot(slot) ? binding_now(slot & ((1 << SLOT_GROUP_BITS) - 1)) : 0;
}

/*
 * Makes what is known of the flow right; 0: nothing is to be known. Adds nothing, and writes
 * only what differs, for a new flow has to look here, but will mostly find nothing. Returns
 * whether it was known.
 */
__noinline int cache_correct(const struct conn *c, const struct service_table *t, binding_t binding)
{
	if (!c || !t)
		return false;

	__u64 flow = cache_flow(c, t);
	__u64 right = binding ? slot_of(flow, binding) : 0;
	struct cache_set *set = cache_set_of(flow);
	bool known = false;

	if (!set)
		return false;
	/* There may be two, if two CPUs have added it at once. */
	for (int i = 0; i < CACHE_WAYS; i++) {
		__u64 slot = READ_ONCE(set->slot[i]);
		if (!slot_is(slot, flow))
			continue;
		known = true;
		if (slot != right)
			WRITE_ONCE(set->slot[i], right);
	}
	return known;
}

/* The same, and if it was not known, it is now: in a free slot, or in place of any other. */
__noinline int cache_keep(const struct conn *c, const struct service_table *t, binding_t binding)
{
	if (!c || !t || !binding || cache_correct(c, t, binding))
		return 0;

	__u64 flow = cache_flow(c, t);
	struct cache_set *set = cache_set_of(flow);
	__u32 slot = bpf_get_prandom_u32();

	if (!set)
		return 0;
	for (int i = 0; i < CACHE_WAYS; i++) {
		if (!READ_ONCE(set->slot[i]))
			slot = i;
	}
	WRITE_ONCE(set->slot[slot & (CACHE_WAYS - 1)], slot_of(flow, binding));
	return 0;
}

#endif /* MQTT_FWD_CACHE_H */
