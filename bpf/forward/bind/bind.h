/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Which group a segment's flow is bound to. What a service's mode decides by stands in a file
 * of its own beside this one: predicted.h.
 */
#ifndef MQTT_FWD_BIND_H
#define MQTT_FWD_BIND_H

#include "../cache.h"
#include "../flow.h"
#include "../learn.h"

struct bound {
	binding_t binding; /* 0: there is no usable group */
	__u32 reason; /* the packet's verdict, enum reason */
	struct flow *flow; /* to be framed; NULL: there is none, or nothing to frame */
};

#endif /* MQTT_FWD_BIND_H */
