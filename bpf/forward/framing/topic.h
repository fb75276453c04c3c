/* SPDX-License-Identifier: GPL-2.0-only */
/* The topics that framing stopped at: whole in the segment, or in pieces. */
#ifndef MQTT_FWD_FRAMING_TOPIC_H
#define MQTT_FWD_FRAMING_TOPIC_H

#include "../learn.h"
#include "packet.h"

/*
 * The topic that framing stopped at lies whole in the segment, and is not long: known from an
 * earlier PUBLISH of anybody, or walked through the routes.
 */
static __always_inline void whole_topic(const struct parse *p)
{
	struct work *w = p->w;
	__u64 hash = w->hash;
	struct publish *publish = &w->publish;

	publish->hash = hash;
	publish->generation = p->t->generation;
	publish->start = start_seq(p);
	publish->inside = false;
	publish->to = topic_binding(p->ctx, p->t, p->svc, w, hash, w->offset, w->topic_length);
	publish_judge(p->c, p->f, p->t, p->svc);
	p->f->parser = PARSER_TYPE;
	w->offset += w->topic_length + w->left;
}

/* A piece of a topic that is long, or split over segments. Returns whether framing goes on. */
static __always_inline bool streamed_topic(const struct parse *p)
{
	struct work *w = p->w;
	struct flow *f = p->f;
	__u32 here = w->end - w->offset;
	__u32 length = f->topic_left < here ? f->topic_left : here;

	topic_feed(p->ctx, p->t, p->svc, w->offset, length);
	w->budget -= length / TOPIC_BYTES_A_UNIT;
	f->topic_left -= length;
	w->offset += length;
	if (f->topic_left)
		return false;

	struct publish *publish = &w->publish;
	__u64 hash = siphash_stream_final(&w->stream.whole);

	publish->hash = hash;
	publish->generation = w->stream.generation;
	publish->start = start_seq(p);
	publish->inside = w->start == STARTED_BEFORE;
	f->parser = PARSER_TYPE;
	w->offset += f->remaining;
	if (hash == f->topic && publish->generation == f->generation && publish_again(f)) {
		tally(w, publish_reason(f));
		return true;
	}
	if (!(w->stream.flags & ROUTE_FINAL))
		topic_level_end(&w->stream, p->t, p->svc);
	w->budget -= TOPIC_COST_WALK + w->stream.steps;
	publish->to = stream_binding(w, p->svc);
	topic_store(w, hash, publish->to, p->svc, publish->generation);
	publish_judge(p->c, f, p->t, p->svc);
	return true;
}

/* Frames up to the next topic that is not the flow's last, and judges that. */
static long topic_step(__u32 index, void *arg)
{
	struct parse *p = arg;
	struct work *w = p->w;

	if (index > 0 || p->f->parser != PARSER_TOPIC) {
		w->pause = PAUSE_NONE;
		/* The shortest control packet has two bytes, and a split header up to seven. */
		bpf_loop((w->end - w->offset) / 2 + 8, frame_step, p, 0);
		if (w->pause == PAUSE_STREAM)
			topic_begin(&w->stream, p->t, p->svc);
	} else {
		w->pause = PAUSE_STREAM; /* w->stream is what the last segment left */
	}

	switch (w->pause) {
	case PAUSE_TOPIC:
		whole_topic(p);
		break;
	case PAUSE_STREAM:
		if (!streamed_topic(p))
			return 1;
		break;
	default:
		return 1;
	}
	return w->offset >= w->end;
}

#endif /* MQTT_FWD_FRAMING_TOPIC_H */
