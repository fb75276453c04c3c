/* SPDX-License-Identifier: GPL-2.0-only */
/* Headers of MQTT control packets, and what a client may send. */
#ifndef MQTT_FWD_MQTT_H
#define MQTT_FWD_MQTT_H

#include "parse.h"
#include "siphash.h"

enum mqtt_type {
	MQTT_CONNECT = 1,
	MQTT_PUBLISH = 3,
	MQTT_PUBACK = 4,
	MQTT_PUBREC = 5,
	MQTT_PUBREL = 6,
	MQTT_PUBCOMP = 7,
	MQTT_SUBSCRIBE = 8,
	MQTT_UNSUBSCRIBE = 10,
	MQTT_PINGREQ = 12,
	MQTT_DISCONNECT = 14,
	MQTT_AUTH = 15,
};

/* Frames are linear (no xdp.frags), hence smaller than this; the verifier wants to see it. */
#define FRAME_MASK 0x3fff

/* What is left to read of a segment, as offsets from the start of the frame. */
struct span {
	__u32 offset;
	__u32 end;
};

static __always_inline const __u8 *frame_at(struct xdp_md *ctx, __u32 offset, __u32 length)
{
	const __u8 *p = frame_start(ctx);

	p += offset & FRAME_MASK;
	return (void *)(p + length) <= frame_end(ctx) ? p : NULL;
}

/* One to eight bytes of the frame, behind at least eight others, as headers are. */
static __always_inline bool frame_bytes(struct xdp_md *ctx, __u32 offset, __u32 bytes, __u64 *word)
{
	const __u8 *p = frame_at(ctx, offset + bytes - 8, 8);

	if (!p)
		return false;
	*word = load_le64(p) >> (8 * (8 - bytes) & 63);
	return true;
}

/*
 * May a client send a control packet that begins so? Types and flags: MQTT 3.1.1 §2.2.1 and
 * §2.2.2, MQTT 5 §2.1. The shortest remaining lengths follow from the variable headers.
 */
static __always_inline bool type_valid(__u8 type)
{
	switch (type >> 4) {
	case MQTT_PUBLISH:
		return (type & 0x06) != 0x06; /* QoS 3 */
	case MQTT_PUBREL:
	case MQTT_SUBSCRIBE:
	case MQTT_UNSUBSCRIBE:
		return (type & 0x0f) == 0x02;
	case MQTT_CONNECT:
	case MQTT_PUBACK:
	case MQTT_PUBREC:
	case MQTT_PUBCOMP:
	case MQTT_PINGREQ:
	case MQTT_DISCONNECT:
	case MQTT_AUTH:
		return (type & 0x0f) == 0;
	default:
		return false;
	}
}

static __always_inline bool length_valid(__u8 type, __u32 remaining)
{
	switch (type >> 4) {
	case MQTT_PINGREQ:
		return remaining == 0;
	case MQTT_CONNECT:
		return remaining >= 12;
	case MQTT_SUBSCRIBE:
	case MQTT_UNSUBSCRIBE:
		return remaining >= 5;
	case MQTT_PUBLISH:
	case MQTT_PUBACK:
	case MQTT_PUBREC:
	case MQTT_PUBREL:
	case MQTT_PUBCOMP:
		return remaining >= 2;
	default:
		return true;
	}
}

/* Whether a topic of this length leaves room for the packet identifier that QoS > 0 needs. */
static __always_inline bool topic_fits(__u8 type, __u32 topic, __u32 remaining)
{
	return 2 + topic + (type & 0x06 ? 2 : 0) <= remaining;
}

enum header_state { HEADER_WHOLE, HEADER_CUT, HEADER_MALFORMED };

struct header {
	__u32 length; /* of the fixed header, and of a PUBLISH's topic length field */
	__u32 remaining;
	__u32 topic; /* PUBLISH: length of the topic */
	__u8 type;
};

/* Reads the header at `offset` if all of it lies before `end`. */
static __always_inline enum header_state read_header(struct xdp_md *ctx, __u32 offset, __u32 end,
						     struct header *h)
{
	const __u8 *p = frame_at(ctx, offset, 2);

	if (!p || offset + 2 > end)
		return HEADER_CUT;
	h->type = p[0];
	h->remaining = p[1] & 0x7f;
	h->length = 2;
	h->topic = 0;
	if (!type_valid(h->type))
		return HEADER_MALFORMED;

	__u8 last = p[1];
	for (int i = 1; i < 4; i++) {
		if (!(last & 0x80))
			break;
		p = frame_at(ctx, offset + h->length, 1);
		if (!p || offset + h->length + 1 > end)
			return HEADER_CUT;
		last = *p;
		h->remaining |= (__u32)(last & 0x7f) << (7 * i);
		h->length++;
	}
	if (last & 0x80 || !length_valid(h->type, h->remaining))
		return HEADER_MALFORMED;
	if (h->type >> 4 != MQTT_PUBLISH)
		return HEADER_WHOLE;

	p = frame_at(ctx, offset + h->length, 2);
	if (!p || offset + h->length + 2 > end)
		return HEADER_CUT;
	h->topic = p[0] << 8 | p[1];
	if (!topic_fits(h->type, h->topic, h->remaining))
		return HEADER_MALFORMED;
	h->length += 2;
	h->remaining -= 2;
	return HEADER_WHOLE;
}

#endif /* MQTT_FWD_MQTT_H */
