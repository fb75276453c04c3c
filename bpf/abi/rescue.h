/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a client sent from a misrouted PUBLISH on, for the sidecar to publish where it belongs: a piece of
 * its stream at a time, in order and without gaps.
 */
#ifndef MQTT_FWD_ABI_RESCUE_H
#define MQTT_FWD_ABI_RESCUE_H

#include "base.h"

enum rescue_flags {
	RESCUE_V6 = 1 << 0,
	RESCUE_MQTT5 = 1 << 1,
	RESCUE_LAST = 1 << 2, /* FIN comes behind it */
};

enum rescue_limits {
	RESCUE_WINDOW_S = 20, /* as long as a stream lasts without anything new */
	RESCUES_PER_ADDRESS =
		64, /* in a window; the sidecar has room for 512 before it is `full` */
};

/* The sidecar, as the datapath knows it. */
struct rescuer {
	__u64 until; /* it surely reads until then, CLOCK_BOOTTIME in ns */
	__u32 instance; /* another number with each start: what was handed to one is unknown to the next */
	__u32 full; /* it takes no new streams */
};
SIZE_IS(struct rescuer, 16);

/* Followed by `length` bytes. */
struct rescue {
	__u64 time_ns; /* CLOCK_BOOTTIME */
	__be32 client[4]; /* IPv4 in client[0] */
	__be16 client_port;
	__u16 service;
	__u32 start; /* sequence number of the stream's first byte, which begins a control packet */
	__u32 seq; /* of the first byte here */
	__u16 length;
	__u8 flags; /* enum rescue_flags */
	__u8 pad;
};
SIZE_IS(struct rescue, 40);

#endif /* MQTT_FWD_ABI_RESCUE_H */
