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
 * packet.h goes from packet to packet, shortcuts.h is what most segments take, judge_topic.h
 * judges the topics that are left.
 *
 * The same rules, in Rust and without the verifier, are in tests/support/model/; the two
 * are compared on random streams.
 */
#ifndef MQTT_FWD_FRAMING_H
#define MQTT_FWD_FRAMING_H

#include "judge_topic.h"
#include "resync.h"

/* The parser's next byte has sequence number `next`. */
static __always_inline void frame_next(struct flow *f, const struct conn *c, __u32 next)
{
	f->ack = c->ack;
	if (f->candidates && next == f->candidate_start && f->parser == PARSER_TYPE &&
	    !(f->flags & (FLOW_OPAQUE | FLOW_UNSYNCED | FLOW_RESCUED))) {
		/* The gap is filled, and what came after it has been here already. */
		next = f->candidate_end;
		f->candidates = 0;
		count(REASON_RESYNCED);
	}
	flow_next(f, c, next);
}

/*
 * A segment's control packets one by one, whatever they are, between scratch.offset and scratch.end, of the service
 * at scratch.slot. Not in
 * frame(), so that their stacks do not add up. Global (see event.h).
 */
__noinline int frame_packets(struct xdp_md *ctx, struct flow *f, const struct conn *c,
			     const struct service_table *t)
{
	struct scratch *w = scratch();
	struct parse p = {.ctx = ctx, .w = w, .f = f, .c = c, .t = t};
	const struct topic_stream *stream;

	if (!f || !c || !t || !w)
		return 0;
	w->new_data_off = w->offset;
	w->start = STARTED_BEFORE;
	w->budget = TOPIC_BUDGET;
	w->relay_asked = false;
	__builtin_memset(w->tally, 0, sizeof(w->tally));
	if (f->parser == PARSER_TOPIC) {
		w->stream_key = c->key;
		stream = bpf_map_lookup_elem(&topic_streams, &w->stream_key);
		if (stream) {
			w->stream = *stream;
		} else {
			count(REASON_TOPIC_FORGOTTEN);
			w->offset += f->topic_left + f->remaining;
			f->parser = PARSER_TYPE;
		}
	}
	/* Stored topics, then long ones, and the rest of the segment. */
	if (w->offset < w->end)
		bpf_loop(TOPIC_BUDGET / TOPIC_COST_STORED + SEGMENT_MAX / TOPIC_TEXT_MAX + 3,
			 topic_step, &p, 0);
	tally_count(w);
	/* What is behind the end is the sidecar's to count. */
	if (f->flags & FLOW_RESCUED)
		w->offset = w->end;
	if (f->parser == PARSER_TOPIC) {
		w->stream_key = c->key;
		bpf_map_update_elem(&topic_streams, &w->stream_key, &w->stream, BPF_ANY);
	}
	frame_next(f, c, c->seq + (w->offset - c->payload));
	return 0;
}

/*
 * Frames the segment's payload, for flow, client and counters. Returns whether frame_packets() is to go on.
 * Global (see event.h).
 */
__noinline int frame(struct xdp_md *ctx, struct flow *f, const struct conn *c,
		     const struct service_table *t, const struct service *svc)
{
	if (!f || !c || !t || !svc)
		return false;

	struct scratch *w = scratch();
	__u64 wanted = READ_ONCE(f->next);
	__u32 next = wanted;

	if (!w)
		return false;
	w->end_before = f->end;
	flow_seen(f, c, c->payload_length);
	if (f->flags & FLOW_OPAQUE)
		return false;
	if (wanted >> 32 != c->tag) {
		/* Another flow's write came too late: see struct flow. */
		f->flags |= FLOW_UNSYNCED;
		f->flags &= ~FLOW_TRUSTED;
	}
	if (f->flags & FLOW_UNSYNCED) {
		segment_unsynced(ctx, f, c);
		return false;
	}

	__s32 skip = next - c->seq;
	if (skip >= (__s32)c->payload_length) {
		count(REASON_SEGMENT_OLD);
		return false;
	}
	if (skip < 0) {
		segment_ahead(ctx, f, c, next);
		return false;
	}

	w->offset = c->payload + skip;
	w->end = c->payload + c->payload_length;
	w->slot = svc->slot;
	return true;
}

#endif /* MQTT_FWD_FRAMING_H */
