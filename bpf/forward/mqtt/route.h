/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Topic → group: the topic's levels drive an automaton that user space compiled from the
 * routes (src/routes/compile.rs). Cost: at most two look-ups a level, however many routes, and
 * none once no further level can change anything.
 */
#ifndef MQTT_FWD_ROUTE_H
#define MQTT_FWD_ROUTE_H

#include "../../lib/mqtt.h"
#include "../../maps/config.h"
#include "../../maps/scratch.h"

/* State 0 is a dead end: no route can match any more. */
#define ROUTE_DEAD 0

static __always_inline void route_enter(struct topic_stream *s, __u32 state)
{
	const struct route_state *next = NULL;

	s->state = state;
	if (state != ROUTE_DEAD)
		next = bpf_map_lookup_elem(&route_states, &s->state);
	s->flags = next ? next->flags : ROUTE_FINAL;
}

/* The state after one more level. Its keys are in the stream: the stack has no room for them. */
static __always_inline __u32 route_step(struct topic_stream *s, __u64 level, __u32 may_be_literal)
{
	const struct route_state *state;
	const __u32 *next;

	if (may_be_literal) {
		s->edge.level = level;
		s->edge.state = s->state;
		next = bpf_map_lookup_elem(&route_edges, &s->edge);
		if (next)
			return *next;
	}
	state = bpf_map_lookup_elem(&route_states, &s->state);
	return state ? state->other : ROUTE_DEAD;
}

/* The group of a topic that ends in this state: a group's number, or ANY_GROUP. */
static __always_inline __u16 route_group(__u32 state, const struct service *svc)
{
	const struct route_state *s = NULL;

	if (state != ROUTE_DEAD)
		s = bpf_map_lookup_elem(&route_states, &state);
	return s && s->group != NO_GROUP ? s->group : svc->default_group;
}

/* ---- a topic, in as many pieces as it comes ---- */

static __always_inline void topic_begin(struct topic_stream *s, const struct service_table *t,
					const struct service *svc)
{
	siphash_stream_init(&s->whole, t->topic_key[0] ^ svc->id, t->topic_key[1]);
	siphash_stream_init(&s->level, t->route_key[0], t->route_key[1]);
	s->generation = t->generation;
	s->lookups = 0;
	route_enter(s, svc->start);
}

static __always_inline void level_end(struct topic_stream *s, const struct service_table *t,
				      const struct service *svc)
{
	__u32 may_be_literal = s->flags & ROUTE_HAS_EDGES && s->level.length <= svc->longest_level;

	s->lookups += may_be_literal;
	route_enter(s, route_step(s, siphash_stream_final(&s->level), may_be_literal));
	siphash_stream_init(&s->level, t->route_key[0], t->route_key[1]);
}

/* The last level of the topic in scratch.stream ends. Global (see event.h). */
__noinline int topic_end(const struct service_table *t, const struct service *svc)
{
	struct scratch *w = scratch();

	if (t && svc && w)
		level_end(&w->stream, t, svc);
	return 0;
}

struct feed {
	struct xdp_md *ctx;
	struct topic_stream *s;
	const struct service_table *t;
	const struct service *svc;
};

/* So many words at once, with the hash's state in registers. */
#define FEED_WORDS 2

static long feed_words(__u32 i, void *arg)
{
	const struct feed *f = arg;
	struct siphash_stream *whole = &f->s->whole;
	const __u8 *p = frame_at(f->ctx, f->s->piece_off + 8 * FEED_WORDS * i, 8 * FEED_WORDS);
	struct siphash_stream s;

	if (!p)
		return 1;
	s = *whole;
#pragma unroll
	for (int j = 0; j < FEED_WORDS; j++)
		siphash_stream_bytes(&s, load_le64(p + 8 * j), 8);
	*whole = s;
	return 0;
}

/* What fills no FEED_WORDS words. */
static long feed_rest(__u32 i, void *arg)
{
	const struct feed *f = arg;
	struct topic_stream *s = f->s;
	__u32 bytes = s->piece_len < 8 ? s->piece_len : 8;
	__u64 word;

	(void)i;
	if (!bytes || !frame_bytes(f->ctx, s->piece_off, bytes, &word))
		return 1;
	siphash_stream_bytes(&s->whole, word, bytes);
	s->piece_off += bytes;
	s->piece_len -= bytes;
	return 0;
}

/* How many of eight bytes are in front of the first '/': the lowest upper bit that is set is that one's. */
static __always_inline __u32 before_slash(__u64 word)
{
	__u64 x = word ^ 0x2f2f2f2f2f2f2f2fULL;
	__u64 slashes = (x - 0x0101010101010101ULL) & ~x & 0x8080808080808080ULL;

	return slashes ? ((slashes & -slashes) >> 7) * 0x0001020304050607ULL >> 56 : 8;
}

/* Up to eight more bytes into the automaton, and no further than a level's end. */
static long feed_levels(__u32 i, void *arg)
{
	const struct feed *f = arg;
	struct topic_stream *s = f->s;
	__u32 bytes = s->piece_len < 8 ? s->piece_len : 8, level;
	__u64 word;

	(void)i;
	if (!bytes || s->flags & ROUTE_FINAL || !frame_bytes(f->ctx, s->piece_off, bytes, &word))
		return 1;
	level = before_slash(word);
	if (level < bytes) {
		word &= (1ULL << 8 * level) - 1;
		bytes = level + 1;
	} else {
		level = bytes;
	}
	s->piece_off += bytes;
	s->piece_len -= bytes;
	/* Longer than any literal, a level need not be hashed any further. */
	if (s->flags & ROUTE_HAS_EDGES && s->level.length <= f->svc->longest_level)
		siphash_stream_bytes(&s->level, word, level);
	if (level < bytes)
		level_end(s, f->t, f->svc);
	return 0;
}

/* A piece of a topic that lies in the frame. Global (see event.h). */
__noinline int topic_feed(struct xdp_md *ctx, const struct service_table *t,
			  const struct service *svc, __u32 offset, __u32 length)
{
	struct scratch *w = scratch();

	if (!t || !svc || !w || !length || length > SEGMENT_MAX)
		return 0;

	struct topic_stream *s = &w->stream;
	struct feed f = {.ctx = ctx, .s = s, .t = t, .svc = svc};
	__u32 before = s->whole.length;
	const __u8 *p = frame_at(ctx, offset, 1);

	if (!p)
		return 0;
	s->piece_off = offset;
	s->piece_len = length;
	if (before == 0 && *p == '$')
		route_enter(s, svc->start_dollar);
	if (before < TOPIC_TEXT_MAX) {
		__u32 room = TOPIC_TEXT_MAX - before;
		__u32 copied = length < room ? length : room;

		barrier_var(copied);
		frame_copy(ctx, offset, s->text + (before & (TOPIC_TEXT_MAX - 1)), copied,
			   TOPIC_TEXT_MAX);
	}
	if (!(s->flags & ROUTE_FINAL))
		bpf_loop(length, feed_levels, &f, 0);

	s->piece_off = offset;
	bpf_loop(length / (8 * FEED_WORDS), feed_words, &f, 0);
	s->piece_off = offset + (length & ~(8U * FEED_WORDS - 1));
	s->piece_len = length % (8 * FEED_WORDS);
	bpf_loop(FEED_WORDS, feed_rest, &f, 0);
	return 0;
}

#endif /* MQTT_FWD_ROUTE_H */
