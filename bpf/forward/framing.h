/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * MQTT control packets in a TCP stream of which each packet shows a piece.
 *
 * A flow keeps the first sequence number that its parser still wants (`next`) and what that byte
 * is (`parser`). Payloads are not read: `next` jumps over them, so segments that lie wholly inside
 * one cost a comparison, in whatever order they come.
 *
 * Everything is framed; what a segment may cost beyond that is bounded (TOPIC_BUDGET), since its
 * sender chooses how many topics it holds.
 *
 * The same rules, in Rust and without the verifier, are in tests/support/model/; the two
 * are compared on random streams.
 */
#ifndef MQTT_FWD_FRAMING_H
#define MQTT_FWD_FRAMING_H

#include "connect.h"
#include "publish.h"
#include "resync.h"
#include "topic.h"

#define SIMPLE_PACKETS 8 /* at once */
#define SAME_TOPIC_MAX 32 /* bytes that are compared rather than hashed */
#define STARTED_BEFORE (~0U) /* work.start: in an earlier segment */

struct parse {
	struct xdp_md *ctx;
	struct work *w;
	struct flow *f;
	const struct conn *c;
	const struct service_table *t;
	const struct service *svc;
};

/* The hash of a PUBLISH's topic if all of it lies in the segment and is not long; else 0. */
static __always_inline __u64 header_topic(struct xdp_md *ctx, const struct service_table *t,
					  const struct service *svc, const struct header *h,
					  __u32 offset, __u32 end)
{
	if (h->topic > TOPIC_TEXT_MAX || offset + h->length + h->topic > end)
		return 0;
	return topic_hash(ctx, t, svc, offset + h->length, h->topic);
}

static __always_inline bool is_last_topic(const struct flow *f, const struct service_table *t,
					  __u64 hash)
{
	return hash && hash == f->topic && f->generation == t->generation;
}

static __always_inline void malformed(const struct parse *p, struct span *s)
{
	/* A broker closes such a connection; should it go on, it has to prove itself anew. */
	p->f->flags |= FLOW_UNSYNCED;
	p->f->flags &= ~FLOW_TRUSTED;
	p->f->candidates = 0;
	count(REASON_MALFORMED);
	report_flow(p->c, p->f, EVENT_UNFRAMED);
	s->offset = s->end;
}

/* Jumps over what is left of the control packet in hand. */
static __always_inline void packet_end(const struct parse *p, struct span *s, __u32 left)
{
	p->f->parser = PARSER_TYPE;
	s->offset += left;
}

/* The first control packet of a flow must be CONNECT (MQTT 3.1.1 §3.1): TLS, say, is not. */
static __always_inline bool connect_missing(const struct parse *p, struct span *s, __u8 type)
{
	if (p->f->flags & FLOW_CONNECTED || !(p->f->flags & FLOW_TRUSTED))
		return false;
	if (type == MQTT_CONNECT << 4) {
		p->f->flags |= FLOW_CONNECTED;
		return false;
	}
	p->f->flags |= FLOW_OPAQUE;
	count(REASON_NOT_MQTT);
	report_flow(p->c, p->f, EVENT_UNFRAMED);
	s->offset = s->end;
	return true;
}

static __always_inline void tally(struct work *w, enum reason reason)
{
	w->tally[(reason - REASON_PUBLISH) & (PUBLISH_REASONS - 1)]++;
}

static __always_inline void tally_count(const struct work *w)
{
#pragma unroll
	for (__u32 i = 0; i < PUBLISH_REASONS; i++) {
		if (w->tally[i])
			count_many(REASON_PUBLISH + i, w->tally[i]);
	}
}

/* Whether the topic at `offset` is the one at w->same, the flow's last. Short ones only. */
static __always_inline bool is_same_topic(struct xdp_md *ctx, const struct work *w, __u32 offset,
					  __u32 length)
{
	__u32 same = w->same;
	const __u8 *a, *b;

	if (!length || length != w->same_length || length > SAME_TOPIC_MAX)
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

/* A PUBLISH that is not judged: nothing is known of its topic. */
static __always_inline void publish_unjudged(struct work *w, struct flow *f)
{
	tally(w, f->flags & FLOW_ENDED ? REASON_PUBLISH_LOST : REASON_UNJUDGED);
	w->same_length = 0;
	f->topic = 0;
	f->untaught = 0;
	f->flags &= ~(FLOW_MISROUTED | FLOW_ANY_TOPIC);
}

/*
 * Whether nothing is left for this topic. A long one, or one that is cut off, costs by its bytes, so it
 * has to fit; unless it is the segment's first, for then it is judged, whatever it costs.
 */
static __always_inline bool over_budget(const struct work *w, const struct header *h,
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
	p->w->pause = PAUSE_STREAM;
}

/*
 * One control packet whose header lies in this segment: all but a few. Returns false, having
 * changed nothing, if it has to be taken byte by byte.
 */
static __always_inline bool parse_whole(const struct parse *p, struct span *s)
{
	struct flow *f = p->f;
	struct work *w = p->w;
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
			subscribe_judge(p->c, f, p->svc, p->c->seq + (s->offset - p->c->payload), false);
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
		publish_unjudged(w, f);
		packet_end(p, s, h.length + h.remaining);
		return true;
	}

	__u32 topic = s->offset + h.length;
	__u64 hash;
	if (topic + h.topic <= s->end && is_same_topic(p->ctx, w, topic, h.topic)) {
		hash = f->topic;
	} else {
		hash = header_topic(p->ctx, p->t, p->svc, &h, s->offset, s->end);
		w->same_length = 0;
	}
	if (is_last_topic(f, p->t, hash)) {
		w->same = topic;
		w->same_length = h.topic;
		if (publish_again(f)) {
			tally(w, publish_reason(f));
			packet_end(p, s, h.length + h.remaining);
			return true;
		}
	}
	w->start = s->offset;
	s->offset = topic;
	f->type = h.type;
	if (!hash) {
		topic_start(p, h.topic, h.remaining - h.topic);
	} else {
		w->pause = PAUSE_TOPIC;
		w->hash = hash;
		w->topic_length = h.topic;
		w->left = h.remaining - h.topic;
	}
	return true;
}

/*
 * Almost every segment: one PUBLISH, with the topic of the last one. It needs nothing but what is
 * passed here, so it has a way of its own past the loop. Returns false, having changed nothing,
 * if the segment begins with something else.
 */
static __noinline int publish_again_alone(struct xdp_md *ctx, struct flow *f,
					  const struct service_table *t,
					  const struct service *svc, struct span *s)
{
	struct span left = *s;
	struct header h;

	if (read_header(ctx, left.offset, left.end, &h) != HEADER_WHOLE ||
	    h.type >> 4 != MQTT_PUBLISH || !h.topic ||
	    !is_last_topic(f, t, header_topic(ctx, t, svc, &h, left.offset, left.end)) ||
	    !publish_again(f))
		return false;
	count(publish_reason(f));
	s->offset = left.offset + h.length + h.remaining;
	return true;
}

/* A control packet but PUBLISH, whose header was split over segments. */
static __always_inline void other_end(const struct parse *p, struct span *s)
{
	bool before = p->w->start == STARTED_BEFORE;
	__u32 start = before ? p->w->first : p->w->start;

	if (p->f->type >> 4 == MQTT_SUBSCRIBE)
		subscribe_judge(p->c, p->f, p->svc, p->c->seq + (start - p->c->payload), before);
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
		f->topic_left = 0;
		f->parser = PARSER_LENGTH;
		return;
	case PARSER_LENGTH:
		f->remaining |= (__u32)(byte & 0x7f) << (f->topic_left & 31);
		f->topic_left += 7;
		if (byte & 0x80) {
			if (f->topic_left > 21)
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

/*
 * A few control packets that ask for nothing but a look at their header: not PUBLISH, or with an
 * alias, or with the topic at w->same; with a remaining length of one byte. Segments can hold
 * hundreds. Leaves the first other one to parse_whole().
 */
static __always_inline void skip_simple(const struct parse *p, struct span *s)
{
	struct flow *f = p->f;
	struct work *w = p->w;

	for (int i = 0; i < SIMPLE_PACKETS; i++) {
		const __u8 *b = frame_at(p->ctx, s->offset, 4);
		__u32 rest, topic;

		if (!b || s->offset + 4 > s->end || b[1] & 0x80)
			return;
		rest = b[1];
		if (b[0] >> 4 != MQTT_PUBLISH) {
			if (b[0] >> 4 == MQTT_SUBSCRIBE || !type_valid(b[0]) || !length_valid(b[0], rest))
				return;
		} else {
			topic = b[2] << 8 | b[3];
			if (!type_valid(b[0]) || rest < 2 || !topic_fits(b[0], topic, rest))
				return;
			if (topic && w->budget <= 0) {
				publish_unjudged(w, f);
				s->offset += 2 + rest;
				continue;
			}
			if (topic && (s->offset + 4 + topic > s->end || f->generation != p->t->generation ||
				      !is_same_topic(p->ctx, w, s->offset + 4, topic) || !publish_again(f)))
				return;
			if (topic)
				w->same = s->offset + 4;
			tally(w, publish_reason(f));
		}
		s->offset += 2 + rest;
	}
}

/* One control packet, or one byte of a header that is split. Stops at a topic. */
static long frame_step(__u32 index, void *arg)
{
	const struct parse *p = arg;
	/* In the map, not on the stack, between the steps (see struct work). */
	struct span s = { .offset = p->w->offset, .end = p->w->end };
	const __u8 *byte;

	(void)index;
	if (s.offset >= s.end || p->w->pause != PAUSE_NONE)
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

/* Where the PUBLISH in hand begins; if in an earlier segment, where this one's new bytes do. */
static __always_inline __u32 start_seq(const struct parse *p)
{
	__u32 start = p->w->start == STARTED_BEFORE ? p->w->first : p->w->start;

	return p->c->seq + (start - p->c->payload);
}

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

/* ---- a segment ---- */

/*
 * What its CONNECT says of a flow, if that lies at the beginning of the first segment, as they do; `skip`: bytes
 * of that which are not the flow's. Global (see event.h).
 */
__noinline int connect_seen(struct xdp_md *ctx, const struct conn *c, struct flow *f, __u32 skip)
{
	const struct work *w = work_of_cpu();

	if (!w || !c || !f)
		return 0;
	f->connect = FLOW_CONNECT_READ;
	if (skip || f->flags & FLOW_CONNECTED)
		return 0;
	read_connect(ctx, c);
	f->connect |= (is_anonymous(ctx, c, &w->connect) ? FLOW_ANONYMOUS : 0) |
		      (w->connect.level == 5 ? FLOW_MQTT5 : 0);
	return 0;
}

/* The rest of a segment, packet by packet, whatever they are. */
static __always_inline void frame_segment(struct xdp_md *ctx, struct flow *f, const struct conn *c,
					  const struct service_table *t,
					  const struct service *svc, struct span *s)
{
	struct work *w = work_of_cpu();
	struct parse p = { .ctx = ctx, .w = w, .f = f, .c = c, .t = t, .svc = svc };

	if (!w)
		return;
	if (f->parser == PARSER_TOPIC) {
		w->stream_key = c->key;
		const struct topic_stream *stream =
			bpf_map_lookup_elem(&topic_streams, &w->stream_key);
		if (stream) {
			w->stream = *stream;
		} else {
			count(REASON_TOPIC_FORGOTTEN);
			s->offset += f->topic_left;
			packet_end(&p, s, f->remaining);
		}
	}
	w->offset = s->offset;
	w->first = s->offset;
	w->start = STARTED_BEFORE;
	w->end = s->end;
	w->budget = TOPIC_BUDGET;
	w->same_length = 0;
	__builtin_memset(w->tally, 0, sizeof(w->tally));
	/* Known topics, then long ones, and the rest of the segment. */
	if (s->offset < s->end)
		bpf_loop(TOPIC_BUDGET / TOPIC_COST_KNOWN + SEGMENT_MAX / TOPIC_TEXT_MAX + 2, topic_step,
			 &p, 0);
	tally_count(w);
	/* What is behind the end is the sidecar's to count. */
	s->offset = f->flags & FLOW_RESCUED ? s->end : w->offset;
	if (f->parser == PARSER_TOPIC) {
		w->stream_key = c->key;
		bpf_map_update_elem(&topic_streams, &w->stream_key, &w->stream, BPF_ANY);
	}
}

/* What the segment's payload says, for flow, client and counters. Global (see event.h). */
__noinline int frame(struct xdp_md *ctx, struct flow *f, const struct conn *c,
		     const struct service_table *t, const struct service *svc)
{
	if (!f || !c || !t || !svc)
		return 0;

	struct work *w = work_of_cpu();
	__u64 wanted = READ_ONCE(f->next);
	__u32 next = wanted;

	if (!w)
		return 0;
	w->seen = f->end;
	flow_seen(f, c, c->payload_length);
	if (f->flags & FLOW_OPAQUE)
		return 0;
	if (wanted >> 32 != c->tag) {
		/* Another flow's write came too late: see struct flow. */
		f->flags |= FLOW_UNSYNCED;
		f->flags &= ~FLOW_TRUSTED;
	}
	if (f->flags & FLOW_UNSYNCED) {
		segment_unsynced(ctx, f, c);
		return 0;
	}

	__s32 skip = next - c->seq;
	if (skip >= (__s32)c->payload_length) {
		count(REASON_SEGMENT_OLD);
		return 0;
	}
	if (skip < 0) {
		segment_ahead(ctx, f, c, next);
		return 0;
	}

	struct span s = { .offset = c->payload + skip, .end = c->payload + c->payload_length };
	if (!(f->connect & FLOW_CONNECT_READ))
		connect_seen(ctx, c, f, skip);
	if (f->parser != PARSER_TYPE || !publish_again_alone(ctx, f, t, svc, &s) ||
	    s.offset < s.end)
		frame_segment(ctx, f, c, t, svc, &s);

	next = c->seq + (s.offset - c->payload);
	f->ack = c->ack;
	if (f->candidates && next == f->candidate_start && f->parser == PARSER_TYPE &&
	    !(f->flags & (FLOW_OPAQUE | FLOW_UNSYNCED))) {
		/* The gap is filled, and what came after it has been here already. */
		next = f->candidate_end;
		f->candidates = 0;
		count(REASON_RESYNCED);
	}
	flow_next(f, c, next);
	return 0;
}

#endif /* MQTT_FWD_FRAMING_H */
