/* SPDX-License-Identifier: GPL-2.0-only */
/* The topics that framing stopped at: whole in the segment, or in pieces. */
#ifndef MQTT_FWD_FRAMING_TOPIC_H
#define MQTT_FWD_FRAMING_TOPIC_H

#include "../learn/record.h"
#include "packet.h"

/*
 * The topic that framing stopped at lies whole in the segment, and is not long: stored, from an
 * earlier PUBLISH of anybody, or walked through the routes.
 */
static __noinline int whole_topic(const struct parse *p)
{
	struct scratch *w = p->w;

	w->publish.hash = w->hash;
	w->publish.print = w->print;
	w->publish.inside = false;
	topic_judge(p->ctx, p->t, service_of(p), w, w->offset, w->topic_length);
	p->f->parser = PARSER_TYPE;
	w->offset += w->topic_length + w->after_topic;
	return 0;
}

enum streamed {
	STREAM_GOES_ON, /* in the next segment */
	STREAM_SAME, /* the flow's last topic, and counted */
	STREAM_JUDGE, /* to be judged */
};

/* A piece of a topic that is long, or split over segments. */
static __noinline enum streamed streamed_topic(const struct parse *p)
{
	struct scratch *w = p->w;
	struct flow *f = p->f;
	__u32 here = w->end - w->offset;
	__u32 length = f->topic_left < here ? f->topic_left : here;

	topic_feed(p->ctx, p->t, service_of(p), w->offset, length);
	w->budget -= length / TOPIC_BYTES_A_UNIT;
	f->topic_left -= length;
	w->offset += length;
	if (f->topic_left)
		return STREAM_GOES_ON;

	w->publish.hash = siphash_stream_final(&w->stream.whole);
	w->publish.print = 0;
	w->publish.generation = w->stream.generation;
	w->publish.inside = w->start == STARTED_BEFORE;
	f->parser = PARSER_TYPE;
	w->offset += f->remaining;
	if (w->publish.hash == f->topic && w->publish.generation == f->generation &&
	    publish_again(f)) {
		tally(w, publish_reason(f));
		return STREAM_SAME;
	}
	if (!(w->stream.flags & ROUTE_FINAL))
		topic_end(p->t, service_of(p));
	w->budget -= TOPIC_COST_WALK + w->stream.lookups;
	w->publish.to = stream_binding(w, service_of(p));
	topic_store(service_of(p));
	return STREAM_JUDGE;
}

/* Frames up to the next topic that is not the flow's last, and judges that. */
static long topic_step(__u32 index, void *arg)
{
	struct parse *p = arg;
	struct scratch *w = p->w;

	if (index > 0 || p->f->parser != PARSER_TOPIC) {
		w->stop_reason = STOP_NONE;
		/* The shortest control packet has two bytes, and a split header up to seven. */
		bpf_loop((w->end - w->offset) / 2 + 8, frame_step, p, 0);
		if (w->stop_reason == STOP_STREAM)
			topic_begin(&w->stream, p->t, service_of(p));
	} else {
		w->stop_reason = STOP_STREAM; /* w->stream is what the last segment left */
	}

	switch (w->stop_reason) {
	case STOP_TOPIC:
		whole_topic(p);
		break;
	case STOP_STREAM:
		switch (streamed_topic(p)) {
		case STREAM_GOES_ON:
			return 1;
		case STREAM_SAME:
			return w->offset >= w->end;
		case STREAM_JUDGE:
			break;
		}
		break;
	case STOP_SUBSCRIBE:
		relay_judge(p->c, p->f, service_of(p), start_seq(p),
			    RELAY_SUBSCRIBER | (w->start == STARTED_BEFORE ? RELAY_INSIDE : 0));
		return w->offset >= w->end;
	case STOP_UNJUDGED:
		relay_judge(p->c, p->f, service_of(p), start_seq(p), 0);
		return w->offset >= w->end;
	case STOP_UNFRAMED:
		report_flow(p->c, p->f, EVENT_UNFRAMED);
		return 1;
	default:
		return 1;
	}
	w->publish.start = start_seq(p);
	publish_judge(p->c, p->f, p->t, service_of(p));
	return w->offset >= w->end;
}

#endif /* MQTT_FWD_FRAMING_TOPIC_H */
