/* SPDX-License-Identifier: GPL-2.0-only */
/* The group of a topic that lies whole in the segment: known from before, or walked through the routes. */
#ifndef MQTT_FWD_TOPIC_H
#define MQTT_FWD_TOPIC_H

#include "../learn/record.h"
#include "route.h"

/*
 * What a segment may spend on topics other than its flow's last, in units of about 50 ns. A walk
 * through the routes is for topics that `topics` does not know, and costs one more for each level
 * that is looked up; long topics cost what their bytes cost. PUBLISHes beyond that are framed and
 * not judged.
 */
#define TOPIC_BUDGET 40
#define TOPIC_COST_STORED 2
#define TOPIC_COST_WALK 24
#define TOPIC_BYTES_A_UNIT 32

/* The hash of a text that lies in the frame and is at most TOPIC_TEXT_MAX long; 0: it does not. */
static __always_inline __u64 text_hash_inline(struct xdp_md *ctx, __u64 key0, __u64 key1,
					      __u32 offset, __u32 length)
{
	const void *end = frame_end(ctx);
	const __u8 *pos = frame_start(ctx);
	__u32 left = length;
	struct siphash h;

	siphash_init(&h, key0, key1);
	pos += offset & FRAME_MASK;
	for (int i = 0; i < TOPIC_TEXT_MAX / 8; i++) {
		if (left < 8)
			break;
		/* Or clang computes with `end`, which the verifier forbids. */
		barrier_var(pos);
		if ((void *)(pos + 8) > end)
			return 0;
		siphash_word(&h, load_le64(pos));
		pos += 8;
		left -= 8;
	}

	__u64 tail = 0;
	if (left && !frame_bytes(ctx, offset + length - left, left, &tail))
		return 0;
	return siphash_final(&h, tail, length);
}

/* Where no established flow's messages come by. Global (see event.h). */
__noinline __u64 text_hash(struct xdp_md *ctx, __u64 key0, __u64 key1, __u32 offset, __u32 length)
{
	return text_hash_inline(ctx, key0, key1, offset, length);
}

static __always_inline __u64 topic_hash(struct xdp_md *ctx, const struct service_table *t,
					__u32 service, __u32 offset, __u32 length)
{
	return text_hash(ctx, t->topic_key[0] ^ service, t->topic_key[1], offset, length);
}

/*
 * What tells a topic from its flow's last, in a fifth of the time of its hash: a word of the text in, one to one. Two
 * topics of a flow that have the same print, which only its own client can contrive, are one topic to it.
 */
static __always_inline __u64 print_word(__u64 print, __u64 word)
{
	print = (print ^ word) * 0x9e3779b97f4a7c15ULL;
	return print ^ print >> 32;
}

/* The print of a topic that lies in the frame and is at most `max` long; 0: it does not. */
static __always_inline __u64 topic_print(struct xdp_md *ctx, const struct service_table *t,
					 __u32 offset, __u32 length, const __u32 max)
{
	__u64 print = print_word(t->topic_key[0], length);
	const void *end = frame_end(ctx);
	const __u8 *pos = frame_start(ctx);
	__u32 left = length;
	__u64 tail;

	pos += offset & FRAME_MASK;
	for (__u32 i = 0; i < max / 8; i++) {
		if (left < 8)
			break;
		/* As in text_hash(). */
		barrier_var(pos);
		if ((void *)(pos + 8) > end)
			return 0;
		print = print_word(print, load_le64(pos));
		pos += 8;
		left -= 8;
	}
	if (left) {
		if (!frame_bytes(ctx, offset + length - left, left, &tail))
			return 0;
		print = print_word(print, tail);
	}
	return print ?: 1;
}

/* The group of the topic in w->stream, which is complete. */
static __always_inline binding_t stream_binding(const struct scratch *w, const struct service *svc)
{
	__u16 group = route_group(w->stream.state, svc);

	return group == ANY_GROUP ? ANY_GROUP : binding_now(group);
}

/* As topic_judge(), for a topic that is not stored, and is from now on. Global (see event.h). */
__noinline int topic_walk(struct xdp_md *ctx, const struct service_table *t,
			  const struct service *svc, __u32 offset, __u32 length)
{
	struct scratch *w = scratch();

	if (!t || !svc || !w)
		return 0;
	topic_begin(&w->stream, t, svc);
	topic_feed(ctx, t, svc, offset, length);
	if (!(w->stream.flags & ROUTE_FINAL))
		topic_end(t, svc);
	w->budget -= TOPIC_COST_WALK + w->stream.lookups + length / TOPIC_BYTES_A_UNIT;
	w->publish.to = stream_binding(w, svc);
	topic_store(svc);
	return 0;
}

/*
 * A topic that is not long, and whose hash is in scratch.publish: its group, or ANY_GROUP, goes there; 0: none
 * (group gone). What it cost is taken from scratch.budget.
 */
static __always_inline void topic_judge(struct xdp_md *ctx, const struct service_table *t,
					const struct service *svc, struct scratch *w, __u32 offset,
					__u32 length)
{
	const struct topic *stored = bpf_map_lookup_elem(&topics, &w->publish.hash);
	const struct topic_verdict *v = stored ? &stored->verdict[t->generation & 1] : NULL;

	w->publish.generation = t->generation;
	if (v && v->generation == t->generation) {
		w->budget -= TOPIC_COST_STORED;
		w->publish.to = v->binding;
		return;
	}
	topic_walk(ctx, t, svc, offset, length);
}

#endif /* MQTT_FWD_TOPIC_H */
