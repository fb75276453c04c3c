/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Finding out where control packets begin, for a flow that is seen from its middle or has a gap. The
 * only evidence is a segment that consists of whole control packets, from its first byte to its last.
 */
#ifndef MQTT_FWD_RESYNC_H
#define MQTT_FWD_RESYNC_H

#include "../event.h"
#include "../flow/flow.h"
#include "../../lib/mqtt.h"

/* A resync candidate of so many segments is believed. */
#define CANDIDATE_BELIEVED 3
/* … and the flow may go on to teach if it lies within what the client can have sent meanwhile. */
#define CANDIDATE_SEQ_WINDOW (1 << 20)
#define CANDIDATE_ACK_WINDOW (1 << 16)

struct evidence {
	struct xdp_md *ctx;
	struct scratch *w;
};

static long whole_packets_step(__u32 index, void *arg)
{
	const struct evidence *e = arg;
	struct scratch *w = e->w;
	struct header h;

	(void)index;
	if (w->offset >= w->end)
		return 1;
	if (read_header(e->ctx, w->offset, w->end, &h) != HEADER_WHOLE) {
		w->offset = ~0U;
		return 1;
	}
	w->offset += h.length + h.remaining;
	return 0;
}

static __always_inline bool is_whole_packets(struct xdp_md *ctx, const struct conn *c)
{
	struct scratch *w = scratch();
	struct evidence e = {.ctx = ctx, .w = w};

	if (!w)
		return false;
	w->offset = c->payload;
	w->end = c->payload + c->payload_length;
	/* The shortest control packet has two bytes. */
	bpf_loop(c->payload_length / 2 + 1, whole_packets_step, &e, 0);
	return w->offset == w->end;
}

static __always_inline void resynced(struct flow *f, const struct conn *c)
{
	flow_next(f, c, c->seq + c->payload_length);
	f->parser = PARSER_TYPE;
	f->flags &= ~FLOW_UNSYNCED;
	f->candidates = 0;
	f->end = c->seq + c->payload_length;
	count(REASON_RESYNCED);
	report_flow(c, f, EVENT_RESYNCED);
}

/* A segment of a flow whose packets' beginnings are not known. */
static __noinline int segment_unsynced(struct xdp_md *ctx, struct flow *f, const struct conn *c)
{
	if (is_whole_packets(ctx, c))
		resynced(f, c);
	return 0;
}

/* A segment behind a gap. The gap may still be filled; enough of evidence says that it won't. */
static __noinline int segment_ahead(struct xdp_md *ctx, struct flow *f, const struct conn *c,
				    __u32 next)
{
	count(REASON_SEGMENT_AHEAD);
	if (f->candidates && c->seq - f->candidate_start < f->candidate_end - f->candidate_start)
		return 0; /* inside the candidate: a repetition */
	if (f->candidates && c->seq != f->candidate_end)
		f->candidates = 0;
	if (!is_whole_packets(ctx, c))
		return 0;
	if (!f->candidates)
		f->candidate_start = c->seq;
	f->candidate_end = c->seq + c->payload_length;
	f->candidates++;
	if (f->candidates < CANDIDATE_BELIEVED)
		return 0;
	if (f->candidate_start - next > CANDIDATE_SEQ_WINDOW ||
	    c->ack - f->ack > CANDIDATE_ACK_WINDOW)
		f->flags &= ~FLOW_TRUSTED;
	resynced(f, c);
	return 0;
}

#endif /* MQTT_FWD_RESYNC_H */
