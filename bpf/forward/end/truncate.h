/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Ending a flow whose PUBLISH belongs to another group: from that PUBLISH on, its broker gets
 * DISCONNECT and FIN in place of what the client sent. So the broker ends the session without
 * publishing its will (MQTT 3.1.1 §3.14) and closes, the client sees that and reconnects, and
 * whatever came before in the segment still arrives. One packet in, one packet out.
 *
 * Both have sequence numbers of their own, end_seq and up: a segment gets the part that it covers. A
 * client that writes a byte at a time has its first byte replaced by the first of DISCONNECT, its
 * second by the second, and its third by FIN. Inside a control packet there is FIN alone.
 *
 * Segments beyond that go on as they are: the broker's TCP has seen FIN, and gives its application none of it
 * (RFC 9293 §3.10.7.4). A repetition is truncated again at the same place.
 */
#ifndef MQTT_FWD_CUT_H
#define MQTT_FWD_CUT_H

#include "../../lib/csum.h"
#include "../../lib/parse.h"
#include "../../lib/tcp.h"
#include "../flow/flow.h"

#define MQTT_DISCONNECT_PACKET 0xe000 /* two bytes, network order: type, remaining length 0 */

/* The Internet checksum of a piece of the frame, as if it began at an even offset. */
static __always_inline __u16 frame_sum(struct xdp_md *ctx, struct scratch *w, __u32 offset,
				       __u32 length)
{
	__u32 padded = (length + 3) & ~3U;
	__s64 sum = 0;

	/* bpf_csum_diff takes whole words. */
	if (!length || length > SEGMENT_MAX)
		return 0;
	*(__u32 *)(w->segment + ((length - 1) & (SEGMENT_MAX - 4))) = 0;
	if (!frame_copy(ctx, offset, w->segment, length, SEGMENT_MAX))
		return 0;
	/* And 512 bytes at a time. */
	for (__u32 i = 0; i < SEGMENT_MAX; i += 512) {
		__u32 part = padded - i < 512 ? padded - i : 512;

		barrier_var(part);
		if (i >= padded || part > 512)
			break;
		sum = bpf_csum_diff(NULL, 0, (__be32 *)(w->segment + i), part, sum);
	}
	return csum_fold(sum & 0xffffffff);
}

/* Bytes of DISCONNECT that a flow's end has; FIN is behind them. */
static __always_inline __u32 goodbye_length(const struct flow *f)
{
	return f->flags & FLOW_END_INSIDE ? 0 : 2;
}

/*
 * Truncates the segment at f->end_seq if that, or what replaces the bytes from there on, lies in it. Global
 * (see event.h). The TCP checksum is updated, not recomputed: what was wrong with the segment stays visible to
 * the broker's kernel.
 */
__noinline int truncate_segment(struct xdp_md *ctx, struct conn *c, const struct flow *f)
{
	struct scratch *w = scratch();

	if (!c || !f || !w || !c->payload_length)
		return 0;

	__u32 goodbye = goodbye_length(f);
	__u32 kept = seq_before(c->seq, f->end_seq) ? f->end_seq - c->seq : 0;
	/* The position of the segment's first byte in what replaces the stream. */
	__u32 first = kept ? 0 : c->seq - f->end_seq;

	if (kept >= c->payload_length || first > goodbye)
		return 0;

	__u32 cut = c->payload + kept, removed = c->payload_length - kept;
	__u32 tcp_offset =
		sizeof(struct ethhdr) + (c->v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));
	__u32 added = goodbye - first < removed ? goodbye - first : removed;
	/*
	 * FIN takes a sequence number, too: an acknowledgement of more than was sent would be ignored. In place
	 * of a PINGREQ there is DISCONNECT alone, and the broker closes for that (MQTT 3.1.1 §3.14.4).
	 */
	bool fin = removed > added;
	__u32 was = frame_sum(ctx, w, cut, removed), is;
	struct cursor cur = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&cur);
	struct tcphdr *tcp;

	if (!eth)
		return 0;
	is = added && !first ? bpf_htons(MQTT_DISCONNECT_PACKET) : 0;
	if ((cut - tcp_offset) & 1) {
		was = csum_swap(was);
		is = csum_swap(is);
	}
	/* The pseudo header has the length of header and payload (RFC 9293 §3.1). */
	__u16 old_length = c->payload + c->payload_length - tcp_offset;
	__u16 new_length = old_length - removed + added;

	if (c->v6) {
		struct ipv6hdr *ip = parse_ipv6(&cur);
		if (!ip)
			return 0;
		ip->payload_len = bpf_htons(new_length);
		tcp = parse_tcp(&cur);
	} else {
		struct iphdr *ip = parse_ipv4(&cur);
		if (!ip)
			return 0;
		__be16 length = bpf_htons(new_length + sizeof(*ip));
		ip->check = csum_replace2(ip->check, ip->tot_len, length);
		ip->tot_len = length;
		tcp = parse_tcp(&cur);
	}
	if (!tcp)
		return 0;

	__u64 check = (__u16)~tcp->check;
	__be16 flags = ((__be16 *)tcp)[6];
	check += (__u16)~was + is;
	check += (__u16)~bpf_htons(old_length) + bpf_htons(new_length);
	if (fin)
		tcp->fin = 1;
	check += (__u16)~flags + ((__be16 *)tcp)[6];
	tcp->check = ~csum_fold(check);

	if (added) {
		__u8 *p = (__u8 *)frame_start(ctx) + (cut & 0x3fff);
		if ((void *)(p + 1) > frame_end(ctx))
			return 0;
		p[0] = first ? 0 : MQTT_DISCONNECT_PACKET >> 8;
		if (added > 1) {
			if ((void *)(p + 2) > frame_end(ctx))
				return 0;
			p[1] = 0;
		}
	}
	c->payload_length = kept + added;
	/* Frames may have padding behind the packet, which goes, too. */
	bpf_xdp_adjust_tail(ctx, (int)(cut + added) - (int)frame_length(ctx));
	return 0;
}

#endif /* MQTT_FWD_CUT_H */
