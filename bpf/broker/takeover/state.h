/* SPDX-License-Identifier: GPL-2.0-only */
/* What ingress and egress share: keys, counters, and the connections that were taken over. */
#ifndef MQTT_FWD_TAKEOVER_STATE_H
#define MQTT_FWD_TAKEOVER_STATE_H

#include "../../abi/config.h"
#include "../../lib/map.h"

#include <bpf/bpf_helpers.h>

/* skb->mark */
enum {
	/* Injected again, after an older socket was ended. */
	SKB_MARK_REINJECTED = 0x4d510001,
	/* Its RST, which net.ipv4.fwmark_reflect marks alike, is dropped at egress. */
	SKB_MARK_SUPPRESS_RST = 0x4d510002,
	/* Its RST has to be where the client is: behind a CONNACK. */
	SKB_MARK_RST_PAST_CONNACK = 0x4d510003,
};

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
	TAKEOVER_FORGOTTEN, /* by the kernel, before TCP had them */
	TAKEOVER_COUNTERS,
};
MAP(takeover_counters, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, __u64, TAKEOVER_COUNTERS);

/* Connections that were taken over: what the broker's CONNACK has to be, and whether it was sent. */
struct taken_over_key {
	__be32 client[4];
	__be16 client_port;
	__be16 port;
};

enum taken_over_state {
	TAKEN_OVER_OPEN, /* taken over; the broker may send what it likes */
	TAKEN_OVER_ANSWERED, /* the balancer has sent its CONNACK */
	TAKEN_OVER_DONE, /* the broker has: the same cookie is worth nothing for a while */
};

struct taken_over_conn {
	__u32 seq; /* of the CONNACK's first byte */
	__u16 state; /* enum taken_over_state */
	__u16 done_s; /* TAKEN_OVER_DONE: when, CLOCK_BOOTTIME seconds */
};
MAP(taken_over, BPF_MAP_TYPE_LRU_HASH, struct taken_over_key, struct taken_over_conn, 1 << 16);

static __always_inline void count(__u32 counter)
{
	__u64 *n = bpf_map_lookup_elem(&takeover_counters, &counter);

	if (n)
		*n += 1;
}

static __always_inline __u16 now_s16(void)
{
	return bpf_ktime_get_boot_ns() / 1000000000ULL;
}

static __always_inline struct taken_over_key taken_over_key_of(const __be32 client[4],
							       __be16 client_port, __be16 port)
{
	struct taken_over_key key = {.client_port = client_port, .port = port};

	__builtin_memcpy(key.client, client, sizeof(key.client));
	return key;
}

#endif /* MQTT_FWD_TAKEOVER_STATE_H */
