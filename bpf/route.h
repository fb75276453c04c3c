/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Topic → group: the topic's levels drive an automaton that user space compiled from the
 * routes (src/routes/compile.rs). Cost: at most two look-ups a level, however many routes.
 */
#ifndef MQTT_FWD_ROUTE_H
#define MQTT_FWD_ROUTE_H

#include "maps.h"

/* State 0 is a dead end: no route can match any more. */
#define ROUTE_DEAD 0

/* Not inlined: its key does not belong on the stack of the parser, which is deep enough. */
__noinline __u32 route_step(__u32 state, __u64 level)
{
	if (state == ROUTE_DEAD)
		return ROUTE_DEAD;

	struct route_edge key = { .level = level, .state = state };
	const __u32 *next = bpf_map_lookup_elem(&mqtt_topic_to_vip, &key);
	if (next)
		return *next;

	const struct route_state *s = bpf_map_lookup_elem(&route_states, &state);
	return s ? s->other : ROUTE_DEAD;
}

static __always_inline __u16 route_group(__u32 state, const struct service *svc)
{
	const struct route_state *s = NULL;

	if (state != ROUTE_DEAD)
		s = bpf_map_lookup_elem(&route_states, &state);
	return s && s->group != NO_GROUP ? s->group : svc->default_group;
}

static __always_inline void topic_begin(struct topic_stream *s, const struct service_table *t,
					const struct service *svc)
{
	siphash_stream_init(&s->whole, t->topic_key[0] ^ svc->id, t->topic_key[1]);
	siphash_stream_init(&s->level, t->route_key[0], t->route_key[1]);
	s->state = svc->start;
	s->generation = t->generation;
}

static __always_inline void topic_level_end(struct topic_stream *s, const struct service_table *t)
{
	s->state = route_step(s->state, siphash_stream_final(&s->level));
	siphash_stream_init(&s->level, t->route_key[0], t->route_key[1]);
}

static __always_inline void topic_byte(struct topic_stream *s, const struct service_table *t,
				       const struct service *svc, __u8 byte)
{
	__u32 position = s->whole.length;

	if (position == 0 && byte == '$')
		s->state = svc->start_dollar;
	if (position < TOPIC_TEXT_MAX)
		s->text[position & (TOPIC_TEXT_MAX - 1)] = byte;
	siphash_byte(&s->whole, byte);
	if (byte == '/')
		topic_level_end(s, t);
	else
		siphash_byte(&s->level, byte);
}

#endif /* MQTT_FWD_ROUTE_H */
