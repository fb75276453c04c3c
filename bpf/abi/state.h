/* SPDX-License-Identifier: GPL-2.0-only */
/* What the datapath learns of flows and clients. */
#ifndef MQTT_FWD_STATE_H
#define MQTT_FWD_STATE_H

#include "base.h"
#include "config.h"

/*
 * A group and its epoch in one word, so that two CPUs can never make a pair that was nobody's:
 * group | epoch << 16. Epochs begin with 1, so 0 is no binding.
 */
typedef __u32 binding_t;

struct client4 {
	__be32 addr;
	__u16 service;
	__u16 pad;
};
SIZE_IS(struct client4, 8);

struct client6 {
	__be32 addr[4];
	__u16 service;
	__u16 pad;
};
SIZE_IS(struct client6, 20);

enum client_flags {
	/* Published to a group, then another, then the first again, under the same routes. */
	CLIENT_MULTI_GROUP = 1 << 0,
	/* A connection that its client id alone decided on (WAY_KNOWN) turned out to be misrouted. */
	CLIENT_MISJUDGED = 1 << 1,
	/*
	 * With a relay, it belongs there: it subscribes, has a will of another group, or publishes more topics in
	 * a segment than are judged.
	 */
	CLIENT_FOR_RELAY = 1 << 2,
	/* One connection of late published to another group than the prediction's: the next that does is believed. */
	CLIENT_DOUBTED = 1 << 3,
};

/*
 * What is known of a client address: 40 B, so that with key and LRU node an IPv4 client takes
 * under 100 B. The groups of its recent messages are weighed against each other; group[best]
 * is the prediction.
 */
struct client {
	__u64 topic; /* key in `topics`: the last one that taught */
	binding_t group[CLIENT_GROUPS]; /* 0: free */
	__u8 weight[CLIENT_GROUPS]; /* recent messages of each */
	__u8 best;
	__u32 learned_s; /* CLOCK_BOOTTIME seconds */
	__u32 generation; /* of the routes that gave `group` */
	__u16 hits; /* flows whose first PUBLISH went where the prediction said */
	__u16 misses;
	__u8 flags; /* enum client_flags */
	__u8 group_changes;
	__u16 ended_s; /* when a misprediction last ended a flow, CLOCK_BOOTTIME seconds; 0: never */
};
SIZE_IS(struct client, 40);

/* A client that is known by its client id: the key is a keyed hash of service and id. */
struct client_id {
	struct client client;
	__u16 service;
	__u16 length; /* of the whole id; text holds the first CLIENT_ID_TEXT_MAX bytes */
	__u8 pad[4];
	__u8 text[CLIENT_ID_TEXT_MAX];
};
SIZE_IS(struct client_id, sizeof(struct client) + 8 + CLIENT_ID_TEXT_MAX);

struct flow6 {
	__be32 addr[4];
	__be16 port;
	__u16 service;
};
SIZE_IS(struct flow6, 20);

/* What the next unread byte of a flow is (MQTT 3.1.1 §2.2, §3.3). */
enum parser {
	PARSER_TYPE = 0, /* first byte of a control packet */
	PARSER_LENGTH, /* a byte of the remaining length */
	PARSER_TOPIC_LENGTH_HIGH,
	PARSER_TOPIC_LENGTH_LOW,
	PARSER_TOPIC,
};

enum flow_flags {
	FLOW_TRUSTED = 1 << 0, /* framed from the ISN on: may teach */
	FLOW_UNSYNCED = 1 << 1, /* where packets begin is not known */
	FLOW_OPAQUE = 1 << 2, /* does not begin with CONNECT: not MQTT, never parsed */
	FLOW_CONNECTED = 1 << 3, /* CONNECT seen */
	FLOW_PREDICTED = 1 << 4, /* bound by a prediction, not by default */
	FLOW_PUBLISHED = 1 << 5, /* at least one PUBLISH taught */
	FLOW_MISROUTED = 1 << 6, /* its topic belongs to another group */
	FLOW_ENDED = 1 << 7, /* for a misprediction, at end_seq */
	FLOW_CLOSING = 1 << 8, /* FIN or RST seen */
	FLOW_PROBATION =
		1 << 9, /* first seen in its middle, and has not shown yet that it is MQTT */
	FLOW_ANY_TOPIC = 1 << 10, /* its topic is of a route to ANY_GROUP */
	FLOW_REUSED_PORT =
		1 << 11, /* predicted: the challenger is of a SYN, not the flow before this one;
				     delayed: there was a SYN on the flow's addresses */
	FLOW_END_INSIDE = 1 << 12, /* end_seq lies inside a control packet */
	FLOW_UNCONFIRMED =
		1 << 13, /* its broker may not have the connection yet: see `handovers` */
	FLOW_ROUTED = 1 << 14, /* bound by a route that names its client: topics change nothing */
	FLOW_RESCUED = 1 << 15, /* ended, and the sidecar takes what comes from end_seq on */
};

/* What a flow's CONNECT said. */
enum flow_connect {
	FLOW_ANONYMOUS = 1 << 0, /* no credentials: what it may publish, any client may */
	FLOW_MQTT5 = 1 << 1,
	FLOW_CONNECT_READ = 1 << 2, /* as far as it could be */
	FLOW_LASTING = 1 << 3, /* its session may be older than the connection */
	/* What came of it, as far as its client's record is concerned (learn/accept.h). */
	FLOW_ACCEPTED = 1 << 4, /* its client went on after a CONNACK */
	FLOW_FOR_RELAY = 1 << 5, /* as CLIENT_FOR_RELAY */
	FLOW_DOUBTED = 1 << 6, /* its client's record has heard of another group from it */
	FLOW_CHALLENGED =
		1 << 7, /* bound by prediction: there is another connection on its addresses */
};

/* How a flow was bound to its group. */
enum bound_by {
	BOUND_BY_PREDICTION = 0, /* at its SYN, or in its middle: by its client's address */
	BOUND_BY_MESSAGE, /* CONNECT and the first message came together: by that */
	BOUND_BY_CLIENT_ID, /* CONNECT alone: by what its client id published before */
	BOUND_BY_ANSWERED, /* CONNECT was answered here: by the message that followed */
	BOUND_BY_ROUTE, /* by a route that names its client id or user name */
	BOUND_BY_SERVER_NAME, /* TLS: by the server name of its ClientHello (SNI, RFC 6066 §3) */
	BOUND_BY_ALPN, /* TLS: by a protocol that its ClientHello offers (RFC 7301) */
	BOUND_BY_UNANSWERED, /* nothing told, and no answer was possible: by the client's address */
	BOUND_BY_REAL, /* seen from its middle (fleet): by the broker host that has it */
	BOUND_BYS,
};

/* Why a flow was not bound by a message. */
enum fallback_reason {
	FALLBACK_NONE = 0,
	FALLBACK_NOT_CONNECT, /* the connection does not begin with CONNECT */
	FALLBACK_CUT, /* CONNECT does not lie whole in its first segment */
	FALLBACK_TOO_LONG, /* CONNECT is longer than HANDOVER_CONNECT_MAX */
	FALLBACK_MQTT5, /* a broker's CONNACK has properties that are not known here */
	FALLBACK_PERSISTENT, /* nor whether a session is present, */
	FALLBACK_CREDENTIALS, /* or whether the credentials are right */
	FALLBACK_SILENT, /* nothing came after CONNECT */
	FALLBACK_NO_TOPIC, /* what came after CONNECT has no topic that decides */
	FALLBACK_NO_SERVER_NAME, /* TLS: ClientHello has neither a server name nor a protocol with a route */
	FALLBACK_NO_HELLO, /* TLS: the connection does not begin with a ClientHello, or with a malformed one */
	FALLBACK_HELLO_CUT, /* TLS: what would decide did not come in time */
	FALLBACKS,
};

/* Values of flow.id that are no flow's. */
#define FLOW_FREE 0
#define FLOW_CLAIMED (~0ULL) /* being written */

/*
 * Two cache lines, of which almost every segment touches the first alone.
 *
 * A place in the table is given to another flow while a program may still hold a pointer to it. `bound` and `next`
 * therefore carry a tag of the flow that they are of: whoever reads another flow's tag has lost its place, and
 * neither forwards nor frames by it.
 */
struct flow {
	__u64 id; /* of `key` (forward/flow/conn.h), FLOW_FREE, or FLOW_CLAIMED */
	__u64 bound; /* binding_t | tag << 32 */
	union {
		__u64 next; /* first sequence number that the parser still wants | tag << 32 */
		__u64 rescue_next; /* FLOW_RESCUED: that the sidecar still wants | tag << 32 */
	};
	__u64 topic_print; /* what tells `topic` from others (forward/mqtt/topic_group.h); 0: not known */
	__u32 end; /* sequence number behind the last byte that was seen */
	__u32 remaining; /* of the current control packet: remaining length, or what is left of it */
	__u32 generation; /* of the routes that judged `topic` */
	__u32 ack; /* acknowledgement number of the last segment in order */
	__u16 flags; /* enum flow_flags */
	union {
		__u16 topic_left; /* bytes of the topic still to come */
		__u16 length_shift; /* PARSER_LENGTH: of the next byte */
	};
	__u8 parser; /* enum parser */
	__u8 type; /* first byte of the current control packet */
	__u8 connect; /* enum flow_connect */
	__u8 candidates; /* segments of the resync candidate below; FLOW_RESCUED: 0 */
	__u16 unrecorded; /* messages of `topic` that the client's record does not weigh yet */
	__u16 seen; /* when it last had a segment that was looked at, in units of 2¹² ticks of the kernel's clock */
	union {
		/* FLOW_ENDED: everything from here on is not the broker's to see. */
		__u32 end_seq;
		/* Else: the number behind the SYN-ACK that its CONNECT acknowledged; 0: not answered here. */
		__u32 first_ack;
	};
	/* The second line. */
	union {
		/* Segments beyond a gap that consist of whole control packets. */
		struct {
			__u32 candidate_start;
			__u32 candidate_end;
		};
		/* FLOW_RESCUED */
		struct {
			__u32 rescue_began_ms; /* CLOCK_BOOTTIME */
			__u32 rescue_instance; /* of the sidecar; 0: none takes it */
		};
	};
	/* flow_client() and flow_challenger() say which of the two it is. */
	union {
		/* FLOW_CHALLENGED: another connection on the same addresses, its first sequence number | its binding << 32. */
		__u64 challenger;
		/* Not BOUND_BY_PREDICTION: key in `client_ids`, or, TLS, in `server_names`; 0: none. */
		__u64 client_id;
	};
	__u64 topic; /* of the last PUBLISH, a key in `topics`; 0: none yet */
	__u8 bound_by; /* enum bound_by */
	__u8 fallback_reason; /* enum fallback_reason */
	__u8 v6;
	__u8 pad;
	struct flow6 key; /* IPv4 in addr[0] */
	__u32 closed_s; /* FLOW_CLOSING: since when, CLOCK_BOOTTIME seconds */
	__u8 pad2[12];
};
SIZE_IS(struct flow, 128);
_Static_assert(__builtin_offsetof(struct flow, candidate_start) == 64,
	       "the second line begins there");

/* Text and verdict of a topic, keyed by its hash: texts are kept once, not for each client. */
struct topic_verdict {
	__u32 generation;
	binding_t binding; /* group ANY_GROUP, epoch 0: of an "any" route */
};
SIZE_IS(struct topic_verdict, 8);

struct topic {
	struct topic_verdict verdict[2]; /* [generation & 1] */
	/*
	 * What chooses among a group's reals (affinity = "topic"): SipHash-1-3 of the text below, with a key of zero, so that
	 * the relay comes to the same (src/brokers/router.rs).
	 */
	__u64 place;
	__u16 service;
	__u16 length; /* of the whole topic; text holds the first TOPIC_TEXT_MAX bytes */
	__u8 pad[4];
	__u8 text[TOPIC_TEXT_MAX];
};
SIZE_IS(struct topic, 24 + 8 + TOPIC_TEXT_MAX);

/* TLS: a server name that clients asked for, for people; the key is its hash. */
struct server_name {
	__u16 service;
	__u16 length; /* of the whole name; text holds the last CLIENT_ROUTE_TEXT_MAX bytes */
	__u8 text[CLIENT_ROUTE_TEXT_MAX];
};
SIZE_IS(struct server_name, 4 + CLIENT_ROUTE_TEXT_MAX);

/* A set of the cache of bindings: one cache line. */
struct cache_set {
	__u64 slot[CACHE_WAYS]; /* binding and flow, see forward/cache.h; 0: free */
};
SIZE_IS(struct cache_set, 64);

/* Entries that were added and removed: what is neither there nor removed was evicted. */
enum tracked_map {
	TRACKED_FLOWS, /* `removed` are standing flows that gave their place to others; `added` is not counted */
	TRACKED_CLIENTS,
	TRACKED_CLIENTS6,
	TRACKED_TOPICS,
	TRACKED_CLIENT_IDS,
	TRACKED_HANDOVERS,
	TRACKED_MAPS,
};

struct map_use {
	__u64 added;
	__u64 removed;
};
SIZE_IS(struct map_use, 16);

#endif /* MQTT_FWD_STATE_H */
