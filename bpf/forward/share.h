/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Shares of an IPv4 address, or of an IPv6 network of 64 bits, so that none can have all of what there is for all: the
 * map `client_shares`. Whoever gets here has an address that a cookie has proved, or, with predicted binding, one that
 * costs the sender a flow.
 */
#ifndef MQTT_FWD_SHARE_H
#define MQTT_FWD_SHARE_H

#include "../lib/clock.h"
#include "../maps/counters.h"
#include "../maps/scratch.h"

/* Windows of a second; of rescues, of RESCUE_WINDOW_S. */
static __always_inline __u32 share_window(enum share_kind share)
{
	return share == SHARE_OF_RESCUES ? now_s() / RESCUE_WINDOW_S : now_s();
}

/*
 * Takes one from the client's share of `most` a window; false: it has had that. CPUs that count at once may let one
 * too many through.
 */
static __always_inline bool share_take(const struct conn *c, enum share_kind share, __u32 most)
{
	__u32 window = share_window(share);
	struct scratch *w = scratch();
	struct client_share *s;

	if (!w)
		return false;
	w->client_key = client6_of(c);
	/* A host has as many IPv6 addresses as it likes, of one network of 64 bits. */
	if (c->v6)
		w->client_key.addr[2] = w->client_key.addr[3] = 0;
	s = bpf_map_lookup_elem(&client_shares, &w->client_key);
	if (!s) {
		__builtin_memset(&w->share, 0, sizeof(w->share));
		w->share.window[share] = window;
		w->share.used[share] = 1;
		return !bpf_map_update_elem(&client_shares, &w->client_key, &w->share, BPF_ANY);
	}
	if (READ_ONCE(s->window[share]) != window) {
		s->used[share] = 0;
		WRITE_ONCE(s->window[share], window);
	}
	if (READ_ONCE(s->used[share]) >= most)
		return false;
	s->used[share]++;
	return true;
}

/* Whether the client may have another place in `handovers`: of an address, half of what all may have, or less. */
__noinline int handover_admitted(const struct conn *c)
{
	__u32 most = handovers_per_second / 2;

	if (connections_per_address && connections_per_address < most)
		most = connections_per_address;
	return c && share_take(c, SHARE_OF_HANDOVERS, most) &&
	       budget_take(&budgets, BUDGET_HANDOVERS, handovers_per_window);
}

/* Whether a client that is not known may become known: of an address, a quarter of what all may have. */
__noinline int client_admitted(const struct conn *c)
{
	if (c && share_take(c, SHARE_OF_CLIENTS, clients_per_second / 4) &&
	    budget_take(&budgets, BUDGET_CLIENTS, clients_per_window))
		return true;
	count(REASON_CLIENT_NOT_STORED);
	return false;
}

#endif /* MQTT_FWD_SHARE_H */
