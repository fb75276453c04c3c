/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The first data of a connection: bound at once, or CONNECT is kept and answered (WAIT), or what there is of it is kept
 * and acknowledged until it is whole: some devices write its fields one by one.
 */
#ifndef MQTT_FWD_HANDSHAKE_CONNECT_H
#define MQTT_FWD_HANDSHAKE_CONNECT_H

#include "answer.h"
#include "bound.h"
#include "client.h"
#include "first_message.h"
#include "../mqtt/will.h"
#include "../../lib/tls.h"

/*
 * Keeps CONNECT, which lies whole in the segment and is short, and answers it (HANDOVER_WAIT); or keeps a piece
 * (HANDOVER_PIECES).
 */
static __always_inline int handshake_keep(struct xdp_md *ctx, struct conn *c, struct scratch *w,
					  const struct service_table *t, const struct service *svc,
					  __u32 state, __u32 will)
{
	struct handover *h = &w->handover;
	bool whole = state == HANDOVER_WAIT;
	__u32 length = whole ? w->connect.length : c->payload_length;

	__builtin_memset(h, 0, sizeof(*h));
	h->start = c->seq;
	h->server = c->ack;
	h->tsval = w->options.o.tsecr;
	h->born_s = now_s();
	h->connect_length = length;
	h->id = whole ? w->id : 0;
	h->id_offset = w->connect.id - c->payload;
	h->id_length = w->connect.id_length;
	h->will_group = will;
	h->state = state;
	if (length > HANDOVER_CONNECT_MAX ||
	    !frame_copy(ctx, c->payload, h->connect, length, CONNECT_BOUND))
		return XDP_DROP;
	h->connect_sum = csum_fold(
		bpf_csum_diff(NULL, 0, (__be32 *)h->connect, HANDOVER_CONNECT_MAX, 0) & 0xffffffff);
	/* It is acknowledged here, so nobody else will find out if it is damaged. */
	if (!checksum_right(ctx, c, h->connect_sum)) {
		count(REASON_WAIT_DROPPED);
		return XDP_DROP;
	}
	/* The old connection's flow would take the next segments. */
	flow_remove(c, t);
	if (!answer_connect(ctx, c, svc, h, whole)) {
		count(REASON_HANDOVER_FAILED);
		return XDP_DROP;
	}
	handover_put(c, h);
	if (fleet == FLEET_WITH_STORE && whole)
		report_waiting(c, REPORT_KEPT);
	count(whole ? REASON_CONNECT_ANSWERED : REASON_CONNECT_PIECE);
	return XDP_TX;
}

/* Whether the payload begins as TLS does (RFC 8446 §5.1). */
static __always_inline bool is_tls_handshake(struct xdp_md *ctx, const struct conn *c)
{
	const __u8 *p = frame_at(ctx, c->payload, 2);

	return p && c->payload_length > 1 && p[0] == TLS_HANDSHAKE && p[1] == TLS_MAJOR;
}

/* Whether the segment's payload may become a CONNECT that is short enough to be kept. */
static __always_inline bool is_piece(struct xdp_md *ctx, const struct conn *c,
				     const struct connect *k)
{
	const __u8 *p = frame_at(ctx, c->payload, 1);

	if (!p || *p != MQTT_CONNECT << 4 || c->payload_length > HANDOVER_CONNECT_MAX)
		return false;
	/* Its length has up to four bytes. */
	if (!k->length)
		return c->payload_length < 5;
	return k->length > c->payload_length && k->length <= HANDOVER_CONNECT_MAX;
}

/*
 * The place of a connection that is bound by its first segments: what they carry needs no more, and of those that were
 * `joined`, what is kept is in scratch.handover. `kept`: bytes that the sidecar has (late_name.h).
 */
static __always_inline void place_handover(const struct conn *c, struct scratch *w, bool joined,
					   __u32 kept)
{
	struct handover *h = &w->handover;

	if (!joined) {
		__builtin_memset(h, 0, sizeof(*h));
		h->start = c->seq;
		h->server = c->ack;
	}
	h->born_s = now_s();
	if (kept)
		h->connect_length = kept;
	h->state = joined ? HANDOVER_PREPEND : kept ? HANDOVER_HELLO_REPEAT : HANDOVER_PASS;
	handover_put(c, h);
}

/* The first data of a connection, with a cookie; `joined`: with what came before in front. */
static __always_inline int handshake_connect(struct xdp_md *ctx, struct conn *c, struct scratch *w,
					     const struct service_table *t,
					     const struct service *svc, bool joined)
{
	const struct connect *k = &w->connect;
	struct bind_decision *v = decision_begin(w, c->seq, 0);
	bool more;
	__u32 fallback, will;

	if (!joined && !handover_admitted(c)) {
		count(REASON_CONNECT_DELAYED);
		return XDP_DROP;
	}
	read_connect(ctx, c);
	if (is_piece(ctx, c, k))
		return handshake_keep(ctx, c, w, t, svc, HANDOVER_PIECES, NO_GROUP);
	identify(ctx, t, svc);
	will = will_group(ctx, t, svc);
	fallback = connect_unanswerable(k, c);
	if (fallback == FALLBACK_NOT_CONNECT && is_tls_handshake(ctx, c))
		count(REASON_TLS_ON_PLAIN);
	more = k->length && k->length < c->payload_length;

	v->binding = route_of_client(ctx, k, t, svc);
	if (v->binding) {
		v->bound_by = BOUND_BY_ROUTE;
		v->flags = FLOW_ROUTED;
	}
	if (!v->binding) {
		v->binding = client_relayed(c, svc, w);
		v->bound_by = BOUND_BY_CLIENT_ID;
	}
	if (!v->binding && more) {
		v->binding = first_message_binding(ctx, c, t, svc, c->payload + k->length);
		v->bound_by = BOUND_BY_MESSAGE;
		fallback = FALLBACK_NO_TOPIC;
	}
	if (!v->binding) {
		v->binding = client_steady(c, t, svc, w);
		if (fallback == FALLBACK_NONE && needs_topic(t, svc, v->binding))
			v->binding = 0;
		v->bound_by = BOUND_BY_CLIENT_ID;
		v->flags = v->binding ? FLOW_PREDICTED : 0;
	}
	if (!v->binding && fallback == FALLBACK_NONE)
		return handshake_keep(ctx, c, w, t, svc, HANDOVER_WAIT, will);
	if (!v->binding)
		decide_by_prediction(c, w, t, svc, fallback);
	if (!(v->flags & FLOW_ROUTED))
		v->binding = with_will(v->binding, will, svc);
	client_id_keep(c, w);

	place_handover(c, w, joined, 0);
	return bound(ctx, c, w, t, svc, NULL);
}

#endif /* MQTT_FWD_HANDSHAKE_CONNECT_H */
