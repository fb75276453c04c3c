/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A connection without a flow, from its SYN until it is bound. The one writer of `handovers` beside
 * handover.h, which ends what begins here.
 *
 *   nothing kept   SYN                   SYN-ACK
 *                  without data          dropped, or RST if it ends
 *                  CONNECT, with cookie  bound, or WAIT and CONNACK
 *                  without a cookie      a flow that was lost, or nobody's: see greet_stray()
 *   WAIT           CONNECT               CONNACK
 *                  what comes behind it  bound
 *                  anything else         dropped
 *
 * What is bound gets a flow and goes back to mqtt_fwd, which frames it like any other segment.
 */
#ifndef MQTT_FWD_DELAYED_GREET_H
#define MQTT_FWD_DELAYED_GREET_H

#include "../bind/predicted.h"
#include "../connect.h"
#include "../emit.h"
#include "../services.h"
#include "answer.h"
#include "decide.h"

/* To the verifier, what is copied to or from handover.connect may be this long; see struct work. */
#define CONNECT_BOUND 256

/* Client ids and topics are hashed with the same secret, which never makes them equal. */
#define CLIENT_ID_DOMAIN 0x6964000000000000ULL

static __always_inline struct handover *handover_find(const struct conn *c)
{
	struct flow6 key = c->key;

	return bpf_map_lookup_elem(&handovers, &key);
}

static __always_inline void handover_put(const struct conn *c, const struct handover *h)
{
	struct flow6 key = c->key;
	bool is_new = !bpf_map_lookup_elem(&handovers, &key);

	if (bpf_map_update_elem(&handovers, &key, h, BPF_ANY))
		count(REASON_MAP_FULL);
	else if (is_new)
		map_used(TRACKED_HANDOVERS, 1, 0);
}

static __always_inline void handover_remove(const struct conn *c)
{
	struct flow6 key = c->key;

	if (!bpf_map_delete_elem(&handovers, &key))
		map_used(TRACKED_HANDOVERS, 0, 1);
}

static __always_inline struct verdict *verdict_begin(struct work *w, __u32 next, __u32 flags)
{
	w->verdict = (struct verdict){ .next = next, .flags = flags };
	return &w->verdict;
}

/* The flow of a connection that is bound; false: it is not stored. Global (see event.h). */
__noinline int flow_bound(const struct conn *c)
{
	struct work *w = work_of_cpu();
	const struct verdict *v;
	struct flow f = {};

	if (!c || !w)
		return false;
	v = &w->verdict;
	f.bound = tagged(c, v->binding);
	f.next = tagged(c, v->next);
	f.end = v->next;
	f.ack = c->ack;
	f.flags = v->flags | FLOW_TRUSTED | FLOW_UNCONFIRMED;
	f.own = w->id;
	f.way = v->way;
	f.why = v->why;
	/* Else the framing of its CONNECT will tell; who was answered here has no credentials. */
	f.connect = v->flags & FLOW_CONNECTED ? FLOW_CONNECT_READ | FLOW_ANONYMOUS : 0;
	if (!flow_add(c, &f))
		return false;
	count(REASON_BOUND_MESSAGE + v->way - WAY_MESSAGE);
	if (v->why)
		count(REASON_WHY_NOT_CONNECT + v->why - WHY_NOT_CONNECT);
	report_event(c, EVENT_BOUND, from_to(NO_GROUP, v->binding), 0,
		     (v->flags & FLOW_PREDICTED ? REPORT_BY_PREDICTION : 0) |
			     v->way << REPORT_WAY_SHIFT | v->why << REPORT_WHY_SHIFT);
	return true;
}

_Static_assert(REASON_BOUND_UNANSWERED - REASON_BOUND_MESSAGE == WAY_UNANSWERED - WAY_MESSAGE,
	       "a counter for each way, in the same order");
_Static_assert(REASON_WHY_NO_TOPIC - REASON_WHY_NOT_CONNECT == WHY_NO_TOPIC - WHY_NOT_CONNECT,
	       "a counter for each reason, in the same order");

/* What a connection is bound by, if its group chooses reals by topic: its own, or its client's last. */
static __always_inline __u64 topic_of(const struct conn *c, const struct work *w, __u8 way)
{
	const struct client *client;

	if (way == WAY_MESSAGE || way == WAY_ANSWERED)
		return w->publish.hash;
	client = client_find(c, true);
	return client ? client->topic : 0;
}

/* On by a binding that leaves no flow. */
static __always_inline int greet_forward(struct xdp_md *ctx, const struct conn *c,
					 const struct service *svc, binding_t binding,
					 enum reason reason)
{
	const struct group *g = group_of(binding);

	if (!g)
		return pass_on(ctx, REASON_NO_GROUP_VIP);
	return to_group(ctx, g, svc, c->v6, reason);
}

/*
 * Bound: back to mqtt_fwd, with a flow. Without one, nothing would tell the broker host to take the
 * connection over: above the rate of new flows, the segment is dropped, and TCP repeats it.
 * `waiting`: the connection's place in `handovers`, if CONNECT is kept there.
 */
static __always_inline int bound(struct xdp_md *ctx, struct conn *c, struct work *w,
				 const struct service_table *t, const struct service *svc,
				 struct handover *waiting)
{
	struct verdict *v = &w->verdict;
	const struct group *g;

	if (svc->has_members)
		v->binding = member_of(c, t, svc, v->binding, topic_of(c, w, v->way));
	g = group_of(v->binding);

	/* What was on these addresses before is over: the cookie says so. */
	flow_remove(c, false);
	flow_remove(c, true);
	if (!g)
		return pass_on(ctx, REASON_NO_GROUP_VIP);
	if (flow_bound(c)) {
		if (waiting)
			waiting->state = HANDOVER_REPEAT;
		bpf_tail_call(ctx, &steps, STEP_FORWARD);
	}
	count(REASON_HANDOVER_FAILED);
	return XDP_DROP;
}

/* By what is known of the client: the last resort, which never fails while there is a default group. */
static __always_inline void verdict_predicted(const struct conn *c, struct work *w,
					      const struct service_table *t,
					      const struct service *svc, __u32 why)
{
	struct verdict *v = &w->verdict;
	__u64 binding = predict(c, t, svc, w->id);

	v->binding = binding;
	v->flags |= binding & PREDICTED ? FLOW_PREDICTED : 0;
	v->way = WAY_UNANSWERED;
	v->why = why;
}

/* Who the client is: w->id, and for a new one w->client_id. */
static __always_inline void identify(struct xdp_md *ctx, struct work *w,
				     const struct service_table *t, const struct service *svc)
{
	const struct connect *k = &w->connect;
	__u32 length = k->id_length, kept;

	w->id = 0;
	if (!k->has_id || !length || length > CLIENT_ID_MAX)
		return;
	w->id = text_hash(ctx, t->topic_key[0] ^ CLIENT_ID_DOMAIN ^ svc->id, t->topic_key[1], k->id,
			  length);
	w->client_id.service = svc->id;
	w->client_id.length = length;
	__builtin_memset(w->client_id.text, 0, sizeof(w->client_id.text));
	kept = length < CLIENT_ID_TEXT_MAX ? length : CLIENT_ID_TEXT_MAX;
	frame_copy(ctx, k->id, w->client_id.text, kept, CLIENT_ID_TEXT_MAX);
}

/* The group of the route that names the client id or user name at `offset`; 0: there is none. */
static __always_inline binding_t client_route(struct xdp_md *ctx, struct work *w,
					      const struct service_table *t,
					      const struct service *svc, __u32 kind, __u32 offset,
					      __u32 length)
{
	struct client_route *key = &w->client_route;
	const __u32 *group;

	if (!length)
		return 0;
	if (length > CLIENT_ROUTE_TEXT_MAX)
		length = CLIENT_ROUTE_TEXT_MAX;
	__builtin_memset(key, 0, sizeof(*key));
	key->prefix = 8 * (sizeof(*key) - sizeof(key->prefix));
	key->service = svc->id;
	key->kind = kind;
	key->generation = t->generation & 1;
	if (!frame_copy(ctx, offset, key->text, length, CLIENT_ROUTE_TEXT_MAX))
		return 0;
	group = bpf_map_lookup_elem(&client_routes, key);
	return group ? binding_now(*group) : 0;
}

/* One rule: client id before user name, and both before topics; the longest match of each. */
static __always_inline binding_t route_of_client(struct xdp_md *ctx, struct work *w,
						 const struct service_table *t,
						 const struct service *svc)
{
	const struct connect *k = &w->connect;
	binding_t binding = 0;

	if (svc->client_routes & 1 << CLIENT_ROUTE_ID && k->has_id)
		binding = client_route(ctx, w, t, svc, CLIENT_ROUTE_ID, k->id, k->id_length);
	if (!binding && svc->client_routes & 1 << CLIENT_ROUTE_USER && k->has_user)
		binding = client_route(ctx, w, t, svc, CLIENT_ROUTE_USER, k->user, k->user_length);
	return binding;
}

/* Keeps CONNECT, which lies whole in the segment and is short, and answers it. */
static __always_inline int greet_wait(struct xdp_md *ctx, struct conn *c, struct work *w,
				      const struct service *svc)
{
	struct handover *h = &w->handover;
	__u32 length = w->connect.length;

	__builtin_memset(h, 0, sizeof(*h));
	h->start = c->seq;
	h->server = c->ack;
	h->tsval = w->options.o.tsecr;
	h->born_s = now_s();
	h->connect_length = length;
	h->id = w->id;
	h->id_offset = w->connect.id - c->payload;
	h->id_length = w->connect.id_length;
	h->state = HANDOVER_WAIT;
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
	flow_remove(c, false);
	flow_remove(c, true);
	if (!answer_connect(ctx, c, svc, h, true)) {
		count(REASON_HANDOVER_FAILED);
		return XDP_DROP;
	}
	handover_put(c, h);
	count(REASON_CONNECT_ANSWERED);
	return XDP_TX;
}

/* The first data of a connection, with a cookie. */
static __always_inline int greet_connect(struct xdp_md *ctx, struct conn *c, struct work *w,
					 const struct service_table *t, const struct service *svc)
{
	const struct connect *k = &w->connect;
	struct verdict *v = verdict_begin(w, c->seq, 0);
	bool more;
	__u32 why;

	read_connect(ctx, c);
	identify(ctx, w, t, svc);
	why = connect_unanswerable(k, c);
	more = k->length && k->length < c->payload_length;

	v->binding = route_of_client(ctx, w, t, svc);
	if (v->binding) {
		v->way = WAY_ROUTE;
		v->flags = FLOW_ROUTED;
	}
	if (!v->binding) {
		v->binding = client_relayed(c, svc, w);
		v->way = WAY_CLIENT_ID;
	}
	if (!v->binding && more) {
		v->binding = decide(ctx, c, t, svc, c->payload + k->length);
		v->way = WAY_MESSAGE;
		why = WHY_NO_TOPIC;
	}
	if (!v->binding) {
		v->binding = client_steady(c, t, svc, w);
		if (why == WHY_NONE && needs_topic(t, svc, v->binding))
			v->binding = 0;
		v->way = WAY_CLIENT_ID;
		v->flags = v->binding ? FLOW_PREDICTED : 0;
	}
	if (!v->binding && why == WHY_NONE)
		return greet_wait(ctx, c, w, svc);
	if (!v->binding)
		verdict_predicted(c, w, t, svc, why);
	client_id_keep(w);

	/* Their first segment carries CONNECT: nothing of it has to be kept but its place. */
	struct handover *h = &w->handover;
	__builtin_memset(h, 0, sizeof(*h));
	h->start = c->seq;
	h->server = c->ack;
	h->born_s = now_s();
	h->state = HANDOVER_PASS;
	handover_put(c, h);
	return bound(ctx, c, w, t, svc, NULL);
}

static __always_inline int greet_answer(struct xdp_md *ctx, struct conn *c,
					const struct service *svc, struct handover *h, bool connack,
					enum reason reason)
{
	if (!answer_connect(ctx, c, svc, h, connack)) {
		count(REASON_HANDOVER_FAILED);
		return XDP_DROP;
	}
	count(reason);
	return XDP_TX;
}

/* Its client id, from the CONNECT that is kept. */
static __always_inline void identify_kept(struct work *w, const struct handover *h,
					  const struct service *svc)
{
	w->id = h->id;
	if (!w->id)
		return;
	w->client_id.service = svc->id;
	w->client_id.length = h->id_length;
	for (__u32 i = 0; i < CLIENT_ID_TEXT_MAX; i++) {
		__u32 at = h->id_offset + i;
		__u8 byte = 0;

		barrier_var(at);
		if (i < h->id_length && at < HANDOVER_CONNECT_MAX)
			byte = h->connect[at];
		WRITE_ONCE(w->client_id.text[i], byte);
	}
}

/* A segment of a connection in WAIT. */
static __always_inline int greet_waiting(struct xdp_md *ctx, struct conn *c, struct work *w,
					 const struct service_table *t, const struct service *svc,
					 struct handover *h, bool fin)
{
	__u32 behind = h->start + h->connect_length;
	struct verdict *v = verdict_begin(w, behind, FLOW_CONNECTED);
	bool again = c->seq == h->start, silent = h->state == HANDOVER_SILENT;

	if (!c->payload_length && !fin) {
		if (c->seq == behind - 1)
			return greet_answer(ctx, c, svc, h, false, REASON_WAIT_ANSWERED);
		count(REASON_WAIT_DROPPED);
		return XDP_DROP;
	}
	if (again && c->payload_length <= h->connect_length && !fin && !silent)
		return greet_answer(ctx, c, svc, h, true, REASON_CONNECT_ANSWERED);
	if (again) {
		/* CONNECT and more in one segment: repeated, or by user space, as nothing else came. */
		v->next = c->seq;
		v->flags = 0;
	} else if (c->seq != behind) {
		count(REASON_WAIT_DROPPED);
		return XDP_DROP;
	}

	identify_kept(w, h, svc);
	v->way = WAY_ANSWERED;
	w->connect.level = 4;
	v->binding = c->payload_length ?
			    decide(ctx, c, t, svc, c->payload + (again ? h->connect_length : 0)) :
			    0;
	if (!v->binding)
		verdict_predicted(c, w, t, svc, silent || !c->payload_length ? WHY_SILENT : WHY_NO_TOPIC);
	client_id_keep(w);
	return bound(ctx, c, w, t, svc, h);
}

/*
 * Whether something of this flow was here before: not just now, and not long ago. What follows
 * CONNECT may overtake it, or CONNECT may be lost; a broker's RST would then end a connection that
 * is being opened. A flow that the balancer lost sends again.
 */
#define STRAY_SOON_MS 3000
#define STRAY_LATE_MS 60000

static __always_inline bool stray_again(const struct conn *c, const struct service_table *t)
{
	__u32 key = ((c->tag ^ (__u32)t->topic_key[0]) * 0x9e3779b1U) >> 20;
	__u64 *place = bpf_map_lookup_elem(&strays, &key), seen;
	__u32 age;

	if (!place)
		return false;
	seen = READ_ONCE(*place); /* ms | tag << 32 */
	age = now_ms() - (__u32)seen;
	if (seen >> 32 == c->tag && age < STRAY_LATE_MS)
		return age >= STRAY_SOON_MS;
	WRITE_ONCE(*place, tagged(c, now_ms()));
	return false;
}

_Static_assert(STRAYS == 1 << (32 - 20), "a hash of so many bits");

/* Neither a flow nor a cookie: one that was lost, or nobody's. Nothing is kept. */
static __always_inline int greet_stray(struct xdp_md *ctx, struct conn *c,
				       const struct service_table *t, const struct service *svc,
				       bool rst)
{
	binding_t binding;

	if (!rst && !stray_again(c, t)) {
		count(REASON_STRAY_DROPPED);
		return XDP_DROP;
	}
	binding = cache_binding(c, t);
	if (!binding)
		binding = predict(c, t, svc, 0);
	return greet_forward(ctx, c, svc, binding, REASON_STRAY);
}

/* There is no key yet: as in predicted mode. */
static __always_inline int greet_without_key(struct xdp_md *ctx, struct conn *c,
					     const struct service_table *t,
					     const struct service *svc)
{
	struct bound b = {};

	bind_unknown(&b, c, t, svc, true, false);
	return greet_forward(ctx, c, svc, b.binding, b.reason);
}

static __always_inline int greet(struct xdp_md *ctx, struct work *w)
{
	const struct service_table *t = table_in_force();
	const struct service *svc = t ? service_at(t, w->handed.slot) : NULL;
	struct conn *c = &w->handed.conn;
	const struct tcphdr *tcp = tcp_of(ctx, c->v6);
	bool syn, fin, rst, ack;
	struct handover *h;
	struct flow *f;

	if (!svc || !tcp)
		return pass_on(ctx, REASON_TRUNCATED);
	syn = tcp->syn;
	fin = tcp->fin;
	rst = tcp->rst;
	ack = tcp->ack;
	read_options(ctx, c);

	if (syn) {
		if (ack || fin || rst) {
			count(REASON_WAIT_DROPPED);
			return XDP_DROP;
		}
		f = flow_find(c);
		if (f && !(f->flags & FLOW_RIVAL_SYN)) {
			/* No more than a hint: anybody can send one. */
			f->flags |= FLOW_RIVAL_SYN;
			cache_correct(c, t, 0);
		}
		if (answer_syn(ctx, c, svc)) {
			count(REASON_SYN_ANSWERED);
			return XDP_TX;
		}
		return greet_without_key(ctx, c, t, svc);
	}

	h = handover_find(c);
	if (h && h->state <= HANDOVER_SILENT) {
		/* An old one may have left its place to a new one on the same addresses. */
		if (c->seq - h->start <= h->connect_length || !has_cookie(ctx, c, true)) {
			if (rst) {
				if (c->seq == h->start + h->connect_length)
					handover_remove(c);
				count(REASON_WAIT_DROPPED);
				return XDP_DROP;
			}
			return greet_waiting(ctx, c, w, t, svc, h, fin);
		}
	}
	if (!ack || rst || !has_cookie(ctx, c, true))
		return greet_stray(ctx, c, t, svc, rst);
	if (c->payload_length)
		return greet_connect(ctx, c, w, t, svc);
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
int mqtt_greet(struct xdp_md *ctx)
{
	struct work *w = work_of_cpu();

	return w ? greet(ctx, w) : XDP_DROP;
}

#endif /* MQTT_FWD_DELAYED_GREET_H */
