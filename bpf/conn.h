/* SPDX-License-Identifier: GPL-2.0-only */
/* The connection that the packet in hand belongs to, and its keys in the maps. */
#ifndef MQTT_FWD_CONN_H
#define MQTT_FWD_CONN_H

#include "maps.h"

struct conn {
	struct flow6 key; /* IPv4: address in key.addr[0], the rest 0 */
	__u32 v6;
	__u32 seq; /* host order */
	__u32 ack; /* host order */
	__u32 payload; /* offset from the start of the frame */
	__u32 payload_length;
};

static __always_inline struct flow4 flow4_of(const struct conn *c)
{
	return (struct flow4){
		.addr = c->key.addr[0], .port = c->key.port, .service = c->key.service
	};
}

static __always_inline struct client4 client4_of(const struct conn *c)
{
	return (struct client4){ .addr = c->key.addr[0], .service = c->key.service };
}

static __always_inline struct client6 client6_of(const struct conn *c)
{
	struct client6 key = { .service = c->key.service };

	__builtin_memcpy(key.addr, c->key.addr, sizeof(key.addr));
	return key;
}

static __always_inline struct client *client_find(const struct conn *c)
{
	if (c->v6) {
		struct client6 key = client6_of(c);
		return bpf_map_lookup_elem(&mqtt_client6_to_topic, &key);
	}
	struct client4 key = client4_of(c);
	return bpf_map_lookup_elem(&mqtt_client_ip_to_topic, &key);
}

static __always_inline long client_store(const struct conn *c, const struct client *client)
{
	if (c->v6) {
		struct client6 key = client6_of(c);
		return bpf_map_update_elem(&mqtt_client6_to_topic, &key, client, BPF_ANY);
	}
	struct client4 key = client4_of(c);
	return bpf_map_update_elem(&mqtt_client_ip_to_topic, &key, client, BPF_ANY);
}

static __always_inline long flow_store(const struct conn *c, const struct flow *flow)
{
	if (c->v6)
		return bpf_map_update_elem(&flows6, &c->key, flow, BPF_ANY);
	struct flow4 key = flow4_of(c);
	return bpf_map_update_elem(&flows, &key, flow, BPF_ANY);
}

/* FIN or RST: move the flow to where it is forgotten early. */
static __always_inline void flow_close(const struct conn *c, struct flow *flow)
{
	flow->flags |= FLOW_CLOSING;
	count(REASON_FLOW_CLOSED);
	if (c->v6) {
		if (!bpf_map_update_elem(&flows6_closing, &c->key, flow, BPF_ANY))
			bpf_map_delete_elem(&flows6, &c->key);
	} else {
		struct flow4 key = flow4_of(c);
		if (!bpf_map_update_elem(&flows_closing, &key, flow, BPF_ANY))
			bpf_map_delete_elem(&flows, &key);
	}
}

/* SYN on a flow that is known: it must not be found among the closing ones any more. */
static __always_inline void flow_reopen(const struct conn *c, const struct flow *flow)
{
	if (!(flow->flags & FLOW_CLOSING))
		return;
	if (c->v6) {
		bpf_map_delete_elem(&flows6_closing, &c->key);
	} else {
		struct flow4 key = flow4_of(c);
		bpf_map_delete_elem(&flows_closing, &key);
	}
}

#endif /* MQTT_FWD_CONN_H */
