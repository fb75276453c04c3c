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
 * and, with timestamps, the lowest byte of TSval has 8 more bits of the hash. The options, whether there
 * are timestamps, and the time are part of the hash's input, so that nobody can change them: a cookie is valid
 * for one to two periods.
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

/*
 * Of CLOCK_TAI, which all hosts have in common, whether or not something told them how far it is from UTC
 * (37 s): see COOKIE_SKEW.
 */
const volatile __u32 cookie_period_ms = 64000;

/*
 * How many periods the clock of a broker host may be off, 21 minutes: the balancer has looked at a cookie's
 * age before.
 */
#define COOKIE_SKEW 20

static __always_inline __u32 cookie_period(void)
{
	return bpf_ktime_get_tai_ns() / 1000000 / cookie_period_ms;
}

static __always_inline __u32 cookie_hash(const struct handover_keys *k,
					 const struct cookie_tuple *t, __u32 client_isn,
					 __u32 options, bool timestamps, __u32 period, bool v6)
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
	hash = siphash_final(&h, options | (__u64)timestamps << 8 | (__u64)period << 16,
			     v6 ? 47 : 23);
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

/* What a segment shows of the SYN-ACK that it acknowledges. */
struct cookie_proof {
	__u32 client_isn;
	__u32 cookie;
	__u32 tsecr;
	bool timestamps;
	bool v6;
};

/* Whether that is what such a SYN got in a period. */
static __always_inline bool cookie_valid(const struct handover_keys *k,
					 const struct cookie_tuple *t, const struct cookie_proof *p,
					 __u32 period)
{
	__u32 hash = cookie_hash(k, t, p->client_isn, p->cookie & COOKIE_OPTIONS_MASK,
				 p->timestamps, period, p->v6);

	return !((hash ^ p->cookie) & COOKIE_HASH_MASK) &&
	       (!p->timestamps || !((p->tsecr ^ hash) & 0xff));
}

#endif /* MQTT_FWD_COOKIE_H */
