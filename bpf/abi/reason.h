/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Reasons: one list for the datapath, the CLI, metrics and docs (build.rs reads it, so keep one
 * REASON(NAME, "text") per line).
 *
 * VERDICT: exactly one per packet, so that they add up to the packets seen.
 * NOTE:    anything else worth counting, any number per packet.
 *
 * The counters of established flows stand together in the middle: they are one cache line then.
 */
#ifndef MQTT_FWD_REASON_H
#define MQTT_FWD_REASON_H

/* clang-format off */
#define FOR_EACH_VERDICT(VERDICT) \
	VERDICT(NOT_IP, "neither IPv4 nor IPv6 (VLAN tags and ARP too): passed on") \
	VERDICT(NOT_SERVICE, "not for a service: passed on") \
	VERDICT(GROUP_VIP, "for the address of a group, which only clients of its service are sent to, and here: dropped") \
	VERDICT(TRUNCATED, "shorter than its own headers say: passed on") \
	VERDICT(IP_OPTIONS, "for a service, with IPv4 options: passed on") \
	VERDICT(IP_FRAGMENT, "an IP fragment: passed on") \
	VERDICT(IPV6_EXTENSION, "IPv6 with an extension header: passed on") \
	VERDICT(FLOW_NEW, "SYN: bound to the service's relay, or its default group if it has none") \
	VERDICT(FLOW_PREDICTED, "SYN: bound to the group that the client's messages predict") \
	VERDICT(SYN_AGAIN, "SYN repeated: stays bound as it was") \
	VERDICT(SYN_REUSED_PORT, "SYN on the addresses of an existing flow, which stays until this one proves itself") \
	VERDICT(FLOW_ADOPTED, "first seen in its middle: bound by prediction") \
	VERDICT(UNTRACKED, "without a flow, and opens none: follows the prediction, leaves no state") \
	VERDICT(SYN_ANSWERED, "SYN: answered here, no state kept") \
	VERDICT(CONNECT_PIECE, "piece of a CONNECT or ClientHello: kept and acknowledged here until it is whole") \
	VERDICT(HELLO_HELD, "segment of a ClientHello whose server name is still to come: left to the sidecar") \
	VERDICT(NAME_REFUSED, "ClientHello for a server name that no route has: refused with an alert (unrecognized_name)") \
	VERDICT(HANDSHAKE, "acknowledges the SYN-ACK from here, without data: dropped") \
	VERDICT(CONNECT_ANSWERED, "CONNECT: answered here; the next message decides its group") \
	VERDICT(WAIT_ANSWERED, "keepalive probe, connection not yet bound: answered") \
	VERDICT(WAIT_DROPPED, "duplicate or out-of-order, connection not yet bound: dropped") \
	VERDICT(REFUSED, "end of a connection that no broker has: answered with RST") \
	VERDICT(UNTRACKED_DROPPED, "without a flow or a cookie, seen once: dropped until it is repeated") \
	VERDICT(HANDOVER_FAILED, "no room for an answer, for CONNECT in front, or for a new flow: dropped") \
	VERDICT(RESCUED, "behind a misrouted PUBLISH: handed to the sidecar") \
	VERDICT(ICMP_ERROR, "ICMP error about a flow: sent to the flow's group") \
	VERDICT(TOO_BIG, "too large to be encapsulated: answered with ICMP") \
	VERDICT(MISSED, "of a connection that this balancer does not know (fleet): dropped, and asked for") \
	VERDICT(MISS_DROPPED, "likewise, and not asked for: over misses_per_second, or asked for just now") \
	VERDICT(RATE_LIMITED, "of a client that is above its [limits]: dropped, for TCP to repeat") \
	VERDICT(NO_GROUP_VIP, "no usable group for the flow: passed on unchanged") \
	VERDICT(NO_DATA, "segment without data: follows its flow") \
	VERDICT(DATA, "segment with data: follows its flow")

#define FOR_EACH_NOTE(NOTE) \
	NOTE(PUBLISH, "PUBLISH that its flow's group is responsible for") \
	NOTE(MISPREDICTED, "PUBLISH that another group is responsible for") \
	NOTE(PUBLISH_LOST, "PUBLISH that no broker got: it or one before it ended its flow") \
	NOTE(UNJUDGED, "PUBLISH not judged: too many topics in its segment") \
	NOTE(FLOW_ENDED, "flow ended with DISCONNECT, so that its client reconnects to the right group") \
	NOTE(FLOW_RESCUED, "flow ended, and what it sent from there on handed to the sidecar") \
	NOTE(NOT_RESCUED, "misrouted PUBLISH not rescued: credentials, prediction only, split over segments, no sidecar, or too many, of all or of one address") \
	NOTE(RESCUE_DAMAGED, "rescue: wrong TCP checksum, dropped") \
	NOTE(RESCUE_FULL, "rescue delayed: the sidecar has no room yet") \
	NOTE(NO_BALANCER, "no program at the balancer's position: packet restored, passed to the stack") \
	NOTE(LEARNED, "prediction made or changed") \
	NOTE(PREDICTION_HIT, "flow's first PUBLISH was predicted right") \
	NOTE(PREDICTION_MISS, "flow's first PUBLISH was predicted wrong") \
	NOTE(SUBSCRIBER, "SUBSCRIBE on a flow that is not bound to the relay, where subscribers belong") \
	NOTE(MULTI_GROUP, "client found to publish to several groups in turn") \
	NOTE(SEGMENT_OLD, "segment without anything new for the parser (payload, repetition)") \
	NOTE(SEGMENT_AHEAD, "segment behind a gap in its flow: not parsed yet") \
	NOTE(RESYNCED, "framing recovered") \
	NOTE(NOT_MQTT, "flow that does not begin with CONNECT: no longer parsed") \
	NOTE(MALFORMED, "malformed control packet: not framed until packets line up again") \
	NOTE(TOPIC_FORGOTTEN, "topic over several segments evicted (map full): not judged") \
	NOTE(GROUP_GONE, "flow's group was removed: bound again") \
	NOTE(FLOW_REPLACED, "flow replaced by another connection on its addresses") \
	NOTE(FLOW_CLOSED, "FIN or RST: flow may be evicted early") \
	NOTE(FLOW_EVICTED, "flow's entry was evicted while in use: bound again") \
	NOTE(FLOW_NOT_STORED, "new flow not stored: too many a second, or a segment of no flow") \
	NOTE(CLIENT_NOT_STORED, "new client not remembered: too many, of all or of its address") \
	NOTE(CONNECT_DELAYED, "CONNECT dropped, for TCP to repeat: too many new connections, of all or of its address") \
	NOTE(WILL_ELSEWHERE, "client whose will belongs to another group than its messages") \
	NOTE(TOPIC_NOT_STORED, "new topic not stored: more than new_topics_per_second") \
	NOTE(BOUND_MESSAGE, "connection bound by the message that came with its CONNECT") \
	NOTE(BOUND_CLIENT_ID, "connection bound by what its client id published before") \
	NOTE(BOUND_ANSWERED, "connection bound by the message that came after CONNECT was answered") \
	NOTE(BOUND_ROUTE, "connection bound by a route that names its client") \
	NOTE(BOUND_SERVER_NAME, "connection bound by the server name of its ClientHello (TLS)") \
	NOTE(BOUND_ALPN, "connection bound by a protocol that its ClientHello offers (TLS)") \
	NOTE(BOUND_UNANSWERED, "connection bound by its client's address: nothing better was possible") \
	NOTE(FALLBACK_NOT_CONNECT, "fallback: did not begin with a CONNECT that all brokers accept") \
	NOTE(FALLBACK_CUT, "fallback: CONNECT did not lie whole in its first segment") \
	NOTE(FALLBACK_TOO_LONG, "fallback: CONNECT too long to be kept") \
	NOTE(FALLBACK_MQTT5, "fallback: MQTT 5, whose CONNACK only the broker knows") \
	NOTE(FALLBACK_PERSISTENT, "fallback: persistent session, which only the broker knows") \
	NOTE(FALLBACK_CREDENTIALS, "fallback: credentials, which only the broker can check") \
	NOTE(FALLBACK_SILENT, "fallback: nothing came after CONNECT") \
	NOTE(FALLBACK_NO_TOPIC, "fallback: what came after CONNECT has no topic that decides") \
	NOTE(FALLBACK_NO_SERVER_NAME, "fallback: ClientHello without a server name or protocol that has a route") \
	NOTE(FALLBACK_NO_HELLO, "fallback: did not begin with a ClientHello, though its service speaks TLS") \
	NOTE(FALLBACK_HELLO_CUT, "fallback: ClientHello's server name did not come in time") \
	NOTE(TLS_ON_PLAIN, "ClientHello at a service that does not speak TLS") \
	NOTE(ADOPTED_FROM_REAL, "connection found at a broker host (fleet): bound to that") \
	NOTE(ADOPTED_FROM_STORE, "connection without a broker yet, found in the fleet's store: goes on here") \
	NOTE(NOBODY_HAS_IT, "connection that no broker host has (fleet): its client is told so by RST") \
	NOTE(RETURNED, "segment that came back from a broker host, which has no such connection (fleet)") \
	NOTE(HANDOVER, "segment given its broker with CONNECT in front") \
	NOTE(HANDOVER_CONFIRMED, "connection confirmed: its broker has it") \
	NOTE(CLIENT_MISJUDGED, "client id found to change topics: no longer bound by its id alone") \
	NOTE(TOO_BIG_NO_DF, "too large, but may be fragmented: passed on") \
	NOTE(TOO_BIG_UNANSWERED, "too large, and no room to answer: passed on") \
	NOTE(MAP_FULL, "flow or client could not be stored") \
	NOTE(EVENT_LOST_BOUND, "event bound not reported: over the rate, or nobody reads") \
	NOTE(EVENT_LOST_LEARNED, "event learned not reported: over the rate, or nobody reads") \
	NOTE(EVENT_LOST_MISPREDICTED, "event mispredicted not reported: over the rate, or nobody reads") \
	NOTE(EVENT_LOST_RESYNCED, "event resynced not reported: over the rate, or nobody reads") \
	NOTE(EVENT_LOST_UNFRAMED, "event unframed not reported: over the rate, or nobody reads")
/* clang-format on */

#define REASON_ENUM(name, text) REASON_##name,
enum reason {
	FOR_EACH_VERDICT(REASON_ENUM) FOR_EACH_NOTE(REASON_ENUM) REASONS,
};
#undef REASON_ENUM

#endif /* MQTT_FWD_REASON_H */
