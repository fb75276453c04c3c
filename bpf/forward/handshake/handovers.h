/* SPDX-License-Identifier: GPL-2.0-only */
/* Connections on their way to a broker: the map `handovers`. Begun in connect.h, ended in handover.h. */
#ifndef MQTT_FWD_HANDSHAKE_HANDOVERS_H
#define MQTT_FWD_HANDSHAKE_HANDOVERS_H

#include "../../maps/counters.h"
#include "../../maps/scratch.h"

/* To the verifier, what is copied to or from handover.connect may be this long; see struct scratch. */
#define CONNECT_BOUND 256

static __always_inline struct handover *handover_find(const struct conn *c)
{
	struct flow6 key = c->key;

	return bpf_map_lookup_elem(&handovers, &key);
}

static __always_inline void handover_put(const struct conn *c, const struct handover *h)
{
	struct flow6 key = c->key;
	bool is_new = !bpf_map_lookup_elem(&handovers, &key);

	if (bpf_map_update_elem(&handovers, &key, h, BPF_ANY))
		count(REASON_MAP_FULL);
	else if (is_new)
		map_used(TRACKED_HANDOVERS, 1, 0);
}

static __always_inline void handover_remove(const struct conn *c)
{
	struct flow6 key = c->key;

	if (!bpf_map_delete_elem(&handovers, &key))
		map_used(TRACKED_HANDOVERS, 0, 1);
}

#endif /* MQTT_FWD_HANDSHAKE_HANDOVERS_H */
