/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * How segments leave whose broker may not have their connection yet. Any first segment at the client's
 * first byte makes it there, so what must not be lost is CONNECT: where it was answered here, it
 * is put in front of the segment that follows it, as often as that is sent. The rest is marked,
 * so that the broker's kernel does not answer RST if it overtakes the first, or that is lost.
 */
#ifndef MQTT_FWD_DELAYED_HANDOVER_H
#define MQTT_FWD_DELAYED_HANDOVER_H

#include "../end/truncate.h"
#include "../emit.h"
#include "../report.h"
#include "../services.h"
#include "handovers.h"

/* How often a segment has the sidecar repeat what is in front of it: TCP gives up after as many (tcp_retries2). */
#define HELLO_REPEATS 15

/* Without timestamps, a client that only sends never shows that its broker has the connection. */
#define UNCONFIRMED_MAX_S 60

#define HEADERS_MAX 128 /* Ethernet, IPv6 and TCP with options: 114, and a power of two for it */

/* Whether the client has seen something that only the broker can have sent. */
static __always_inline bool is_confirmed(const struct conn *c, const struct handover *h,
					 const struct scratch *w)
{
	__u32 acked = c->ack - h->server;
	__u32 ours = h->state == HANDOVER_REPEAT ? HANDOVER_CONNACK : 0;

	if (now_s() - h->born_s > UNCONFIRMED_MAX_S)
		return true;
	if (c->seq - h->start > FLOW_WINDOW || acked > FLOW_WINDOW)
		return false;
	if (acked > ours)
		return true;
	/* Every timestamp from here has the same lowest byte, also those of SYN-ACKs sent again. */
	return h->state == HANDOVER_REPEAT && h->timestamps && w->options.o.has_timestamps &&
	       seq_before(h->tsval, w->options.o.tsecr) && (h->tsval ^ w->options.o.tsecr) & 0xff;
}

/* Marks the packet for the broker host (abi/handover.h). */
static __always_inline bool set_mark(struct xdp_md *ctx, bool v6, __u32 mark)
{
	struct cursor cur = cursor_of(ctx);

	if (!parse_eth(&cur))
		return false;
	if (v6) {
		struct ipv6hdr *ip = parse_ipv6(&cur);
		if (!ip)
			return false;
		((__be16 *)ip)[1] = bpf_htons(mark);
		return true;
	}
	struct iphdr *ip = parse_ipv4(&cur);
	if (!ip)
		return false;
	/* Identification means nothing beside DF; decapsulated, it is not fragmented any more. */
	ip->check = csum_replace2(ip->check, ip->id, bpf_htons(mark));
	ip->id = bpf_htons(mark);
	ip->check = csum_replace2(ip->check, ip->frag_off, bpf_htons(IP_DF));
	ip->frag_off = bpf_htons(IP_DF);
	return true;
}

/*
 * Cuts off the end of a segment that is too long with CONNECT in front; TCP repeats what is missing.
 * Returns the sum of what was cut off, as part of the segment's payload.
 */
static __always_inline __u32 truncate_tail(struct xdp_md *ctx, struct conn *c, struct scratch *w,
					   __u32 excess)
{
	__u32 kept = c->payload_length - excess;
	__u32 sum = frame_sum(ctx, w, c->payload + kept, excess);

	if (bpf_xdp_adjust_tail(ctx, (int)(c->payload + kept) - (int)frame_length(ctx)))
		return ~0U;
	c->payload_length = kept;
	return kept & 1 ? csum_swap(sum) : sum;
}

/*
 * Puts the stored CONNECT, or what is stored of it (w->handover), in front of the segment's payload. The TCP checksum is derived
 * from the client's: bit errors stay visible to the broker's kernel. Global (see event.h).
 */
__noinline int put_connect_in_front(struct xdp_md *ctx, struct conn *c, __u32 max_packet)
{
	struct scratch *w = scratch();
	const struct handover *h;
	__u32 header, length, excess = 0, cut = 0, tcp_offset;
	__u64 sum, pseudo;

	if (!c || !w)
		return false;
	h = &w->handover;
	header = c->payload;
	length = h->connect_length;
	tcp_offset = tcp_offset_of(c->v6);
	if (length < 1 || length > HANDOVER_CONNECT_MAX || header > HEADERS_MAX ||
	    header <= tcp_offset)
		return false;

	__u32 was = c->payload_length;
	__u32 packet = header - sizeof(struct ethhdr) + was + length;
	if (packet > max_packet) {
		excess = packet - max_packet;
		if (excess >= was)
			return false;
		cut = truncate_tail(ctx, c, w, excess);
		if (cut == ~0U)
			return false;
	}

	__u16 mark = MARK | (h->state == HANDOVER_REPEAT ? MARK_HANDOVER : 0);

	__builtin_memset(w->segment, 0, HEADERS_MAX);
	if (!frame_copy(ctx, 0, w->segment, header, HEADERS_MAX))
		return false;
	if (c->v6) {
		struct ipv6hdr *ip = (void *)w->segment + sizeof(struct ethhdr);
		pseudo = sum_words((__be32 *)&ip->saddr, 8, 0);
		ip->payload_len = bpf_htons(header - tcp_offset + length + c->payload_length);
		((__be16 *)ip)[1] = bpf_htons(mark);
	} else {
		struct iphdr *ip = (void *)w->segment + sizeof(struct ethhdr);
		pseudo = (__u64)ip->saddr + ip->daddr;
		ip->tot_len =
			bpf_htons(header - sizeof(struct ethhdr) + length + c->payload_length);
		ip->id = bpf_htons(mark);
		ip->frag_off = bpf_htons(IP_DF);
		ip->check = 0;
		ip->check = ~csum_fold(sum_words((__be32 *)ip, 5, 0));
	}
	pseudo += bpf_htons(IPPROTO_TCP);

	/* Two places, not one that is computed: the verifier knows where each begins. */
	struct tcphdr *tcp =
		c->v6 ? (void *)w->segment + sizeof(struct ethhdr) + sizeof(struct ipv6hdr)
		      : (void *)w->segment + sizeof(struct ethhdr) + sizeof(struct iphdr);
	/* What the client's checksum says of its payload. */
	sum = sum_words((__be32 *)tcp, 15, pseudo + bpf_htons(header - tcp_offset + was));
	__u32 payload = (__u16)~csum_fold(sum);
	if (excess)
		payload = csum_fold((__u64)payload + (__u16)~cut);
	if (length & 1)
		payload = csum_swap(payload);

	tcp->seq = bpf_htonl(h->start);
	tcp->ack_seq = bpf_htonl(h->server);
	if (excess)
		tcp->fin = 0;
	tcp->check = 0;
	sum = sum_words((__be32 *)tcp, 15,
			pseudo + bpf_htons(header - tcp_offset + length + c->payload_length));
	tcp->check = ~csum_fold(sum + h->connect_sum + payload);

	if (bpf_xdp_adjust_head(ctx, -(int)length))
		return false;
	barrier_var(header);
	if (!header || header > HEADERS_MAX ||
	    bpf_xdp_store_bytes(ctx, 0, w->segment, ((header - 1) & (HEADERS_MAX - 1)) + 1))
		return false;
	barrier_var(length);
	if (bpf_xdp_store_bytes(ctx, header, w->handover.connect,
				((length - 1) & (CONNECT_BOUND - 1)) + 1))
		return false;
	c->payload_length += length;
	return true;
}

static __always_inline int handover(struct xdp_md *ctx, struct scratch *w)
{
	const struct service_table *t = current_table();
	const struct service *svc = t ? service_at(t, w->tail_args.slot) : NULL;
	const struct group *g = group_of(w->tail_args.binding);
	struct conn c = w->tail_args.conn;
	enum reason reason = c.payload_length ? REASON_DATA : REASON_NO_DATA;
	const struct tcphdr *tcp = tcp_of(ctx, c.v6);
	struct handover *h = handover_find(&c);
	bool fin;

	if (!svc || !g || !tcp)
		return pass_on(ctx, REASON_NO_GROUP_VIP);
	fin = tcp->fin;
	read_options(ctx, &c);
	if (!h || is_confirmed(&c, h, w)) {
		struct flow *f = flow_find(&c, t);
		if (f)
			f->flags &= ~FLOW_UNCONFIRMED;
		if (h) {
			handover_remove(&c);
			count(REASON_HANDOVER_CONFIRMED);
		}
		return to_group(ctx, g, svc, c.v6, reason);
	}
	/* Of HANDOVER_PASS, nothing is kept: its length is 0. */
	if (c.seq == h->start + h->connect_length && h->tries < 0xff)
		h->tries++;
	if ((h->state == HANDOVER_REPEAT || h->state == HANDOVER_PREPEND) &&
	    c.seq == h->start + h->connect_length && (c.payload_length || fin)) {
		w->handover = *h; /* its place may become another's */
		if (!put_connect_in_front(ctx, &c, svc->max_packet)) {
			count(REASON_HANDOVER_FAILED);
			return XDP_DROP;
		}
		count(REASON_HANDOVER);
		return to_group(ctx, g, svc, c.v6, reason);
	}
	if (h->state == HANDOVER_HELLO_REPEAT && c.seq == h->start + h->connect_length &&
	    (c.payload_length || fin)) {
		count(h->tries <= HELLO_REPEATS && report_segment(ctx, &c, REPORT_HELLO)
			      ? REASON_HELLO_HELD
			      : REASON_HANDOVER_FAILED);
		return XDP_DROP;
	}
	__u32 acked = c.ack - h->server;
	set_mark(ctx, c.v6, MARK | (acked <= MARK_ACK_MASK ? acked : 0));
	return to_group(ctx, g, svc, c.v6, reason);
}

SEC("xdp")
int mqtt_handover(struct xdp_md *ctx)
{
	struct scratch *w = scratch();

	return w ? handover(ctx, w) : XDP_DROP;
}

#endif /* MQTT_FWD_DELAYED_HANDOVER_H */
