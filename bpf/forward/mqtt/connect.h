/* SPDX-License-Identifier: GPL-2.0-only */
/* CONNECT (MQTT 3.1.1 §3.1, MQTT 5 §3.1): who the client is, and whether it may be answered here. */
#ifndef MQTT_FWD_CONNECT_H
#define MQTT_FWD_CONNECT_H

#include "../../lib/mqtt.h"
#include "../../maps/scratch.h"

enum connect_flags {
	CONNECT_RESERVED = 1 << 0,
	CONNECT_CLEAN = 1 << 1,
	CONNECT_WILL = 1 << 2,
	CONNECT_WILL_QOS = 3 << 3,
	CONNECT_WILL_RETAIN = 1 << 5,
	CONNECT_PASSWORD = 1 << 6,
	CONNECT_USER = 1 << 7,
};

/* The protocol names with their lengths in front: MQTT since 3.1.1, MQIsdp before. */
#define NAME_MQTT 0x00044d515454ULL
#define NAME_MQISDP 0x00064d5149736470ULL

/* MQTT 3.1 client ids have 1 to 23 characters. */
#define CLIENT_ID_MAX_31 23

/* A variable byte integer (MQTT 5 §1.5.5) at *offset, which it moves behind it; ~0: cut or malformed. */
static __always_inline __u32 read_varint(struct xdp_md *ctx, __u32 *offset, __u32 end)
{
	__u32 value = 0;

#pragma unroll
	for (int i = 0; i < 4; i++) {
		const __u8 *p = frame_at(ctx, *offset, 1);

		if (!p || *offset >= end)
			return ~0U;
		*offset += 1;
		value |= (__u32)(*p & 0x7f) << (7 * i);
		if (!(*p & 0x80))
			return value;
	}
	return ~0U;
}

/* A length of two bytes at *offset, which it moves behind it; ~0: cut. */
static __always_inline __u32 read_length(struct xdp_md *ctx, __u32 *offset, __u32 end)
{
	const __u8 *p = frame_at(ctx, *offset, 2);

	if (!p || *offset + 2 > end)
		return ~0U;
	*offset += 2;
	return p[0] << 8 | p[1];
}

/* CONNECT's properties that are numbers, by their length in bytes (MQTT 5 §3.1.2.11). */
#define PROPERTIES_1 (1ULL << 0x17 | 1ULL << 0x19) /* request problem, response information */
#define PROPERTIES_2 (1ULL << 0x21 | 1ULL << 0x22) /* receive maximum, topic alias maximum */
#define PROPERTIES_4 \
	(1ULL << 0x11 | 1ULL << 0x27) /* session expiry interval, maximum packet size */

/* Length of such a property's value; 0: it is another. Branches would multiply what the verifier walks. */
static __always_inline __u32 number_property(__u8 property)
{
	__u64 bit = property < 64 ? 1ULL << property : 0;

	return !!(PROPERTIES_1 & bit) + 2 * !!(PROPERTIES_2 & bit) + 4 * !!(PROPERTIES_4 & bit);
}

#define NUMBER_PROPERTIES 6

struct property_scan {
	struct xdp_md *ctx;
	__u32 offset; /* of the next property */
	__u32 end; /* of the properties */
};

static long property_step(__u32 i, void *arg)
{
	struct property_scan *s = arg;
	const __u8 *p = frame_at(s->ctx, s->offset, 1);
	__u32 size;

	(void)i;
	if (!p || s->offset >= s->end)
		return 1;
	size = number_property(*p);
	if (!size)
		return 1;
	s->offset += 1 + size;
	return 0;
}

/* Whether the properties are all numbers: none of them is an authentication method (MQTT 5 §3.1.2.11.9). */
static __always_inline bool only_numbers(struct xdp_md *ctx, __u32 offset, __u32 length)
{
	struct property_scan scan = {.ctx = ctx, .offset = offset, .end = offset + length};

	bpf_loop(NUMBER_PROPERTIES, property_step, &scan, 0);
	return scan.offset == scan.end;
}

/* Whether brokers refuse it for its flags (MQTT 3.1.1 §3.1.2.3 to §3.1.2.7), or differ in that. */
static __always_inline bool connect_flags_wrong(const struct connect *k)
{
	return k->flags & CONNECT_RESERVED || (k->flags & CONNECT_WILL_QOS) == CONNECT_WILL_QOS ||
	       (!(k->flags & CONNECT_WILL) && k->flags & (CONNECT_WILL_QOS | CONNECT_WILL_RETAIN));
}

/* Reads the CONNECT that the payload begins with to scratch.connect. Global (see event.h). */
__noinline int read_connect(struct xdp_md *ctx, const struct conn *c)
{
	struct scratch *w = scratch();
	struct connect *k;
	const __u8 *p;
	__u32 offset, end, remaining, length;

	if (!w || !c)
		return 0;
	k = &w->connect;
	*k = (struct connect){};
	offset = c->payload;
	end = c->payload + c->payload_length;
	p = frame_at(ctx, offset, 1);
	if (!p || *p != MQTT_CONNECT << 4)
		return 0;
	offset++;
	remaining = read_varint(ctx, &offset, end);
	if (remaining == ~0U)
		return 0;
	k->length = offset - c->payload + remaining;
	if (end > offset + remaining)
		end = offset + remaining;

	p = frame_at(ctx, offset, 8);
	if (!p || offset + 8 > end)
		return 0;
	__u64 name = load_be64(p);
	if (name == NAME_MQISDP)
		offset += 8;
	else if (name >> 16 == NAME_MQTT)
		offset += 6;
	else
		return 0;
	p = frame_at(ctx, offset, 4); /* level, flags, keepalive */
	if (!p || offset + 4 > end)
		return 0;
	/* A level that does not go with its name is refused by brokers, not by us. */
	if ((name == NAME_MQISDP) == (p[0] == 3))
		k->level = p[0];
	k->flags = p[1];
	offset += 4;
	if (k->level == 5) {
		length = read_varint(ctx, &offset, end);
		if (length > 0xffff)
			return 0;
		k->properties = offset;
		k->properties_length = length;
		offset += length;
	}
	length = read_length(ctx, &offset, end);
	if (length == ~0U || offset + length > end)
		return 0;
	k->id = offset;
	k->id_length = length;
	k->has_id = true;
	offset += length;

	if (k->flags & CONNECT_WILL) {
		if (k->level == 5) {
			length = read_varint(ctx, &offset, end);
			if (length > 0xffff)
				return 0;
			offset += length;
		}
		length = read_length(ctx, &offset, end);
		if (length == ~0U || offset + length > end)
			return 0;
		k->will = offset;
		k->will_length = length;
		offset += length;
		length = read_length(ctx, &offset, end);
		if (length == ~0U || offset + length > end)
			return 0;
		offset += length;
	}
	if (!(k->flags & CONNECT_USER))
		return 0;
	length = read_length(ctx, &offset, end);
	if (length == ~0U || offset + length > end)
		return 0;
	k->user = offset;
	k->user_length = length;
	k->has_user = true;
	return 0;
}

/* Whether it surely has no credentials of any kind, and no broker refuses it for its form. */
static __always_inline bool is_anonymous(struct xdp_md *ctx, const struct conn *c,
					 const struct connect *k)
{
	__u32 end = c->payload + (k->length < c->payload_length ? k->length : c->payload_length);

	if (k->level < 3 || k->level > 5 || k->flags & (CONNECT_USER | CONNECT_PASSWORD) ||
	    connect_flags_wrong(k))
		return false;
	return k->level != 5 || (k->properties + k->properties_length <= end &&
				 only_numbers(ctx, k->properties, k->properties_length));
}

/* Whether a session may be older than the connection, and have subscriptions of before (MQTT 5 §3.1.2.11.2). */
static __always_inline bool is_lasting(const struct connect *k)
{
	return !(k->flags & CONNECT_CLEAN) || k->properties_length;
}

/*
 * Why no broker may be answered for, enum fallback_reason; FALLBACK_NONE: any broker that takes the connection at
 * all would answer with the same four bytes.
 */
static __always_inline __u32 connect_unanswerable(const struct connect *k, const struct conn *c)
{
	if (!k->length)
		return FALLBACK_NOT_CONNECT;
	if (k->length > c->payload_length || !k->has_id)
		return FALLBACK_CUT;
	if (k->level != 3 && k->level != 4)
		return FALLBACK_MQTT5;
	if (k->flags & (CONNECT_USER | CONNECT_PASSWORD))
		return FALLBACK_CREDENTIALS;
	if (!(k->flags & CONNECT_CLEAN))
		return FALLBACK_PERSISTENT;
	if (k->length > HANDOVER_CONNECT_MAX)
		return FALLBACK_TOO_LONG;
	if (connect_flags_wrong(k) ||
	    (k->level == 3 && (!k->id_length || k->id_length > CLIENT_ID_MAX_31)))
		return FALLBACK_NOT_CONNECT;
	return FALLBACK_NONE;
}

#endif /* MQTT_FWD_CONNECT_H */
