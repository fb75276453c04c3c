/* SPDX-License-Identifier: GPL-2.0-only */
/* What user space is told as it happens. */
#ifndef MQTT_FWD_ABI_EVENT_H
#define MQTT_FWD_ABI_EVENT_H

#include "base.h"
#include "config.h"

enum event_kind {
	EVENT_BOUND, /* a new flow got its group */
	EVENT_LEARNED, /* a client's prediction was made or changed */
	EVENT_MISPREDICTED, /* a PUBLISH belongs to another group than its flow's */
	EVENT_RESYNCED, /* a flow's framing was found again */
	EVENT_UNFRAMED, /* a flow's bytes are not MQTT control packets */
	EVENT_KINDS,
};

struct event {
	__u64 time_ns; /* CLOCK_BOOTTIME */
	__be32 client[4]; /* IPv4 in client[0] */
	__be16 client_port;
	__u16 service;
	__u16 kind; /* enum event_kind */
	__u16 from_group; /* NO_GROUP: none */
	__u16 to_group;
	__u16 topic_length;
	__u8 v6;
	__u8 by_prediction;
	__u8 ended; /* EVENT_MISPREDICTED: the flow is ended for it */
	__u8 bound_by; /* enum bound_by; EVENT_BOUND */
	__u64 topic; /* or, EVENT_BOUND of a service that speaks TLS, the server name */
	__u8 fallback_reason; /* enum fallback_reason */
	__u8 pad[7];
	__u8 text[TOPIC_TEXT_MAX];
};
SIZE_IS(struct event, 56 + TOPIC_TEXT_MAX);

#endif /* MQTT_FWD_ABI_EVENT_H */
