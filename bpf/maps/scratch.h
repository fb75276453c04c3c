/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * One packet's working memory.
 */
#ifndef MQTT_FWD_MAPS_SCRATCH_H
#define MQTT_FWD_MAPS_SCRATCH_H

#include "../abi/fleet.h"
#include "../abi/handover.h"
#include "../abi/rescue.h"
#include "../abi/state.h"
#include "../forward/flow/conn.h"
#include "../lib/map.h"
#include "../lib/tcp.h"
#include "counters.h"
#include "state.h"

/* A PUBLISH to be judged. */
struct publish {
	__u64 hash; /* of the topic */
	__u64 print; /* likewise, see struct flow; 0: not known */
	__u64 place; /* see struct topic; 0: it was not asked for, or is not known */
	binding_t to; /* where it belongs; 0: nowhere (group gone) */
	__u32 generation; /* of the routes that say so */
	__u32 start; /* sequence number of its first byte */
	__u32 inside; /* that lies before this segment */
};

/* Why framing stops before the end of a segment. */
enum stop_reason {
	STOP_NONE,
	STOP_TOPIC, /* a PUBLISH whose topic lies whole in the segment: scratch.hash, scratch.topic_length */
	STOP_STREAM, /* a topic that is long or split: flow.parser is PARSER_TOPIC */
	STOP_SUBSCRIBE, /* a SUBSCRIBE that begins at scratch.start */
	STOP_UNJUDGED, /* a PUBLISH that begins there, and is not judged */
	STOP_UNFRAMED, /* no MQTT, or malformed: to be reported */
};

/* What a PUBLISH may be counted as: these reasons follow each other. */
#define PUBLISH_REASONS 4
_Static_assert(REASON_UNJUDGED == REASON_PUBLISH + PUBLISH_REASONS - 1 &&
		       REASON_MISPREDICTED > REASON_PUBLISH &&
		       REASON_MISPREDICTED < REASON_UNJUDGED &&
		       REASON_PUBLISH_LOST > REASON_PUBLISH &&
		       REASON_PUBLISH_LOST < REASON_UNJUDGED,
	       "see scratch.tally");

_Static_assert(sizeof(struct rescue) == sizeof(struct segment_report),
	       "both end where the segment begins");

#define SEGMENT_MAX 4096 /* bytes; frames are linear, and no larger than a page */

/* What a CONNECT says (mqtt/connect.h). Offsets are from the start of the frame. */
struct connect {
	__u32 length; /* of the whole packet; 0: this is no CONNECT */
	__u32 id; /* offset of the client id */
	__u32 id_length;
	__u32 user; /* offset of the user name */
	__u32 user_length;
	__u32 will; /* offset of the will's topic */
	__u32 will_length; /* 0: there is none in the segment */
	__u32 properties; /* offset of MQTT 5's properties */
	__u32 properties_length;
	__u8 level; /* protocol level: 3, 4 (MQTT 3.1.1), 5 */
	__u8 flags; /* MQTT 3.1.1 §3.1.2.3 */
	__u8 has_id; /* the client id lies in the segment */
	__u8 has_user;
};

/* An answer of delayed binding (handshake/answer.h). */
#define ANSWER_WORDS 8 /* SYN-ACK: MSS, timestamps, window scale: 5; CONNACK: 4; a power of two */

struct answer {
	__u32 seq; /* host order, as the next ones */
	__u32 ack;
	__u16 window;
	__u8 flags; /* the lower byte of the TCP header's flags (RFC 9293 §3.1) */
	__u8 options; /* words */
	__u32 words; /* of options and payload together */
	__u32 cut; /* bytes of the last word that are not sent */
	__be32 word[ANSWER_WORDS]; /* zero behind those */
};

/* How a connection is bound (handshake/bound.h, flow/predicted.h). */
struct bind_decision {
	binding_t binding;
	__u32 flags; /* enum flow_flags, beside those that all have */
	__u32 next; /* sequence number from which on the flow is framed */
	__u32 first_ack; /* see struct flow */
	__u8 bound_by; /* enum bound_by */
	__u8 fallback_reason; /* enum fallback_reason */
	__u16 verdict; /* the packet's, enum reason (flow/predicted.h) */
};

/* What one stage leaves for the next. */
struct tail_args {
	struct conn conn;
	__u32 slot; /* of the service */
	binding_t binding;
	__u32 joined; /* STAGE_HELLO: what was kept is in front of the segment */
};

/* How far a ClientHello was read (tls/client_hello.h). */
enum hello_outcome {
	HELLO_READ, /* as far as it matters */
	HELLO_MORE, /* what matters lies behind the segment */
	HELLO_NONE, /* it is none, or malformed */
};

struct hello {
	__u32 outcome; /* enum hello_outcome */
	__u32 offset; /* of the next byte, from the start of the frame */
	__u32 end; /* of the payload, likewise */
	__u32 records; /* TLS records that were begun */
	__u32 record; /* bytes of the last of them that are still to be read */
	__u32 message; /* bytes of the handshake message, likewise */
	__u32 extensions; /* bytes of its extensions, likewise */
	__u32 wanted; /* 1 << enum client_route_kind: of the routes that there are, and not looked up yet */
	__u32 list; /* bytes of ALPN's list, likewise */
	binding_t by_name;
	binding_t by_alpn;
	__u32 name_length; /* 0: it has none */
	__u32 text_length;
	__u8 text[CLIENT_ROUTE_TEXT_MAX]; /* zero behind its length */
};

/*
 * One packet's working memory. A map value rather than the stack: there is more room, and
 * the verifier takes what it reads from here as unknown, which keeps loops cheap to verify.
 *
 * While a build of the same layout is loaded, its stages are called by the last one's programs, and this is where each
 * finds what the other noted: what is meant otherwise is to be named otherwise.
 */
struct scratch {
	__u32 offset; /* of the next unread byte, from the start of the frame */
	__u32 end; /* of the payload, likewise */
	__u32 start; /* of the current control packet, likewise, or STARTED_BEFORE */
	__u32 stop_reason; /* enum stop_reason */
	__s32 budget; /* for judging topics, see mqtt/framing.h */
	__u32 topic_length; /* STOP_TOPIC */
	__u32 after_topic; /* STOP_TOPIC: bytes of the packet behind its topic */
	__u32 new_data_off; /* of the bytes that are new, offset from the start of the frame */
	__u32 end_before; /* the flow's end before this segment: its broker may have what lies before that */
	__u32 slot; /* of the service that is framed for */
	__u32 relay_asked; /* for this segment, whether the flow belongs to the relay */
	__u32 tally[PUBLISH_REASONS]; /* for counters[REASON_PUBLISH …], once a segment */
	__u32 published; /* PUBLISHes of this segment; counted only where [limits] bounds them */
	__u64 hash; /* STOP_TOPIC */
	__u64 print; /* STOP_TOPIC */
	struct publish publish;
	/* What a client's record is to hear of: a topic's hash, and its group. */
	__u64 lesson_topic;
	binding_t lesson_group;
	/* Keys: there is more room for them here than on the stack. */
	struct flow6 stream_key;
	struct client6 client_key;
	struct client_share share;
	/*
	 * Key in `client_ids` of the packet's client; 0: it is identified by its address. Set before
	 * anything is learned or predicted of a client.
	 */
	__u64 id;
	struct topic_stream stream;
	__u8 text_verifier_slack
		[TOPIC_TEXT_MAX]; /* what a copy to stream.text may touch, to the verifier */
	struct topic topic;
	struct client client;
	struct client_id client_id;
	struct tail_args tail_args;
	struct connect connect;
	struct bind_decision decision;
	struct server_name server_name;
	struct hello hello;
	__u8 hello_verifier_slack[CLIENT_ROUTE_TEXT_MAX]; /* as text_verifier_slack */
	struct client_route client_route;
	__u8 client_route_verifier_slack[CLIENT_ROUTE_TEXT_MAX]; /* as text_verifier_slack */
	struct handover handover; /* with room behind it: see CONNECT_BOUND */
	struct tcp_option_scan options;
	struct answer answer;
	/* With its bytes behind it. */
	union {
		struct rescue rescue;
		struct segment_report report;
	};
	__u8 segment[SEGMENT_MAX];
};
MAP(scratch_area, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct scratch, 1);

static __always_inline struct scratch *scratch(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch_area, &zero);
}

#endif /* MQTT_FWD_MAPS_SCRATCH_H */
