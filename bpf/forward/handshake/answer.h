/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Answers in the service's name, made of the segment that they answer. None is longer than that:
 * options are only offered to who offered them, and a CONNACK is shorter than any CONNECT.
 */
#ifndef MQTT_FWD_DELAYED_ANSWER_H
#define MQTT_FWD_DELAYED_ANSWER_H

#include "../../lib/clock.h"
#include "../../lib/csum.h"
#include "cookie_proof.h"

#define MQTT_CONNACK_ACCEPTED 0x20020000 /* MQTT 3.1.1 §3.2: no session present, accepted */

/*
 * As much as makes sure that a stored CONNECT and the segment after it fit one packet: senders cut
 * at half of the largest window they saw. A multiple of the window scale's unit, so that SYN-ACK,
 * which is not scaled, and CONNACK can offer the same; a window that shrinks costs a timeout.
 */
static __always_inline __u32 answer_window(const struct service *svc, bool v6)
{
	__u32 mss = svc->max_packet - (v6 ? 60 : 40);
	__u32 room = mss > 2 * HANDOVER_CONNECT_MAX ? mss - HANDOVER_CONNECT_MAX : mss / 2;

	return (2 * room) & ~((1U << HANDOVER_WSCALE) - 1);
}

/* Turns the packet into scratch.answer; false: the packet is spoilt. Global (see event.h). */
__noinline int answer(struct xdp_md *ctx, const struct conn *c)
{
	struct scratch *w = scratch();
	const struct answer *a;
	struct {
		struct tcphdr tcp;
		__be32 word[ANSWER_WORDS];
	} t = {};
	__u32 length, offset;
	__u64 sum;

	if (!c || !w)
		return false;
	a = &w->answer;
	if (a->words > ANSWER_WORDS)
		return false;
	length = sizeof(t.tcp) + 4 * a->words;
	offset = tcp_offset_of(c->v6);
	if (bpf_xdp_adjust_tail(ctx, (int)(offset + length) - (int)frame_length(ctx)))
		return false;
	/* What is cut off is zero, and so to the checksum as if it were not there. */
	length -= a->cut & 3;

	struct cursor cur = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&cur);
	if (!eth)
		return false;
	struct ethhdr was = *eth;
	__builtin_memcpy(eth->h_dest, was.h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, was.h_dest, ETH_ALEN);

	if (c->v6) {
		struct ipv6hdr *ip = parse_ipv6(&cur);
		struct in6_addr client;

		if (!ip)
			return false;
		client = ip->saddr;
		ip->saddr = ip->daddr;
		ip->daddr = client;
		*(__be32 *)ip = bpf_htonl(6U << 28);
		ip->payload_len = bpf_htons(length);
		ip->hop_limit = 64;
		sum = sum_words((__be32 *)&ip->saddr, 8, 0);
	} else {
		struct iphdr *ip = parse_ipv4(&cur);
		__be32 client;

		if (!ip)
			return false;
		client = ip->saddr;
		*ip = (struct iphdr){
			.version = 4,
			.ihl = 5,
			.tot_len = bpf_htons(sizeof(*ip) + length),
			.frag_off = bpf_htons(IP_DF),
			.ttl = 64,
			.protocol = IPPROTO_TCP,
			.saddr = ip->daddr,
			.daddr = client,
		};
		ip->check = ~csum_fold(sum_words((__be32 *)ip, 5, 0));
		sum = (__u64)ip->saddr + ip->daddr;
	}

	struct tcphdr *tcp = parse_tcp(&cur);
	if (!tcp)
		return false;
	t.tcp.source = tcp->dest;
	t.tcp.dest = tcp->source;
	t.tcp.seq = bpf_htonl(a->seq);
	t.tcp.ack_seq = bpf_htonl(a->ack);
	((__be16 *)&t.tcp)[6] = bpf_htons((5 + a->options) << 12 | a->flags);
	t.tcp.window = bpf_htons(a->window);
	__builtin_memcpy(t.word, a->word, sizeof(t.word));
	sum += bpf_htons(IPPROTO_TCP) + (__u64)bpf_htons(length);
	t.tcp.check = ~csum_fold(sum_words((__be32 *)&t, sizeof(t) / 4, sum));
	*tcp = t.tcp;

	__be32 *to = (void *)(tcp + 1);
#pragma unroll
	for (__u32 i = 0; i < ANSWER_WORDS; i++) {
		if (i >= a->words || (void *)(to + i + 1) > cur.end)
			break;
		to[i] = t.word[i];
	}
	return !(a->cut & 3) || !bpf_xdp_adjust_tail(ctx, -(int)(a->cut & 3));
}

/* A timestamp that carries a byte of its own (lib/cookie.h), and is no earlier than `after`. */
static __always_inline __u32 timestamp(__u32 byte, __u32 after)
{
	__u32 now = (now_ms() & ~0xffU) | (byte & 0xff);

	return seq_before(now, after) ? after : now;
}

static __always_inline __be32 option(__u8 a, __u8 b, __u8 c, __u8 d)
{
	return bpf_htonl((__u32)a << 24 | b << 16 | c << 8 | d);
}

static __always_inline struct answer *answer_begin(struct scratch *w, __u8 flags)
{
	w->answer = (struct answer){.flags = flags};
	return &w->answer;
}

static __always_inline void answer_word(struct answer *a, __be32 word)
{
	a->word[a->words & (ANSWER_WORDS - 1)] = word;
	a->words++;
}

/*
 * The cookie for a SYN, with these options in it (lib/cookie.h), and the byte for its timestamp << 32; 0: there is
 * no key. Global (see event.h).
 */
__noinline __u64 cookie_for(struct xdp_md *ctx, const struct conn *c, __u32 options)
{
	const struct handover_keys *keys = current_keys();
	struct scratch *w = scratch();
	struct cookie_tuple t;
	__u32 hash;

	if (!c || !keys || !w || !tuple_of(ctx, c->v6, &t))
		return 0;
	options |= keys->epoch & 1 ? COOKIE_EPOCH : 0;
	if (!cookie_has_key(keys, options))
		return 0;
	hash = cookie_hash(keys, &t, c->seq, options, w->options.o.has_timestamps, cookie_period(),
			   c->v6);
	return cookie_make(hash, options) | (__u64)(hash & 0xff) << 32;
}

/* The SYN-ACK for a SYN whose options are in scratch.options; false: it cannot be answered. */
__noinline int answer_syn(struct xdp_md *ctx, const struct conn *c, const struct service *svc)
{
	struct scratch *w = scratch();
	struct answer *a;
	struct tcp_options o;
	__u64 cookie;

	if (!c || !svc || !w)
		return false;
	o = w->options.o;
	a = answer_begin(w, TCP_SYN | TCP_ACK);
	cookie = cookie_for(ctx, c,
			    cookie_mss_index(o.mss ? o.mss : 536, c->v6) << COOKIE_MSS_SHIFT |
				    (o.has_wscale ? o.wscale & COOKIE_WSCALE_MASK
						  : COOKIE_NO_WSCALE) |
				    (o.sack ? COOKIE_SACK : 0));
	if (!cookie)
		return false;
	a->seq = cookie;
	a->ack = c->seq + 1;
	a->window = answer_window(svc, c->v6);

	__be32 mss =
		bpf_htonl(TCP_OPTION_MSS << 24 | 4 << 16 | (svc->max_packet - (c->v6 ? 60 : 40)));
	__be32 first = o.sack ? option(TCP_OPTION_SACK, 2, TCP_OPTION_TIMESTAMPS, 10)
			      : option(TCP_OPTION_NOP, TCP_OPTION_NOP, TCP_OPTION_TIMESTAMPS, 10);
	__be32 sack = option(TCP_OPTION_NOP, TCP_OPTION_NOP, TCP_OPTION_SACK, 2);
	__be32 wscale = option(TCP_OPTION_NOP, TCP_OPTION_WSCALE, 3, HANDOVER_WSCALE);

	if (o.mss)
		answer_word(a, mss);
	if (o.has_timestamps) {
		answer_word(a, first);
		answer_word(a, bpf_htonl(timestamp(cookie >> 32, 0)));
		answer_word(a, bpf_htonl(o.tsval));
	} else if (o.sack) {
		answer_word(a, sack);
	}
	if (o.has_wscale)
		answer_word(a, wscale);
	a->options = a->words;
	return answer(ctx, c);
}

/* CONNACK, or only that CONNECT, or what there is of it, has arrived. Remembers the connection's timestamps. */
__noinline int answer_connect(struct xdp_md *ctx, const struct conn *c, const struct service *svc,
			      struct handover *h, __u32 connack)
{
	struct scratch *w = scratch();
	struct answer *a;
	__u32 window;

	if (!c || !svc || !h || !w)
		return false;
	a = answer_begin(w, connack ? TCP_ACK | TCP_PSH : TCP_ACK);
	a->seq = h->server + (connack || h->state > HANDOVER_REPEAT ? 0 : HANDOVER_CONNACK);
	a->ack = h->start + h->connect_length;
	window = answer_window(svc, c->v6);
	if (((h->server - 1) & COOKIE_WSCALE_MASK) != COOKIE_NO_WSCALE)
		window >>= HANDOVER_WSCALE;
	a->window = window;
	if (w->options.o.has_timestamps) {
		h->tsval = timestamp(w->options.o.tsecr, seq_before(h->tsval, w->options.o.tsecr)
								 ? w->options.o.tsecr
								 : h->tsval);
		h->client_tsval = w->options.o.tsval;
		h->timestamps = true;
		answer_word(a, option(TCP_OPTION_NOP, TCP_OPTION_NOP, TCP_OPTION_TIMESTAMPS, 10));
		answer_word(a, bpf_htonl(h->tsval));
		answer_word(a, bpf_htonl(h->client_tsval));
	}
	a->options = a->words;
	if (connack)
		answer_word(a, bpf_htonl(MQTT_CONNACK_ACCEPTED));
	return answer(ctx, c);
}

/* TLS' fatal alert unrecognized_name (RFC 6066 §3, RFC 8446 §6.2), and the end. */
__noinline int answer_alert(struct xdp_md *ctx, const struct conn *c)
{
	struct scratch *w = scratch();
	struct answer *a;

	if (!c || !w)
		return false;
	a = answer_begin(w, TCP_ACK | TCP_PSH | TCP_FIN);
	a->seq = c->ack;
	a->ack = c->seq + c->payload_length;
	a->window = 0xffff;
	if (w->options.o.has_timestamps) {
		answer_word(a, option(TCP_OPTION_NOP, TCP_OPTION_NOP, TCP_OPTION_TIMESTAMPS, 10));
		answer_word(a, bpf_htonl(timestamp(w->options.o.tsecr, w->options.o.tsecr)));
		answer_word(a, bpf_htonl(w->options.o.tsval));
	}
	a->options = a->words;
	/* Record: alert, TLS 1.2 as in all records since, two bytes. */
	answer_word(a, bpf_htonl(0x15030300));
	answer_word(a, bpf_htonl(0x02027000));
	a->cut = 1;
	return answer(ctx, c);
}

/* To who cannot be served: end it (RFC 9293 §3.5.2, group 1 and 2). */
__noinline int answer_reset(struct xdp_md *ctx, const struct conn *c, __u32 fin)
{
	struct scratch *w = scratch();
	struct answer *a;

	if (!c || !w)
		return false;
	a = answer_begin(w, TCP_RST | TCP_ACK);
	a->seq = c->ack;
	a->ack = c->seq + c->payload_length + (fin ? 1 : 0);
	return answer(ctx, c);
}

#endif /* MQTT_FWD_DELAYED_ANSWER_H */
