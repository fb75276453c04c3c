/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a flow says, and how it changes. Framing and judging change what a flow has learned of its stream through the
 * pointer that flow_find() gives (table.h).
 */
#ifndef MQTT_FWD_FLOW_H
#define MQTT_FWD_FLOW_H

#include "table.h"

/* How far a segment may begin behind the last byte seen and still move flow.end. */
#define FLOW_WINDOW (1 << 20)

static __always_inline __u64 tagged(const struct conn *c, __u32 word)
{
	return word | (__u64)c->tag << 32;
}

/* A challenger's first sequence number and binding: see flow.challenger. */
static __always_inline __u32 challenger_seq(__u64 challenger)
{
	return challenger;
}

static __always_inline binding_t challenger_binding(__u64 challenger)
{
	return challenger >> 32;
}

static __always_inline __u64 challenger_of(__u32 seq, binding_t binding)
{
	return seq | (__u64)binding << 32;
}

/* Key in `client_ids` of the flow's client; 0: it is identified by its address. */
static __always_inline __u64 flow_client(const struct flow *f)
{
	return f->bound_by == BOUND_BY_PREDICTION ? 0 : f->client_id;
}

/* Another connection on the flow's addresses; 0: there is none. */
static __always_inline __u64 flow_challenger(const struct flow *f)
{
	return f->connect & FLOW_CHALLENGED ? f->challenger : 0;
}

static __always_inline void flow_challenge(struct flow *f, __u64 challenger)
{
	f->challenger = challenger;
	if (challenger)
		f->connect |= FLOW_CHALLENGED;
	else
		f->connect &= ~FLOW_CHALLENGED;
}

/* The flow's binding; 0 if its entry is another flow's meanwhile. */
static __always_inline binding_t flow_binding(const struct flow *f, const struct conn *c)
{
	__u64 bound = READ_ONCE(f->bound);

	return bound >> 32 == c->tag ? bound : 0;
}

static __always_inline void flow_bind(struct flow *f, const struct conn *c, binding_t binding)
{
	WRITE_ONCE(f->bound, tagged(c, binding));
}

static __always_inline void flow_next(struct flow *f, const struct conn *c, __u32 next)
{
	WRITE_ONCE(f->next, tagged(c, next));
}

/* The flow's last topic, and what tells it from others (see struct flow). */
static __always_inline void flow_topic(struct flow *f, __u64 topic, __u64 print)
{
	f->topic = topic;
	f->topic_print = print;
}

static __always_inline void flow_close(struct flow *f)
{
	f->flags |= FLOW_CLOSING;
	f->closed_s = now_s();
}

/* How far the flow has been seen; what lies far off is not its own. */
static __always_inline void flow_seen(struct flow *f, const struct conn *c, __u32 length)
{
	__u32 end = c->seq + length;

	if (seq_before(f->end, end) && end - f->end < FLOW_WINDOW)
		f->end = end;
}

#endif /* MQTT_FWD_FLOW_H */
