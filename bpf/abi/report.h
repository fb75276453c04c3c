/* SPDX-License-Identifier: GPL-2.0-only */
/* Segments, and connections, that the datapath leaves to the sidecar. */
#ifndef MQTT_FWD_ABI_REPORT_H
#define MQTT_FWD_ABI_REPORT_H

#include "base.h"

enum report_kind {
	/* A segment of a connection that is not known here. Its frame follows, as it came in. */
	REPORT_MISSED,
	/* A CONNECT was answered, and is kept for the message after it. Its struct handover follows. */
	REPORT_KEPT,
	/* A broker is given it now. */
	REPORT_GIVEN,
	/* A segment of a ClientHello whose server name has not come yet (handshake/hello.h). Its frame follows. */
	REPORT_HELLO,
};

/* What the datapath tells the sidecar. */
struct segment_report {
	__u64 time_ns; /* CLOCK_BOOTTIME */
	__be32 client[4]; /* IPv4 in client[0] */
	__be16 client_port;
	__u16 service;
	__u32 seq; /* of a segment */
	__u32 ack;
	__u16 length; /* of what follows */
	__u8 v6;
	__u8 kind; /* enum report_kind */
};
SIZE_IS(struct segment_report, 40);

#endif /* MQTT_FWD_ABI_REPORT_H */
