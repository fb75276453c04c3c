// SPDX-License-Identifier: GPL-2.0-only
/*
 * The embedded balancer: what is needed of an L4 balancer with direct server return to run
 * mqtt_fwd where no Katran is at hand. VIP by (address, port, protocol), connection table,
 * Maglev ring, IPIP or IP6IP6 towards the real. Not here: UDP, QUIC, GUE, source routing.
 *
 *   VIP? → (MQTT group: put the service's address back) → connection table → ring → encapsulate
 */
#include "../abi/balancer.h"
#include "../lib/csum.h"
#include "../lib/map.h"
#include "../lib/parse.h"
#include "../lib/predecessor.h"
#include "../lib/siphash.h"

#define DEFAULT_VIPS 64

MAP(vip_map, BPF_MAP_TYPE_HASH, struct vip_definition, struct vip_meta, DEFAULT_VIPS);
MAP(ch_rings, BPF_MAP_TYPE_ARRAY, __u32, __u32, DEFAULT_VIPS *RING_SIZE);
MAP(reals, BPF_MAP_TYPE_ARRAY, __u32, struct real_definition, REALS);
MAP(reals_stats, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct lb_stats, REALS);
MAP(vip_reals, BPF_MAP_TYPE_HASH, struct vip_real, __u32, 4096);
MAP(connections, BPF_MAP_TYPE_LRU_HASH, struct connection4, struct connection_real, 1 << 20);
MAP(connections6, BPF_MAP_TYPE_LRU_HASH, struct connection6, struct connection_real, 1 << 20);
MAP(ctl_array, BPF_MAP_TYPE_ARRAY, __u32, struct gateway, 1);
MAP(vip_stats, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct lb_stats, DEFAULT_VIPS);
MAP(balancer_stats, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct lb_stats, BALANCER_STATS);
MAP(vip_inner_dst, BPF_MAP_TYPE_HASH, struct vip_definition, struct vip_definition, MAX_GROUP_VIPS);
/* Packets of groups for which that had no service: dropped. Of the same name in katran-patches/. */
MAP(inner_dst_misses, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, __u64, 1);

struct exported_types {
	enum balancer_limits balancer_limits;
	enum balancer_stat balancer_stat;
};
EXPORT_TYPES(exported_types);

/* The ends of a connection, client first. */
struct connection {
	__be32 src[4]; /* IPv4 in src[0] */
	__be32 dst[4];
	__be16 sport;
	__be16 dport;
	__u32 proto;
};

/* What the balancer has to know of a packet. Of an ICMP error: of the packet it is about. */
struct packet {
	struct connection conn;
	struct vip_definition vip;
	__u32 length; /* IP */
	__u32 quoted; /* offset of the IP header that an ICMP error quotes; 0: no error */
	__u8 tos;
	bool v6;
	bool syn;
};

static __always_inline void stat_add(void *map, __u32 key, __u64 v1, __u64 v2)
{
	struct lb_stats *s = bpf_map_lookup_elem(map, &key);

	if (s) {
		s->v1 += v1;
		s->v2 += v2;
	}
}

static __always_inline bool parse_tcp_ports(struct cursor *c, struct packet *p)
{
	const struct tcphdr *tcp = parse_tcp(c);

	if (!tcp)
		return false;
	p->conn.sport = tcp->source;
	p->conn.dport = tcp->dest;
	p->syn = tcp->syn;
	return true;
}

/* The quoted packet went the other way, service to client: swap the ends. */
static __always_inline bool parse_quoted_ports(struct cursor *c, struct packet *p)
{
	const __be16 *ports = c->pos;

	if ((void *)(ports + 2) > c->end)
		return false;
	p->conn.sport = ports[1];
	p->conn.dport = ports[0];
	return true;
}

static __always_inline bool parse_packet4(struct cursor *c, struct packet *p)
{
	const struct iphdr *ip = parse_ipv4(c);

	if (!ip || ip->ihl != 5 || ip->frag_off & bpf_htons(IP_FRAGMENT_MASK))
		return false;
	p->length = bpf_ntohs(ip->tot_len);
	p->tos = ip->tos;
	p->conn.proto = IPPROTO_TCP;
	if (ip->protocol == IPPROTO_TCP) {
		p->conn.src[0] = ip->saddr;
		p->conn.dst[0] = ip->daddr;
		return parse_tcp_ports(c, p);
	}
	if (ip->protocol != IPPROTO_ICMP)
		return false;

	const struct icmphdr *icmp = parse_icmp(c);
	if (!icmp || icmp->type != ICMP_DEST_UNREACH)
		return false;
	const struct iphdr *quoted = parse_ipv4(c);
	if (!quoted || quoted->ihl != 5 || quoted->protocol != IPPROTO_TCP)
		return false;
	p->quoted = sizeof(struct ethhdr) + sizeof(*ip) + sizeof(*icmp);
	p->conn.src[0] = quoted->daddr;
	p->conn.dst[0] = quoted->saddr;
	return parse_quoted_ports(c, p);
}

static __always_inline bool parse_packet6(struct cursor *c, struct packet *p)
{
	const struct ipv6hdr *ip = parse_ipv6(c);

	if (!ip)
		return false;
	p->length = sizeof(*ip) + bpf_ntohs(ip->payload_len);
	p->tos = ip->priority << 4 | ip->flow_lbl[0] >> 4;
	p->conn.proto = IPPROTO_TCP;
	if (ip->nexthdr == IPPROTO_TCP) {
		copy_addr6(p->conn.src, &ip->saddr);
		copy_addr6(p->conn.dst, &ip->daddr);
		return parse_tcp_ports(c, p);
	}
	if (ip->nexthdr != IPPROTO_ICMPV6)
		return false;

	const struct icmp6hdr *icmp = parse_icmp6(c);
	if (!icmp ||
	    (icmp->icmp6_type != ICMPV6_PKT_TOOBIG && icmp->icmp6_type != ICMPV6_DEST_UNREACH))
		return false;
	const struct ipv6hdr *quoted = parse_ipv6(c);
	if (!quoted || quoted->nexthdr != IPPROTO_TCP)
		return false;
	p->quoted = sizeof(struct ethhdr) + sizeof(*ip) + sizeof(*icmp);
	copy_addr6(p->conn.src, &quoted->daddr);
	copy_addr6(p->conn.dst, &quoted->saddr);
	return parse_quoted_ports(c, p);
}

/*
 * The client spoke to the service, not to the group: so must the packet that the real gets,
 * and the packet that an ICMP error quotes. mqtt_fwd left the TCP and ICMP checksums as they
 * were, so they are right again now.
 */
static __always_inline bool restore_service(struct xdp_md *ctx, const struct packet *p)
{
	const struct vip_definition *service = bpf_map_lookup_elem(&vip_inner_dst, &p->vip);
	struct cursor c = cursor_of(ctx);

	if (!service) {
		__u32 zero = 0;
		__u64 *misses = bpf_map_lookup_elem(&inner_dst_misses, &zero);

		if (misses)
			*misses += 1;
		return false;
	}
	if (!parse_eth(&c))
		return false;
	if (p->v6) {
		struct ipv6hdr *ip = parse_ipv6(&c);
		if (!ip)
			return false;
		__builtin_memcpy(&ip->daddr, service->addr, sizeof(ip->daddr));
		if (p->quoted) {
			if (!parse_icmp6(&c))
				return false;
			ip = parse_ipv6(&c);
			if (!ip)
				return false;
			__builtin_memcpy(&ip->saddr, service->addr, sizeof(ip->saddr));
		}
	} else {
		struct iphdr *ip = parse_ipv4(&c);
		if (!ip)
			return false;
		ip->check = csum_replace4(ip->check, ip->daddr, service->addr[0]);
		ip->daddr = service->addr[0];
		if (p->quoted) {
			if (!parse_icmp(&c))
				return false;
			ip = parse_ipv4(&c);
			if (!ip)
				return false;
			ip->saddr = service->addr[0];
		}
	}
	return true;
}

static __always_inline __u64 connection_hash(const struct connection *c)
{
	const __u64 *words = (const __u64 *)c;
	struct siphash h;

	siphash_init(&h, 0, 0);
#pragma unroll
	for (int i = 0; i < (int)(sizeof(*c) / 8); i++)
		siphash_word(&h, words[i]);
	return siphash_final(&h, 0, sizeof(*c));
}

/* The real that a connection has already; 0: none, or one of another VIP that had this number. */
static __always_inline __u32 known_real(const struct packet *p, const struct vip_meta *vip)
{
	const struct connection_real *known;

	if (p->v6) {
		struct connection6 key = {.sport = p->conn.sport, .vip_num = vip->vip_num};
		__builtin_memcpy(key.src, p->conn.src, sizeof(key.src));
		known = bpf_map_lookup_elem(&connections6, &key);
	} else {
		struct connection4 key = {
			.src = p->conn.src[0], .sport = p->conn.sport, .vip_num = vip->vip_num};
		known = bpf_map_lookup_elem(&connections, &key);
	}
	return known && known->vip_epoch == vip->epoch ? known->real_num : NO_REAL;
}

static __always_inline void keep_real(const struct packet *p, const struct vip_meta *vip,
				      __u32 real_num)
{
	struct connection_real real = {.real_num = real_num, .vip_epoch = vip->epoch};

	if (p->v6) {
		struct connection6 key = {.sport = p->conn.sport, .vip_num = vip->vip_num};
		__builtin_memcpy(key.src, p->conn.src, sizeof(key.src));
		bpf_map_update_elem(&connections6, &key, &real, BPF_ANY);
	} else {
		struct connection4 key = {
			.src = p->conn.src[0], .sport = p->conn.sport, .vip_num = vip->vip_num};
		bpf_map_update_elem(&connections, &key, &real, BPF_ANY);
	}
}

/* The real of a connection that is not known, by the ring; 0: none. */
static __always_inline __u32 new_real(const struct packet *p, const struct vip_meta *vip)
{
	stat_add(&balancer_stats, STAT_LRU, 0, 1);
	stat_add(&balancer_stats, STAT_LRU_MISS, p->syn, !p->syn);

	__u32 slot = vip->vip_num * RING_SIZE + connection_hash(&p->conn) % RING_SIZE;
	const __u32 *real = bpf_map_lookup_elem(&ch_rings, &slot);
	if (!real || *real == NO_REAL)
		return NO_REAL;
	if (!p->quoted)
		keep_real(p, vip, *real);
	return *real;
}

/*
 * The outer source differs from connection to connection, so that receive queues of the real
 * and ECMP on the way can tell them apart; from the ranges that Katran takes, too.
 */
static __always_inline bool encap4(struct xdp_md *ctx, const struct packet *p,
				   const struct gateway *gw, __be32 dst)
{
	struct cursor c;

	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(struct iphdr)))
		return false;
	c = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&c);
	struct iphdr *ip = parse_ipv4(&c);
	const struct ethhdr *old = frame_start(ctx) + sizeof(*ip);
	if (!eth || !ip || (void *)(old + 1) > c.end)
		return false;

	__builtin_memcpy(eth->h_source, old->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, gw->mac, ETH_ALEN);
	eth->h_proto = bpf_htons(ETH_P_IP);
	*ip = (struct iphdr){
		.version = 4,
		.ihl = 5,
		.tos = p->tos,
		.tot_len = bpf_htons(p->length + sizeof(*ip)),
		.ttl = 64,
		.protocol = IPPROTO_IPIP,
		.saddr = bpf_htonl(0xac100000) | /* 172.16.0.0/16 */
			 (((__u32)p->conn.sport ^ p->conn.src[0]) & bpf_htonl(0xffff)),
		.daddr = dst,
	};
	ip->check = ~csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)ip, sizeof(*ip), 0));
	return true;
}

static __always_inline bool encap6(struct xdp_md *ctx, const struct packet *p,
				   const struct gateway *gw, const __be32 dst[4])
{
	struct cursor c;

	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(struct ipv6hdr)))
		return false;
	c = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&c);
	struct ipv6hdr *ip = parse_ipv6(&c);
	const struct ethhdr *old = frame_start(ctx) + sizeof(*ip);
	if (!eth || !ip || (void *)(old + 1) > c.end)
		return false;

	__builtin_memcpy(eth->h_source, old->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, gw->mac, ETH_ALEN);
	eth->h_proto = bpf_htons(ETH_P_IPV6);
	*ip = (struct ipv6hdr){
		.version = 6,
		.priority = p->tos >> 4,
		.flow_lbl[0] = p->tos << 4,
		.payload_len = bpf_htons(p->length),
		.nexthdr = p->v6 ? IPPROTO_IPV6 : IPPROTO_IPIP,
		.hop_limit = 64,
	};
	ip->saddr.s6_addr32[0] = bpf_htonl(0x01000000); /* 0100::/64 (RFC 6666) */
	ip->saddr.s6_addr32[3] = p->conn.sport ^ (p->v6 ? p->conn.src[3] : p->conn.src[0]);
	__builtin_memcpy(&ip->daddr, dst, sizeof(ip->daddr));
	return true;
}

SEC("xdp")
int balancer_ingress(struct xdp_md *ctx)
{
	struct cursor c = cursor_of(ctx);
	const struct ethhdr *eth = parse_eth(&c);
	struct packet p = {};
	__u32 zero = 0;

	if (!eth)
		return XDP_PASS;
	p.v6 = eth->h_proto == bpf_htons(ETH_P_IPV6);
	if (p.v6) {
		if (!parse_packet6(&c, &p))
			return XDP_PASS;
	} else if (eth->h_proto != bpf_htons(ETH_P_IP) || !parse_packet4(&c, &p)) {
		return XDP_PASS;
	}

	__builtin_memcpy(p.vip.addr, p.conn.dst, sizeof(p.vip.addr));
	p.vip.port = p.conn.dport;
	p.vip.proto = p.conn.proto;
	const struct vip_meta *vip = bpf_map_lookup_elem(&vip_map, &p.vip);
	if (!vip)
		return XDP_PASS;

	if (vip->flags & VIP_FLAG_BY_ADDRESS)
		p.conn.sport = 0;

	__u32 real_num = p.syn ? NO_REAL : known_real(&p, vip);
	stat_add(&balancer_stats, STAT_LRU, 1, 0);
	if (real_num == NO_REAL) {
		if (!p.syn && has_predecessor)
			bpf_tail_call(ctx, &predecessor, 0);
		real_num = new_real(&p, vip);
	}
	if (vip->flags & VIP_FLAG_INNER_DST && !restore_service(ctx, &p))
		return XDP_DROP;

	const struct real_definition *real = bpf_map_lookup_elem(&reals, &real_num);
	const struct gateway *gw = bpf_map_lookup_elem(&ctl_array, &zero);
	if (real_num == NO_REAL || !real || !gw)
		return XDP_DROP;

	stat_add(&vip_stats, vip->vip_num, 1, p.length);
	stat_add(&reals_stats, real_num, 1, p.length);
	if (real->v6 ? !encap6(ctx, &p, gw, real->addr) : !encap4(ctx, &p, gw, real->addr[0]))
		return XDP_DROP;
	return XDP_TX;
}

char _license[] SEC("license") = "GPL";
