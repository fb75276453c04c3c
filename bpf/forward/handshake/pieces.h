/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A connection whose CONNECT comes in pieces.
 *
 *   the next piece      what is kept is put in front, and it goes on as the first data (connect.h)
 *   a piece once more   acknowledged again
 *   keepalive probe     acknowledged
 *   anything else       dropped
 */
#ifndef MQTT_FWD_HANDSHAKE_PIECES_H
#define MQTT_FWD_HANDSHAKE_PIECES_H

#include "handover.h"
#include "waiting.h"

/* The segment now begins with the connection's first byte. */
#define JOINED (-1)

/* A segment of such a connection; its verdict, or JOINED. */
static __always_inline int handshake_pieces(struct xdp_md *ctx, struct conn *c, struct scratch *w,
					    const struct service *svc, struct handover *h)
{
	__u32 behind = h->start + h->connect_length;

	if (c->seq != behind || !c->payload_length) {
		if (seq_before(c->seq, behind) && c->seq - h->start < h->connect_length &&
		    (c->payload_length || c->seq == behind - 1))
			return handshake_answer(ctx, c, svc, h, false, REASON_CONNECT_PIECE);
		count(REASON_WAIT_DROPPED);
		return XDP_DROP;
	}
	w->handover = *h;
	if (!put_connect_in_front(ctx, c, svc->max_packet)) {
		count(REASON_HANDOVER_FAILED);
		return XDP_DROP;
	}
	c->seq = h->start;
	c->ack = h->server;
	return JOINED;
}

#endif /* MQTT_FWD_HANDSHAKE_PIECES_H */
