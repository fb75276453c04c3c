/* SPDX-License-Identifier: GPL-2.0-only */
/* Packets of this host's own that go the way of clients' packets (bpf/checks/). */
#ifndef MQTT_FWD_CHECK_H
#define MQTT_FWD_CHECK_H

#include "base.h"

enum check_limits { CHECK_SOCKETS = 4096, CHECK_FRAME = 9216 };

/* What a health check's packets are wrapped in, by socket cookie. */
struct check_path {
	__be32 src[4]; /* of the outer header; IPv4 in src[0] */
	__be32 dst[4]; /* the real */
	__u8 v6; /* the outer header's version */
	__u8 gue; /* UDP between the headers */
	__u8 answered; /* of a connection whose SYN was answered here: marked (handover.h) */
	__u8 has_mac;
	__u8 mac[6]; /* the balancer's gateway */
	__u8 pad[6];
};
SIZE_IS(struct check_path, 48);

/* A frame that was taken before it left. */
struct client_frame {
	__u32 length;
	__u8 bytes[CHECK_FRAME];
};
SIZE_IS(struct client_frame, 4 + CHECK_FRAME);

#endif /* MQTT_FWD_CHECK_H */
