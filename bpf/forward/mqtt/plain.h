/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The plain segment, which is almost every one with data: the next of an established flow, and one PUBLISH with the
 * topic of the flow's last. It goes through the root program without a call, as a call's return alone costs 10 ns
 * where returns are guarded (docs/measurements.md), and at the first doubt it is left, as it came, to everybody's way.
 */
#ifndef MQTT_FWD_PLAIN_H
#define MQTT_FWD_PLAIN_H

#include "../../maps/counters.h"
#include "../flow/flow.h"
#include "shortcuts.h"

/* What a flow is not whose segments are plain. */
#define NOT_PLAIN                                                                        \
	(FLOW_UNSYNCED | FLOW_ENDED | FLOW_CLOSING | FLOW_PROBATION | FLOW_REUSED_PORT | \
	 FLOW_UNCONFIRMED | FLOW_RESCUED)

/* Whether nothing is to be found out about a flow but what it publishes. */
static __always_inline bool is_plain(const struct flow *f)
{
	if (f->flags & NOT_PLAIN || !(f->connect & FLOW_CONNECT_READ) || flow_challenger(f))
		return false;
	/* What it shows counts already. */
	return !(f->flags & FLOW_TRUSTED) ||
	       (f->flags & FLOW_CONNECTED && f->connect & FLOW_ACCEPTED);
}

/* The offset behind the PUBLISH that a segment begins with, which may lie beyond its end; 0: it is not plain. */
static __always_inline __u32 plain_publish(struct xdp_md *ctx, struct flow *f, const struct conn *c,
					   const struct service_table *t)
{
	__u32 end = c->payload + c->payload_length;
	struct header h;

	if (read_header(ctx, c->payload, end, &h) != HEADER_WHOLE || h.type >> 4 != MQTT_PUBLISH ||
	    !h.topic || c->payload + h.length + h.remaining < end ||
	    !is_last_topic(f, t, header_topic(ctx, t, c->key.service, &h, c->payload, end)) ||
	    !publish_again(f))
		return 0;
	count(publish_reason(f));
	return c->payload + h.length + h.remaining;
}

/* Frames a plain segment. Returns false, having changed nothing, if it is another. */
static __always_inline bool frame_plain(struct xdp_md *ctx, struct flow *f, const struct conn *c,
					const struct service_table *t)
{
	__u64 wanted = READ_ONCE(f->next);
	__s32 skip = (__u32)wanted - c->seq;
	__u32 behind;

	if (messages_per_client || !c->payload_length || !is_plain(f) ||
	    c->flags & bpf_htons(TCP_SYN | TCP_FIN | TCP_RST))
		return false;
	if (f->flags & FLOW_OPAQUE) {
		if (c->seq != f->end)
			return false;
	} else {
		if (wanted >> 32 != c->tag || f->parser != PARSER_TYPE || f->candidates || skip)
			return false;
		behind = plain_publish(ctx, f, c, t);
		if (!behind)
			return false;
		f->ack = c->ack;
		flow_next(f, c, c->seq + (behind - c->payload));
	}
	flow_seen(f, c, c->payload_length);
	return true;
}

#endif /* MQTT_FWD_PLAIN_H */
