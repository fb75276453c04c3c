/* SPDX-License-Identifier: GPL-2.0-only */
/* Configuration: written by user space, read by the datapath. */
#ifndef MQTT_FWD_CONFIG_H
#define MQTT_FWD_CONFIG_H

#include "base.h"

enum limits {
	/* Services are compared one by one on every packet, so they are few. */
	MAX_SERVICES = 16,
	/* Bytes of a topic's text that are kept for people; routing uses all of a topic. */
	TOPIC_TEXT_MAX = 256,
	GROUP_NAME_MAX = 32,
	ROOT_ARRAY_SIZE = 3,
	/* Size of vip_inner_dst, the same in katran-patches/: a Katran may have made the map. */
	MAX_GROUP_VIPS = 4096,
	/* Levels of a route's topic filter: each may cost a packet a look-up. */
	MAX_ROUTE_LEVELS = 16,
	CACHE_WAYS = 8, /* slots of a cache_set */
	FLOW_WAYS = 8, /* places of a set in the table of flows, a power of two */
	CLIENT_ID_TEXT_MAX = 64, /* bytes of a client id's text that are kept for people */
	CLIENT_ID_MAX = 256, /* bytes; clients with longer ids are identified by address */
	CLIENT_ROUTE_TEXT_MAX =
		128, /* bytes of a client id, user name or server name that routes look at */
	MEMBER_SLOTS = 1021, /* of a group whose reals are chosen here */
	CLIENT_GROUPS = 3, /* groups that a client's record weighs against each other */
};

/* Positions in root_array. */
enum chain_position {
	POSITION_MQTT_FWD = 1,
	POSITION_BALANCER = 2,
};

/* Numbers that are no group's. */
enum special_group {
	/* route_state.group: no route of the configuration ends here. */
	NO_GROUP = 0xffff,
	/* route_state.group: follows its flow, whatever group that is bound to. */
	ANY_GROUP = 0xfffe,
};

/* Flags of a balancer's VIPs. */
enum vip_flags {
	/* Katran's F_HASH_NO_SRC_PORT: all connections of an address have one real. */
	VIP_FLAG_BY_ADDRESS = 1 << 0,
	/* This is an MQTT group, look it up in vip_inner_dst. */
	VIP_FLAG_INNER_DST = 1 << 30,
};

/* Katran's layout (balancer_structs.h), so that both balancers read one map. */
struct vip_definition {
	__be32 addr[4]; /* IPv4 in addr[0], the rest 0 */
	__be16 port;
	__u8 proto;
	__u8 pad;
};
SIZE_IS(struct vip_definition, 20);

enum misprediction_policy {
	/* End the flow, so that the client reconnects and is bound right. */
	MISPREDICTION_RESET = 0,
	/* Leave the flow with the group that it was bound to. */
	MISPREDICTION_KEEP = 1,
	/* As RESET, but what is cut off is handed to the sidecar, which publishes it. */
	MISPREDICTION_RESCUE = 2,
};

enum binding_mode {
	/* At the SYN, by what the client's address published before. */
	BINDING_PREDICTED = 0,
	/* When CONNECT and what follows it have been read; see forward/bind/delayed.h. */
	BINDING_DELAYED = 1,
};

/* What a service's clients speak. */
enum service_protocol {
	PROTOCOL_MQTT = 0,
	PROTOCOL_TLS =
		1, /* with their brokers: of their connections, only ClientHello can be read */
};

/* One cache line. */
struct service {
	__be32 addr[4]; /* IPv4 in addr[0] */
	__be16 port;
	__u16 id; /* part of flow and client keys: the same in every generation */
	__u16 default_group;
	__u16 max_packet; /* largest IP packet, bytes, that still fits once encapsulated */
	__u32 start; /* state of the route automaton before the first level */
	__u32 start_dollar; /* the same for topics that begin with '$' (MQTT 3.1.1 §4.7.2) */
	__u16 longest_level; /* of the routes' literal levels, bytes: no longer one can match */
	__u16 slot; /* own index in service_table: read back, it is a number of no known value to
		       the verifier, which then checks the program once, not once a service */
	__u8 v6;
	__u8 on_misprediction; /* enum misprediction_policy */
	__u8 binding; /* enum binding_mode */
	__u8 client_routes; /* 1 << enum client_route_kind of the routes that there are */
	__u8 has_members; /* some of its groups choose their reals here: see struct member_slot */
	__u8 protocol; /* enum service_protocol */
	__u16 relay; /* group for clients that cannot be bound to another; NO_GROUP: none */
	__u8 refuses_unknown; /* PROTOCOL_TLS: who names no server that has a route */
	__u8 pad[19];
};
SIZE_IS(struct service, 64);

/*
 * Everything that the datapath needs to know of the configuration. There are two of these;
 * `generation` & 1 in the map of that name says which one is in force. What each packet reads
 * lies in the first cache line, up to five IPv4 services, and in its service's own.
 */
struct service_table {
	__u64 topic_key[2]; /* SipHash key of whole topics; secret */
	__u32 generation;
	__u16 v4; /* service[0 .. v4) are IPv4 … */
	__u16 count; /* … service[v4 .. count) are IPv6 */
	__u64 v4_key[MAX_SERVICES]; /* addr | port << 32, both network order: one comparison each */
	__u64 route_key[2]; /* SipHash key of topic levels; secret */
	__u64 pad[3];
	struct service service[MAX_SERVICES];
};
SIZE_IS(struct service_table, 192 + 64 * MAX_SERVICES);
_Static_assert(__builtin_offsetof(struct service_table, service) % 64 == 0, "a service is a line");

/* One cache line. */
struct group {
	__be32 vip[4]; /* IPv4 in vip[0] */
	__u16 epoch; /* 0: free. Whoever remembers another epoch means an earlier group. */
	__u16 service; /* service.id */
	__u16 last_epoch; /* of a free one: the next is another than any before */
	__u16 parent; /* own number; of one real alone (affinity): that of the group it belongs to */
	char name[GROUP_NAME_MAX];
	__u8 pad2[8];
};
SIZE_IS(struct group, 64);

/*
 * Routes by what a client says first (delayed binding): CONNECT, or, of a service that speaks TLS, ClientHello. Of each,
 * the ones that are asked first first.
 */
enum client_route_kind {
	CLIENT_ROUTE_ID,
	CLIENT_ROUTE_USER,
	CLIENT_ROUTE_SNI,
	CLIENT_ROUTE_ALPN,
	CLIENT_ROUTE_KINDS,
};

/*
 * Key of such a route, in a trie that finds the longest prefix. An exact text ends with the byte 0, which no MQTT text
 * has (MQTT 3.1.1 §1.5.3) and no host name, so it is longer than any of its prefixes. Server names are in lower case,
 * and backwards: what routes have in common is their end.
 */
struct client_route {
	__u32 prefix; /* bits of what follows */
	__u16 service;
	__u8 kind; /* enum client_route_kind */
	__u8 generation; /* its lowest bit */
	__u8 text[CLIENT_ROUTE_TEXT_MAX];
};
SIZE_IS(struct client_route, 8 + CLIENT_ROUTE_TEXT_MAX);

/* What decides on the real of a group that chooses it here. */
enum affinity {
	AFFINITY_CLIENT_ID,
	AFFINITY_TOPIC,
};

/*
 * A group whose reals are chosen here has a group VIP for each of them, at the balancer with that real
 * alone, and a table of those, filled by user space so that a real that goes moves its own clients only.
 */
struct member_slot {
	__u16 group;
	__u8 generation; /* its lowest bit */
	__u8 pad;
	__u32 slot; /* of MEMBER_SLOTS */
};
SIZE_IS(struct member_slot, 8);

struct member {
	__u16 group; /* number of the group of that real alone */
	__u8 affinity; /* enum affinity, of the group */
	__u8 pad;
};
SIZE_IS(struct member, 4);

struct route_edge {
	__u64 level; /* SipHash-1-3 of the level's text under route_key */
	__u32 state;
	__u32 pad;
};
SIZE_IS(struct route_edge, 16);

enum route_state_flags {
	ROUTE_FINAL = 1 << 0, /* every level leads back here: the rest of a topic changes nothing */
	ROUTE_HAS_EDGES = 1 << 1, /* some level has an edge of its own */
};

struct route_state {
	__u32 other; /* next state for a level that has no edge of its own */
	__u16 group; /* for a topic that ends here: its group, ANY_GROUP, or NO_GROUP: the default */
	__u16 flags; /* enum route_state_flags */
};
SIZE_IS(struct route_state, 8);

#endif /* MQTT_FWD_CONFIG_H */
