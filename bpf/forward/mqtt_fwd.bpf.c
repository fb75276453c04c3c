// SPDX-License-Identifier: GPL-2.0-only
/*
 * mqtt_fwd: the group of an MQTT flow, in front of the balancer. One packet is
 *
 *   classify   Ethernet → IP → TCP → is it for a service?      services.h, too_big.h, icmp_error.h
 *   bind       its flow, and the group that is bound to        bind/, flow.h, cache.h, delayed/
 *   frame      the MQTT control packets that it shows          framing.h, framing/, resync.h, connect.h,
 *                                                              publish.h, route.h, learn.h
 *   forward    dst: service → group VIP, on to the balancer    cut.h, rescue.h, emit.h
 *
 * and ends in one of the functions of emit.h and too_big.h, with exactly one verdict.
 */
#include "bind/delayed.h"
#include "bind/predicted.h"
#include "delayed/greet.h"
#include "delayed/handover.h"
#include "emit.h"
#include "framing.h"
#include "icmp_error.h"
#include "rescued.h"
#include "services.h"
#include "too_big.h"

struct exported_types {
	struct event event;
	enum limits limits;
	enum budget_kind budget_kind;
	enum affinity affinity;
	enum binding_mode binding_mode;
	enum client_flags client_flags;
	enum client_route_kind client_route_kind;
	enum event_kind event_kind;
	enum flow_connect flow_connect;
	enum flow_flags flow_flags;
	enum handover_limits handover_limits;
	enum handover_state handover_state;
	enum misprediction_policy misprediction_policy;
	enum parser parser;
	enum reason reason;
	enum rescue_flags rescue_flags;
	struct rescue rescue;
	struct rescuer rescuer;
	enum route_state_flags route_state_flags;
	enum tracked_map tracked_map;
	enum way way;
	enum why why;
};
EXPORT_TYPES(exported_types);

/*
 * One segment without data in 64, as good as at random, looks into `flows` all the same: a flow
 * that only acknowledges, a subscriber's, would be the first to be evicted there otherwise.
 */
#define TOUCH_BITS 6

static __always_inline bool looks_into_flows(const struct tcphdr *tcp, const struct conn *c)
{
	return !(((tcp->check ^ c->ack) * 0x9e3779b1U) >> (32 - TOUCH_BITS));
}

/* Whether the flow's segments without data need not look at it. */
static __always_inline bool bypasses_flows(const struct flow *f, const struct service *svc)
{
	if (f->flags & (FLOW_CLOSING | FLOW_UNCONFIRMED | FLOW_RESCUED))
		return false;
	return svc->binding == BINDING_DELAYED ? !(f->flags & FLOW_RIVAL_SYN) : !f->own;
}

/* With a packet's verdict, as a word of its own would be one too many on the stack. */
#define UNCONFIRMED (1U << 31)

/* What a segment's flags make of it: asked when it is needed, so that one word is kept, not three. */
static __always_inline bool is_syn(__be16 flags)
{
	return flags & bpf_htons(TCP_SYN);
}

static __always_inline bool is_end(__be16 flags)
{
	return flags & bpf_htons(TCP_FIN | TCP_RST);
}

static __always_inline bool is_bare(const struct conn *c, __be16 flags)
{
	return !c->payload_length && !(flags & bpf_htons(TCP_SYN | TCP_FIN | TCP_RST));
}

/* A segment with a flow's last bytes, FIN or RST behind them: the flow closes. */
static __always_inline void close_flow(const struct conn *c, struct flow *f,
				       const struct service_table *t)
{
	publish_teach_rest(c, f, t);
	count(REASON_FLOW_CLOSED);
	cache_correct(c, t, 0);
	if (f->flags & FLOW_WEAK)
		f->flags |= FLOW_CLOSING;
	else
		flow_move(c, f, true);
}

/*
 * Binds a segment, frames it, and keeps its flow. Returns its group; NULL: there is none. What it counts
 * as is in b; REASON_RESCUED: it was to go to the sidecar, but its checksum is wrong. It is dropped,
 * and TCP repeats it.
 */
static __always_inline const struct group *follow(struct xdp_md *ctx, struct bound *b, struct conn *c,
						  const struct service_table *t,
						  const struct service *svc, __be16 flags)
{
	const struct group *g;
	struct flow *f;

	c->tag = conn_tag(&c->key);
	f = flow_find(c);
	if (svc->binding == BINDING_DELAYED)
		bind_delayed(ctx, b, c, t, svc, f, is_syn(flags));
	else
		bind_predicted(ctx, b, c, t, svc, f, is_syn(flags), is_end(flags));
	g = group_of(b->binding);
	f = b->flow;
	if (!f || is_syn(flags))
		return g;
	if (f->flags & FLOW_RESCUED && !(flags & bpf_htons(TCP_RST)))
		hand_to(ctx, c, svc, b->binding, STEP_RESCUE);
	if (c->payload_length) {
		frame(ctx, f, c, t, svc);
		if (f->flags & (FLOW_RESCUED | FLOW_ENDED) &&
		    !end_segment(ctx, c, f, t, flags & bpf_htons(TCP_FIN))) {
			b->reason = REASON_RESCUED;
			return g;
		}
	} else if (is_bare(c, flags) && bypasses_flows(f, svc)) {
		cache_keep(c, t, b->binding);
	}
	if (f->flags & FLOW_UNCONFIRMED)
		b->reason |= UNCONFIRMED;
	/* Only with the number that is next: anybody can send one with another. */
	if (is_end(flags) && !(f->flags & FLOW_CLOSING) && c->seq + c->payload_length == f->end)
		close_flow(c, f, t);
	else if (f->flags & FLOW_WEAK && !(f->flags & (FLOW_UNSYNCED | FLOW_CLOSING)))
		flow_move(c, f, false); /* last: the entry is another's from here on */
	return g;
}

static __always_inline int handle_segment(struct xdp_md *ctx, struct conn *c,
					  const struct service_table *t,
					  const struct service *svc, const struct tcphdr *tcp)
{
	__be16 flags = ((__be16 *)tcp)[6];
	struct bound b = { .reason = c->payload_length ? REASON_DATA : REASON_NO_DATA };
	const struct group *g = NULL;

	if (is_bare(c, flags) && !looks_into_flows(tcp, c))
		g = group_of_slot(cache_find(c, t));
	if (!g)
		g = follow(ctx, &b, c, t, svc, flags);
	if (b.reason == REASON_RESCUED) {
		count(REASON_RESCUED);
		return XDP_DROP;
	}
	if (!g)
		return unchanged(REASON_NO_GROUP_VIP);
	if (b.reason & UNCONFIRMED)
		hand_to(ctx, c, svc, b.binding, STEP_HANDOVER);
	return to_group(ctx, g, svc, c->v6, b.reason & ~UNCONFIRMED);
}

/* What a segment is for, and its header. */
struct addressed {
	const struct service *svc;
	const struct tcphdr *tcp;
};

/* TCP header and payload of a packet whose IP header says that they end at `end` (offset). */
static __always_inline bool conn_of(struct conn *c, const struct addressed *s, __u32 tcp_offset,
				    __u32 end)
{
	const struct tcphdr *tcp = s->tcp;
	__u32 header = tcp->doff * 4;

	if (header < sizeof(*tcp) || tcp_offset + header > end)
		return false;
	c->key.port = tcp->source;
	c->key.service = s->svc->id;
	c->seq = bpf_ntohl(tcp->seq);
	c->ack = bpf_ntohl(tcp->ack_seq);
	c->payload = tcp_offset + header;
	c->payload_length = end - c->payload;
	return true;
}

/* What classify4() and classify6() return of a segment for a service; else a verdict. */
#define IS_SEGMENT XDP_ABORTED

static __always_inline int classify4(struct xdp_md *ctx, struct cursor *cur,
				     const struct service_table *t, struct conn *c,
				     struct addressed *s)
{
	struct iphdr *ip = parse_ipv4(cur);

	if (!ip)
		return unchanged(REASON_TRUNCATED);
	if (ip->protocol != IPPROTO_TCP) {
		if (ip->protocol == IPPROTO_ICMP && ip->ihl == 5 &&
		    !(ip->frag_off & bpf_htons(IP_FRAGMENT_MASK)))
			return handle_icmp4(ctx, cur, ip, t);
		return unchanged(REASON_NOT_SERVICE);
	}
	if (ip->frag_off & bpf_htons(IP_FRAGMENT_MASK))
		return unchanged(REASON_IP_FRAGMENT);
	if (ip->ihl != 5)
		return unchanged(REASON_IP_OPTIONS);

	s->tcp = parse_tcp(cur);
	if (!s->tcp)
		return unchanged(REASON_TRUNCATED);
	s->svc = service_find4(t, ip->daddr, s->tcp->dest);
	if (!s->svc)
		return unchanged(REASON_NOT_SERVICE);

	__u32 length = bpf_ntohs(ip->tot_len);
	c->key.addr[0] = ip->saddr;
	if (sizeof(struct ethhdr) + length > ctx->data_end - ctx->data ||
	    !conn_of(c, s, sizeof(struct ethhdr) + sizeof(*ip), sizeof(struct ethhdr) + length))
		return unchanged(REASON_TRUNCATED);

	if (length > s->svc->max_packet) {
		if (ip->frag_off & bpf_htons(IP_DF))
			return answer_too_big(ctx, s->svc->max_packet, false);
		count(REASON_TOO_BIG_NO_DF);
	}
	clear_mark4(ip);
	return IS_SEGMENT;
}

static __always_inline int classify6(struct xdp_md *ctx, struct cursor *cur,
				     const struct service_table *t, struct conn *c,
				     struct addressed *s)
{
	struct ipv6hdr *ip = parse_ipv6(cur);

	if (!ip)
		return unchanged(REASON_TRUNCATED);
	switch (ip->nexthdr) {
	case IPPROTO_TCP:
		break;
	case IPPROTO_ICMPV6:
		return handle_icmp6(ctx, cur, ip, t);
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_FRAGMENT:
	case IPPROTO_AH:
	case IPPROTO_DSTOPTS:
		return unchanged(REASON_IPV6_EXTENSION);
	default:
		return unchanged(REASON_NOT_SERVICE);
	}

	s->tcp = parse_tcp(cur);
	if (!s->tcp)
		return unchanged(REASON_TRUNCATED);
	copy_addr6(c->key.addr, &ip->daddr);
	s->svc = service_find6(t, c->key.addr, s->tcp->dest);
	if (!s->svc)
		return unchanged(REASON_NOT_SERVICE);

	__u32 length = sizeof(*ip) + bpf_ntohs(ip->payload_len);
	copy_addr6(c->key.addr, &ip->saddr);
	c->v6 = true;
	if (sizeof(struct ethhdr) + length > ctx->data_end - ctx->data ||
	    !conn_of(c, s, sizeof(struct ethhdr) + sizeof(*ip), sizeof(struct ethhdr) + length))
		return unchanged(REASON_TRUNCATED);

	if (length > s->svc->max_packet)
		return answer_too_big(ctx, s->svc->max_packet, true);
	clear_mark6(ip);
	return IS_SEGMENT;
}

static __always_inline int verdict_of(struct xdp_md *ctx)
{
	struct cursor cur = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&cur);
	const struct service_table *t = table_in_force();
	struct addressed s = {};
	struct conn c = {};
	int verdict;

	if (!eth || !t)
		return unchanged(REASON_TRUNCATED);
	if (eth->h_proto == bpf_htons(ETH_P_IP))
		verdict = classify4(ctx, &cur, t, &c, &s);
	else if (eth->h_proto == bpf_htons(ETH_P_IPV6))
		verdict = classify6(ctx, &cur, t, &c, &s);
	else
		return unchanged(REASON_NOT_IP);
	return verdict == IS_SEGMENT ? handle_segment(ctx, &c, t, s.svc, s.tcp) : verdict;
}

SEC("xdp")
int mqtt_fwd(struct xdp_md *ctx)
{
	int verdict = verdict_of(ctx);

	return is_unchanged(verdict) ? pass_on(ctx, unchanged_because(verdict)) : verdict;
}

char _license[] SEC("license") = "GPL";
