/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The group of a segment's flow. How a service's binding mode decides is in predicted.h and
 * delayed.h beside this file.
 */
#ifndef MQTT_FWD_BIND_H
#define MQTT_FWD_BIND_H

#include "../learn/predict.h"
#include "affinity.h"
#include "cache.h"
#include "flow.h"

/* How a segment leaves. */
enum exit {
	EXIT_FORWARD, /* to its group */
	EXIT_HANDOVER, /* likewise, by way of the stage that hands its connection over */
	EXIT_HANDSHAKE, /* to the stage for connections without a flow */
	EXIT_DROP, /* dropped: TCP repeats it */
};

struct bound {
	binding_t binding; /* 0: there is no usable group */
	__u32 reason; /* the packet's verdict, enum reason */
	__u32 exit; /* enum exit */
};

static __always_inline bool is_syn(const struct conn *c)
{
	return c->flags & bpf_htons(TCP_SYN);
}

static __always_inline bool is_end(const struct conn *c)
{
	return c->flags & bpf_htons(TCP_FIN | TCP_RST);
}

/* The group that a flow was bound to is gone, or its entry became another flow's. */
__noinline __u64 flow_rebind(const struct conn *c, const struct service_table *t,
			     const struct service *svc, struct flow *f)
{
	struct scratch *w = scratch();
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
	if (svc->has_members && w)
		binding = member_of(c, t, svc, (__u32)binding, topic_place(w, f->topic));
	if (bound >> 32 == c->tag)
		flow_bind(f, c, binding);
	return binding;
}

/* The binding of a flow that is there, to another group if its own is gone. */
static __always_inline binding_t binding_of_flow(const struct conn *c,
						 const struct service_table *t,
						 const struct service *svc, struct flow *f)
{
	binding_t binding = flow_binding(f, c);

	return group_of(binding) ? binding : (binding_t)flow_rebind(c, t, svc, f);
}

#endif /* MQTT_FWD_BIND_H */
