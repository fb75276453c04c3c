/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What one client may do in a second ([limits] in the configuration). What is above that is dropped, for TCP to
 * repeat: a client that is too fast becomes slow, and loses nothing.
 */
#ifndef MQTT_FWD_LIMITS_H
#define MQTT_FWD_LIMITS_H

#include "flow/flow.h"
#include "share.h"

/*
 * By client id where that is known, else by address; of IPv6, all of a network of 64 bits are one. Whether the id is
 * its own, only its broker knows: until that has accepted it, by connection, so that nobody can use up what another one
 * may.
 */
static __always_inline __u64 rate_key(const struct conn *c, const struct flow *f)
{
	__u64 id = flow_client(f), key;

	if (id && f->connect & FLOW_ACCEPTED)
		return id;
	key = (c->v6 ? c->key.addr[0] | (__u64)c->key.addr[1] << 32 : c->key.addr[0]) ^
	      (__u64)c->key.service << 48;
	return id ? key ^ (__u64)c->key.port << 32 : key;
}

/* Whether a segment with data may pass. Global (see event.h). */
__noinline int messages_admitted(const struct conn *c, const struct flow *f)
{
	struct client_rate *r;
	__u64 key, drained;
	__u32 now = now_s();

	if (!c || !f)
		return true;
	key = rate_key(c, f);
	r = bpf_map_lookup_elem(&client_rates, &key);
	if (!r)
		return true;
	if (r->second != now) {
		/* A segment of many messages is paid for in the seconds that follow. */
		drained = (__u64)(now - r->second) * messages_per_client;
		r->used = r->used > drained ? r->used - drained : 0;
		r->second = now;
	}
	return r->used < messages_per_client;
}

/* The messages of a segment, which have been framed. Global (see event.h). */
__noinline int messages_used(const struct conn *c, const struct flow *f)
{
	struct scratch *w = scratch();
	struct client_rate *r, first;
	__u64 key;

	if (!c || !f || !w || !w->published)
		return 0;
	key = rate_key(c, f);
	r = bpf_map_lookup_elem(&client_rates, &key);
	if (r) {
		r->used += w->published;
		return 0;
	}
	first.second = now_s();
	first.used = w->published;
	bpf_map_update_elem(&client_rates, &key, &first, BPF_ANY);
	return 0;
}

/* Whether an address may open another connection; of predicted binding, whose SYN is all that is known. */
__noinline int connection_admitted(const struct conn *c)
{
	return c && share_take(c, SHARE_OF_CONNECTIONS, connections_per_address);
}

#endif /* MQTT_FWD_LIMITS_H */
