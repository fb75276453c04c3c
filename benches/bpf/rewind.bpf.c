// SPDX-License-Identifier: GPL-2.0-only
/*
 * For benches/ only. BPF_PROG_TEST_RUN keeps the packet from run to run; this program, in the
 * free position 0 of the chain, makes it the next packet of a client: takes off what a balancer
 * put around it, puts the addresses back, and moves the sequence number on.
 *
 * Clients take turns in the order of a full-period generator, so that each is met once a round
 * and all have the same sequence number in a round, without a map that would warm the caches.
 */
#include "abi/config.h"
#include "lib/map.h"
#include "lib/parse.h"

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
	__uint(max_entries, ROOT_ARRAY_SIZE);
} root_array SEC(".maps");

const volatile __u32 clients = 1;
const volatile __u32 clients_mask; /* the next power of two, less one */
const volatile __u32 multiplier = 1664525; /* another one, another order */
const volatile __u32 seq_step; /* bytes of payload, or how far ISNs lie apart */
const volatile __u32 topic_offset; /* in the frame: a byte that changes each round; 0: none */
const volatile __u16 wrapped; /* bytes that a balancer put in front; 0: none */
const volatile __u32 burst; /* packets on the wire at once, at most */
const volatile __u32 wire; /* index of the interface that packets are put on */
const volatile __be32 dst[4];
const volatile __be32 src[4]; /* the last word counts clients */

__u32 client; /* state of the generator */
__u32 seq; /* host order */
__u32 rounds;
__u32 sent;
__u32 received;

static __always_inline bool next_packet(struct xdp_md *ctx)
{
	struct cursor c = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&c);
	if (!eth)
		return false;

	if (client == 0) {
		seq += seq_step;
		rounds++;
	}

	struct tcphdr *tcp;
	if (dst[3]) { /* IPv6 */
		eth->h_proto = bpf_htons(ETH_P_IPV6);
		struct ipv6hdr *ip = parse_ipv6(&c);
		if (!ip)
			return false;
		ip->daddr.s6_addr32[0] = dst[0];
		ip->daddr.s6_addr32[1] = dst[1];
		ip->daddr.s6_addr32[2] = dst[2];
		ip->daddr.s6_addr32[3] = dst[3];
		ip->saddr.s6_addr32[3] = src[3] ^ bpf_htonl(client);
		tcp = parse_tcp(&c);
	} else {
		eth->h_proto = bpf_htons(ETH_P_IP);
		struct iphdr *ip = parse_ipv4(&c);
		if (!ip)
			return false;
		ip->daddr = dst[0];
		ip->saddr = src[0] ^ bpf_htonl(client);
		tcp = parse_tcp(&c);
	}
	if (!tcp)
		return false;
	tcp->seq = bpf_htonl(seq);
	if (topic_offset) {
		__u8 *p = frame_start(ctx) + (topic_offset & 0xfff);
		if ((void *)(p + 1) > frame_end(ctx))
			return false;
		*p = 'a' + (rounds & 7);
	}
	/* Hull and Dobell: full period for a power of two, of which what is too much is left out. */
	__u32 next = client;
	for (int i = 0; i < 64; i++) {
		next = (next * multiplier + 1013904223) & clients_mask;
		if (next < clients)
			break;
	}
	client = next;
	return true;
}

SEC("xdp")
int rewind(struct xdp_md *ctx)
{
	if (wrapped && bpf_xdp_adjust_head(ctx, wrapped))
		return XDP_ABORTED;
	if (next_packet(ctx))
		bpf_tail_call(ctx, &root_array, POSITION_MQTT_FWD);
	return XDP_ABORTED;
}

/* Puts it on a wire instead, if there are fewer than a ring holds. */
SEC("xdp")
int send(struct xdp_md *ctx)
{
	if (sent - READ_ONCE(received) >= burst)
		return XDP_DROP;
	if (!next_packet(ctx))
		return XDP_ABORTED;
	sent++;
	return bpf_redirect(wire, 0);
}

/* The end of that wire, on one CPU. */
SEC("xdp")
int receive(struct xdp_md *ctx __attribute__((unused)))
{
	received++;
	return XDP_DROP;
}

/* Memory as large as the flows' is, and one access to it, where the one before says. */
struct place {
	__u32 next;
	__u8 rest[124];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct place);
	__uint(max_entries, 1);
} places SEC(".maps");

__u32 place;

SEC("xdp")
int access(struct xdp_md *ctx __attribute__((unused)))
{
	struct place *p = bpf_map_lookup_elem(&places, &place);

	if (!p)
		return XDP_ABORTED;
	place = p->next;
	return XDP_TX;
}

/* Stands for a balancer that only makes room. */
SEC("xdp")
int bare_wrap(struct xdp_md *ctx)
{
	return bpf_xdp_adjust_head(ctx, -(int)wrapped) ? XDP_ABORTED : XDP_TX;
}

char _license[] SEC("license") = "GPL";
