// SPDX-License-Identifier: GPL-2.0-only
/*
 * On a broker host with delayed binding: makes the kernel take over connections whose SYN the
 * balancer has answered (bpf_sk_assign_tcp_reqsk, Linux 6.9). Runs behind decap, on what that
 * unwrapped. Only segments that the balancer marked are looked at (abi/handover.h): it marks all
 * until it has seen that the broker has the connection, and established ones pass untouched.
 *
 * ingress, by the socket that is there:
 *   listener     with a cookie      the kernel makes the connection of this very segment
 *                without            it may have overtaken the first: no RST, TCP repeats it
 *   established  this connection    acknowledges what the balancer sent: held back to what the
 *                                   broker has written, or TCP would drop the segment
 *                an older one       RST in its own name, and the segment once more
 *   TIME_WAIT    likewise
 *
 * egress:
 *   the first CONNACK  not what the balancer answered: RST
 *   FIN or RST         before any CONNACK, while the client has one: RST where the client is
 *   RST                to a segment that was not to have one: dropped
 */
#include "../abi/config.h"
#include "../lib/cookie.h"
#include "../lib/csum.h"
#include "../lib/map.h"
#include "../lib/parse.h"
#include "../lib/tcp.h"
#include "vips.h"

#include <linux/pkt_cls.h>
#include <bpf/bpf_core_read.h>

#define MARK_AGAIN 0x4d510001U /* skb->mark: sent round once more, an older socket has been ended */
#define MARK_RESET_AHEAD 0x4d510003U /* its RST has to be where the client is: behind a CONNACK */
#define MARK_NO_RESET 0x4d510002U /* its RST, which net.ipv4.fwmark_reflect marks alike, goes no further */

/* How far a segment of the same connection may lie from what its socket expects. */
#define SAME_CONNECTION (1 << 24)

/* How long a segment may wander through the network: TIME_WAIT, as the kernel has it. */
#define REPLAY_S 60

/* The balancer marks less than this. */
#define ACK_AHEAD_MAX 16

/* The kernel's types, as far as they are used here. */
#define KERNEL_TYPE __attribute__((preserve_access_index))

struct tcp_sock {
	__u32 rcv_nxt;
	__u32 snd_una;
	__u32 write_seq;
} KERNEL_TYPE;

struct sock_common {
	__u32 skc_tw_rcv_nxt;
} KERNEL_TYPE;

struct sock {
	struct sock_common __sk_common;
} KERNEL_TYPE;

struct inet_timewait_sock {
	struct sock_common __tw_common;
} KERNEL_TYPE;

struct tcp_timewait_sock {
	struct inet_timewait_sock tw_sk;
} KERNEL_TYPE;

/* Since Linux 7, as far as can be seen. */
struct tcp_timewait_sock___own {
	__u32 tw_rcv_nxt;
} KERNEL_TYPE;

struct bpf_tcp_req_attrs {
	__u32 rcv_tsval;
	__u32 rcv_tsecr;
	__u16 mss;
	__u8 rcv_wscale;
	__u8 snd_wscale;
	__u8 ecn_ok;
	__u8 wscale_ok;
	__u8 sack_ok;
	__u8 tstamp_ok;
	__u8 usec_ts_ok;
	__u8 reserved[3];
};

extern int bpf_sk_assign_tcp_reqsk(struct __sk_buff *skb, struct sock *sk,
				   struct bpf_tcp_req_attrs *attrs, int attrs__sz) __ksym;

MAP(handover_keys, BPF_MAP_TYPE_ARRAY, __u32, struct handover_keys, 1);

enum takeover_counter {
	TAKEOVER_DONE, /* connections taken over */
	TAKEOVER_REFUSED, /* by the kernel: takeover_error says why */
	TAKEOVER_ERROR, /* the last refusal's errno */
	TAKEOVER_NO_COOKIE, /* data for a listener, without a cookie of these keys */
	TAKEOVER_EARLY, /* overtook their first segment */
	TAKEOVER_ACK_HELD, /* acknowledgements held back */
	TAKEOVER_OLD_SOCKET, /* older sockets on the same addresses ended */
	TAKEOVER_RESET_HELD, /* RSTs not sent */
	TAKEOVER_CONNACK_SAME,
	TAKEOVER_CONNACK_DIFFERENT, /* connections ended for it */
	TAKEOVER_CONNACK_NONE, /* connections that their broker ended without one */
	TAKEOVER_REPLAYED, /* first segments that came once more, after their connection had ended */
	TAKEOVER_COUNTERS,
};
MAP(takeover_counters, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, __u64, TAKEOVER_COUNTERS);

/* Connections that were taken over: what the broker's CONNACK has to be, and whether it was sent. */
struct guard_key {
	__be32 client[4];
	__be16 client_port;
	__be16 port;
};
enum guard_state {
	GUARD_OPEN, /* taken over; the broker may send what it likes */
	GUARD_ANSWERED, /* the balancer has sent its CONNACK */
	GUARD_DONE, /* the broker has: the same cookie is worth nothing for a while */
};

struct guard {
	__u32 seq; /* of the CONNACK's first byte */
	__u16 state; /* enum guard_state */
	__u16 done_s; /* GUARD_DONE: when, CLOCK_BOOTTIME seconds */
};
MAP(guards, BPF_MAP_TYPE_LRU_HASH, struct guard_key, struct guard, 1 << 16);

struct exported_types {
	enum takeover_counter takeover_counter;
};
EXPORT_TYPES(exported_types);

static __always_inline void count(__u32 counter)
{
	__u64 *n = bpf_map_lookup_elem(&takeover_counters, &counter);

	if (n)
		*n += 1;
}

static __always_inline __u16 now_s(void)
{
	return bpf_ktime_get_boot_ns() / 1000000000ULL;
}

/* A TCP segment to or from a service of this host. */
struct segment {
	struct cookie_tuple tuple;
	__u32 v6;
	__u32 tcp; /* offset */
	__u32 header; /* length of the TCP header, options included */
	__u32 payload; /* length */
	__u32 seq;
	__u32 ack;
	__u32 mark; /* what the balancer says of it; ingress only */
	__be16 flags;
	__u16 pad;
};

static __always_inline void *skb_start(const struct __sk_buff *skb)
{
	return (void *)(long)skb->data;
}

static __always_inline void *skb_end(const struct __sk_buff *skb)
{
	return (void *)(long)skb->data_end;
}

static __always_inline __u32 mark_of(__u16 word)
{
	return (word & MARK_MASK) == MARK ? word : 0;
}

/* The balancer's mark in a packet's IP header; 0: not marked. */
static __always_inline __u32 read_mark(struct __sk_buff *skb)
{
	struct cursor cur = { .pos = skb_start(skb), .end = skb_end(skb) };
	const struct ethhdr *eth = parse_eth(&cur);

	if (!eth)
		return 0;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		const struct iphdr *ip = parse_ipv4(&cur);
		return ip && ip->frag_off & bpf_htons(IP_DF) ? mark_of(bpf_ntohs(ip->id)) : 0;
	}
	if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		const struct ipv6hdr *ip = parse_ipv6(&cur);
		return ip ? mark_of(bpf_ntohs(((__be16 *)ip)[1])) : 0;
	}
	return 0;
}

enum glimpse {
	GLIMPSE_NOTHING,
	GLIMPSE_CONNACK, /* its payload begins as one */
	GLIMPSE_END, /* FIN or RST, without payload */
};

#define MQTT_CONNACK_TYPE 0x20

/*
 * Whether a packet is one to look at more closely. As little as says so: every packet of the
 * broker's is asked, and its payload need not be where its headers are.
 */
static __always_inline enum glimpse glimpse(struct __sk_buff *skb)
{
	struct cursor cur = { .pos = skb_start(skb), .end = skb_end(skb) };
	const struct ethhdr *eth = parse_eth(&cur);
	const struct tcphdr *tcp;
	__u32 offset;
	__u8 first;

	if (!eth)
		return GLIMPSE_NOTHING;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		const struct iphdr *ip = parse_ipv4(&cur);
		if (!ip || ip->protocol != IPPROTO_TCP)
			return GLIMPSE_NOTHING;
		offset = sizeof(*eth) + sizeof(*ip);
	} else {
		const struct ipv6hdr *ip = parse_ipv6(&cur);
		if (eth->h_proto != bpf_htons(ETH_P_IPV6) || !ip || ip->nexthdr != IPPROTO_TCP)
			return GLIMPSE_NOTHING;
		offset = sizeof(*eth) + sizeof(*ip);
	}
	tcp = parse_tcp(&cur);
	if (!tcp)
		return GLIMPSE_NOTHING;
	bool ends = tcp->fin || tcp->rst;
	offset += tcp->doff * 4;
	if (skb->len <= offset)
		return ends ? GLIMPSE_END : GLIMPSE_NOTHING;
	if (bpf_skb_load_bytes(skb, offset, &first, 1) || first != MQTT_CONNACK_TYPE)
		return GLIMPSE_NOTHING;
	return GLIMPSE_CONNACK;
}

static __always_inline bool read_segment(struct __sk_buff *skb, struct segment *s)
{
	struct cursor cur = { .pos = skb_start(skb), .end = skb_end(skb) };
	struct ethhdr *eth = parse_eth(&cur);
	struct tcphdr *tcp;
	__u32 length;

	*s = (struct segment){};
	if (!eth)
		return false;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = parse_ipv4(&cur);
		if (!ip || ip->protocol != IPPROTO_TCP || ip->ihl != 5 ||
		    ip->frag_off & bpf_htons(IP_FRAGMENT_MASK))
			return false;
		s->tuple.src[0] = ip->saddr;
		s->tuple.dst[0] = ip->daddr;
		s->tcp = sizeof(*eth) + sizeof(*ip);
		length = bpf_ntohs(ip->tot_len) - sizeof(*ip);
	} else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = parse_ipv6(&cur);
		if (!ip || ip->nexthdr != IPPROTO_TCP)
			return false;
		copy_addr6(s->tuple.src, &ip->saddr);
		copy_addr6(s->tuple.dst, &ip->daddr);
		s->v6 = true;
		s->tcp = sizeof(*eth) + sizeof(*ip);
		length = bpf_ntohs(ip->payload_len);
	} else {
		return false;
	}
	tcp = parse_tcp(&cur);
	if (!tcp)
		return false;
	s->tuple.sport = tcp->source;
	s->tuple.dport = tcp->dest;
	s->seq = bpf_ntohl(tcp->seq);
	s->ack = bpf_ntohl(tcp->ack_seq);
	s->flags = ((__be16 *)tcp)[6];
	s->header = tcp->doff * 4;
	if (s->header < sizeof(*tcp) || s->header > length)
		return false;
	s->payload = length - s->header;
	return true;
}

#define TCP_FLAGS_ALL 0x3f

#define SEQ_OFFSET 4
#define ACK_OFFSET 8
#define FLAGS_OFFSET 12
#define CHECK_OFFSET 16

/* Works with checksums that a network card has yet to finish, too: those cover no field of the header. */
static __always_inline void set_word(struct __sk_buff *skb, const struct segment *s, __u32 offset,
				     __u32 from, __u32 to)
{
	__be32 was = bpf_htonl(from), is = bpf_htonl(to);

	bpf_l4_csum_replace(skb, s->tcp + CHECK_OFFSET, was, is, sizeof(is));
	bpf_skb_store_bytes(skb, s->tcp + offset, &is, sizeof(is), 0);
}

static __always_inline void set_flags(struct __sk_buff *skb, const struct segment *s, __be16 flags)
{
	bpf_l4_csum_replace(skb, s->tcp + CHECK_OFFSET, s->flags, flags, sizeof(flags));
	bpf_skb_store_bytes(skb, s->tcp + FLAGS_OFFSET, &flags, sizeof(flags), 0);
}

/* A segment's options on their way through the parser (lib/tcp.h). */
MAP(scratch, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct tcp_option_scan, 1);

static __always_inline struct tcp_options *options_of(struct __sk_buff *skb, const struct segment *s)
{
	__u32 zero = 0, length = s->header - sizeof(struct tcphdr);
	struct tcp_option_scan *scan = bpf_map_lookup_elem(&scratch, &zero);

	if (!scan || length > TCP_OPTIONS_MAX)
		return NULL;
	scan->length = length;
	barrier_var(length);
	if (length && (length > TCP_OPTIONS_MAX ||
		       bpf_skb_load_bytes(skb, s->tcp + sizeof(struct tcphdr), scan->bytes, length)))
		return NULL;
	tcp_options_scan(scan);
	return &scan->o;
}

static __always_inline bool segment_has_cookie(const struct segment *s, const struct tcp_options *o)
{
	__u32 zero = 0;
	const struct handover_keys *keys = bpf_map_lookup_elem(&handover_keys, &zero);
	__u32 tsecr = o->tsecr;

	return keys && cookie_valid(keys, &s->tuple, s->seq - 1, s->ack - 1,
				    o->has_timestamps ? &tsecr : NULL, s->v6);
}

static __always_inline struct guard_key guard_key_of(const __be32 client[4], __be16 client_port,
						     __be16 port)
{
	struct guard_key key = { .client_port = client_port, .port = port };

	__builtin_memcpy(key.client, client, sizeof(key.client));
	return key;
}

/* A marked segment for which there is only a listener. */
static __always_inline int for_listener(struct __sk_buff *skb, const struct segment *s,
					struct bpf_sock *listener)
{
	const struct tcp_options *o = options_of(skb, s);
	struct bpf_tcp_req_attrs attrs = {};
	__u32 cookie = s->ack - 1;
	struct tcp_sock *sk;

	if (!o)
		return TC_ACT_OK;
	if (!s->payload || !segment_has_cookie(s, o)) {
		__u32 held = s->mark & MARK_HANDOVER ? 0 : s->mark & MARK_ACK_MASK;

		/*
		 * What makes the connection may be right before it, in this very batch: so TCP gets it,
		 * as if it acknowledged the SYN-ACK, and if it is lost, answers no RST.
		 */
		count(s->payload && !held ? TAKEOVER_NO_COOKIE : TAKEOVER_EARLY);
		skb->mark = MARK_NO_RESET;
		if (held)
			set_word(skb, s, ACK_OFFSET, s->ack, s->ack - held);
		return TC_ACT_OK;
	}
	/*
	 * TCP remembers connections that ended, but only one of both ends does (TIME_WAIT, RFC 9293
	 * §3.6.1). A first segment that the network doubled must not become another connection, and
	 * its messages not come twice.
	 */
	struct guard_key key = guard_key_of(s->tuple.src, s->tuple.sport, s->tuple.dport);
	const struct guard *before = bpf_map_lookup_elem(&guards, &key);
	if (before && before->seq == s->ack && before->state == GUARD_DONE &&
	    (__u16)(now_s() - before->done_s) < REPLAY_S) {
		count(TAKEOVER_REPLAYED);
		return TC_ACT_SHOT;
	}
	attrs.mss = cookie_mss(cookie, s->v6);
	if ((cookie & COOKIE_WSCALE_MASK) != COOKIE_NO_WSCALE) {
		attrs.wscale_ok = 1;
		attrs.snd_wscale = cookie & COOKIE_WSCALE_MASK;
		attrs.rcv_wscale = HANDOVER_WSCALE;
	}
	attrs.sack_ok = !!(cookie & COOKIE_SACK);
	if (o->has_timestamps) {
		attrs.tstamp_ok = 1;
		attrs.rcv_tsval = o->tsval;
		attrs.rcv_tsecr = o->tsecr;
	}
	sk = bpf_skc_to_tcp_sock(listener);
	if (!sk)
		return TC_ACT_OK;
	int error = bpf_sk_assign_tcp_reqsk(skb, (struct sock *)sk, &attrs, sizeof(attrs));
	if (error) {
		__u32 last_error = TAKEOVER_ERROR;
		__u64 *last = bpf_map_lookup_elem(&takeover_counters, &last_error);
		if (last)
			*last = -error;
		count(TAKEOVER_REFUSED);
		return TC_ACT_SHOT;
	}
	count(TAKEOVER_DONE);
	struct guard guard = {
		.seq = s->ack,
		.state = s->mark & MARK_HANDOVER ? GUARD_ANSWERED : GUARD_OPEN,
	};
	bpf_map_update_elem(&guards, &key, &guard, BPF_ANY);
	return TC_ACT_OK;
}

/* What an older connection's TIME_WAIT socket expects next. */
static __always_inline __u32 time_wait_rcv_nxt(struct tcp_timewait_sock *tw)
{
	struct tcp_timewait_sock___own *own = (void *)tw;

	if (bpf_core_field_exists(own->tw_rcv_nxt))
		return BPF_CORE_READ(own, tw_rcv_nxt);
	return tw->tw_sk.__tw_common.skc_tw_rcv_nxt;
}

/* The segment goes round once more; this copy ends the older socket that would have taken it. */
static __always_inline int end_older(struct __sk_buff *skb, const struct segment *s, __u32 rcv_nxt)
{
	count(TAKEOVER_OLD_SOCKET);
	skb->mark = MARK_AGAIN;
	bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
	set_word(skb, s, SEQ_OFFSET, s->seq, rcv_nxt);
	set_flags(skb, s, s->flags | bpf_htons(TCP_RST));
	return TC_ACT_OK;
}

SEC("tc")
int takeover_ingress(struct __sk_buff *skb)
{
	struct bpf_sock_tuple tuple = {};
	struct segment s;
	struct bpf_sock *sk;
	struct address vip = {};
	int verdict = TC_ACT_OK;
	__u32 mark = read_mark(skb);

	if (!mark || !read_segment(skb, &s) || s.flags & bpf_htons(TCP_SYN | TCP_RST) ||
	    !(s.flags & bpf_htons(TCP_ACK)))
		return TC_ACT_OK;
	s.mark = mark;
	__builtin_memcpy(vip.addr, s.tuple.dst, sizeof(vip.addr));
	if (!bpf_map_lookup_elem(&decap_vips, &vip))
		return TC_ACT_OK;
	if (s.v6) {
		__builtin_memcpy(tuple.ipv6.saddr, s.tuple.src, 16);
		__builtin_memcpy(tuple.ipv6.daddr, s.tuple.dst, 16);
		tuple.ipv6.sport = s.tuple.sport;
		tuple.ipv6.dport = s.tuple.dport;
		sk = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	} else {
		tuple.ipv4.saddr = s.tuple.src[0];
		tuple.ipv4.daddr = s.tuple.dst[0];
		tuple.ipv4.sport = s.tuple.sport;
		tuple.ipv4.dport = s.tuple.dport;
		sk = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk) {
		/* Nobody listens: the client is told so, though it has an answer to its CONNECT. */
		if (s.mark & MARK_HANDOVER)
			skb->mark = MARK_RESET_AHEAD;
		return TC_ACT_OK;
	}

	if (sk->state == BPF_TCP_LISTEN) {
		verdict = for_listener(skb, &s, sk);
		bpf_sk_release(sk);
		return verdict;
	}

	__u32 rcv_nxt = 0, write_seq = 0;
	bool older = false, ours = false;
	if (sk->state == BPF_TCP_TIME_WAIT) {
		struct tcp_timewait_sock *tw = bpf_skc_to_tcp_timewait_sock(sk);
		if (tw) {
			rcv_nxt = time_wait_rcv_nxt(tw);
			older = true;
		}
	} else if (sk->state != BPF_TCP_NEW_SYN_RECV) {
		struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
		if (tp) {
			rcv_nxt = tp->rcv_nxt;
			write_seq = tp->write_seq;
			__s32 ahead = s.seq - rcv_nxt, acked = s.ack - tp->snd_una;
			older = ahead > 0 || ahead < -SAME_CONNECTION || acked > SAME_CONNECTION ||
				acked < -SAME_CONNECTION;
			ours = true;
		}
	}
	bpf_sk_release(sk);

	if (older && s.payload && skb->mark != MARK_AGAIN) {
		const struct tcp_options *o = options_of(skb, &s);
		if (o && segment_has_cookie(&s, o))
			return end_older(skb, &s, rcv_nxt);
	}
	if (ours && seq_before(write_seq, s.ack) && s.ack - write_seq <= ACK_AHEAD_MAX) {
		set_word(skb, &s, ACK_OFFSET, s.ack, write_seq);
		count(TAKEOVER_ACK_HELD);
	}
	return TC_ACT_OK;
}

#define PAYLOAD_MAX 2048 /* of a segment that is turned into RST */

/* Turns the segment into RST, where the client takes the connection to be. */
static __always_inline int reset(struct __sk_buff *skb, const struct segment *s, __u32 seq)
{
	__u32 offset = s->tcp + s->header, sum = 0, left = s->payload;
	__be32 word;

	if (left > PAYLOAD_MAX)
		return TC_ACT_SHOT;
	for (__u32 i = 0; i < PAYLOAD_MAX / 4; i++) {
		if (left < 4)
			break;
		if (bpf_skb_load_bytes(skb, offset, &word, 4))
			return TC_ACT_SHOT;
		sum = csum_fold((__u64)sum + word);
		offset += 4;
		left -= 4;
	}
	word = 0;
	left &= 3;
	if (left && bpf_skb_load_bytes(skb, offset, &word, left))
		return TC_ACT_SHOT;
	sum = csum_fold((__u64)sum + word);

	/* The payload goes out of the sum, and its length out of the pseudo header's. */
	bpf_l4_csum_replace(skb, s->tcp + CHECK_OFFSET, 0, (__u16)~sum, 0);
	bpf_l4_csum_replace(skb, s->tcp + CHECK_OFFSET, bpf_htons(s->header + s->payload),
			    bpf_htons(s->header), BPF_F_PSEUDO_HDR | 2);
	set_word(skb, s, SEQ_OFFSET, s->seq, seq);
	set_flags(skb, s, (s->flags & ~bpf_htons(TCP_FLAGS_ALL)) | bpf_htons(TCP_RST | TCP_ACK));

	__be16 length;
	if (s->v6) {
		length = bpf_htons(s->header);
		bpf_skb_store_bytes(skb, sizeof(struct ethhdr) + 4, &length, 2, 0);
	} else {
		__be16 was = bpf_htons(sizeof(struct iphdr) + s->header + s->payload);

		length = bpf_htons(sizeof(struct iphdr) + s->header);
		bpf_l3_csum_replace(skb, sizeof(struct ethhdr) + 10, was, length, 2);
		bpf_skb_store_bytes(skb, sizeof(struct ethhdr) + 2, &length, 2, 0);
	}
	return bpf_skb_change_tail(skb, s->tcp + s->header, 0) ? TC_ACT_SHOT : TC_ACT_OK;
}

SEC("tc")
int takeover_egress(struct __sk_buff *skb)
{
	struct segment s;
	__u8 connack[HANDOVER_CONNACK] = {};

	if (skb->mark == MARK_RESET_AHEAD) {
		if (read_segment(skb, &s) && s.flags & bpf_htons(TCP_RST))
			set_word(skb, &s, SEQ_OFFSET, s.seq, s.seq + HANDOVER_CONNACK);
		return TC_ACT_OK;
	}
	if (skb->mark == MARK_NO_RESET) {
		if (!read_segment(skb, &s) || !(s.flags & bpf_htons(TCP_RST)))
			return TC_ACT_OK;
		count(TAKEOVER_RESET_HELD);
		return TC_ACT_SHOT;
	}
	enum glimpse seen = glimpse(skb);

	if (seen == GLIMPSE_NOTHING || !read_segment(skb, &s) || !s.payload != (seen == GLIMPSE_END))
		return TC_ACT_OK;
	struct guard_key key = guard_key_of(s.tuple.dst, s.tuple.dport, s.tuple.sport);
	struct guard *guard = bpf_map_lookup_elem(&guards, &key);
	if (!guard || guard->seq != s.seq || guard->state == GUARD_DONE)
		return TC_ACT_OK;
	__u32 at = guard->seq, state = guard->state;
	guard->done_s = now_s();
	guard->state = GUARD_DONE;
	if (state == GUARD_OPEN)
		return TC_ACT_OK;
	if (!s.payload) {
		count(TAKEOVER_CONNACK_NONE);
		return reset(skb, &s, at + HANDOVER_CONNACK);
	}
	if (s.payload >= HANDOVER_CONNACK &&
	    !bpf_skb_load_bytes(skb, s.tcp + s.header, connack, sizeof(connack)) &&
	    connack[1] == 2 && !connack[2] && !connack[3]) {
		count(TAKEOVER_CONNACK_SAME);
		return TC_ACT_OK;
	}
	count(TAKEOVER_CONNACK_DIFFERENT);
	return reset(skb, &s, at + HANDOVER_CONNACK);
}

char _license[] SEC("license") = "GPL";
