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
	if (f->flags & NOT_PLAIN ||
	    (f->connect & (FLOW_CONNECT_READ | FLOW_CHALLENGED)) != FLOW_CONNECT_READ)
		return false;
	/* What it shows counts already. */
	return !(f->flags & FLOW_TRUSTED) ||
	       (f->flags & FLOW_CONNECTED && f->connect & FLOW_ACCEPTED);
}

/*
 * How far the PUBLISH reaches that a segment begins with: bytes of the segment and beyond it. 0: it is not plain, as is one
 * that claims 16 KiB or more, or has another packet behind it.
 */
static __always_inline __u32 plain_publish(struct xdp_md *ctx, struct flow *f, const struct conn *c,
					   const struct service_table *t)
{
	/* MQTT 3.1.1 §2.2, §3.3: the shortest with a topic has five bytes. */
	const __u8 *p = frame_at(ctx, c->payload, 5);
	__u32 rest, topic, header = 4;

	if (!p || p[0] >> 4 != MQTT_PUBLISH || !type_valid(p[0]))
		return 0;
	rest = p[1];
	topic = p[2] << 8 | p[3];
	if (rest & 0x80) {
		if (p[2] & 0x80)
			return 0;
		rest = (rest & 0x7f) | p[2] << 7;
		topic = p[3] << 8 | p[4];
		header = 5;
	}
	if (!topic || topic > TOPIC_TEXT_MAX || header + topic > c->payload_length ||
	    !topic_fits(p[0], topic, rest) || header - 2 + rest < c->payload_length ||
	    !is_last_topic(f, t, topic_print(ctx, t, c->payload + header, topic, TOPIC_TEXT_MAX)) ||
	    !publish_again(f))
		return 0;
	return header - 2 + rest;
}

/* Frames a plain segment, and counts it. Returns false, having changed nothing, if it is another. */
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
		count(REASON_DATA);
	} else {
		if (wanted >> 32 != c->tag || f->parser != PARSER_TYPE || f->candidates || skip)
			return false;
		behind = plain_publish(ctx, f, c, t);
		if (!behind)
			return false;
		count_both(REASON_DATA, publish_reason(f));
		f->ack = c->ack;
		flow_next(f, c, c->seq + behind);
	}
	flow_seen(f, c, c->payload_length);
	return true;
}

#endif /* MQTT_FWD_PLAIN_H */
