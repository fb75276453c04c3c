/* SPDX-License-Identifier: GPL-2.0-only */
/* The map `untracked`: where it is noted that a segment without a flow was here, by a hash of its addresses. */
#ifndef MQTT_FWD_HANDSHAKE_UNTRACKED_PLACE_H
#define MQTT_FWD_HANDSHAKE_UNTRACKED_PLACE_H

#include "../flow/flow.h"

/* log2 of the places in `untracked`. */
const volatile __u32 untracked_bits = 12;

/* Milliseconds | tag << 32. */
static __always_inline __u64 *untracked_place(const struct conn *c)
{
	__u32 key = c->tag >> (32 - untracked_bits);

	return bpf_map_lookup_elem(&untracked, &key);
}

/*
 * A connection on these addresses is bound: what is noted of it says nothing about the next one, whose first segment may
 * come behind its second, too.
 */
static __always_inline void untracked_forget(const struct conn *c)
{
	__u64 *place = untracked_place(c);

	if (place && READ_ONCE(*place) >> 32 == c->tag)
		WRITE_ONCE(*place, 0);
}

#endif /* MQTT_FWD_HANDSHAKE_UNTRACKED_PLACE_H */
