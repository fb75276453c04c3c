/* SPDX-License-Identifier: GPL-2.0-only */
/* What is read of a segment beyond struct conn: addresses, header, options, checksum. */
#ifndef MQTT_FWD_SEGMENT_H
#define MQTT_FWD_SEGMENT_H

#include "../lib/cookie.h"
#include "../lib/csum.h"
#include "../lib/parse.h"
#include "../maps/programs.h"
#include "../maps/config.h"
#include "../maps/state.h"
#include "../maps/counters.h"
#include "../maps/scratch.h"

static __always_inline __u32 tcp_offset_of(bool v6)
{
	return sizeof(struct ethhdr) + (v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));
}

static __always_inline struct tcphdr *tcp_of(struct xdp_md *ctx, bool v6)
{
	struct tcphdr *tcp = frame_start(ctx) + tcp_offset_of(v6);

	return (void *)(tcp + 1) <= frame_end(ctx) ? tcp : NULL;
}

static __always_inline bool tuple_of(struct xdp_md *ctx, bool v6, struct cookie_tuple *t)
{
	struct cursor cur = cursor_of(ctx);
	struct tcphdr *tcp;

	*t = (struct cookie_tuple){};
	if (!parse_eth(&cur))
		return false;
	if (v6) {
		struct ipv6hdr *ip = parse_ipv6(&cur);
		if (!ip)
			return false;
		copy_addr6(t->src, &ip->saddr);
		copy_addr6(t->dst, &ip->daddr);
	} else {
		struct iphdr *ip = parse_ipv4(&cur);
		if (!ip)
			return false;
		t->src[0] = ip->saddr;
		t->dst[0] = ip->daddr;
	}
	tcp = parse_tcp(&cur);
	if (!tcp)
		return false;
	t->sport = tcp->source;
	t->dport = tcp->dest;
	return true;
}

/* Reads the segment's options to scratch.options. Global (see event.h). */
__noinline int read_options(struct xdp_md *ctx, const struct conn *c)
{
	struct scratch *w = scratch();
	__u32 start, length;

	if (!w || !c)
		return 0;
	start = tcp_offset_of(c->v6) + sizeof(struct tcphdr);
	length = c->payload - start;
	if (length > TCP_OPTIONS_MAX)
		length = 0;
	w->options.length = length;
	if (length)
		frame_copy(ctx, start, w->options.bytes, length, 64);
	tcp_options_scan(&w->options);
	return 0;
}

/* Whether the segment's TCP checksum is that of its header and a payload with this sum. Global. */
__noinline int checksum_right(struct xdp_md *ctx, const struct conn *c, __u32 payload)
{
	__be32 header[15] = {};
	__u32 offset, length;
	struct cookie_tuple t;
	__u64 sum;

	if (!c)
		return false;
	offset = tcp_offset_of(c->v6);
	length = c->payload - offset;
	barrier_var(length);
	if (length < sizeof(struct tcphdr) || length > sizeof(header) ||
	    !tuple_of(ctx, c->v6, &t) || bpf_xdp_load_bytes(ctx, offset, header, length))
		return false;
	sum = sum_words(t.src, 4, sum_words(t.dst, 4, payload));
	sum += bpf_htons(IPPROTO_TCP) + (__u64)bpf_htons(length + c->payload_length);
	return csum_fold(sum_words(header, 15, sum)) == 0xffff;
}

#endif /* MQTT_FWD_SEGMENT_H */
