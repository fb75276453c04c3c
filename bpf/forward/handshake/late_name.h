/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A ClientHello whose server name does not lie in its first segment, which is too long to be kept here: one with a
 * post-quantum key share in front of the name, say. Its segments go to the sidecar, which reads it (handover/hellos.rs):
 *
 *   the name comes right behind   DECIDED, and the segments once more, as they came: nothing was acknowledged, so what is
 *                                 lost is the client's to repeat
 *   it does not, and the client   acknowledged, as it may wait for that (RFC 896); then what is acknowledged is the
 *   sends nothing                 sidecar's to repeat, in front of whatever the client repeats: HELLO_REPEAT
 *   the sidecar does not answer   bound without its name, when the first segment comes for the fifth time
 */
#ifndef MQTT_FWD_HANDSHAKE_LATE_NAME_H
#define MQTT_FWD_HANDSHAKE_LATE_NAME_H

#include "../report.h"
#include "../share.h"
#include "waiting.h"

/* How often the first segment is left to the sidecar: three seconds, as TCP repeats it, in which that may start again. */
#define HELLO_TRIES 4
/* A message of more is no ClientHello that anybody sends. */
#define HELLO_MAX (1 << 14)

/* A segment for which there is no room is the client's to repeat. */
static __always_inline void hello_hold(struct xdp_md *ctx, const struct conn *c)
{
	count(report_segment(ctx, c, REPORT_HELLO) ? REASON_HELLO_HELD : REASON_WAIT_DROPPED);
}

/* A segment of such a connection behind its first, or one that is acknowledged. */
static __always_inline int handshake_hello(struct xdp_md *ctx, struct conn *c,
					   const struct service *svc, struct handover *h)
{
	if (c->seq - h->start < h->connect_length)
		return handshake_answer(ctx, c, svc, h, false, REASON_CONNECT_PIECE);
	if (h->state == HANDOVER_HELLO && c->payload_length && handover_admitted(c))
		hello_hold(ctx, c);
	else
		count(REASON_WAIT_DROPPED);
	return XDP_DROP;
}

/* The first segment: whether it is left to the sidecar, or has been often enough. */
static __always_inline bool hello_held(struct xdp_md *ctx, struct conn *c, struct scratch *w,
				       const struct service_table *t)
{
	struct handover *h = handover_find(c);

	if (h && h->state == HANDOVER_HELLO && h->start == c->seq && h->server == c->ack) {
		if (h->tries >= HELLO_TRIES)
			return false;
		h->tries++;
		hello_hold(ctx, c);
		return true;
	}
	h = &w->handover;
	__builtin_memset(h, 0, sizeof(*h));
	h->start = c->seq;
	h->server = c->ack;
	h->tsval = w->options.o.tsecr;
	h->born_s = now_s();
	h->state = HANDOVER_HELLO;
	h->tries = 1;
	/* The old connection's flow would take the next segments. */
	flow_remove(c, t);
	/* First, for the sidecar looks for it at once. */
	handover_put(c, h);
	hello_hold(ctx, c);
	return true;
}

#endif /* MQTT_FWD_HANDSHAKE_LATE_NAME_H */
