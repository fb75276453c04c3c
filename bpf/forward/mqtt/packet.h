/* SPDX-License-Identifier: GPL-2.0-only */
/* One control packet after the other, up to a topic that has to be judged. */
#ifndef MQTT_FWD_FRAMING_PACKET_H
#define MQTT_FWD_FRAMING_PACKET_H

#include "shortcuts.h"
#include "parse_state.h"

/*
 * Whether nothing is left for this topic. A long one, or one that is cut off, costs by its bytes, so it
 * has to fit; unless it is the segment's first, for then it is judged, whatever it costs.
 */
static __always_inline bool over_budget(const struct scratch *w, const struct header *h,
					const struct span *s)
{
	__u32 room = s->end - s->offset - h->length;
	__s32 cost;

	if (w->budget <= 0 || w->budget == TOPIC_BUDGET)
		return w->budget <= 0;
	if (h->topic <= TOPIC_TEXT_MAX && h->topic <= room)
		return false;
	cost = TOPIC_COST_WALK + (h->topic < room ? h->topic : room) / TOPIC_BYTES_A_UNIT;
	return w->budget < cost;
}

static __always_inline void topic_start(const struct parse *p, __u32 length, __u32 left)
{
	p->f->parser = PARSER_TOPIC;
	p->f->topic_left = length;
	p->f->remaining = left;
	p->w->stop_reason = STOP_STREAM;
}

/*
 * One control packet whose header lies in this segment: all but a few. Returns false, having
 * changed nothing, if it has to be taken byte by byte.
 */
static __always_inline bool parse_whole(const struct parse *p, struct span *s)
{
	struct flow *f = p->f;
	struct scratch *w = p->w;
	struct header h;

	switch (read_header(p->ctx, s->offset, s->end, &h)) {
	case HEADER_CUT:
		return false;
	case HEADER_MALFORMED:
		if (!connect_missing(p, s, h.type))
			malformed(p, s);
		return true;
	case HEADER_WHOLE:
		break;
	}
	if (connect_missing(p, s, h.type))
		return true;
	if (h.type >> 4 != MQTT_PUBLISH) {
		if (h.type >> 4 == MQTT_SUBSCRIBE)
			w->stop_reason = STOP_SUBSCRIBE;
		packet_end(p, s, h.length + h.remaining);
		return true;
	}
	if (h.topic == 0) {
		/* MQTT 5 §3.3.2.3.4: a topic alias stands for a topic of this flow. */
		tally(w, publish_reason(f));
		packet_end(p, s, h.length + h.remaining);
		return true;
	}
	if (over_budget(w, &h, s)) {
		publish_unjudged(p, s->offset);
		packet_end(p, s, h.length + h.remaining);
		return true;
	}

	__u32 topic = s->offset + h.length;
	bool whole = h.topic <= TOPIC_TEXT_MAX && topic + h.topic <= s->end;
	__u64 print = whole ? topic_print(p->ctx, p->t, topic, h.topic, TOPIC_TEXT_MAX) : 0;
	bool last = is_last_topic(f, p->t, print);
	__u64 hash = last    ? f->topic
		     : whole ? text_hash_inline(p->ctx, p->t->topic_key[0] ^ service_of(p)->id,
						p->t->topic_key[1], topic, h.topic)
			     : 0;

	if (hash && hash == f->topic && f->generation == p->t->generation) {
		f->topic_print = print; /* not known of one that was split */
		last = true;
	}
	if (last && publish_again(f)) {
		tally(w, publish_reason(f));
		packet_end(p, s, h.length + h.remaining);
		return true;
	}
	w->start = s->offset;
	s->offset = topic;
	f->type = h.type;
	if (!hash) {
		topic_start(p, h.topic, h.remaining - h.topic);
	} else {
		w->stop_reason = STOP_TOPIC;
		w->hash = hash;
		w->print = print;
		w->topic_length = h.topic;
		w->after_topic = h.remaining - h.topic;
	}
	return true;
}

/* A control packet but PUBLISH, whose header was split over segments. */
static __always_inline void other_end(const struct parse *p, struct span *s)
{
	if (p->f->type >> 4 == MQTT_SUBSCRIBE)
		p->w->stop_reason = STOP_SUBSCRIBE;
	packet_end(p, s, p->f->remaining);
}

/* One byte of a header that is split over segments. */
static __always_inline void parse_byte(const struct parse *p, struct span *s, __u8 byte)
{
	struct flow *f = p->f;

	s->offset++;
	switch (f->parser) {
	case PARSER_TYPE:
		if (connect_missing(p, s, byte))
			return;
		if (!type_valid(byte)) {
			malformed(p, s);
			return;
		}
		f->type = byte;
		f->remaining = 0;
		f->length_shift = 0;
		f->parser = PARSER_LENGTH;
		return;
	case PARSER_LENGTH:
		f->remaining |= (__u32)(byte & 0x7f) << (f->length_shift & 31);
		f->length_shift += 7;
		if (byte & 0x80) {
			if (f->length_shift > 21)
				malformed(p, s);
			return;
		}
		if (!length_valid(f->type, f->remaining))
			malformed(p, s);
		else if (f->type >> 4 == MQTT_PUBLISH)
			f->parser = PARSER_TOPIC_LENGTH_HIGH;
		else
			other_end(p, s);
		return;
	case PARSER_TOPIC_LENGTH_HIGH:
		f->topic_left = byte << 8;
		f->parser = PARSER_TOPIC_LENGTH_LOW;
		return;
	default:
		f->topic_left |= byte;
		if (!topic_fits(f->type, f->topic_left, f->remaining)) {
			malformed(p, s);
		} else if (f->topic_left == 0) {
			tally(p->w, publish_reason(f));
			packet_end(p, s, f->remaining - 2);
		} else {
			/* Its first byte is of an earlier segment, or not: see topic_step(). */
			topic_start(p, f->topic_left, f->remaining - 2 - f->topic_left);
		}
	}
}

/* One control packet, or one byte of a header that is split. Stops at a topic. */
static long frame_step(__u32 index, void *arg)
{
	const struct parse *p = arg;
	/* In the map, not on the stack, between the steps (see struct scratch). */
	struct span s = {.offset = p->w->offset, .end = p->w->end};
	const __u8 *byte;

	(void)index;
	if (s.offset >= s.end || p->w->stop_reason != STOP_NONE)
		return 1;
	if (p->f->parser == PARSER_TYPE) {
		p->w->start = s.offset;
		if (p->f->flags & FLOW_CONNECTED) {
			skip_simple(p, &s);
			if (s.offset != p->w->offset) {
				p->w->offset = s.offset;
				return 0;
			}
		}
	}
	if (p->f->parser != PARSER_TYPE || !parse_whole(p, &s)) {
		byte = frame_at(p->ctx, s.offset, 1);
		if (!byte)
			return 1;
		parse_byte(p, &s, *byte);
	}
	p->w->offset = s.offset;
	return 0;
}

#endif /* MQTT_FWD_FRAMING_PACKET_H */
