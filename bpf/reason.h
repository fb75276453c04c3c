/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Why packets went the way they went: one list for the datapath, the CLI and the docs
 * (build.rs reads it, so keep one REASON(NAME, "text") a line).
 *
 * VERDICT: exactly one a packet, so that they add up to the packets seen.
 * NOTE:    what else happened on the way, any number a packet.
 */
#ifndef MQTT_FWD_REASON_H
#define MQTT_FWD_REASON_H

#define FOR_EACH_VERDICT(VERDICT)                                                               \
	VERDICT(NOT_IP, "neither IPv4 nor IPv6 (VLAN tags and ARP too): passed on")             \
	VERDICT(NOT_SERVICE, "not for a service: passed on")                                    \
	VERDICT(TRUNCATED, "shorter than its own headers say: passed on")                       \
	VERDICT(IP_OPTIONS, "for a service, with IPv4 options: passed on")                      \
	VERDICT(IP_FRAGMENT, "an IP fragment: passed on")                                       \
	VERDICT(IPV6_EXTENSION, "IPv6 with an extension header: passed on")                     \
	VERDICT(FLOW_NEW, "SYN: bound to the service's default group")                          \
	VERDICT(FLOW_PREDICTED, "SYN: bound to the group that the client's last topic predicts") \
	VERDICT(SYN_AGAIN, "SYN repeated: stays bound as it was")                               \
	VERDICT(FLOW_ADOPTED, "first seen in its middle: bound by prediction")                  \
	VERDICT(NO_DATA, "segment without data: follows its flow")                              \
	VERDICT(DATA, "segment with data: follows its flow")                                    \
	VERDICT(ICMP_ERROR, "ICMP error about a flow: sent to the flow's group")                \
	VERDICT(TOO_BIG, "too large to be encapsulated: answered with ICMP")                    \
	VERDICT(NO_GROUP_VIP, "no usable group for the flow: passed on unchanged")

#define FOR_EACH_NOTE(NOTE)                                                                     \
	NOTE(NO_BALANCER, "nobody at the balancer's position: packet restored, given to the stack") \
	NOTE(PUBLISH, "PUBLISH that its flow's group is responsible for")                       \
	NOTE(MISPREDICTED, "PUBLISH that another group is responsible for")                     \
	NOTE(RESET, "flow sent to the right group, to be reset and opened anew")                \
	NOTE(LEARNED, "prediction made or changed")                                             \
	NOTE(PREDICTION_HIT, "flow's first PUBLISH was predicted right")                        \
	NOTE(PREDICTION_MISS, "flow's first PUBLISH was predicted wrong")                       \
	NOTE(MIXED, "client found to publish to several groups in turn")                        \
	NOTE(SEGMENT_OLD, "segment without anything new for the parser (payload, repetition)")  \
	NOTE(SEGMENT_AHEAD, "segment behind a hole in its flow: not parsed yet")                \
	NOTE(RESYNCED, "framing found again")                                                   \
	NOTE(NOT_MQTT, "flow that does not begin with CONNECT: no longer parsed")               \
	NOTE(MALFORMED, "malformed control packet: framing given up until there is evidence")   \
	NOTE(TOPIC_LOST, "topic over several segments forgotten (map full): not judged")        \
	NOTE(GROUP_GONE, "flow's group was removed: bound anew")                                \
	NOTE(FLOW_CLOSED, "FIN or RST: flow may be forgotten early")                            \
	NOTE(TOO_BIG_NO_DF, "too large, but may be fragmented: passed on")                      \
	NOTE(MAP_FULL, "flow or client could not be stored")                                    \
	NOTE(EVENT_LOST, "event not reported: nobody reads, or over the rate")

#define REASON_ENUM(name, text) REASON_##name,
enum reason {
	FOR_EACH_VERDICT(REASON_ENUM)
	FOR_EACH_NOTE(REASON_ENUM)
	REASONS,
};
#undef REASON_ENUM

#endif /* MQTT_FWD_REASON_H */
