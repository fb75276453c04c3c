/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Shortcuts: almost every PUBLISH has its flow's last topic, and almost every other control packet
 * asks for nothing but its length.
 */
#ifndef MQTT_FWD_FRAMING_AGAIN_H
#define MQTT_FWD_FRAMING_AGAIN_H

#include "publish.h"
#include "topic_group.h"
#include "parse_state.h"

#define SIMPLE_PACKETS 8 /* at once */
#define SAME_TOPIC_MAX 32 /* bytes that are compared rather than hashed */

/* The hash of a PUBLISH's topic if all of it lies in the segment and is not long; else 0. */
static __always_inline __u64 header_topic(struct xdp_md *ctx, const struct service_table *t,
					  __u32 service, const struct header *h, __u32 offset,
					  __u32 end)
{
	if (h->topic > TOPIC_TEXT_MAX || offset + h->length + h->topic > end)
		return 0;
	return topic_hash(ctx, t, service, offset + h->length, h->topic);
}

static __always_inline bool is_last_topic(const struct flow *f, const struct service_table *t,
					  __u64 hash)
{
	return hash && hash == f->topic && f->generation == t->generation;
}

/* Whether the topic at `offset` is the one at w->same, the flow's last. Short ones only. */
static __always_inline bool is_same_topic(struct xdp_md *ctx, const struct scratch *w, __u32 offset,
					  __u32 length)
{
	__u32 same = w->last_topic_off;
	const __u8 *a, *b;

	if (!length || length != w->last_topic_len || length > SAME_TOPIC_MAX)
		return false;
#pragma unroll
	for (__u32 i = 0; i < SAME_TOPIC_MAX / 8; i++) {
		if (8 * i + 8 > length)
			break;
		a = frame_at(ctx, same + 8 * i, 8);
		b = frame_at(ctx, offset + 8 * i, 8);
		if (!a || !b || *(__u64 *)a != *(__u64 *)b)
			return false;
	}
	if (!(length & 7))
		return true;
	/* The eight bytes that end with the topic: headers lie before it, always. */
	a = frame_at(ctx, same + length - 8, 8);
	b = frame_at(ctx, offset + length - 8, 8);
	return a && b && !((load_le64(a) ^ load_le64(b)) >> (64 - 8 * (length & 7)));
}

/*
 * A PUBLISH at `offset` that is not judged: nothing is known of its topic. If there is a relay, framing stops at the
 * segment's first one, for the flow may belong there. Whether it does.
 */
static __always_inline bool publish_unjudged(const struct parse *p, __u32 offset)
{
	struct scratch *w = p->w;
	struct flow *f = p->f;

	tally(w, f->flags & FLOW_ENDED ? REASON_PUBLISH_LOST : REASON_UNJUDGED);
	w->last_topic_len = 0;
	f->topic = 0;
	f->unrecorded = 0;
	f->flags &= ~(FLOW_MISROUTED | FLOW_ANY_TOPIC);
	if (w->relay_asked || service_of(p)->relay == NO_GROUP)
		return false;
	w->relay_asked = true;
	w->start = offset;
	w->stop_reason = STOP_UNJUDGED;
	return true;
}

/*
 * A few control packets that ask for nothing but a look at their header: not PUBLISH, or with an
 * alias, or with the topic at w->last_topic_off; with a remaining length of one byte. Segments can hold
 * hundreds. Leaves the first other one to parse_whole().
 */
static __always_inline void skip_simple(const struct parse *p, struct span *s)
{
	struct flow *f = p->f;
	struct scratch *w = p->w;

	for (int i = 0; i < SIMPLE_PACKETS; i++) {
		const __u8 *b = frame_at(p->ctx, s->offset, 4);
		__u32 rest, topic;

		if (!b || s->offset + 4 > s->end || b[1] & 0x80)
			return;
		rest = b[1];
		if (b[0] >> 4 != MQTT_PUBLISH) {
			if (b[0] >> 4 == MQTT_SUBSCRIBE || !type_valid(b[0]) ||
			    !length_valid(b[0], rest))
				return;
		} else {
			topic = b[2] << 8 | b[3];
			if (!type_valid(b[0]) || rest < 2 || !topic_fits(b[0], topic, rest))
				return;
			if (topic && w->budget <= 0) {
				bool stop = publish_unjudged(p, s->offset);

				s->offset += 2 + rest;
				if (stop)
					return;
				continue;
			}
			if (topic &&
			    (s->offset + 4 + topic > s->end || f->generation != p->t->generation ||
			     !is_same_topic(p->ctx, w, s->offset + 4, topic) || !publish_again(f)))
				return;
			if (topic)
				w->last_topic_off = s->offset + 4;
			tally(w, publish_reason(f));
		}
		s->offset += 2 + rest;
	}
}

#endif /* MQTT_FWD_FRAMING_AGAIN_H */
