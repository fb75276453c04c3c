/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * MQTT control packets in a TCP stream of which each packet shows a piece.
 *
 * A flow keeps the first sequence number that its parser still wants (`next_seq`) and what
 * that byte is (`parser`). Payloads are not read: next_seq jumps over them, so segments that
 * lie wholly inside one cost a comparison, in whatever order they come.
 *
 * The same rules, in Rust and without the verifier, are in tests/support/model.rs; the two
 * are compared on random streams.
 */
#ifndef MQTT_FWD_STREAM_H
#define MQTT_FWD_STREAM_H

#include "binding.h"
#include "learn.h"
#include "mqtt.h"

/* A run of this many segments beyond a hole is believed. */
#define RUN_BELIEVED 3
/* … and may go on to teach if it lies within what the client can have sent meanwhile. */
#define RUN_SEQ_WINDOW (1 << 20)
#define RUN_ACK_WINDOW (1 << 16)

#define FLOW_UNPARSED (FLOW_OPAQUE | FLOW_RESET)

struct parse {
	struct xdp_md *ctx;
	struct work *w;
	struct flow *f;
	const struct conn *c;
	const struct service_table *t;
	const struct service *svc;
};

/* The hash of a topic that lies in the frame and is at most TOPIC_TEXT_MAX long; 0: it does not. */
static __always_inline __u64 topic_hash(struct xdp_md *ctx, const struct service_table *t,
					const struct service *svc, __u32 offset, __u32 length)
{
	const void *end = frame_end(ctx);
	const __u8 *pos = frame_start(ctx);
	__u32 left = length;
	struct siphash h;

	siphash_init(&h, t->topic_key[0] ^ svc->id, t->topic_key[1]);
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
	if (left) {
		/* The eight bytes that end with the topic: headers lie before it, always. */
		pos = frame_at(ctx, offset + length - 8, 8);
		if (!pos)
			return 0;
		tail = load_le64(pos) >> (64 - 8 * (left & 7));
	}
	return siphash_final(&h, tail, length);
}

/* Is this PUBLISH's topic the one that the flow published last, under the same routes? */
static __always_inline bool topic_again(struct xdp_md *ctx, const struct flow *f,
					const struct service_table *t, const struct service *svc,
					const struct span *s, const struct header *h)
{
	return f->topic && f->generation == t->generation && h->topic <= TOPIC_TEXT_MAX &&
	       s->offset + h->length + h->topic <= s->end &&
	       topic_hash(ctx, t, svc, s->offset + h->length, h->topic) == f->topic;
}

static __always_inline void count_publish(const struct flow *f)
{
	count(f->flags & FLOW_ASTRAY ? REASON_MISPREDICTED : REASON_PUBLISH);
}

/* The topic in w->stream is complete: whose is it, and what follows for flow and client? */
static __always_inline void publish_judge(const struct parse *p)
{
	struct topic_stream *s = &p->w->stream;
	struct flow *f = p->f;

	__u64 hash = siphash_stream_final(&s->whole);
	if (hash == f->topic && s->generation == f->generation) {
		count_publish(f);
		return;
	}

	topic_level_end(s, p->t);
	struct binding to = { .group = route_group(s->state, p->svc) };
	__u32 key = to.group;
	const struct group *g = bpf_map_lookup_elem(&groups, &key);
	to.epoch = g ? g->epoch : 0;

	f->topic = hash;
	f->generation = s->generation;
	topic_store(p->w, hash, &to, p->svc, s->generation);

	bool may_reset = false;
	if (f->flags & FLOW_SYN_SEEN)
		may_reset = learn(p->c, f, hash, &to, s->generation);
	f->flags |= FLOW_PUBLISHED;

	if (f->group == to.group) {
		f->flags &= ~FLOW_ASTRAY;
		f->flags |= FLOW_AGREED;
		count(REASON_PUBLISH);
		return;
	}

	__u32 groups = from_to(f->group, to.group);
	enum report_how how = 0;
	count(REASON_MISPREDICTED);
	if (may_reset && to.epoch && p->svc->on_misprediction == MISPREDICTION_RESET) {
		/*
		 * The right group's broker does not know this connection and answers with RST;
		 * the client opens a new one, which is bound by what was just learned.
		 */
		f->group = to.group;
		f->epoch = to.epoch;
		f->flags |= FLOW_RESET;
		binding_correct(p->c, p->t, f->group, f->epoch);
		how = REPORT_RESET;
		count(REASON_RESET);
	} else {
		f->flags |= FLOW_ASTRAY;
	}
	report_event(p->c, EVENT_MISPREDICTED, groups, hash, how);
}

static __always_inline void malformed(const struct parse *p, struct span *s)
{
	/* A broker closes such a connection; should it go on, it has to prove itself anew. */
	p->f->flags |= FLOW_UNSYNCED;
	p->f->flags &= ~FLOW_SYN_SEEN;
	p->f->tiled = 0;
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
	if (p->f->flags & FLOW_CONNECTED || !(p->f->flags & FLOW_SYN_SEEN))
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

static __always_inline void topic_start(const struct parse *p, __u32 length, __u32 left)
{
	p->f->parser = PARSER_TOPIC;
	p->f->topic_left = length;
	p->f->remaining = left;
	topic_begin(&p->w->stream, p->t, p->svc);
}

/*
 * One control packet whose header, and topic if it is a known one, lie in this segment: all
 * but a few. Returns false, having changed nothing, if it has to be taken byte by byte.
 */
static __always_inline bool parse_whole(const struct parse *p, struct span *s)
{
	struct flow *f = p->f;
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
		packet_end(p, s, h.length + h.remaining);
		return true;
	}
	if (h.topic == 0) {
		/* MQTT 5 §3.3.2.3.4: a topic alias stands for a topic of this flow. */
		count_publish(f);
		packet_end(p, s, h.length + h.remaining);
		return true;
	}
	if (topic_again(p->ctx, f, p->t, p->svc, s, &h)) {
		count_publish(f);
		packet_end(p, s, h.length + h.remaining);
		return true;
	}
	s->offset += h.length;
	f->type = h.type;
	topic_start(p, h.topic, h.remaining - h.topic);
	return true;
}

/*
 * Almost every packet: a PUBLISH with the topic of the last one. It needs nothing but what is
 * passed here, so it has a way of its own past the loop. Returns false, having changed nothing,
 * if the packet is another.
 */
static __noinline int publish_again(struct xdp_md *ctx, const struct flow *f,
				    const struct service_table *t, const struct service *svc,
				    struct span *s)
{
	struct span left = *s;
	struct header h;

	if (read_header(ctx, left.offset, left.end, &h) != HEADER_WHOLE ||
	    h.type >> 4 != MQTT_PUBLISH || !topic_again(ctx, f, t, svc, &left, &h))
		return false;
	count_publish(f);
	s->offset = left.offset + h.length + h.remaining;
	return true;
}

/* Up to eight bytes of a topic. */
static __always_inline void parse_topic(const struct parse *p, struct span *s)
{
	struct flow *f = p->f;

	for (int i = 0; i < 8; i++) {
		const __u8 *byte = frame_at(p->ctx, s->offset, 1);
		if (f->topic_left == 0 || s->offset >= s->end || !byte)
			break;
		topic_byte(&p->w->stream, p->t, p->svc, *byte);
		f->topic_left--;
		s->offset++;
	}
	if (f->topic_left == 0) {
		publish_judge(p);
		packet_end(p, s, f->remaining);
	}
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
		f->shift = 0;
		f->parser = PARSER_LENGTH;
		return;
	case PARSER_LENGTH:
		f->remaining |= (__u32)(byte & 0x7f) << (f->shift & 31);
		f->shift += 7;
		if (byte & 0x80) {
			if (f->shift > 21)
				malformed(p, s);
			return;
		}
		if (!length_valid(f->type, f->remaining))
			malformed(p, s);
		else if (f->type >> 4 == MQTT_PUBLISH)
			f->parser = PARSER_TOPIC_LENGTH_HIGH;
		else
			packet_end(p, s, f->remaining);
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
			count_publish(f);
			packet_end(p, s, f->remaining - 2);
		} else {
			topic_start(p, f->topic_left, f->remaining - 2 - f->topic_left);
		}
	}
}

static long parse_step(__u32 index, void *arg)
{
	const struct parse *p = arg;
	/* In the map, not on the stack, between the steps (see struct work). */
	struct span s = { .offset = p->w->offset, .end = p->w->end };
	const __u8 *byte;

	(void)index;
	if (s.offset >= s.end || p->f->flags & FLOW_RESET)
		return 1;
	if (p->f->parser == PARSER_TOPIC) {
		parse_topic(p, &s);
	} else if (p->f->parser != PARSER_TYPE || !parse_whole(p, &s)) {
		byte = frame_at(p->ctx, s.offset, 1);
		if (!byte)
			return 1;
		parse_byte(p, &s, *byte);
	}
	p->w->offset = s.offset;
	return 0;
}

/* ---- evidence: does the segment consist of whole control packets, from first to last byte? ---- */

static long tile_step(__u32 index, void *arg)
{
	struct parse *p = arg;
	struct work *w = p->w;
	struct header h;

	(void)index;
	if (w->tile >= w->end)
		return 1;
	if (read_header(p->ctx, w->tile, w->end, &h) != HEADER_WHOLE) {
		w->tile = FRAME_MASK;
		return 1;
	}
	w->tile += h.length + h.remaining;
	return 0;
}

static __always_inline bool segment_tiles(struct xdp_md *ctx, const struct conn *c)
{
	__u32 zero = 0;
	struct work *w = bpf_map_lookup_elem(&work, &zero);
	struct parse p = { .ctx = ctx, .w = w };

	if (!w)
		return false;
	w->tile = c->payload;
	w->end = c->payload + c->payload_length;
	/* The shortest control packet has two bytes. */
	bpf_loop(c->payload_length / 2 + 1, tile_step, &p, 0);
	return w->tile == w->end;
}

static __always_inline void resynced(struct flow *f, const struct conn *c)
{
	f->next_seq = c->seq + c->payload_length;
	f->parser = PARSER_TYPE;
	f->flags &= ~FLOW_UNSYNCED;
	f->tiled = 0;
	count(REASON_RESYNCED);
	report_flow(c, f, EVENT_RESYNCED);
}

/* A segment of a flow whose packets' beginnings are not known. */
static __noinline int segment_unsynced(struct xdp_md *ctx, struct flow *f, const struct conn *c)
{
	if (segment_tiles(ctx, c))
		resynced(f, c);
	return 0;
}

/* A segment behind a hole. The hole may still be filled; a long run of evidence says it won't. */
static __noinline int segment_ahead(struct xdp_md *ctx, struct flow *f, const struct conn *c)
{
	count(REASON_SEGMENT_AHEAD);
	if (f->tiled && c->seq - f->run_start < f->run_end - f->run_start)
		return 0; /* inside the run: a repetition */
	if (f->tiled && c->seq != f->run_end)
		f->tiled = 0;
	if (!segment_tiles(ctx, c))
		return 0;
	if (!f->tiled)
		f->run_start = c->seq;
	f->run_end = c->seq + c->payload_length;
	f->tiled++;
	if (f->tiled < RUN_BELIEVED)
		return 0;
	if (f->run_start - f->next_seq > RUN_SEQ_WINDOW || c->ack - f->ack > RUN_ACK_WINDOW)
		f->flags &= ~FLOW_SYN_SEEN;
	resynced(f, c);
	return 0;
}

/* ---- a segment ---- */

/* The rest of a segment, packet by packet, whatever they are. */
static __always_inline void parse_segment(struct xdp_md *ctx, struct flow *f, const struct conn *c,
					  const struct service_table *t,
					  const struct service *svc, struct span *s)
{
	__u32 zero = 0;
	struct work *w = bpf_map_lookup_elem(&work, &zero);
	struct parse p = { .ctx = ctx, .w = w, .f = f, .c = c, .t = t, .svc = svc };

	if (!w)
		return;
	if (f->parser == PARSER_TOPIC) {
		const struct topic_stream *stream = bpf_map_lookup_elem(&topic_streams, &c->key);
		if (stream) {
			w->stream = *stream;
		} else {
			count(REASON_TOPIC_LOST);
			s->offset += f->topic_left;
			packet_end(&p, s, f->remaining);
		}
	}
	w->offset = s->offset;
	w->end = s->end;
	bpf_loop(c->payload_length + 1, parse_step, &p, 0);
	s->offset = w->offset;
	if (f->parser == PARSER_TOPIC)
		bpf_map_update_elem(&topic_streams, &c->key, &w->stream, BPF_ANY);
}

/* What the segment's payload says, for flow, client and counters. Global (see event.h). */
__noinline int mqtt_segment(struct xdp_md *ctx, struct flow *f, const struct conn *c,
			    const struct service_table *t, const struct service *svc)
{
	if (!f || !c || !t || !svc || f->flags & FLOW_UNPARSED)
		return 0;
	if (f->flags & FLOW_UNSYNCED) {
		segment_unsynced(ctx, f, c);
		return 0;
	}

	__s32 skip = f->next_seq - c->seq;
	if (skip >= (__s32)c->payload_length) {
		count(REASON_SEGMENT_OLD);
		return 0;
	}
	if (skip < 0) {
		segment_ahead(ctx, f, c);
		return 0;
	}

	struct span s = { .offset = c->payload + skip, .end = c->payload + c->payload_length };
	if (f->parser != PARSER_TYPE || !publish_again(ctx, f, t, svc, &s) || s.offset < s.end)
		parse_segment(ctx, f, c, t, svc, &s);

	f->next_seq = c->seq + (s.offset - c->payload);
	f->ack = c->ack;
	if (f->tiled && f->next_seq == f->run_start && f->parser == PARSER_TYPE &&
	    !(f->flags & FLOW_UNPARSED)) {
		/* The hole is filled, and what came after it has been here already. */
		f->next_seq = f->run_end;
		f->tiled = 0;
		count(REASON_RESYNCED);
	}
	return 0;
}

#endif /* MQTT_FWD_STREAM_H */
