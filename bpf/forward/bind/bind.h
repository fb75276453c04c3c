/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Which group a segment's flow is bound to. What a service's mode decides by stands in a file
 * of its own beside this one: predicted.h, delayed.h.
 */
#ifndef MQTT_FWD_BIND_H
#define MQTT_FWD_BIND_H

#include "../cache.h"
#include "../flow.h"
#include "../learn.h"
#include "affinity.h"

struct bound {
	binding_t binding; /* 0: there is no usable group */
	__u32 reason; /* the packet's verdict, enum reason */
	struct flow *flow; /* to be framed; NULL: there is none, or nothing to frame */
};

/* The group that a flow was bound to is gone, or its entry became another flow's. */
__noinline __u64 flow_rebind(const struct conn *c, const struct service_table *t,
			     const struct service *svc, struct flow *f)
{
	__u64 binding, bound;

	if (!c || !t || !svc || !f)
		return 0;
	bound = READ_ONCE(f->bound);
	if (bound >> 32 == c->tag) {
		count(REASON_GROUP_GONE);
		binding = 0;
	} else {
		count(REASON_FLOW_EVICTED);
		binding = cache_binding(c, t);
	}
	if (!binding)
		binding = predict(c, t, svc, flow_client(f));
	binding = member_of(c, t, svc, (__u32)binding, f->topic);
	if (bound >> 32 == c->tag)
		flow_bind(f, c, binding);
	return binding;
}

#endif /* MQTT_FWD_BIND_H */
