/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A connection in WAIT: its CONNECT was answered, and the next message decides.
 *
 *   CONNECT                again: CONNACK
 *   what comes behind it   bound
 *   keepalive probe        acknowledged
 *   anything else          dropped
 */
#ifndef MQTT_FWD_HANDSHAKE_WAITING_H
#define MQTT_FWD_HANDSHAKE_WAITING_H

#include "../flow/delayed.h"
#include "answer.h"
#include "bound.h"
#include "first_message.h"
#include "../mqtt/will.h"

static __always_inline int handshake_answer(struct xdp_md *ctx, struct conn *c,
					    const struct service *svc, struct handover *h,
					    bool connack, enum reason verdict)
{
	if (!answer_connect(ctx, c, svc, h, connack)) {
		count(REASON_HANDOVER_FAILED);
		return XDP_DROP;
	}
	count(verdict);
	return XDP_TX;
}

struct kept_id {
	struct scratch *w;
	const struct handover *h;
};

static long kept_id_step(__u32 i, void *arg)
{
	const struct kept_id *kept = arg;
	__u32 at = kept->h->id_offset + i;

	if (i >= CLIENT_ID_TEXT_MAX || at >= HANDOVER_CONNECT_MAX)
		return 1;
	kept->w->client_id.text[i] = kept->h->connect[at];
	return 0;
}

/* Its client id, from the CONNECT that is kept. */
static __always_inline void identify_kept(struct scratch *w, const struct handover *h,
					  const struct service *svc)
{
	struct kept_id kept = {.w = w, .h = h};

	w->id = h->id;
	if (!w->id)
		return;
	w->client_id.service = svc->id;
	w->client_id.length = h->id_length;
	__builtin_memset(w->client_id.text, 0, sizeof(w->client_id.text));
	bpf_loop(h->id_length, kept_id_step, &kept, 0);
}

/* A segment of a connection in WAIT. */
static __always_inline int handshake_waiting(struct xdp_md *ctx, struct conn *c, struct scratch *w,
					     const struct service_table *t,
					     const struct service *svc, struct handover *h,
					     bool fin)
{
	__u32 behind = h->start + h->connect_length;
	struct bind_decision *v = decision_begin(w, behind, FLOW_CONNECTED);
	bool again = c->seq == h->start, silent = h->state == HANDOVER_SILENT;

	/* What comes before this was lost, or another balancer had it, and a broker has the connection. */
	if (fleet && seq_before(behind, c->seq)) {
		tail_call_stage(ctx, c, svc, 0, STAGE_MISS);
		return XDP_DROP;
	}
	if (!c->payload_length && !fin) {
		if (c->seq == behind - 1)
			return handshake_answer(ctx, c, svc, h, false, REASON_WAIT_ANSWERED);
		count(REASON_WAIT_DROPPED);
		return XDP_DROP;
	}
	if (again && c->payload_length <= h->connect_length && !fin && !silent)
		return handshake_answer(ctx, c, svc, h, true, REASON_CONNECT_ANSWERED);
	if (again) {
		/* CONNECT and more in one segment: repeated, or by user space, as nothing else came. */
		v->next = c->seq;
		v->flags = 0;
	} else if (c->seq != behind) {
		count(REASON_WAIT_DROPPED);
		return XDP_DROP;
	}

	identify_kept(w, h, svc);
	v->bound_by = BOUND_BY_ANSWERED;
	w->connect.level = 4;
	v->binding = c->payload_length
			     ? first_message_binding(ctx, c, t, svc,
						     c->payload + (again ? h->connect_length : 0))
			     : 0;
	if (!v->binding)
		decide_by_prediction(c, w, t, svc,
				     silent || !c->payload_length ? FALLBACK_SILENT
								  : FALLBACK_NO_TOPIC);
	v->binding = with_will(v->binding, h->will_group, svc);
	client_id_keep(c, w);
	return bound(ctx, c, w, t, svc, h);
}

#endif /* MQTT_FWD_HANDSHAKE_WAITING_H */
