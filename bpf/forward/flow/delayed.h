/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Delayed binding: SYNs are answered here, and a connection gets its group, and a flow, when CONNECT and
 * what follows it have been read. Everything up to there is another stage (handshake/handshake.h).
 * From there on a flow is a flow; until its broker has answered, a third program says how its
 * segments leave (handshake/handover.h).
 *
 *            SYN ─► SYN-ACK from here, nothing kept
 *        CONNECT ─► bound at once (BOUND_BY_MESSAGE, _CLIENT_ID, _ROUTE, _UNANSWERED),
 *                   or CONNACK from here, `handovers` keeps CONNECT: WAIT
 *   next message ─► bound (BOUND_BY_ANSWERED); goes to the broker with CONNECT in front
 *           then ─► FLOW_UNCONFIRMED, until the client acknowledges what only the broker can have sent
 */
#ifndef MQTT_FWD_BIND_DELAYED_H
#define MQTT_FWD_BIND_DELAYED_H

#include "../../maps/programs.h"
#include "../handshake/cookie_proof.h"
#include "../handshake/handovers.h"
#include "bind.h"

/* For the next stage. Global (see event.h): the caller has no stack to spare. */
__noinline int save_tail_args(const struct conn *c, const struct service *svc, __u32 binding)
{
	struct scratch *w = scratch();

	if (!w || !c || !svc)
		return 0;
	w->tail_args.conn = *c;
	w->tail_args.slot = svc->slot;
	w->tail_args.binding = binding;
	return 0;
}

static __always_inline void tail_call_stage(struct xdp_md *ctx, const struct conn *c,
					    const struct service *svc, binding_t binding,
					    enum stage step)
{
	save_tail_args(c, svc, binding);
	bpf_tail_call(ctx, &stages, step);
}

/* Whether a segment is too far from where the flow is, or behind its end, to be the flow's own. */
static __always_inline bool is_far(const struct flow *f, const struct conn *c)
{
	__u32 ahead = c->seq - f->end;

	if (f->flags & FLOW_CLOSING && ahead < 1U << 31)
		return true;
	return ahead + FLOW_WINDOW > 2 * FLOW_WINDOW;
}

/* The acknowledgement of the SYN-ACK that a flow began with; 0: it has none. */
static __always_inline __u32 flow_first_ack(const struct flow *f)
{
	return f->flags & FLOW_ENDED ? 0 : f->first_ack;
}

/*
 * After a SYN on a flow's addresses: whether a segment is of the flow, or of another connection. The flow itself
 * shows by its next byte that it goes on. What acknowledges a SYN-ACK and nothing behind it is the first of a
 * connection, of whatever numbers: the flow's own CONNECT, doubled by the network, if it is the flow's SYN-ACK, and
 * else a new connection's, as of a device that lost power and has the same port again.
 */
static __always_inline bool is_of_flow(struct xdp_md *ctx, const struct conn *c, struct flow *f)
{
	if (c->seq == f->end) {
		if (c->payload_length)
			f->flags &= ~FLOW_REUSED_PORT;
		return true;
	}
	if (is_far(f, c))
		return false;
	if (c->ack == flow_first_ack(f))
		return true;
	read_options(ctx, c);
	return !has_cookie(ctx, c);
}

#endif /* MQTT_FWD_BIND_DELAYED_H */
