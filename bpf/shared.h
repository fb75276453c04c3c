/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Types that the datapath (C) and the sidecar (Rust, through the skeletons' BTF) share.
 * __be16/__be32 fields hold network byte order, everything else host order.
 * Padding is explicit: map keys are compared byte for byte.
 */
#ifndef MQTT_FWD_SHARED_H
#define MQTT_FWD_SHARED_H

#include <linux/types.h>

#define SIZE_IS(type, bytes) _Static_assert(sizeof(type) == (bytes), #type " must be " #bytes " B")

enum limits {
	/* Services are compared one by one on every packet, so they are few. */
	MAX_SERVICES = 16,
	/* Bytes of a topic's text that are kept for people; routing uses all of a topic. */
	TOPIC_TEXT_MAX = 256,
	GROUP_NAME_MAX = 32,
	ROOT_ARRAY_SIZE = 3,
	/* Size of mqtt_service_vips, the same in katran-patches/: a Katran may have made the map. */
	MAX_GROUP_VIPS = 4096,
	BINDING_WAYS = 8, /* slots of a binding_set */
	POSITION_MQTT_FWD = 1,
	POSITION_BALANCER = 2,
	/* route_state.group: no route of the configuration ends here. */
	NO_GROUP = 0xffff,
	/* Flag of a balancer's VIP: this is an MQTT group, look it up in mqtt_service_vips. */
	VIP_FLAG_MQTT_GROUP = 1 << 30,
};

/* Katran's layout (balancer_structs.h), so that both balancers read one map. */
struct vip_definition {
	__be32 addr[4]; /* IPv4 in addr[0], the rest 0 */
	__be16 port;
	__u8 proto;
	__u8 pad;
};
SIZE_IS(struct vip_definition, 20);

/* ---- configuration, written by user space ------------------------------------------------ */

enum misprediction_policy {
	/* Let the flow be reset, so that the client reconnects and is predicted right. */
	MISPREDICTION_RESET = 0,
	/* Leave the flow with the group that it was bound to. */
	MISPREDICTION_KEEP = 1,
};

struct service {
	__be32 addr[4]; /* IPv4 in addr[0] */
	__be16 port;
	__u16 id; /* part of flow and client keys: the same in every generation */
	__u16 default_group;
	__u16 max_packet; /* largest IP packet, bytes, that still fits once encapsulated */
	__u32 start;	  /* state of the route automaton before the first level */
	__u32 start_dollar; /* the same for topics that begin with '$' (MQTT 3.1.1 §4.7.2) */
	__u8 v6;
	__u8 on_misprediction; /* enum misprediction_policy */
	__u16 slot; /* own index in service_table: read back, it is a number of no known value to
		       the verifier, which then checks the program once, not once a service */
	__u8 pad[4];
};
SIZE_IS(struct service, 40);

/*
 * Everything that the datapath needs to know of the configuration. There are two of these;
 * `generation` & 1 in the map of that name says which one is in force.
 */
struct service_table {
	__u64 route_key[2]; /* SipHash key of topic levels; secret */
	__u64 topic_key[2]; /* SipHash key of whole topics; secret */
	__u32 generation;
	__u16 v4; /* service[0 .. v4) are IPv4 … */
	__u16 count; /* … service[v4 .. count) are IPv6 */
	__u64 v4_key[MAX_SERVICES]; /* addr | port << 32, both network order: one comparison each */
	struct service service[MAX_SERVICES];
};
SIZE_IS(struct service_table, 40 + 8 * MAX_SERVICES + 40 * MAX_SERVICES);

struct group {
	__be32 vip[4]; /* IPv4 in vip[0] */
	__u16 epoch; /* 0: free. Whoever remembers another epoch means an earlier group. */
	__u16 service; /* service.id */
	__u16 last_epoch; /* of a free one: the next is another than any before */
	__u16 pad;
	char name[GROUP_NAME_MAX];
};
SIZE_IS(struct group, 56);

struct route_edge {
	__u64 level; /* SipHash-1-3 of the level's text under route_key */
	__u32 state;
	__u32 pad;
};
SIZE_IS(struct route_edge, 16);

struct route_state {
	__u32 other; /* next state for a level that has no edge of its own */
	__u16 group; /* for a topic that ends here, or NO_GROUP: the service's default */
	__u16 pad;
};
SIZE_IS(struct route_state, 8);

/* ---- what the datapath learns ------------------------------------------------------------ */

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
	/* Published to a group, then another, then the first again: not one topic's client. */
	CLIENT_MIXED = 1 << 0,
};

/* A prediction. 40 B: with key and LRU node an IPv4 client takes under 100 B. */
struct client {
	__u64 topic; /* key in `topics` */
	__u32 groups_seen; /* bit (group & 31) */
	__u32 learned_s; /* CLOCK_BOOTTIME seconds */
	__u32 generation; /* of the routes that gave `group` */
	__u16 group;
	__u16 epoch;
	__u32 hits; /* flows whose first PUBLISH went where the prediction said */
	__u32 misses;
	__u16 group_changes;
	__u16 flags; /* enum client_flags */
	__u32 reset_s; /* when a misprediction last reset a flow, seconds; 0 never */
};
SIZE_IS(struct client, 40);

struct flow4 {
	__be32 addr;
	__be16 port;
	__u16 service;
};
SIZE_IS(struct flow4, 8);

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
	FLOW_SYN_SEEN = 1 << 0, /* framed from the ISN on: may teach */
	FLOW_UNSYNCED = 1 << 1, /* where packets begin is not known */
	FLOW_OPAQUE = 1 << 2, /* does not begin with CONNECT: not MQTT, never parsed */
	FLOW_CONNECTED = 1 << 3, /* CONNECT seen */
	FLOW_PREDICTED = 1 << 4, /* bound by a prediction, not by default */
	FLOW_PUBLISHED = 1 << 5, /* at least one PUBLISH judged */
	FLOW_ASTRAY = 1 << 6, /* its topic belongs to another group */
	FLOW_RESET = 1 << 7, /* moved by MISPREDICTION_RESET */
	FLOW_CLOSING = 1 << 8, /* FIN or RST seen */
	FLOW_AGREED = 1 << 9, /* at least one PUBLISH went where it belongs */
};

/*
 * With its LRU node (48 B) and key (8 B) an IPv4 flow fills two cache lines. All that a segment
 * without data needs lies in the first, beside the key: hence the order, and the room at the end.
 */
struct flow {
	__u16 group;
	__u16 epoch;
	__u16 flags; /* enum flow_flags */
	__u16 topic_left; /* bytes of the topic still to come */
	__u32 next_seq; /* first sequence number that the parser still wants */
	__u32 remaining; /* of the control packet in hand: remaining length, or what is left of it */
	__u64 topic; /* of the last PUBLISH, 0: none yet */
	__u32 generation; /* of the routes that judged `topic` */
	__u8 parser; /* enum parser */
	__u8 type; /* first byte of the control packet in hand */
	__u8 shift; /* of the next remaining-length byte */
	__u8 tiled; /* segments in the run below */
	/* A run of segments beyond a hole that whole control packets tile exactly. */
	__u32 run_start;
	__u32 run_end;
	__u32 ack; /* acknowledgement number of the last segment in order */
	__u32 pad[7];
};
SIZE_IS(struct flow, 72);

/* Text and verdict of a topic, keyed by its hash: texts are kept once, not for each client. */
struct topic_verdict {
	__u32 generation;
	__u16 group;
	__u16 epoch;
};

struct topic {
	struct topic_verdict verdict[2]; /* [generation & 1] */
	__u16 service;
	__u16 length; /* of the whole topic; text holds the first TOPIC_TEXT_MAX bytes */
	__u8 text[TOPIC_TEXT_MAX];
};
SIZE_IS(struct topic, 16 + 4 + TOPIC_TEXT_MAX);

/* A set of the cache of bindings: one cache line. */
struct binding_set {
	__u64 slot[BINDING_WAYS]; /* group, epoch and flow, see binding.h; 0: free */
};
SIZE_IS(struct binding_set, 64);

/* ---- events ------------------------------------------------------------------------------ */

enum event_kind {
	EVENT_BOUND = 1, /* a new flow got its group */
	EVENT_LEARNED, /* a client's prediction changed */
	EVENT_MISPREDICTED, /* a PUBLISH belongs to another group than its flow's */
	EVENT_RESYNCED, /* a flow's framing was found again */
	EVENT_UNFRAMED, /* a flow's bytes are not MQTT control packets */
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
	__u8 reset; /* EVENT_MISPREDICTED: the flow is being reset */
	__u8 pad;
	__u64 topic;
	__u8 text[TOPIC_TEXT_MAX];
};
SIZE_IS(struct event, 48 + TOPIC_TEXT_MAX);

/*
 * BTF, and with it the skeleton, has only types that something uses. EXPORT_TYPES(struct)
 * makes it have those that are otherwise only used inside functions.
 */
#define EXPORT_TYPES(type) const volatile struct type type __attribute__((used))

#endif /* MQTT_FWD_SHARED_H */
