/* SPDX-License-Identifier: GPL-2.0-only */
/* Segments with neither a flow nor a cookie. */
#ifndef MQTT_FWD_HANDSHAKE_UNTRACKED_H
#define MQTT_FWD_HANDSHAKE_UNTRACKED_H

#include "../../lib/clock.h"
#include "../flow/delayed.h"
#include "bound.h"
#include "untracked_place.h"

/*
 * Whether something of this flow was here before: not just now, and not long ago. What follows
 * CONNECT may overtake it, or CONNECT may be lost; a broker's RST would then end a connection that
 * is being opened. A flow that the balancer lost sends again, and is let through for as long as it goes on.
 */
#define UNTRACKED_SOON_MS 3000
#define UNTRACKED_LATE_MS 60000

static __always_inline bool untracked_again(const struct conn *c)
{
	__u64 *place = untracked_place(c), seen;
	__u32 age;

	if (!place)
		return false;
	seen = READ_ONCE(*place);
	age = now_ms() - (__u32)seen;
	if (seen >> 32 == c->tag && age < UNTRACKED_LATE_MS) {
		if (age < UNTRACKED_SOON_MS)
			return false;
		if (age >= UNTRACKED_LATE_MS / 2)
			WRITE_ONCE(*place, tagged(c, now_ms() - UNTRACKED_SOON_MS));
		return true;
	}
	WRITE_ONCE(*place, tagged(c, now_ms()));
	return false;
}

/* Neither a flow nor a cookie: a connection whose state was lost, or nobody's. Nothing is kept. */
static __always_inline int handshake_untracked(struct xdp_md *ctx, struct conn *c,
					       const struct service_table *t,
					       const struct service *svc, bool rst)
{
	binding_t binding;

	if (fleet) {
		tail_call_stage(ctx, c, svc, 0, STAGE_MISS);
		return XDP_DROP;
	}
	if (!rst && !untracked_again(c)) {
		count(REASON_UNTRACKED_DROPPED);
		return XDP_DROP;
	}
	binding = cache_binding(c, t);
	if (!binding)
		binding = predict(c, t, svc, 0);
	return handshake_forward(ctx, c, svc, binding, REASON_UNTRACKED);
}

#endif /* MQTT_FWD_HANDSHAKE_UNTRACKED_H */
