/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Maps of mqtt_fwd. Sizes are defaults: the loader sets what the configuration says.
 * IPv4 and IPv6 have maps of their own, so that IPv4 does not hash IPv6's key size.
 *
 * Each map that the datapath writes has one file that does: flow.h the flows, cache.h the cache,
 * learn.h clients, client_ids and topics, framing.h topic_streams, delayed/ handovers.
 */
#ifndef MQTT_FWD_MAPS_H
#define MQTT_FWD_MAPS_H

#include "../abi/config.h"
#include "../abi/event.h"
#include "../abi/handover.h"
#include "../abi/reason.h"
#include "../abi/rescue.h"
#include "../abi/state.h"
#include "../lib/map.h"
#include "../lib/predecessor.h"
#include "../lib/ratelimit.h"
#include "../lib/siphash.h"
#include "../lib/tcp.h"
#include "conn.h"

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
	__uint(max_entries, ROOT_ARRAY_SIZE);
} root_array SEC(".maps");

/*
 * The programs of this object, which hand a packet to each other: what one needs to know of the
 * other's findings is in work.handed. Each has a stack, and the verifier's patience, of its own.
 */
enum step { STEP_FORWARD, STEP_GREET, STEP_HANDOVER, STEP_RESCUE, STEPS };

int mqtt_fwd(struct xdp_md *ctx);
int mqtt_greet(struct xdp_md *ctx);
int mqtt_handover(struct xdp_md *ctx);
int mqtt_rescue(struct xdp_md *ctx);

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(max_entries, STEPS);
	__array(values, int(struct xdp_md *));
} steps SEC(".maps") = {
	.values = {
		[STEP_FORWARD] = (void *)&mqtt_fwd,
		[STEP_GREET] = (void *)&mqtt_greet,
		[STEP_HANDOVER] = (void *)&mqtt_handover,
		[STEP_RESCUE] = (void *)&mqtt_rescue,
	},
};

/* ---- configuration: read here, written by user space ---- */

/* The one switch between the two generations of services and routes. */
MAP(generation, BPF_MAP_TYPE_ARRAY, __u32, __u32, 1);
LINE_ARRAY(services, struct service_table, 2);
LINE_ARRAY(groups, struct group, 1024);

/*
 * Routes, as an automaton over topic levels. States of both generations share the maps;
 * their numbers do not overlap, so a walk stays within the generation it started in.
 */
MAP_WITH_FLAGS(mqtt_topic_to_vip, BPF_MAP_TYPE_HASH, BPF_F_NO_PREALLOC, struct route_edge, __u32,
	       1 << 20);
MAP_WITH_FLAGS(client_routes, BPF_MAP_TYPE_LPM_TRIE, BPF_F_NO_PREALLOC, struct client_route, __u32,
	       1 << 16);
MAP_WITH_FLAGS(members, BPF_MAP_TYPE_HASH, BPF_F_NO_PREALLOC, struct member_slot, struct member, 1 << 20);
MAP(route_states, BPF_MAP_TYPE_ARRAY, __u32, struct route_state, 1 << 19);

/*
 * Not read here: the balancer puts the service's address back with it. It lives in this
 * object so that it exists, pinned, whichever of the two is loaded first.
 */
MAP(mqtt_service_vips, BPF_MAP_TYPE_HASH, struct vip_definition, struct vip_definition,
    MAX_GROUP_VIPS);

/* ---- state: written here ---- */

/* Kernel names end after 15 characters, hence not mqtt_client_ip6_to_topic. */
MAP(mqtt_client_ip_to_topic, BPF_MAP_TYPE_LRU_HASH, struct client4, struct client, 1 << 20);
MAP(mqtt_client6_to_topic, BPF_MAP_TYPE_LRU_HASH, struct client6, struct client, 1 << 20);
/* Clients of services with delayed binding, by a keyed hash of service and client id. */
MAP(client_ids, BPF_MAP_TYPE_LRU_HASH, __u64, struct client_id, 1 << 20);
MAP(topics, BPF_MAP_TYPE_LRU_HASH, __u64, struct topic, 1 << 16);

MAP(flows, BPF_MAP_TYPE_LRU_HASH, struct flow4, struct flow, 1 << 20);
MAP(flows6, BPF_MAP_TYPE_LRU_HASH, struct flow6, struct flow, 1 << 20);
/*
 * Flows that saw FIN or RST, and those that were first seen in their middle and have not shown
 * yet that they are MQTT. They compete for room only with each other, so that neither a wave of
 * short connections nor a stranger's segments push out standing flows.
 */
MAP(flows_weak, BPF_MAP_TYPE_LRU_HASH, struct flow4, struct flow, 1 << 16);
MAP(flows6_weak, BPF_MAP_TYPE_LRU_HASH, struct flow6, struct flow, 1 << 16);

/* Bindings of flows of both families, in front of the maps above (see cache.h). */
LINE_ARRAY(binding_cache, struct cache_set, 1 << 16);

/* Delayed binding: written by user space; and connections that no broker has confirmed yet. */
MAP(handover_keys, BPF_MAP_TYPE_ARRAY, __u32, struct handover_keys, 1);
MAP(handovers, BPF_MAP_TYPE_LRU_HASH, struct flow6, struct handover, 1 << 16);

/*
 * When a segment of no known flow was last taken for the first of its flow, by a hash of that, and its
 * tag: a table of a fixed size, in which nothing is kept for whoever sends them.
 */
MAP(strays, BPF_MAP_TYPE_ARRAY, __u32, __u64, STRAYS);

/* A topic in the hands of the parser. */
struct topic_stream {
	struct siphash_stream whole;
	struct siphash_stream level;
	__u32 state; /* of the route automaton */
	__u32 generation;
	__u32 flags; /* of `state`, enum route_state_flags */
	__u32 steps; /* look-ups of levels so far */
	__u8 text[TOPIC_TEXT_MAX];
};

/* Topics that are split over segments, between the segments. */
MAP(topic_streams, BPF_MAP_TYPE_LRU_HASH, struct flow6, struct topic_stream, 1 << 14);

/* A PUBLISH to be judged. */
struct publish {
	__u64 hash; /* of the topic */
	binding_t to; /* where it belongs; 0: nowhere (group gone) */
	__u32 generation; /* of the routes that say so */
	__u32 start; /* sequence number of its first byte */
	__u32 inside; /* that lies before this segment */
};

/* Why framing stops before the end of a segment. */
enum pause {
	PAUSE_NONE,
	PAUSE_TOPIC, /* a PUBLISH whose topic lies whole in the segment: work.hash, work.topic_length */
	PAUSE_STREAM, /* a topic that is long or split: flow.parser is PARSER_TOPIC */
};

/* What a PUBLISH may be counted as: these reasons follow each other. */
#define PUBLISH_REASONS 4
_Static_assert(REASON_UNJUDGED == REASON_PUBLISH + PUBLISH_REASONS - 1 &&
		       REASON_MISPREDICTED > REASON_PUBLISH && REASON_MISPREDICTED < REASON_UNJUDGED &&
		       REASON_PUBLISH_LOST > REASON_PUBLISH && REASON_PUBLISH_LOST < REASON_UNJUDGED,
	       "see work.tally");

#define SEGMENT_MAX 4096 /* bytes; frames are linear, and no larger than a page */

/* What a CONNECT says (connect.h). Offsets are from the start of the frame. */
struct connect {
	__u32 length; /* of the whole packet; 0: this is no CONNECT */
	__u32 id; /* offset of the client id */
	__u32 id_length;
	__u32 user; /* offset of the user name */
	__u32 user_length;
	__u32 properties; /* offset of MQTT 5's properties */
	__u32 properties_length;
	__u8 level; /* protocol level: 3, 4 (MQTT 3.1.1), 5 */
	__u8 flags; /* MQTT 3.1.1 §3.1.2.3 */
	__u8 has_id; /* the client id lies in the segment */
	__u8 has_user;
};

/* An answer of delayed binding (delayed/answer.h). */
#define ANSWER_WORDS 8 /* SYN-ACK: MSS, timestamps, window scale: 5; CONNACK: 4; a power of two */

struct answer {
	__u32 seq; /* host order, as the next ones */
	__u32 ack;
	__u16 window;
	__u8 flags; /* the lower byte of the TCP header's flags (RFC 9293 §3.1) */
	__u8 options; /* words */
	__u32 words; /* of options and payload together */
	__be32 word[ANSWER_WORDS]; /* zero behind those */
};

/* How a connection is bound (delayed/greet.h). */
struct verdict {
	binding_t binding;
	__u32 flags; /* enum flow_flags, beside those that all have */
	__u32 next; /* sequence number from which on the flow is framed */
	__u8 way;
	__u8 why;
};

/* What one of `steps` hands to another. */
struct handed {
	struct conn conn;
	__u32 slot; /* of the service */
	binding_t binding;
};

/*
 * One packet's working memory. A map value rather than the stack: there is more room, and
 * the verifier takes what it reads from here as unknown, which keeps loops cheap to verify.
 */
struct work {
	__u32 offset; /* of the next unread byte, from the start of the frame */
	__u32 end; /* of the payload, likewise */
	__u32 start; /* where the control packet in hand begins, likewise, or STARTED_BEFORE */
	__u32 pause; /* enum pause */
	__s32 budget; /* for judging topics, see framing.h */
	__u32 topic_length; /* PAUSE_TOPIC */
	__u32 left; /* PAUSE_TOPIC: bytes of the packet behind its topic */
	__u32 first; /* of the bytes that are new, offset from the start of the frame */
	/* A topic of this segment that is the flow's last: offset from the start of the frame, bytes. */
	__u32 same;
	__u32 same_length;
	__u32 seen; /* the flow's end before this segment: what lies before that, its broker may have */
	__u32 tally[PUBLISH_REASONS]; /* for counters[REASON_PUBLISH …], once a segment */
	__u64 hash; /* PAUSE_TOPIC */
	struct publish publish;
	/* Keys: there is more room for them here than on the stack. */
	struct flow6 stream_key;
	struct client6 client_key;
	/*
	 * Key in `client_ids` of the client in hand; 0: it is known by its address. Whoever learns of
	 * a client or predicts says first which.
	 */
	__u64 id;
	struct topic_stream stream;
	__u8 beyond_text[TOPIC_TEXT_MAX]; /* what a copy to stream.text may touch, to the verifier */
	struct topic topic;
	struct client client;
	struct client_id client_id;
	struct handed handed;
	struct connect connect;
	struct verdict verdict;
	struct client_route client_route;
	__u8 beyond_client_route[CLIENT_ROUTE_TEXT_MAX]; /* as beyond_text */
	struct handover handover; /* with room behind it: see CONNECT_BOUND */
	struct tcp_option_scan options;
	struct answer answer;
	struct rescue rescue; /* with its bytes behind it */
	__u8 segment[SEGMENT_MAX];
};
MAP(work, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct work, 1);

static __always_inline struct work *work_of_cpu(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&work, &zero);
}

/* ---- limits and reports ---- */

enum budget_kind {
	BUDGET_EVENTS, /* one each kind of event */
	BUDGET_FLOWS = BUDGET_EVENTS + EVENT_KINDS,
	BUDGET_TOPICS,
	BUDGET_RESCUES,
	BUDGETS,
};
MAP(budgets, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct budget, BUDGETS);

/* Per CPU and window of 0.1 s (lib/ratelimit.h). */
const volatile __u32 events_per_window = 200; /* of each kind; 0 turns events off */
const volatile __u32 flows_per_window = 10000; /* as Katran's is_under_flood, but for the rate */
const volatile __u32 topics_per_window = 1000;
const volatile __u32 rescues_per_window = 50;

MAP(counters, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, __u64, REASONS);
MAP(map_uses, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct map_use, TRACKED_MAPS);

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
} events SEC(".maps");

/* What misrouted clients sent, for the sidecar (abi/rescue.h). */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
} rescues SEC(".maps");

/* Written by the sidecar. */
MAP(rescuer, BPF_MAP_TYPE_ARRAY, __u32, struct rescuer, 1);

static __always_inline void count_many(enum reason reason, __u32 times)
{
	__u32 key = reason;
	__u64 *counter = bpf_map_lookup_elem(&counters, &key);

	if (counter)
		*counter += times;
}

static __always_inline void count(enum reason reason)
{
	count_many(reason, 1);
}

static __always_inline void map_used(enum tracked_map map, __u32 added, __u32 removed)
{
	__u32 key = map;
	struct map_use *use = bpf_map_lookup_elem(&map_uses, &key);

	if (use) {
		use->added += added;
		use->removed += removed;
	}
}

/* ---- bindings ---- */

static __always_inline binding_t binding_of(__u16 group, __u16 epoch)
{
	return epoch ? group | (__u32)epoch << 16 : 0;
}

static __always_inline __u16 binding_group(binding_t binding)
{
	return binding;
}

/* The group that a binding means, if it is still there. */
static __always_inline const struct group *group_of(binding_t binding)
{
	__u32 key = binding_group(binding);
	const struct group *g = bpf_map_lookup_elem(&groups, &key);

	return g && binding && READ_ONCE(g->epoch) == binding >> 16 ? g : NULL;
}

/* Whether a flow that is bound so belongs to a group: it may be bound to one of its reals. */
static __always_inline bool belongs_to(binding_t bound, __u16 group)
{
	__u32 key = binding_group(bound);
	const struct group *g;

	if (key == group)
		return true;
	g = bpf_map_lookup_elem(&groups, &key);
	return g && READ_ONCE(g->parent) == group;
}

/* A binding to whatever group has this number now; 0: none has. */
static __always_inline binding_t binding_now(__u16 group)
{
	__u32 key = group;
	const struct group *g = bpf_map_lookup_elem(&groups, &key);

	return g ? binding_of(group, READ_ONCE(g->epoch)) : 0;
}

/* The binding to a service's relay; 0: it has none. */
static __always_inline binding_t relay_of(const struct service *svc)
{
	return svc->relay == NO_GROUP ? 0 : binding_now(svc->relay);
}

#endif /* MQTT_FWD_MAPS_H */
