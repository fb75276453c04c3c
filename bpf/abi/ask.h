/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What balancers of a fleet ask broker hosts (UDP), and what those answer: which of these connections do you have?
 * Question and answer are equally long, and both are authenticated.
 */
#ifndef MQTT_FWD_ABI_ASK_H
#define MQTT_FWD_ABI_ASK_H

#include "base.h"

enum ask_limits {
	ASK_MAGIC = 0x4d515441, /* "MQTA" */
	ASK_VERSION = 1,
	ASK_CONNECTIONS = 40, /* of a question, at most: 1,376 B with all headers */
	/*
	 * How far a segment may lie from what a socket expects next, bytes: as much as may be on its way. What lies
	 * further off is another connection's.
	 */
	ASK_NEAR = 1 << 24,
};

enum ask_kind {
	ASK_QUESTION = 1,
	ASK_ANSWER,
};

/* Followed by `count` of struct asked. All of one service. */
struct ask {
	__be32 magic;
	__u8 version;
	__u8 kind; /* enum ask_kind */
	__u8 count;
	__u8 epoch; /* of the key, its lowest bit */
	__u64 nonce; /* whatever the question has */
	__be32 service[4]; /* IPv4 in service[0] */
	__be16 port;
	__u8 v6;
	__u8 pad[5];
	__u64 mac; /* SipHash-2-4 of all else, little endian */
};
SIZE_IS(struct ask, 48);

enum asked_state {
	ASKED_NONE = 0, /* no socket, or only a listener */
	ASKED_HAS, /* this connection */
	ASKED_OTHER, /* another one on the same addresses */
};

struct asked {
	__be32 client[4]; /* IPv4 in client[0] */
	__be16 client_port;
	__u8 state; /* enum asked_state; 0 in questions */
	__u8 pad;
	__be32 seq; /* of the segment that is in hand */
	__be32 ack;
	__be32 expected; /* ASKED_HAS, ASKED_OTHER: the sequence number that the socket expects next */
};
SIZE_IS(struct asked, 32);

/* Made of the keys of delayed binding (src/fleet/key.rs). All zero: this host answers no questions. */
struct ask_keys {
	__u64 key[2][2]; /* [epoch & 1] */
};
SIZE_IS(struct ask_keys, 32);

#endif /* MQTT_FWD_ABI_ASK_H */
