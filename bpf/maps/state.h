/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * State: written by the datapath, one file for each map: flow/table.h the flows, flow/cache.h the
 * cache, learn/record.h clients, client_ids and topics, mqtt/framing.h topic_streams, handshake/ handovers and
 * server_names, share.h client_shares. IPv4 and IPv6 have maps of their own, so that IPv4 does not hash IPv6's key size.
 */
#ifndef MQTT_FWD_MAPS_STATE_H
#define MQTT_FWD_MAPS_STATE_H

#include "../abi/handover.h"
#include "../abi/rescue.h"
#include "../abi/share.h"
#include "../abi/state.h"
#include "../lib/map.h"
#include "../lib/siphash.h"

/* Clients by address, and (services with delayed binding) by a keyed hash of service and client id. */
MAP(clients, BPF_MAP_TYPE_LRU_HASH, struct client4, struct client, 1 << 20);
MAP(clients6, BPF_MAP_TYPE_LRU_HASH, struct client6, struct client, 1 << 20);
MAP(client_ids, BPF_MAP_TYPE_LRU_HASH, __u64, struct client_id, 1 << 20);
MAP(topics, BPF_MAP_TYPE_LRU_HASH, __u64, struct topic, 1 << 16);
/* Of services that speak TLS, for people. */
MAP(server_names, BPF_MAP_TYPE_LRU_HASH, __u64, struct server_name, 1 << 14);

/* Flows of both families: flow/table.h says where each has its place. */
CACHELINE_ARRAY(flows, struct flow, 1 << 21);

/* Their bindings once more, for segments without data (see cache.h). */
CACHELINE_ARRAY(binding_cache, struct cache_set, 1 << 16);

/* Delayed binding: connections that no broker has confirmed yet. */
MAP(handovers, BPF_MAP_TYPE_LRU_HASH, struct flow6, struct handover, 1 << 16);

/*
 * When a segment without a flow was last taken for the first of its flow, by a hash of that, and its
 * tag: a place each, which another may take, so that nobody can fill it by sending them.
 */
MAP(untracked, BPF_MAP_TYPE_ARRAY, __u32, __u64, 1 << 12);

/* What each address has used lately of what all share. */
MAP(client_shares, BPF_MAP_TYPE_LRU_HASH, struct client6, struct client_share, 1 << 14);

/* How much clients publish, where [limits] bounds that: by their key in `client_ids`, or by address. */
MAP(client_rates, BPF_MAP_TYPE_LRU_HASH, __u64, struct client_rate, 1 << 16);

/* A topic that is being parsed. */
struct topic_stream {
	struct siphash_stream whole;
	struct siphash_stream level;
	__u32 state; /* of the route automaton */
	__u32 generation;
	__u32 flags; /* of `state`, enum route_state_flags */
	__u32 lookups; /* of levels, so far */
	/* The piece that is being fed: offset from the start of the frame, bytes. */
	__u32 piece_off;
	__u32 piece_len;
	struct route_edge edge; /* key of the look-up of a level */
	__u8 text[TOPIC_TEXT_MAX];
};

/* Topics that are split over segments, between the segments. */
MAP(topic_streams, BPF_MAP_TYPE_LRU_HASH, struct flow6, struct topic_stream, 1 << 14);

#endif /* MQTT_FWD_MAPS_STATE_H */
