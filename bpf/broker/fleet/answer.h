/* SPDX-License-Identifier: GPL-2.0-only */
/* Answers a balancer's question which of some connections this host has (abi/ask.h): in place, and sent back. */
#ifndef MQTT_FWD_FLEET_ANSWER_H
#define MQTT_FWD_FLEET_ANSWER_H

#include "../../lib/map.h"
#include "../../lib/siphash.h"
#include "connection.h"

MAP(ask_keys, BPF_MAP_TYPE_ARRAY, __u32, struct ask_keys, 1);

/* When a question came last, CLOCK_BOOTTIME in ns; 0: never. */
MAP(asked_at, BPF_MAP_TYPE_ARRAY, __u32, __u64, 1);

const volatile __u16 ask_port = 18830; /* host order */

/* One way through a packet's connections. */
struct ask_pass {
	struct xdp_md *ctx;
	struct siphash mac;
	struct ask head;
	__u32 offset; /* of the first connection */
	__u32 answers; /* else: only reads */
	__u32 failed;
};

static long ask_step(__u32 index, void *arg)
{
	struct ask_pass *p = arg;
	union {
		struct asked asked;
		__u64 word[sizeof(struct asked) / 8];
	} one;
	__u32 at = p->offset + index * sizeof(one);

	if (bpf_xdp_load_bytes(p->ctx, at, &one, sizeof(one))) {
		p->failed = true;
		return 1;
	}
	if (p->answers) {
		struct probe probe = {
			.v6 = p->head.v6,
			.seq = bpf_ntohl(one.asked.seq),
			.ack = bpf_ntohl(one.asked.ack),
		};

		if (probe.v6) {
			__builtin_memcpy(probe.tuple.ipv6.saddr, one.asked.client, 16);
			__builtin_memcpy(probe.tuple.ipv6.daddr, p->head.service, 16);
			probe.tuple.ipv6.sport = one.asked.client_port;
			probe.tuple.ipv6.dport = p->head.port;
		} else {
			probe.tuple.ipv4.saddr = one.asked.client[0];
			probe.tuple.ipv4.daddr = p->head.service[0];
			probe.tuple.ipv4.sport = one.asked.client_port;
			probe.tuple.ipv4.dport = p->head.port;
		}
		one.asked.state = find_connection(p->ctx, &probe);
		one.asked.expected = bpf_htonl(probe.expected);
		if (bpf_xdp_store_bytes(p->ctx, at, &one, sizeof(one))) {
			p->failed = true;
			return 1;
		}
	}
#pragma unroll
	for (__u32 i = 0; i < sizeof(one) / 8; i++)
		siphash24_word(&p->mac, load_le64(&one.word[i]));
	return 0;
}

/* The MAC of head and connections; 0: they are not all there. */
static __always_inline __u64 ask_mac(struct ask_pass *p, const __u64 key[2])
{
	siphash_init(&p->mac, key[0], key[1]);
#pragma unroll
	for (__u32 word = 0; word < __builtin_offsetof(struct ask, mac) / 8; word++)
		siphash24_word(&p->mac, load_le64((__u64 *)&p->head + word));
	p->failed = false;
	bpf_loop(p->head.count, ask_step, p, 0);
	if (p->failed)
		return 0;
	return siphash24_final(&p->mac, __builtin_offsetof(struct ask, mac) +
						p->head.count * sizeof(struct asked));
}

static __always_inline void send_back(struct ethhdr *eth)
{
	struct ethhdr was = *eth;

	__builtin_memcpy(eth->h_dest, was.h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, was.h_dest, ETH_ALEN);
}

/* Turns addresses and ports round. The sender wants no UDP checksum: there is a MAC. */
static __always_inline bool ask_turn(struct xdp_md *ctx, bool v6)
{
	struct cursor c = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&c);
	struct udphdr *udp;

	if (!eth)
		return false;
	if (v6) {
		struct ipv6hdr *ip = parse_ipv6(&c);
		struct in6_addr from;

		if (!ip)
			return false;
		from = ip->saddr;
		ip->saddr = ip->daddr;
		ip->daddr = from;
	} else {
		struct iphdr *ip = parse_ipv4(&c);
		__be32 from;

		if (!ip)
			return false;
		from = ip->saddr;
		ip->saddr = ip->daddr;
		ip->daddr = from;
	}
	udp = parse_udp(&c);
	if (!udp)
		return false;
	__be16 port = udp->source;
	udp->source = udp->dest;
	udp->dest = port;
	udp->check = 0;
	send_back(eth);
	return true;
}

enum ask_result { ASK_FOREIGN, ASK_DENIED, ASK_ANSWERED };

/* A packet to the port of questions. */
static __always_inline enum ask_result answer_question(struct xdp_md *ctx, bool v6)
{
	__u32 zero = 0, offset = sizeof(struct ethhdr) + sizeof(struct udphdr) +
				 (v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));
	const struct ask_keys *keys = bpf_map_lookup_elem(&ask_keys, &zero);
	struct ask_pass p = {.ctx = ctx, .offset = offset + sizeof(struct ask)};
	__u64 *at = bpf_map_lookup_elem(&asked_at, &zero), mac, key[2];

	if (!keys || !at || bpf_xdp_load_bytes(ctx, offset, &p.head, sizeof(p.head)) ||
	    p.head.magic != bpf_htonl(ASK_MAGIC) || p.head.version != ASK_VERSION ||
	    p.head.kind != ASK_QUESTION || p.head.count > ASK_CONNECTIONS)
		return ASK_FOREIGN;
	key[0] = p.head.epoch & 1 ? keys->key[1][0] : keys->key[0][0];
	key[1] = p.head.epoch & 1 ? keys->key[1][1] : keys->key[0][1];
	if (!(key[0] | key[1]))
		return ASK_DENIED;
	mac = ask_mac(&p, key);
	if (!mac || mac != load_le64(&p.head.mac))
		return ASK_DENIED;
	WRITE_ONCE(*at, bpf_ktime_get_boot_ns());
	p.head.kind = ASK_ANSWER;
	p.answers = true;
	mac = ask_mac(&p, key);
	p.head.mac = load_le64(&mac);
	if (!mac || bpf_xdp_store_bytes(ctx, offset, &p.head, sizeof(p.head)) || !ask_turn(ctx, v6))
		return ASK_DENIED;
	return ASK_ANSWERED;
}

#endif /* MQTT_FWD_FLEET_ANSWER_H */
