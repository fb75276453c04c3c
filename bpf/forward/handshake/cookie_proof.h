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
 * Whether a client's segment, whose options are in scratch.options, acknowledges a SYN-ACK that was sent from
 * here a minute or two ago at most, and nothing after it. Without timestamps that is 24 bits of proof, with
 * them 32. Global (see event.h).
 */
__noinline int has_cookie(struct xdp_md *ctx, const struct conn *c)
{
	const struct handover_keys *keys = current_keys();
	struct scratch *w = scratch();
	struct cookie_proof p = {};
	struct cookie_tuple t;
	__u32 now;

	if (!c || !keys || !w || !cookie_has_key(keys, c->ack - 1) || !tuple_of(ctx, c->v6, &t))
		return false;
	p.client_isn = c->seq - 1;
	p.cookie = c->ack - 1;
	p.tsecr = w->options.o.tsecr;
	p.timestamps = w->options.o.has_timestamps;
	p.v6 = c->v6;
	now = cookie_period();
	/* The next period: of another balancer, whose clock is ahead. */
#pragma nounroll
	for (__u32 i = 0; i < 3; i++) {
		if (cookie_valid(keys, &t, &p, now - 1 + i))
			return true;
	}
	return false;
}

#endif /* MQTT_FWD_DELAYED_PROOF_H */
