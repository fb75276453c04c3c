/* SPDX-License-Identifier: GPL-2.0-only */
/* Whether a segment answers a SYN-ACK of ours: its sender is where it says it is. */
#ifndef MQTT_FWD_DELAYED_PROOF_H
#define MQTT_FWD_DELAYED_PROOF_H

#include "../../lib/cookie.h"
#include "../tcp_segment.h"

static __always_inline const struct handover_keys *current_keys(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&handover_keys, &zero);
}

/*
 * Whether a client's segment acknowledges a SYN-ACK that was sent from here, and nothing after it.
 * Without timestamps that is 24 bits of proof, with them 32: scratch.options are checked if
 * `with_options`. Global (see event.h).
 */
__noinline int has_cookie(struct xdp_md *ctx, const struct conn *c, __u32 with_options)
{
	const struct handover_keys *keys = current_keys();
	struct scratch *w = scratch();
	struct cookie_tuple t;
	__u32 tsecr;

	if (!c || !keys || !w || !tuple_of(ctx, c->v6, &t))
		return false;
	tsecr = w->options.o.tsecr;
	return cookie_valid(keys, &t, c->seq - 1, c->ack - 1,
			    with_options && w->options.o.has_timestamps ? &tsecr : NULL, c->v6);
}

#endif /* MQTT_FWD_DELAYED_PROOF_H */
