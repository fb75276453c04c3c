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
 * framing/packet.h goes from packet to packet, framing/again.h has the shortcuts that most segments
 * take, framing/topic.h judges the topics that are left.
 *
 * The same rules, in Rust and without the verifier, are in tests/support/model/; the two
 * are compared on random streams.
 */
#ifndef MQTT_FWD_FRAMING_H
#define MQTT_FWD_FRAMING_H

#include "connect.h"
#include "framing/topic.h"
#include "resync.h"

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
