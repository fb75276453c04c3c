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
#include "cut.h"
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

static __always_inline int handle_segment(struct xdp_md *ctx, struct conn *c,
					  const struct service_table *t,
					  const struct service *svc, const struct tcphdr *tcp,
					  const bool v6)
{
	__be16 flags = ((__be16 *)tcp)[6];
	struct bound b = { .reason = c->payload_length ? REASON_DATA : REASON_NO_DATA };
	const struct group *g;

	if (is_bare(c, flags) && !looks_into_flows(tcp, c)) {
		g = group_of_slot(cache_find(c, t));
		if (g)
			return to_group(ctx, g, svc, v6, REASON_NO_DATA);
	}
	c->tag = conn_tag(&c->key);

	struct flow *f = flow_find(c);
	if (svc->binding == BINDING_DELAYED)
		bind_delayed(ctx, &b, c, t, svc, f, is_syn(flags));
	else
		bind_predicted(ctx, &b, c, t, svc, f, is_syn(flags), is_end(flags));
	g = group_of(b.binding);
	f = b.flow;
	if (f && f->flags & FLOW_RESCUED && !(flags & bpf_htons(TCP_SYN | TCP_RST)))
		hand_to(ctx, c, svc, b.binding, STEP_RESCUE);
	if (f && !is_syn(flags)) {
		if (c->payload_length) {
			frame(ctx, f, c, t, svc);
			if (f->flags & FLOW_RESCUED) {
				cache_correct(c, t, 0);
				if (!rescue_begin(ctx, c, f, flags & bpf_htons(TCP_FIN))) {
					count(REASON_RESCUED);
					return XDP_DROP;
				}
			}
			if (f->flags & FLOW_ENDED)
				cut_segment(ctx, c, f);
		} else if (is_bare(c, flags) && bypasses_flows(f, svc)) {
			cache_keep(c, t, b.binding);
		}
		if (f->flags & FLOW_UNCONFIRMED)
			b.reason |= UNCONFIRMED;
		/* Only with the number that is next: anybody can send one with another. */
		if (is_end(flags) && !(f->flags & FLOW_CLOSING) && c->seq + c->payload_length == f->end) {
			publish_teach_rest(c, f, t);
			count(REASON_FLOW_CLOSED);
			cache_correct(c, t, 0);
			if (f->flags & FLOW_WEAK)
				f->flags |= FLOW_CLOSING;
			else
				flow_move(c, f, true);
		} else if (f->flags & FLOW_WEAK && !(f->flags & (FLOW_UNSYNCED | FLOW_CLOSING))) {
			flow_move(c, f, false); /* last: the entry is another's from here on */
		}
	}
	if (!g)
		return pass_on(ctx, REASON_NO_GROUP_VIP);
	if (b.reason & UNCONFIRMED)
		hand_to(ctx, c, svc, b.binding, STEP_HANDOVER);
	return to_group(ctx, g, svc, v6, b.reason & ~UNCONFIRMED);
}

/* TCP header and payload of a packet whose IP header says that they end at `end` (offset). */
static __always_inline bool conn_of(struct conn *c, const struct tcphdr *tcp, __u32 tcp_offset,
				    __u32 end)
{
	__u32 header = tcp->doff * 4;

	if (header < sizeof(*tcp) || tcp_offset + header > end)
		return false;
	c->key.port = tcp->source;
	c->seq = bpf_ntohl(tcp->seq);
	c->ack = bpf_ntohl(tcp->ack_seq);
	c->payload = tcp_offset + header;
	c->payload_length = end - c->payload;
	return true;
}

static __always_inline int handle_ipv4(struct xdp_md *ctx, struct cursor *cur,
				       const struct service_table *t)
{
	struct iphdr *ip = parse_ipv4(cur);

	if (!ip)
		return pass_on(ctx, REASON_TRUNCATED);
	if (ip->protocol != IPPROTO_TCP) {
		if (ip->protocol == IPPROTO_ICMP && ip->ihl == 5 &&
		    !(ip->frag_off & bpf_htons(IP_FRAGMENT_MASK)))
			return handle_icmp4(ctx, cur, ip, t);
		return pass_on(ctx, REASON_NOT_SERVICE);
	}
	if (ip->frag_off & bpf_htons(IP_FRAGMENT_MASK))
		return pass_on(ctx, REASON_IP_FRAGMENT);
	if (ip->ihl != 5)
		return pass_on(ctx, REASON_IP_OPTIONS);

	struct tcphdr *tcp = parse_tcp(cur);
	if (!tcp)
		return pass_on(ctx, REASON_TRUNCATED);

	const struct service *svc = service_find4(t, ip->daddr, tcp->dest);
	if (!svc)
		return pass_on(ctx, REASON_NOT_SERVICE);

	__u32 length = bpf_ntohs(ip->tot_len);
	struct conn c = { .key.addr[0] = ip->saddr, .key.service = svc->id };
	if (sizeof(struct ethhdr) + length > ctx->data_end - ctx->data ||
	    !conn_of(&c, tcp, sizeof(struct ethhdr) + sizeof(*ip), sizeof(struct ethhdr) + length))
		return pass_on(ctx, REASON_TRUNCATED);

	if (length > svc->max_packet) {
		if (ip->frag_off & bpf_htons(IP_DF))
			return answer_too_big(ctx, svc->max_packet, false);
		count(REASON_TOO_BIG_NO_DF);
	}
	clear_mark4(ip);
	return handle_segment(ctx, &c, t, svc, tcp, false);
}

static __always_inline int handle_ipv6(struct xdp_md *ctx, struct cursor *cur,
				       const struct service_table *t)
{
	struct ipv6hdr *ip = parse_ipv6(cur);
	struct conn c = { .v6 = true };

	if (!ip)
		return pass_on(ctx, REASON_TRUNCATED);
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
		return pass_on(ctx, REASON_IPV6_EXTENSION);
	default:
		return pass_on(ctx, REASON_NOT_SERVICE);
	}

	struct tcphdr *tcp = parse_tcp(cur);
	if (!tcp)
		return pass_on(ctx, REASON_TRUNCATED);

	copy_addr6(c.key.addr, &ip->daddr);
	const struct service *svc = service_find6(t, c.key.addr, tcp->dest);
	if (!svc)
		return pass_on(ctx, REASON_NOT_SERVICE);

	__u32 length = sizeof(*ip) + bpf_ntohs(ip->payload_len);
	copy_addr6(c.key.addr, &ip->saddr);
	c.key.service = svc->id;
	if (sizeof(struct ethhdr) + length > ctx->data_end - ctx->data ||
	    !conn_of(&c, tcp, sizeof(struct ethhdr) + sizeof(*ip), sizeof(struct ethhdr) + length))
		return pass_on(ctx, REASON_TRUNCATED);

	if (length > svc->max_packet)
		return answer_too_big(ctx, svc->max_packet, true);
	clear_mark6(ip);
	return handle_segment(ctx, &c, t, svc, tcp, true);
}

SEC("xdp")
int mqtt_fwd(struct xdp_md *ctx)
{
	struct cursor c = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&c);
	const struct service_table *t = table_in_force();

	if (!eth || !t)
		return pass_on(ctx, REASON_TRUNCATED);
	if (eth->h_proto == bpf_htons(ETH_P_IP))
		return handle_ipv4(ctx, &c, t);
	if (eth->h_proto == bpf_htons(ETH_P_IPV6))
		return handle_ipv6(ctx, &c, t);
	return pass_on(ctx, REASON_NOT_IP);
}

char _license[] SEC("license") = "GPL";
