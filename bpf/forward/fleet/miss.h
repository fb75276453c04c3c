/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A fleet's balancer gets segments of connections that it does not know: another one had them until now. It
 * never forwards those by prediction. The sidecar asks all broker hosts who has the connection, and puts the
 * answer in front of the segment (adopt.h).
 *
 *   not known      no flow, and neither SYN nor cookie; or the group is gone
 *   not the flow's data far from where the flow is: it ended elsewhere, and its port is used again
 *   came back      its broker host has no such connection
 *
 * Segments are dropped here: TCP repeats what nobody answers in time.
 */
#ifndef MQTT_FWD_FLEET_MISS_H
#define MQTT_FWD_FLEET_MISS_H

#include "../flow/delayed.h"
#include "../handshake/handovers.h"
#include "../handshake/untracked.h"
#include "../report.h"
#include "../services.h"

/* Without data, a connection is asked for once in this time. */
#define MISS_PAUSE_MS 1000

/* Whether a segment without SYN is of a connection that is not known here, though there may be a flow. */
static __always_inline bool is_missed(const struct conn *c, const struct service *svc,
				      const struct flow *f)
{
	bool delayed = svc->binding == BINDING_DELAYED;
	__u64 other;

	if (!f)
		return !delayed; /* else the handshake's stage knows more */
	if (c->returned || !group_of(flow_binding(f, c)))
		return true;
	if (delayed || !c->payload_length || !is_far(f, c))
		return false;
	other = flow_challenger(f);
	return !other || challenger_seq(other) != c->seq;
}

/* Whether a segment without data was not asked for just now. */
static __always_inline bool miss_again(const struct conn *c)
{
	__u64 *place = untracked_place(c), seen;

	if (!place)
		return false;
	seen = READ_ONCE(*place);
	if (seen >> 32 == c->tag && now_ms() - (__u32)seen < MISS_PAUSE_MS)
		return false;
	WRITE_ONCE(*place, tagged(c, now_ms()));
	return true;
}

/*
 * Whether a segment that is marked as one that came back belongs here, and the mark is the client's own number: one of
 * its packets in 65,536 has it. No broker has what only acknowledges the SYN-ACK, or the CONNACK, that a balancer sent.
 */
static __always_inline bool is_still_here(struct xdp_md *ctx, const struct conn *c)
{
	const struct handover *h = handover_find(c);

	if (h && h->state <= HANDOVER_SILENT && c->ack - h->server <= HANDOVER_CONNACK &&
	    c->seq - h->start <= h->connect_length)
		return true;
	read_options(ctx, c);
	return has_cookie(ctx, c);
}

SEC("xdp")
int mqtt_miss(struct xdp_md *ctx)
{
	const struct service_table *t = current_table();
	struct scratch *w = scratch();
	const struct service *svc = t && w ? service_at(t, w->tail_args.slot) : NULL;
	struct conn *c;

	if (!svc)
		return XDP_DROP;
	c = &w->tail_args.conn;
	if (c->returned) {
		if (svc->binding == BINDING_DELAYED && is_still_here(ctx, c)) {
			c->returned = false;
			bpf_tail_call(ctx, &stages, STAGE_HANDSHAKE);
			return XDP_DROP;
		}
		count(REASON_RETURNED);
	}
	if (((c->payload_length || c->flags & bpf_htons(TCP_FIN)) || miss_again(c)) &&
	    budget_take(&budgets, BUDGET_MISSES, misses_per_window) &&
	    report_segment(ctx, c, REPORT_MISSED))
		count(REASON_MISSED);
	else
		count(REASON_MISS_DROPPED);
	return XDP_DROP;
}

#endif /* MQTT_FWD_FLEET_MISS_H */
