// SPDX-License-Identifier: GPL-2.0-only
/*
 * mqtt_fwd: the group of an MQTT flow, in front of the balancer. One packet is
 *
 *   classify   Ethernet → IP → TCP → is it for a service?      services.h, too_big.h, icmp_error.h
 *   bind       its flow, and the group of that                 flow/, handshake/
 *   frame      the MQTT control packets that it shows          mqtt/, learn/
 *   forward    dst: service → group VIP, on to the balancer    end/, emit.h
 *
 * and ends in one of the functions of emit.h and too_big.h, with exactly one verdict.
 */
#include "flow/delayed.h"
#include "flow/predicted.h"
#include "fleet/adopt.h"
#include "fleet/miss.h"
#include "handshake/handshake.h"
#include "handshake/handover.h"
#include "handshake/hello.h"
#include "emit.h"
#include "mqtt/framing.h"
#include "mqtt/plain.h"
#include "mqtt/will.h"
#include "icmp_error.h"
#include "end/rescue_stage.h"
#include "limits.h"
#include "services.h"
#include "too_big.h"

struct exported_types {
	struct adoption adoption;
	enum adoption_kind adoption_kind;
	struct event event;
	enum limits limits;
	enum chain_position chain_position;
	enum special_group special_group;
	enum vip_flags vip_flags;
	enum budget_kind budget_kind;
	enum affinity affinity;
	enum binding_mode binding_mode;
	enum client_flags client_flags;
	enum client_route_kind client_route_kind;
	enum event_kind event_kind;
	enum fleet_mode fleet_mode;
	struct segment_report segment_report;
	enum report_kind report_kind;
	enum flow_connect flow_connect;
	enum flow_flags flow_flags;
	enum handover_limits handover_limits;
	enum handover_state handover_state;
	enum misprediction_policy misprediction_policy;
	enum parser parser;
	enum reason reason;
	enum rescue_flags rescue_flags;
	struct rescue rescue;
	enum rescue_limits rescue_limits;
	struct rescuer rescuer;
	enum route_state_flags route_state_flags;
	enum service_protocol service_protocol;
	enum tracked_map tracked_map;
	enum bound_by bound_by;
	enum fallback_reason fallback_reason;
};
EXPORT_TYPES(exported_types);

/*
 * One segment without data in 64, as good as at random, still looks into `flows`: a flow
 * that only acknowledges, a subscriber's, would be the first to be evicted there otherwise.
 */
#define TOUCH_BITS 6

static __always_inline bool touches_flows(const struct tcphdr *tcp)
{
	return !(((tcp->check ^ tcp->ack_seq) * 0x9e3779b1U) >> (32 - TOUCH_BITS));
}

/* Whether the flow's segments without data need not look at it. */
static __always_inline bool bypasses_flows(const struct flow *f, const struct service *svc)
{
	if (f->flags & (FLOW_CLOSING | FLOW_UNCONFIRMED | FLOW_RESCUED))
		return false;
	return svc->binding == BINDING_DELAYED ? !(f->flags & FLOW_REUSED_PORT)
					       : !flow_challenger(f);
}

static __always_inline bool is_bare(const struct conn *c)
{
	return !c->payload_length && !(c->flags & bpf_htons(TCP_SYN | TCP_FIN | TCP_RST));
}

/* A segment with a flow's last bytes, FIN or RST behind them: the flow closes. Global (see event.h). */
__noinline int close_flow(const struct conn *c, struct flow *f, const struct service_table *t,
			  const struct service *svc)
{
	if (!c || !f || !t || !svc)
		return 0;
	/* What is not accepted yet may be by the last acknowledgement. */
	if (f->connect & FLOW_ACCEPTED)
		publish_record_rest(c, f, t, svc);
	count(REASON_FLOW_CLOSED);
	cache_correct(c, t, 0);
	flow_close(f);
	return 0;
}

/* Binds a segment. Returns the flow that is to be framed; NULL: there is none, or nothing to frame. */
static __always_inline struct flow *bind(struct xdp_md *ctx, struct bound *b, const struct conn *c,
					 const struct service_table *t, const struct service *svc,
					 struct flow *f)
{
	if (svc->binding == BINDING_DELAYED) {
		/* In a fleet, the SYN on the flow's addresses may have gone to another balancer. */
		if (!f || is_syn(c) || (f->flags & FLOW_REUSED_PORT && !is_of_flow(ctx, c, f)) ||
		    (fleet && c->payload_length && is_far(f, c))) {
			b->exit = EXIT_HANDSHAKE;
			return NULL;
		}
	} else if (!f || is_syn(c) || flow_challenger(f)) {
		const struct scratch *w;

		f = bind_predicted(c, t, svc, f);
		w = scratch();
		if (!w)
			return NULL;
		b->binding = w->decision.binding;
		b->reason = w->decision.verdict;
		return is_syn(c) ? NULL : f;
	}
	b->binding = binding_of_flow(c, t, svc, f);
	return f;
}

/* Frames a segment, and keeps its flow. */
static __always_inline void follow(struct xdp_md *ctx, struct bound *b, struct conn *c,
				   const struct service_table *t, const struct service *svc,
				   struct flow *f)
{
	if (f->flags & FLOW_TRUSTED && !(f->connect & FLOW_ACCEPTED) && flow_went_on(f, c) &&
	    !(c->flags & bpf_htons(TCP_RST)))
		flow_accept(c, f, t, svc);
	if (f->flags & FLOW_RESCUED && !(c->flags & bpf_htons(TCP_RST)))
		tail_call_stage(ctx, c, svc, b->binding, STAGE_RESCUE);
	if (messages_per_client && c->payload_length && !(c->flags & bpf_htons(TCP_RST))) {
		struct scratch *w = scratch();

		if (w)
			w->published = 0;
		if (!messages_admitted(c, f)) {
			b->reason = REASON_RATE_LIMITED;
			b->exit = EXIT_DROP;
			return;
		}
	}
	if (c->payload_length) {
		if (!(f->connect & FLOW_CONNECT_READ) && connect_seen(ctx, c, f, svc))
			will_seen(ctx, c, f, t, svc);
		if (frame(ctx, f, c, t, svc))
			frame_packets(ctx, f, c, t);
		if (messages_per_client)
			messages_used(c, f);
		if (f->flags & (FLOW_RESCUED | FLOW_ENDED) &&
		    !end_segment(ctx, c, f, t, c->flags & bpf_htons(TCP_FIN))) {
			/* It was to go to the sidecar, but its checksum is wrong. */
			b->reason = REASON_RESCUED;
			b->exit = EXIT_DROP;
			return;
		}
	} else if (is_bare(c) && bypasses_flows(f, svc)) {
		cache_keep(c, t, b->binding);
	}
	if (f->flags & FLOW_UNCONFIRMED)
		b->exit = EXIT_HANDOVER;
	/* Only with the number that is next: anybody can send one with another. */
	if (is_end(c) && !(f->flags & FLOW_CLOSING) && c->seq + c->payload_length == f->end)
		close_flow(c, f, t, svc);
	else if (f->flags & FLOW_PROBATION && !(f->flags & (FLOW_UNSYNCED | FLOW_CLOSING)))
		f->flags &= ~FLOW_PROBATION; /* it has shown that it is MQTT */
}

/* A segment of a flow that is not plain, or of none. */
static __always_inline int handle_other(struct xdp_md *ctx, struct conn *c,
					const struct service_table *t, const struct service *svc,
					struct flow *f)
{
	struct bound b = {.reason = c->payload_length ? REASON_DATA : REASON_NO_DATA};
	const struct group *g;

	/*
	 * During an upgrade, flows that are not here yet are the last program's; and so are SYNs that keep nothing but a
	 * note at the flow that was on their addresses before.
	 */
	if (!f && has_predecessor && (!is_syn(c) || svc->binding == BINDING_DELAYED))
		bpf_tail_call(ctx, &predecessor, 0);
	if (connections_per_address && !f && is_syn(c) && svc->binding == BINDING_PREDICTED &&
	    !connection_admitted(c)) {
		count(REASON_RATE_LIMITED);
		return XDP_DROP;
	}
	if (fleet && !is_syn(c) && is_missed(c, svc, f)) {
		tail_call_stage(ctx, c, svc, 0, STAGE_MISS);
		return XDP_DROP;
	}
	f = bind(ctx, &b, c, t, svc, f);
	if (b.exit == EXIT_HANDSHAKE)
		tail_call_stage(ctx, c, svc, 0, STAGE_HANDSHAKE);
	if (f)
		follow(ctx, &b, c, t, svc, f);
	g = group_of(b.binding);
	if (b.exit == EXIT_DROP) {
		count(b.reason);
		return XDP_DROP;
	}
	if (!g)
		return unchanged(REASON_NO_GROUP_VIP);
	if (b.exit == EXIT_HANDOVER)
		tail_call_stage(ctx, c, svc, b.binding, STAGE_HANDOVER);
	return to_group(ctx, g, svc, c->v6, b.reason);
}

/* What a segment is for, and its header. */
struct addressed {
	const struct service *svc;
	struct tcphdr *tcp;
};

static __always_inline int handle_segment(struct xdp_md *ctx, struct conn *c,
					  const struct service_table *t, const struct addressed *s)
{
	const struct service *svc = s->svc;
	const struct group *g;
	struct flow *f;
	__u64 id;

	if (is_bare(c) && !c->returned && !touches_flows(s->tcp)) {
		g = group_of_slot(cache_find(c, t));
		if (g) {
			count(REASON_NO_DATA);
			return to_group_at(ctx, s->tcp, g, svc, c->v6);
		}
	}
	id = flow_id(c, t);
	c->tag = flow_tag(id);
	f = flow_by_id(id);
	if (f)
		flow_touch(f);
	if (f && !c->returned) {
		g = group_of(flow_binding(f, c));
		if (g && frame_plain(ctx, f, c, t))
			return to_group_at(ctx, s->tcp, g, svc, c->v6);
	}
	return handle_other(ctx, c, t, svc, f);
}

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
	c->flags = ((__be16 *)tcp)[6];
	c->payload = tcp_offset + header;
	c->payload_length = end - c->payload;
	return true;
}

/* Fills in c and s, and returns SEGMENT, if the packet is a segment for a service; else its verdict. */
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
			return handle_icmp(ctx, t, false);
		return unchanged(REASON_NOT_SERVICE);
	}
	if (ip->frag_off & bpf_htons(IP_FRAGMENT_MASK))
		return unchanged(REASON_IP_FRAGMENT);
	if (ip->ihl != 5)
		return unchanged(REASON_IP_OPTIONS);

	s->tcp = parse_tcp(cur);
	if (!s->tcp)
		return unchanged(REASON_TRUNCATED);
	c->key.addr[0] = ip->daddr;
	s->svc = service_find4(t, ip->daddr, s->tcp->dest);
	if (!s->svc)
		return verdict_of_other(c, s->tcp->dest);

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
	if (clear_mark4(ip))
		c->returned = true;
	return SEGMENT;
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
		return handle_icmp(ctx, t, true);
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
		return verdict_of_other(c, s->tcp->dest);

	__u32 length = sizeof(*ip) + bpf_ntohs(ip->payload_len);
	copy_addr6(c->key.addr, &ip->saddr);
	c->v6 = true;
	if (sizeof(struct ethhdr) + length > ctx->data_end - ctx->data ||
	    !conn_of(c, s, sizeof(struct ethhdr) + sizeof(*ip), sizeof(struct ethhdr) + length))
		return unchanged(REASON_TRUNCATED);

	if (length > s->svc->max_packet)
		return answer_too_big(ctx, s->svc->max_packet, true);
	if (clear_mark6(ip))
		c->returned = true;
	return SEGMENT;
}

static __always_inline int verdict_of(struct xdp_md *ctx)
{
	struct cursor cur = cursor_of(ctx);
	struct ethhdr *eth = parse_eth(&cur);
	const struct service_table *t = current_table();
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
	return verdict == SEGMENT ? handle_segment(ctx, &c, t, &s) : verdict;
}

SEC("xdp")
int mqtt_fwd(struct xdp_md *ctx)
{
	int verdict = verdict_of(ctx);

	return is_unchanged(verdict) ? pass_on(ctx, reason_of(verdict)) : verdict;
}

char _license[] SEC("license") = "GPL";
