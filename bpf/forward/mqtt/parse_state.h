/* SPDX-License-Identifier: GPL-2.0-only */
/* What all steps of framing share: the segment in hand, its counters, and the ways out of it. */
#ifndef MQTT_FWD_FRAMING_PARSE_H
#define MQTT_FWD_FRAMING_PARSE_H

#include "../../lib/mqtt.h"
#include "../event.h"
#include "../../maps/scratch.h"

#define STARTED_BEFORE (~0U) /* scratch.start: in an earlier segment */

struct parse {
	struct xdp_md *ctx;
	struct scratch *w;
	struct flow *f;
	const struct conn *c;
	const struct service_table *t;
};

static __always_inline const struct service *service_of(const struct parse *p)
{
	return &p->t->service[p->w->slot & (MAX_SERVICES - 1)];
}

static __always_inline void tally(struct scratch *w, enum reason reason)
{
	w->tally[(reason - REASON_PUBLISH) & (PUBLISH_REASONS - 1)]++;
}

static __always_inline void tally_count(struct scratch *w)
{
#pragma unroll
	for (__u32 i = 0; i < PUBLISH_REASONS; i++) {
		if (w->tally[i])
			count_many(REASON_PUBLISH + i, w->tally[i]);
		if (messages_per_client)
			w->published += w->tally[i];
	}
}

static __always_inline void malformed(const struct parse *p, struct span *s)
{
	/* A broker closes such a connection; should it go on, it has to prove itself again. */
	p->f->flags |= FLOW_UNSYNCED;
	p->f->flags &= ~FLOW_TRUSTED;
	p->f->candidates = 0;
	count(REASON_MALFORMED);
	p->w->stop_reason = STOP_UNFRAMED;
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
	p->w->stop_reason = STOP_UNFRAMED;
	s->offset = s->end;
	return true;
}

/* Where the PUBLISH in hand begins; if in an earlier segment, where this one's new bytes do. */
static __always_inline __u32 start_seq(const struct parse *p)
{
	__u32 start = p->w->start == STARTED_BEFORE ? p->w->new_data_off : p->w->start;

	return p->c->seq + (start - p->c->payload);
}

#endif /* MQTT_FWD_FRAMING_PARSE_H */
