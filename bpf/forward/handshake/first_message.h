/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the control packets behind CONNECT ask for: the group of the first PUBLISH with a topic that
 * decides, or of the first filter of the first SUBSCRIBE.
 *
 * A filter without wildcards is a topic. Of one with wildcards, the levels before the first decide
 * if all topics that begin with them have one group; else it says nothing, for a subscriber to
 * several groups has no one broker that has it all. Where there is a relay, all subscribers are its.
 */
#ifndef MQTT_FWD_DELAYED_DECIDE_H
#define MQTT_FWD_DELAYED_DECIDE_H

#include "../../lib/mqtt.h"
#include "../mqtt/topic_group.h"
#include "../mqtt/connect.h"

/* Control packets that are looked at. */
#define FIRST_MESSAGE_PACKETS 8

struct first_message {
	struct xdp_md *ctx;
	struct scratch *w;
	const struct service_table *t;
	const struct service *svc;
};

struct wildcard_scan {
	struct xdp_md *ctx;
	__u32 offset;
	__u32 length; /* of the filter; then of what comes before the level with the wildcard */
	__u32 level; /* where the level in hand begins, from the filter's start */
};

static long wildcard_step(__u32 i, void *arg)
{
	struct wildcard_scan *s = arg;
	const __u8 *p = frame_at(s->ctx, s->offset + i, 1);

	if (!p)
		return 1;
	if (*p == '/')
		s->level = i + 1;
	if (*p != '+' && *p != '#')
		return 0;
	s->length = s->level;
	return 1;
}

/* The group of all topics that a filter can match; 0: there is no such. */
static __always_inline binding_t filter_binding(const struct first_message *d, __u32 offset,
						__u32 length)
{
	struct wildcard_scan scan = {.ctx = d->ctx, .offset = offset, .length = length};
	struct topic_stream *s = &d->w->stream;

	bpf_loop(length, wildcard_step, &scan, 0);
	topic_begin(s, d->t, d->svc);
	topic_feed(d->ctx, d->t, d->svc, offset, scan.length);
	if (scan.length == length)
		d->w->publish.hash = siphash_stream_final(&s->whole);
	if (scan.length == length && !(s->flags & ROUTE_FINAL))
		topic_end(d->t, d->svc);
	else if (scan.length != length && !(s->flags & ROUTE_FINAL))
		return 0;
	return stream_binding(d->w, d->svc);
}

/* Finds the place of a topic that lies in the segment (struct topic). Global (see event.h). */
__noinline int find_place(struct xdp_md *ctx, const struct service *svc, __u32 offset, __u32 length)
{
	struct scratch *w = scratch();

	if (w && svc && svc->has_members)
		w->publish.place = text_hash(ctx, 0, 0, offset,
					     length < TOPIC_TEXT_MAX ? length : TOPIC_TEXT_MAX);
	return 0;
}

/* One control packet at w->offset. Stops when something is decided, or nothing more can be read. */
static long first_message_step(__u32 index, void *arg)
{
	struct first_message *d = arg;
	struct scratch *w = d->w;
	struct header h;
	__u32 at = w->offset, length;
	__u64 hash;

	(void)index;
	if (at >= w->end || read_header(d->ctx, at, w->end, &h) != HEADER_WHOLE)
		return 1;
	w->offset = at + h.length + h.remaining;
	at += h.length;
	switch (h.type >> 4) {
	case MQTT_PUBLISH:
		length = h.topic;
		if (!length)
			return 0;
		if (at + length > w->end)
			return 1;
		find_place(d->ctx, d->svc, at, length);
		if (length <= TOPIC_TEXT_MAX) {
			hash = topic_hash(d->ctx, d->t, d->svc->id, at, length);
			if (!hash)
				return 1;
			w->publish.hash = hash;
			topic_judge(d->ctx, d->t, d->svc, w, at, length);
		} else {
			topic_begin(&w->stream, d->t, d->svc);
			topic_feed(d->ctx, d->t, d->svc, at, length);
			if (!(w->stream.flags & ROUTE_FINAL))
				topic_end(d->t, d->svc);
			w->publish.to = stream_binding(w, d->svc);
			w->publish.hash = siphash_stream_final(&w->stream.whole);
		}
		break;
	case MQTT_SUBSCRIBE:
		w->publish.to = relay_of(d->svc);
		if (w->publish.to)
			return 1;
		at += 2; /* packet identifier */
		if (w->connect.level == 5) {
			length = read_varint(d->ctx, &at, w->end);
			if (length > w->end)
				return 1;
			at += length;
		}
		length = read_length(d->ctx, &at, w->end);
		if (!length || length > TOPIC_TEXT_MAX || at + length > w->end)
			return 1;
		find_place(d->ctx, d->svc, at, length);
		w->publish.to = filter_binding(d, at, length);
		if (!w->publish.to)
			return 1;
		break;
	default:
		return 0;
	}
	if (binding_group(w->publish.to) != ANY_GROUP)
		return 1;
	w->publish.to = 0;
	return 0;
}

/* The binding that the segment from `offset` on asks for; 0: none. Global (see event.h). */
__noinline __u32 first_message_binding(struct xdp_md *ctx, const struct conn *c,
				       const struct service_table *t, const struct service *svc,
				       __u32 offset)
{
	struct scratch *w = scratch();
	struct first_message d = {.ctx = ctx, .w = w, .t = t, .svc = svc};

	if (!c || !t || !svc || !w)
		return 0;
	w->offset = offset;
	w->end = c->payload + c->payload_length;
	w->budget = TOPIC_BUDGET;
	w->publish.to = 0;
	w->publish.hash = 0;
	w->publish.place = 0;
	bpf_loop(FIRST_MESSAGE_PACKETS, first_message_step, &d, 0);
	return w->publish.to;
}

#endif /* MQTT_FWD_DELAYED_DECIDE_H */
