/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A will is published by the broker of its connection (MQTT 3.1.1 §3.1.2.5): if its topic belongs to another group than
 * what the client publishes, only the relay has a connection to each.
 */
#ifndef MQTT_FWD_WILL_H
#define MQTT_FWD_WILL_H

#include "../learn/predict.h"
#include "connect.h"
#include "topic_group.h"

/*
 * The group of the will's topic in the CONNECT that was read; NO_GROUP: there is none, or any will do. Global
 * (see event.h).
 */
__noinline int will_group(struct xdp_md *ctx, const struct service_table *t,
			  const struct service *svc)
{
	struct scratch *w = scratch();
	__u32 length;

	if (!t || !svc || !w)
		return NO_GROUP;
	length = w->connect.will_length;
	if (!length || length > TOPIC_TEXT_MAX)
		return NO_GROUP;
	w->publish.hash = topic_hash(ctx, t, svc->id, w->connect.will, length);
	if (!w->publish.hash)
		return NO_GROUP;
	topic_judge(ctx, t, svc, w, w->connect.will, length);
	if (!w->publish.to || binding_group(w->publish.to) == ANY_GROUP)
		return NO_GROUP;
	return binding_group(w->publish.to);
}

/* The binding of a client with such a will, that would be bound so. */
static __always_inline binding_t with_will(binding_t binding, __u32 will, const struct service *svc)
{
	if (will == NO_GROUP || !binding || belongs_to(binding, will) ||
	    (svc->relay != NO_GROUP && belongs_to(binding, svc->relay)))
		return binding;
	count(REASON_WILL_ELSEWHERE);
	return relay_of(svc) ?: binding;
}

/*
 * Predicted binding: CONNECT comes when the flow is bound, so the client's next one goes to the relay. Global
 * (see event.h).
 */
__noinline int will_seen(struct xdp_md *ctx, const struct conn *c, struct flow *f,
			 const struct service_table *t, const struct service *svc)
{
	const struct client *client;
	binding_t binding;
	__u32 will;

	if (!c || !f || !t || !svc)
		return 0;
	will = will_group(ctx, t, svc);
	binding = flow_binding(f, c);
	if (svc->relay != NO_GROUP && belongs_to(binding, svc->relay)) {
		/* There, what it publishes tells; so far, what it published before. */
		client = client_find(c, false);
		binding = client ? client_best(client) : 0;
	}
	if (with_will(binding, will, svc) != binding)
		f->connect |= FLOW_FOR_RELAY;
	return 0;
}

/*
 * What its CONNECT says of a flow, if the segment begins with that, as the first with data does. Whether will_seen() is
 * to look at its will. Global (see event.h).
 */
__noinline int connect_seen(struct xdp_md *ctx, const struct conn *c, struct flow *f,
			    const struct service *svc)
{
	const struct scratch *w = scratch();
	__s32 skip;

	if (!w || !c || !f || !svc)
		return false;
	/* Bound at its SYN, or found in its middle. */
	if (svc->protocol == PROTOCOL_TLS) {
		f->flags = (f->flags | FLOW_OPAQUE) & ~FLOW_TRUSTED;
		f->connect |= FLOW_CONNECT_READ;
		return false;
	}
	if (f->flags & (FLOW_OPAQUE | FLOW_UNSYNCED))
		return false;
	skip = (__u32)READ_ONCE(f->next) - c->seq;
	if (skip < 0 || skip >= (__s32)c->payload_length)
		return false;
	f->connect |= FLOW_CONNECT_READ;
	if (f->bound_by == BOUND_BY_PREDICTION && !(f->flags & FLOW_ENDED))
		f->first_ack = c->ack ?: 1;
	if (skip || f->flags & FLOW_CONNECTED)
		return false;
	read_connect(ctx, c);
	f->connect |= (is_anonymous(ctx, c, &w->connect) ? FLOW_ANONYMOUS : 0) |
		      (w->connect.level == 5 ? FLOW_MQTT5 : 0) |
		      (is_lasting(&w->connect) ? FLOW_LASTING : 0);
	return w->connect.will_length && f->bound_by == BOUND_BY_PREDICTION &&
	       svc->relay != NO_GROUP;
}

#endif /* MQTT_FWD_WILL_H */
