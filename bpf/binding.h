/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Flows' bindings once more, for segments without data: those need nothing else of a flow. With a
 * million flows, what a packet costs is cache and TLB misses, and a hash table with LRU has two
 * that wait for each other, in memory too large for either. This table has one, and is small: a
 * set is a cache line, a slot 8 bytes.
 *
 * It is a cache. What is not in it is in `flows`, and whatever binds a flow anew writes it here,
 * too, unless the old group is gone: its epoch tells. Of a flow that `flows` has forgotten, it may still know the group.
 *
 * A flow is 56 bits here. IPv4: 0, service, port and address, which is all of it, so that nobody
 * can be taken for another. IPv6: 1 and 55 bits of a keyed hash. They are mixed, one to one; the
 * set and the 40 bits in the slot together are all of them again. A slot is one word, written and
 * read at once.
 */
#ifndef MQTT_FWD_BINDING_H
#define MQTT_FWD_BINDING_H

#include "conn.h"

#define FLOW_BITS 56
#define FLOW_MASK ((1ULL << FLOW_BITS) - 1)
#define SLOT_GROUP_BITS 12 /* MAX_GROUP_VIPS */
#define SLOT_EPOCH_BITS 12
#define SLOT_FLOW_SHIFT (SLOT_GROUP_BITS + SLOT_EPOCH_BITS)

/* log2 of the sets in `bindings`: 16 or more. */
const volatile __u32 binding_set_bits = 16;

static __always_inline __u64 binding_flow(const struct conn *c, const struct service_table *t)
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

static __always_inline struct binding_set *binding_set_of(__u64 flow)
{
	__u32 set = flow >> ((FLOW_BITS - binding_set_bits) & 63);

	return bpf_map_lookup_elem(&bindings, &set);
}

/* What a slot of this flow has above its group and epoch. */
static __always_inline __u64 slot_flow(__u64 flow)
{
	return flow << SLOT_FLOW_SHIFT;
}

static __always_inline bool slot_is(__u64 slot, __u64 flow)
{
	return !((slot ^ slot_flow(flow)) >> SLOT_FLOW_SHIFT);
}

static __always_inline __u16 binding_group(__u32 binding)
{
	return binding & ((1 << SLOT_GROUP_BITS) - 1);
}

static __always_inline __u32 binding_epoch(__u32 epoch)
{
	return epoch & ((1 << SLOT_EPOCH_BITS) - 1);
}

/* The group that the flow is bound to, if it is known here and still there. */
static __always_inline const struct group *group_of_binding(__u32 binding)
{
	__u32 key = binding_group(binding);
	__u32 epoch = binding_epoch(binding >> SLOT_GROUP_BITS);
	const struct group *g = bpf_map_lookup_elem(&groups, &key);

	return g && epoch && binding_epoch(g->epoch) == epoch ? g : NULL;
}

/* Group and epoch as they are in a slot; 0: not known here. */
__noinline int binding_find(const struct conn *c, const struct service_table *t)
{
	if (!c || !t)
		return 0;

	__u64 flow = binding_flow(c, t), found = 0;
	const struct binding_set *set = binding_set_of(flow);

	if (!set)
		return 0;
	for (int i = 0; i < BINDING_WAYS; i++) {
		if (slot_is(set->slot[i], flow))
			found = set->slot[i];
	}
	return found & ((1 << SLOT_FLOW_SHIFT) - 1);
}

/*
 * Makes what is known of the flow right: this group, or none if there is no epoch. Adds nothing, and
 * writes only what differs, for a new flow has to look here, but will mostly find nothing. Returns
 * whether it was known.
 */
__noinline int binding_correct(const struct conn *c, const struct service_table *t, __u16 group,
			       __u16 epoch)
{
	if (!c || !t)
		return false;

	__u64 flow = binding_flow(c, t);
	__u64 right = epoch ? slot_flow(flow) | binding_epoch(epoch) << SLOT_GROUP_BITS | group : 0;
	struct binding_set *set = binding_set_of(flow);
	bool known = false;

	if (!set)
		return false;
	/* There may be two, if two CPUs have added it at once. */
	for (int i = 0; i < BINDING_WAYS; i++) {
		if (!slot_is(set->slot[i], flow))
			continue;
		known = true;
		if (set->slot[i] != right)
			set->slot[i] = right;
	}
	return known;
}

/* The same, and if it was not known, it is now: in a free slot, or in place of any other. */
__noinline int binding_keep(const struct conn *c, const struct service_table *t, __u16 group,
			    __u16 epoch)
{
	if (!c || !t || !epoch || binding_correct(c, t, group, epoch))
		return 0;

	__u64 flow = binding_flow(c, t);
	struct binding_set *set = binding_set_of(flow);
	__u32 slot = bpf_get_prandom_u32();

	if (!set)
		return 0;
	for (int i = 0; i < BINDING_WAYS; i++) {
		if (!set->slot[i])
			slot = i;
	}
	set->slot[slot & (BINDING_WAYS - 1)] =
		slot_flow(flow) | binding_epoch(epoch) << SLOT_GROUP_BITS | group;
	return 0;
}

#endif /* MQTT_FWD_BINDING_H */
