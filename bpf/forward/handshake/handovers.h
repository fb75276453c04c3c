/* SPDX-License-Identifier: GPL-2.0-only */
/* Connections on their way to a broker: the map `handovers`. Begun in connect.h, ended in handover.h. */
#ifndef MQTT_FWD_HANDSHAKE_HANDOVERS_H
#define MQTT_FWD_HANDSHAKE_HANDOVERS_H

#include "../../maps/counters.h"
#include "../../maps/scratch.h"

/* To the verifier, what is copied to or from handover.connect may be this long; see struct scratch. */
#define CONNECT_BOUND 256

/* enum fleet_mode */
const volatile __u8 fleet = FLEET_WITH_STORE;

/* Tells the sidecar of a connection that waits for its client's next message, or does no more. Global (see event.h). */
__noinline int report_waiting(const struct conn *c, __u32 kind)
{
	struct scratch *w = scratch();
	struct {
		struct segment_report report;
		struct handover handover;
	} *r;

	if (!c || !w)
		return 0;
	r = bpf_ringbuf_reserve(&fleet_reports, sizeof(*r), 0);
	if (!r)
		return 0;
	r->report = (struct segment_report){
		.time_ns = bpf_ktime_get_boot_ns(),
		.client_port = c->key.port,
		.service = c->key.service,
		.length = kind == REPORT_KEPT ? sizeof(r->handover) : 0,
		.v6 = c->v6,
		.kind = kind,
	};
	__builtin_memcpy(r->report.client, c->key.addr, sizeof(r->report.client));
	__builtin_memcpy(&r->handover, &w->handover, sizeof(r->handover));
	bpf_ringbuf_submit(r, 0);
	return 0;
}

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
