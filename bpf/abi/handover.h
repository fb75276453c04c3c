/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Delayed binding: what the balancer, which answers SYNs, and the broker hosts, whose kernels
 * take the connections over, have to agree on.
 */
#ifndef MQTT_FWD_ABI_HANDOVER_H
#define MQTT_FWD_ABI_HANDOVER_H

#include "base.h"

enum handover_limits {
	/* Bytes of a CONNECT that is answered and kept: it has to fit into the headroom of the
	 * segment after it, with what the balancer puts around that. */
	HANDOVER_CONNECT_MAX = 176,
	/* Window scale of the SYN-ACK (RFC 7323 §2.2), and of the broker's socket. */
	HANDOVER_WSCALE = 7,
	/* A CONNACK that is answered here: MQTT 3.1.1 §3.2, without properties. */
	HANDOVER_CONNACK = 4,
};

/*
 * Keys of the cookies in SYN-ACKs. Cookies are made with key[epoch & 1]; the other one, of the
 * epoch before or the next, is only checked against. All zero: there is none.
 */
struct handover_keys {
	__u64 key[2][2];
	__u32 epoch;
	__u32 pad;
};
SIZE_IS(struct handover_keys, 40);

enum handover_state {
	HANDOVER_WAIT = 1, /* CONNECT was answered; nothing has come after it yet */
	HANDOVER_SILENT, /* and nothing came for too long: to be bound without */
	HANDOVER_REPEAT, /* bound; the broker may not have CONNECT yet: put in front */
	HANDOVER_PASS, /* bound; the client's own segments carry CONNECT */
	HANDOVER_PIECES, /* CONNECT has not come whole: what came is kept, and acknowledged */
	HANDOVER_PREPEND, /* bound when it was whole; what came before its last piece is put in front of that */
	HANDOVER_HELLO, /* the sidecar has what came of a ClientHello; so many bytes of it are acknowledged */
	HANDOVER_DECIDED, /* and has found out where it belongs: see handover.decided */
	HANDOVER_HELLO_REPEAT, /* bound; what is acknowledged, the sidecar puts in front of what follows */
};

/* A connection on its way to a broker, from CONNECT to the client's first acknowledgement of something
 * that only the broker can have sent. */
struct handover {
	__u32 start; /* sequence number of the client's first byte */
	__u32 server; /* sequence number of the server's first byte */
	__u32 tsval; /* last timestamp that was sent from here (RFC 7323 §3) */
	__u32 client_tsval; /* last timestamp of the client's */
	__u32 born_s; /* CLOCK_BOOTTIME seconds */
	__u16 connect_length;
	__u16 connect_sum; /* of the bytes below, in ones' complement */
	union {
		__u64 id; /* key in `client_ids`; 0: none */
		__u64 decided; /* HANDOVER_DECIDED: binding, 0: none | enum bound_by << 32 */
	};
	__u8 state; /* enum handover_state */
	__u8 timestamps;
	__u8 id_offset; /* of the client id in CONNECT */
	__u8 tries; /* how often the segment went to the broker that makes the connection there */
	__u16 id_length;
	__u16 will_group; /* of its will's topic; NO_GROUP: it has none, or that may be at any broker */
	__u8 connect[HANDOVER_CONNECT_MAX];
};
SIZE_IS(struct handover, 40 + HANDOVER_CONNECT_MAX);

/*
 * What the balancer says of a segment of a connection that its broker may not have yet. It rides
 * in the identification of the inner IPv4 header, which means nothing beside DF (RFC 6864 §4.1),
 * or in the lower 16 bits of the IPv6 flow label.
 */
enum handover_mark {
	MARK = 0x4d00,
	MARK_MASK = 0xff00,
	MARK_HANDOVER = 0x80, /* carries a CONNECT that has been answered here */
	MARK_ACK_MASK = 0x7f, /* else: acknowledges so many bytes that the balancer sent */
	/*
	 * A broker host's word to the balancer: the packet comes back, for the connection is not here (fleets,
	 * broker/returned.h).
	 */
	MARK_RETURNED = MARK | MARK_HANDOVER | MARK_ACK_MASK,
};

#endif /* MQTT_FWD_ABI_HANDOVER_H */
