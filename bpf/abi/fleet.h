/* SPDX-License-Identifier: GPL-2.0-only */
/* A fleet of balancers: what the datapath asks its sidecar, and what that finds out. */
#ifndef MQTT_FWD_ABI_FLEET_H
#define MQTT_FWD_ABI_FLEET_H

#include "handover.h"
#include "report.h"

/* Values of the constant `fleet`. */
enum fleet_mode {
	FLEET_NONE,
	FLEET_MEMBER, /* this balancer is one of several: what it does not know, another may have had */
	FLEET_WITH_STORE, /* and there is a store for connections that no broker has yet */
};

enum adoption_kind {
	ADOPTED_FROM_REAL = 1, /* a broker host has it */
	ADOPTED_FROM_STORE, /* no broker has it yet: its CONNECT was kept by another balancer */
	ADOPTED_BY_NOBODY, /* nobody has it: its client is told so */
	ADOPTED_ELSEWHERE, /* another balancer has gone on with it: what is kept of it here is old */
};

/* Where such a connection belongs. Put in front of the segment, whose frame follows. */
struct adoption {
	__be32 client[4]; /* IPv4 in client[0] */
	__be16 client_port;
	__u16 service;
	__u32 seq;
	__u32 ack;
	__u32 binding; /* ADOPTED_FROM_REAL */
	__u16 payload_length;
	__u8 kind; /* enum adoption_kind */
	__u8 v6;
	__u8 fin;
	__u8 rst;
	__u8 pad[2];
	struct handover handover; /* ADOPTED_FROM_STORE */
};
SIZE_IS(struct adoption, 40 + sizeof(struct handover));

#endif /* MQTT_FWD_ABI_FLEET_H */
