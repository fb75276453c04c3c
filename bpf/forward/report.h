/* SPDX-License-Identifier: GPL-2.0-only */
/* Segments that are left to the sidecar. */
#ifndef MQTT_FWD_REPORT_H
#define MQTT_FWD_REPORT_H

#include "../lib/mqtt.h"
#include "../lib/parse.h"
#include "../maps/counters.h"
#include "../maps/scratch.h"

/* What others had leaves a quarter of the ring to what this balancer alone can tell, of CONNECTs that it answers. */
static __always_inline bool reports_crowded(void)
{
	__u64 size = bpf_ringbuf_query(&fleet_reports, BPF_RB_RING_SIZE);

	return bpf_ringbuf_query(&fleet_reports, BPF_RB_AVAIL_DATA) > size / 4 * 3;
}

/* Hands the frame to the sidecar; false: there is no room. Global (see event.h). */
__noinline int report_segment(struct xdp_md *ctx, const struct conn *c, __u32 kind)
{
	struct scratch *w = scratch();
	__u32 length;
	long failed;

	if (!c || !w || (kind == REPORT_MISSED && reports_crowded()))
		return false;
	length = frame_length(ctx);
	barrier_var(length);
	if (length >= SEGMENT_MAX)
		return false;
	w->report = (struct segment_report){
		.time_ns = bpf_ktime_get_boot_ns(),
		.client_port = c->key.port,
		.service = c->key.service,
		.seq = c->seq,
		.ack = c->ack,
		.length = length,
		.v6 = c->v6,
		.kind = kind,
	};
	__builtin_memcpy(w->report.client, c->key.addr, sizeof(w->report.client));
	if (!frame_copy(ctx, 0, w->segment, length, SEGMENT_MAX))
		return false;
	barrier_var(length);
	length = sizeof(w->report) + (length & (SEGMENT_MAX - 1));
	if (kind == REPORT_HELLO)
		failed = bpf_ringbuf_output(&hellos, &w->report, length, 0);
	else
		failed = bpf_ringbuf_output(&fleet_reports, &w->report, length, 0);
	return !failed;
}

#endif /* MQTT_FWD_REPORT_H */
