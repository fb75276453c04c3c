/* SPDX-License-Identifier: GPL-2.0-only */
/* The connection of the current segment, and its keys in the maps. */
#ifndef MQTT_FWD_CONN_H
#define MQTT_FWD_CONN_H

#include "../../abi/state.h"
#include "../../lib/siphash.h"

struct conn {
	struct flow6 key; /* IPv4: address in key.addr[0], the rest 0 */
	__u32 tag; /* of the flow's id, never 0: see struct flow */
	__u32 seq; /* host order */
	__u32 ack; /* host order */
	__u16 payload; /* offset from the start of the frame */
	__u16 payload_length;
	__u8 v6;
	__u8 returned; /* from a broker host that has no such connection (abi/handover.h, MARK_RETURNED) */
	__be16 flags; /* of TCP, in the word that begins with the header's length (RFC 9293 §3.1) */
};

/*
 * A flow's key in one word, by a secret, as its place in the table follows from it. IPv4: mixed, one to one, so that no
 * flow can be taken for another. IPv6: a keyed hash, with a bit that no IPv4 flow has.
 */
static __always_inline __u64 flow_id(const struct conn *c, const struct service_table *t)
{
	__u64 id;

	if (c->v6) {
		struct siphash h;

		siphash_init(&h, t->topic_key[0], t->topic_key[1]);
		siphash_word(&h, c->key.addr[0] | (__u64)c->key.addr[1] << 32);
		siphash_word(&h, c->key.addr[2] | (__u64)c->key.addr[3] << 32);
		id = siphash_final(&h, c->key.port | (__u32)c->key.service << 16, sizeof(c->key));
		id |= 1ULL << 63;
	} else {
		id = c->key.addr[0] | (__u64)c->key.port << 32 | (__u64)c->key.service << 48;
	}
	/* Each step can be undone. */
	id = (id ^ t->topic_key[0]) * 0x9e3779b97f4a7c15ULL;
	id = (id ^ id >> 32) * 0xc2b2ae3d27d4eb4fULL;
	id ^= id >> 32;
	/* Two of 2⁶⁴ are none. */
	return id == FLOW_FREE || id == FLOW_CLAIMED ? 1 : id;
}

/* What a place in the table says of whose it is, with less room: see struct flow. */
static __always_inline __u32 flow_tag(__u64 id)
{
	return (__u32)(id ^ id >> 32) ?: 1;
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
