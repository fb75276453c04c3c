/* SPDX-License-Identifier: GPL-2.0-only */
/* Types that the embedded balancer's program and server share. */
#ifndef MQTT_FWD_BALANCER_H
#define MQTT_FWD_BALANCER_H

#include <linux/types.h>

#include "base.h"
#include "config.h"

enum balancer_limits {
	/* Prime, as Maglev wants it, and a hundred times more than a group has reals. */
	RING_SIZE = 65537,
	/* Number 0 is "no real", so that a ring that was never filled sends nowhere. */
	NO_REAL = 0,
	REALS = 1024,
};

struct vip_meta {
	__u32 flags;
	__u32 vip_num;
	__u32 epoch; /* random: of two VIPs with the same number, one after the other */
};
SIZE_IS(struct vip_meta, 12);

/* As Katran's, so that both are read alike. */
struct real_definition {
	__be32 addr[4]; /* IPv4 in addr[0] */
	__u8 v6; /* Katran: bit 0 of its flags */
	__u8 pad[3];
};
SIZE_IS(struct real_definition, 20);

/* The server's own notes, in a map so that they outlive it: which reals a VIP has. */
struct vip_real {
	__u32 vip_num;
	__u32 real_num;
};
SIZE_IS(struct vip_real, 8);

struct gateway {
	__u8 mac[6];
	__u8 pad[2];
};
SIZE_IS(struct gateway, 8);

/* A VIP's number instead of its address: an IPv4 connection fills one cache line that way. */
struct connection4 {
	__be32 src;
	__be16 sport;
	__u16 vip_num;
};
SIZE_IS(struct connection4, 8);

struct connection6 {
	__be32 src[4];
	__be16 sport;
	__u16 vip_num;
};
SIZE_IS(struct connection6, 20);

struct connection_real {
	__u32 real_num;
	__u32 vip_epoch;
};
SIZE_IS(struct connection_real, 8);

struct lb_stats {
	__u64 v1; /* a VIP's or real's packets; see the server for the others */
	__u64 v2; /* a VIP's or real's bytes */
};
SIZE_IS(struct lb_stats, 16);

enum balancer_stat {
	STAT_LRU, /* packets, misses */
	STAT_LRU_MISS, /* misses of SYNs, of other segments */
	BALANCER_STATS,
};

#endif /* MQTT_FWD_BALANCER_H */
