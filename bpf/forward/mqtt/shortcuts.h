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
#define SAME_TOPIC_MAX 32 /* bytes of a topic of theirs */

static __always_inline bool is_last_topic(const struct flow *f, const struct service_table *t,
					  __u64 print)
{
	return print && print == f->topic_print && f->generation == t->generation;
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
	flow_topic(f, 0, 0);
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
 * alias, or with the flow's last topic; with a remaining length of one byte. Segments can hold
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
			if (topic && (topic > SAME_TOPIC_MAX || s->offset + 4 + topic > s->end ||
				      !is_last_topic(f, p->t,
						     topic_print(p->ctx, p->t, s->offset + 4, topic,
								 SAME_TOPIC_MAX)) ||
				      !publish_again(f)))
				return;
			tally(w, publish_reason(f));
		}
		s->offset += 2 + rest;
	}
}

#endif /* MQTT_FWD_FRAMING_AGAIN_H */
