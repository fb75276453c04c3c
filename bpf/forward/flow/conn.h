/* SPDX-License-Identifier: GPL-2.0-only */
/* The connection of the current segment, and its keys in the maps. */
#ifndef MQTT_FWD_CONN_H
#define MQTT_FWD_CONN_H

#include "../../abi/state.h"

/* conn.touches of what came back from a broker host (abi/handover.h, MARK_RETURNED). */
#define RETURNED 2

struct conn {
	struct flow6 key; /* IPv4: address in key.addr[0], the rest 0 */
	__u32 tag; /* of the key, never 0: see struct flow */
	__u32 seq; /* host order */
	__u32 ack; /* host order */
	__u16 payload; /* offset from the start of the frame */
	__u16 payload_length;
	__u8 v6;
	__u8 touches; /* looks into `flows`, though it has no data: see mqtt_fwd.bpf.c; RETURNED */
	__be16 flags; /* of TCP, in the word that begins with the header's length (RFC 9293 §3.1) */
};

static __always_inline __u32 conn_tag(const struct flow6 *key)
{
	__u32 tag = key->addr[0] ^ key->addr[1] ^ key->addr[2] ^ key->addr[3];

	tag = (tag ^ (key->port | (__u32)key->service << 16) * 0x9e3779b1U) * 0x85ebca6bU;
	return tag ^ tag >> 15 ?: 1;
}

static __always_inline struct flow4 flow4_of(const struct conn *c)
{
	return (struct flow4){
		.addr = c->key.addr[0], .port = c->key.port, .service = c->key.service};
}

static __always_inline struct client4 client4_of(const struct conn *c)
{
	return (struct client4){.addr = c->key.addr[0], .service = c->key.service};
}

static __always_inline struct client6 client6_of(const struct conn *c)
{
	struct client6 key = {.service = c->key.service};

	__builtin_memcpy(key.addr, c->key.addr, sizeof(key.addr));
	return key;
}

#endif /* MQTT_FWD_CONN_H */
