/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The first data of a connection to a service that speaks TLS: bound by its ClientHello, of which nothing is answered
 * here, nor could be. What the client and its broker say from there on is theirs.
 *
 *   server name with a route     its group
 *   protocol (ALPN) with a route its group
 *   neither                      what was learned of the client's address (imported), else the relay or the default
 *                                group, or the alert unrecognized_name
 *   a piece, too short to tell   kept and acknowledged, as of a CONNECT (connect.h); a long one: late_name.h
 */
#ifndef MQTT_FWD_HANDSHAKE_HELLO_H
#define MQTT_FWD_HANDSHAKE_HELLO_H

#include "../tls/client_hello.h"
#include "connect.h"

/* Server names and topics are hashed with the same secret, which never makes them equal. */
#define SERVER_NAME_DOMAIN 0x736e690000000000ULL

/* The key of the server name in hello.text, which is stored, for people; 0: it has none. Global (see event.h). */
__noinline __u64 server_name_keep(const struct service_table *t, const struct service *svc)
{
	struct scratch *w = scratch();
	struct siphash s;
	__u64 key;

	if (!w || !t || !svc || !w->hello.name_length)
		return 0;
	siphash_init(&s, t->topic_key[0] ^ SERVER_NAME_DOMAIN ^ svc->id, t->topic_key[1]);
	for (__u32 i = 0; i < CLIENT_ROUTE_TEXT_MAX / 8; i++) {
		if (8 * i >= w->hello.text_length)
			break;
		siphash_word(&s, load_le64(w->hello.text + 8 * i));
	}
	key = siphash_final(&s, 0, w->hello.name_length);
	w->hash = key;
	if (bpf_map_lookup_elem(&server_names, &w->hash))
		return key;
	if (!budget_take(&budgets, BUDGET_TOPICS, topics_per_window))
		return 0;
	w->server_name.service = svc->id;
	w->server_name.length = w->hello.name_length;
	__builtin_memcpy(w->server_name.text, w->hello.text, sizeof(w->server_name.text));
	bpf_map_update_elem(&server_names, &w->hash, &w->server_name, BPF_ANY);
	return key;
}

/* What the sidecar has read. */
static __always_inline void hello_decided(struct hello *k, __u64 decided)
{
	__builtin_memset(k, 0, sizeof(*k));
	if (decided >> 32 == BOUND_BY_ALPN)
		k->by_alpn = decided;
	else
		k->by_name = decided;
	/* Whatever it was, it was a ClientHello. */
	k->outcome = HELLO_READ;
}

static __always_inline int hello_refused(struct xdp_md *ctx, const struct conn *c, bool is_tls)
{
	if (!(is_tls ? answer_alert(ctx, c) : answer_reset(ctx, c, false))) {
		count(REASON_HANDOVER_FAILED);
		return XDP_DROP;
	}
	count(REASON_NAME_REFUSED);
	return XDP_TX;
}

static __always_inline int hello(struct xdp_md *ctx, struct scratch *w)
{
	const struct service_table *t = current_table();
	const struct service *svc = t ? service_at(t, w->tail_args.slot) : NULL;
	struct bind_decision *v;
	struct conn *c = &w->tail_args.conn;
	bool joined = w->tail_args.joined;
	struct hello *k = &w->hello;
	__u32 kept = 0;
	__u64 name;

	if (!svc)
		return pass_on(ctx, REASON_NO_GROUP_VIP);
	const struct handover *h = handover_find(c);

	if (h && h->state == HANDOVER_DECIDED && h->start == c->seq && h->server == c->ack) {
		kept = h->connect_length;
		hello_decided(k, h->decided);
	} else {
		if (!joined && !handover_admitted(c)) {
			count(REASON_CONNECT_DELAYED);
			return XDP_DROP;
		}
		read_client_hello(ctx, c, t, svc);
		if (k->outcome == HELLO_MORE && c->payload_length <= HANDOVER_CONNECT_MAX)
			return handshake_keep(ctx, c, w, t, svc, HANDOVER_PIECES, NO_GROUP);
		if (k->outcome == HELLO_MORE && !joined && hello_held(ctx, c, w, t))
			return XDP_DROP;
	}

	name = server_name_keep(t, svc);
	v = decision_begin(w, c->seq, FLOW_OPAQUE);
	if (k->by_name) {
		v->binding = k->by_name;
		v->bound_by = BOUND_BY_SERVER_NAME;
		v->flags |= FLOW_ROUTED;
	} else if (k->by_alpn) {
		v->binding = k->by_alpn;
		v->bound_by = BOUND_BY_ALPN;
		v->flags |= FLOW_ROUTED;
	} else {
		w->id = 0;
		decide_by_prediction(c, w, t, svc,
				     k->outcome == HELLO_MORE	? FALLBACK_HELLO_CUT
				     : k->outcome == HELLO_NONE ? FALLBACK_NO_HELLO
								: FALLBACK_NO_SERVER_NAME);
		if (svc->refuses_unknown && !(v->flags & FLOW_PREDICTED))
			return hello_refused(ctx, c, k->outcome != HELLO_NONE);
	}
	w->id = name;
	place_handover(c, w, joined, kept);
	return bound(ctx, c, w, t, svc, NULL);
}

SEC("xdp")
int mqtt_hello(struct xdp_md *ctx)
{
	struct scratch *w = scratch();

	return w ? hello(ctx, w) : XDP_DROP;
}

#endif /* MQTT_FWD_HANDSHAKE_HELLO_H */
