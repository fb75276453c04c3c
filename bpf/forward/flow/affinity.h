/* SPDX-License-Identifier: GPL-2.0-only */
/* Which real of its group a connection goes to, where that is chosen here and not by the balancer. */
#ifndef MQTT_FWD_BIND_AFFINITY_H
#define MQTT_FWD_BIND_AFFINITY_H

#include "../../maps/config.h"
#include "../../maps/scratch.h"

static __always_inline const struct member *member_at(const struct service_table *t, __u16 group,
						      __u32 slot)
{
	struct member_slot key = {.group = group, .generation = t->generation & 1, .slot = slot};

	return bpf_map_lookup_elem(&members, &key);
}

/* Whether the topic chooses among a group's reals: then a client id alone is not enough. */
static __always_inline bool needs_topic(const struct service_table *t, const struct service *svc,
					binding_t binding)
{
	const struct member *m = NULL;

	if (svc->has_members && binding)
		m = member_at(t, binding_group(binding), 0);
	return m && m->affinity == AFFINITY_TOPIC;
}

/* A topic's place, by its hash; 0: it is not stored. */
static __always_inline __u64 topic_place(struct scratch *w, __u64 hash)
{
	const struct topic *topic;

	w->hash = hash;
	topic = bpf_map_lookup_elem(&topics, &w->hash);
	return topic ? topic->place : 0;
}

/*
 * The binding to one real of a group, by client id or topic, whichever the group wants; without one,
 * by the client's address. The binding itself, if the balancer chooses. Global (see event.h).
 */
__noinline __u64 member_of(const struct conn *c, const struct service_table *t,
			   const struct service *svc, __u64 binding, __u64 place)
{
	struct scratch *w = scratch();
	const struct member *m;
	__u64 hash;

	if (!c || !t || !svc || !w || !svc->has_members)
		return binding;
	m = member_at(t, binding_group(binding), 0);
	if (!m)
		return binding;
	hash = m->affinity == AFFINITY_TOPIC ? place : w->id;
	if (!hash)
		hash = c->key.addr[0] ^ c->key.addr[1] ^ c->key.addr[2] ^ c->key.addr[3];
	m = member_at(t, binding_group(binding), hash % MEMBER_SLOTS);
	return (m ? binding_now(m->group) : 0) ?: binding;
}

#endif /* MQTT_FWD_BIND_AFFINITY_H */
