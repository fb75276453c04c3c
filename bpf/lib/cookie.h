/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * SYN cookies of delayed binding: all that the balancer promised in a SYN-ACK, so that it need
 * not remember it. The initial sequence number is
 *
 *   31..8  hash of both addresses, both ports and the client's initial sequence number
 *   7..6   MSS of the client, index of cookie_mss()
 *   5      parity of the key's epoch
 *   4      SACK permitted
 *   3..0   window scale of the client; 15: none
 *
 * and, with timestamps, the lowest byte of TSval has 8 more bits of the hash. The options are part
 * of the hash's input, so that nobody can change them.
 */
#ifndef MQTT_FWD_COOKIE_H
#define MQTT_FWD_COOKIE_H

#include <stdbool.h>

#include "../abi/handover.h"
#include "siphash.h"

#define COOKIE_HASH_MASK 0xffffff00U
#define COOKIE_OPTIONS_MASK 0xffU
#define COOKIE_MSS_SHIFT 6
#define COOKIE_EPOCH (1U << 5)
#define COOKIE_SACK (1U << 4)
#define COOKIE_WSCALE_MASK 0xfU
#define COOKIE_NO_WSCALE 15U

/* Values of the kernel's own SYN cookies: what clients have. The kernel takes no less over. */
static __always_inline __u16 cookie_mss(__u32 cookie, bool v6)
{
	switch (cookie >> COOKIE_MSS_SHIFT & 3) {
	case 0:
		return v6 ? 1220 : 536;
	case 1:
		return v6 ? 1380 : 1300;
	case 2:
		return v6 ? 1420 : 1440;
	default:
		return v6 ? 1440 : 1460;
	}
}

/* The largest MSS of the list that is not above the client's. */
static __always_inline __u32 cookie_mss_index(__u32 mss, bool v6)
{
	if (mss >= (v6 ? 1440 : 1460))
		return 3;
	if (mss >= (v6 ? 1420 : 1440))
		return 2;
	return mss >= (v6 ? 1380 : 1300) ? 1 : 0;
}

/* Both ends of a connection as they stand in a client's packet. IPv4: the first word, the rest 0. */
struct cookie_tuple {
	__be32 src[4];
	__be32 dst[4];
	__be16 sport;
	__be16 dport;
};

static __always_inline __u32 cookie_hash(const struct handover_keys *k,
					 const struct cookie_tuple *t, __u32 client_isn,
					 __u32 options, bool v6)
{
	const __u64 *key = options & COOKIE_EPOCH ? k->key[1] : k->key[0];
	struct siphash h;
	__u64 hash;

	siphash_init(&h, key[0], key[1]);
	siphash_word(&h, t->src[0] | (__u64)t->dst[0] << 32);
	if (v6) {
		siphash_word(&h, t->src[1] | (__u64)t->dst[1] << 32);
		siphash_word(&h, t->src[2] | (__u64)t->dst[2] << 32);
		siphash_word(&h, t->src[3] | (__u64)t->dst[3] << 32);
	}
	siphash_word(&h, client_isn | (__u64)t->sport << 32 | (__u64)t->dport << 48);
	hash = siphash_final(&h, options, v6 ? 41 : 17);
	return hash ^ hash >> 32;
}

static __always_inline bool cookie_has_key(const struct handover_keys *k, __u32 cookie)
{
	const __u64 *key = cookie & COOKIE_EPOCH ? k->key[1] : k->key[0];

	return key[0] | key[1];
}

/* The initial sequence number; the low byte of TSval is the hash's. */
static __always_inline __u32 cookie_make(__u32 hash, __u32 options)
{
	return (hash & COOKIE_HASH_MASK) | options;
}

/*
 * Whether `cookie`, which a segment acknowledges, is what a SYN with `client_isn` got.
 * `tsecr`: what the segment echoes; NULL: it has no timestamps.
 */
static __always_inline bool cookie_valid(const struct handover_keys *k,
					 const struct cookie_tuple *t, __u32 client_isn,
					 __u32 cookie, const __u32 *tsecr, bool v6)
{
	__u32 hash;

	if (!cookie_has_key(k, cookie))
		return false;
	hash = cookie_hash(k, t, client_isn, cookie & COOKIE_OPTIONS_MASK, v6);
	return !((hash ^ cookie) & COOKIE_HASH_MASK) && (!tsecr || !((*tsecr ^ hash) & 0xff));
}

#endif /* MQTT_FWD_COOKIE_H */
