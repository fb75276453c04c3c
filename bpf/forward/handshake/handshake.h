/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A connection without a flow, from its SYN until it is bound (delayed binding).
 *
 *   no state    SYN                   SYN-ACK                                    syn.h
 *               without data          dropped, or RST if it ends
 *               CONNECT, with cookie  bound, or WAIT and CONNACK                 connect.h
 *               ClientHello, likewise bound, or refused with an alert            hello.h
 *               without a cookie      a flow that was lost, or nobody's          untracked.h
 *   PIECES      any                   put together                               pieces.h
 *   HELLO       any                   left to the sidecar                        late_name.h
 *   WAIT        any                   CONNACK again, bound, or dropped           waiting.h
 *
 * A connection that is bound gets a flow and goes back to mqtt_fwd (bound.h).
 */
#ifndef MQTT_FWD_HANDSHAKE_H
#define MQTT_FWD_HANDSHAKE_H

#include "../services.h"
#include "connect.h"
#include "late_name.h"
#include "pieces.h"
#include "syn.h"
#include "untracked.h"
#include "waiting.h"

static __always_inline int handshake(struct xdp_md *ctx, struct scratch *w)
{
	const struct service_table *t = current_table();
	const struct service *svc = t ? service_at(t, w->tail_args.slot) : NULL;
	struct conn *c = &w->tail_args.conn;
	const struct tcphdr *tcp = tcp_of(ctx, c->v6);
	struct handover *h;
	bool fin, rst, ack, joined = false;

	if (!svc || !tcp)
		return pass_on(ctx, REASON_TRUNCATED);
	fin = tcp->fin;
	rst = tcp->rst;
	ack = tcp->ack;
	read_options(ctx, c);
	/* A global function does not change the packet, but the verifier forgets what it knew of it. */
	tcp = tcp_of(ctx, c->v6);
	if (!tcp)
		return pass_on(ctx, REASON_TRUNCATED);
	if (tcp->syn)
		return handshake_syn(ctx, c, w, t, svc, tcp);

	h = handover_find(c);
	if (h && h->state <= HANDOVER_SILENT) {
		/*
		 * An old one may have left its place to a new one on the same addresses, of whatever numbers: that acknowledges
		 * another SYN-ACK.
		 */
		if (c->ack - h->server <= HANDOVER_CONNACK || !has_cookie(ctx, c)) {
			if (rst) {
				if (c->seq == h->start + h->connect_length)
					handover_remove(c);
				count(REASON_WAIT_DROPPED);
				return XDP_DROP;
			}
			return handshake_waiting(ctx, c, w, t, svc, h, fin);
		}
	}
	/* Of this connection, not of a new one on its addresses: as above. */
	if (h && h->state == HANDOVER_PIECES && !rst && c->ack == h->server && c->seq != h->start &&
	    c->seq - h->start <= h->connect_length) {
		int verdict = handshake_pieces(ctx, c, w, svc, h);

		if (verdict != JOINED)
			return verdict;
		joined = true;
	}
	if (h && !rst && c->ack == h->server && c->seq - h->start < HELLO_MAX &&
	    ((h->state == HANDOVER_HELLO && (h->connect_length || c->seq != h->start)) ||
	     (h->state == HANDOVER_DECIDED && c->seq != h->start)))
		return handshake_hello(ctx, c, svc, h);
	if (!ack || rst || !(joined || has_cookie(ctx, c)))
		return handshake_untracked(ctx, c, t, svc, rst);
	if (c->payload_length && svc->protocol == PROTOCOL_TLS) {
		w->tail_args.joined = joined;
		bpf_tail_call(ctx, &stages, STAGE_HELLO);
	} else if (c->payload_length) {
		return handshake_connect(ctx, c, w, t, svc, joined);
	}
	if (!fin) {
		count(REASON_HANDSHAKE);
		return XDP_DROP;
	}
	if (!answer_reset(ctx, c, true)) {
		count(REASON_HANDOVER_FAILED);
		return XDP_DROP;
	}
	count(REASON_REFUSED);
	return XDP_TX;
}

SEC("xdp")
int mqtt_handshake(struct xdp_md *ctx)
{
	struct scratch *w = scratch();

	return w ? handshake(ctx, w) : XDP_DROP;
}

#endif /* MQTT_FWD_HANDSHAKE_H */
