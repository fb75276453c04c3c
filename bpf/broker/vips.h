/* SPDX-License-Identifier: GPL-2.0-only */
/* The services' addresses on this broker host: shared by what unwraps and what takes over. */
#ifndef MQTT_FWD_BROKER_VIPS_H
#define MQTT_FWD_BROKER_VIPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct address {
	__be32 addr[4]; /* IPv4 in addr[0] */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct address);
	__type(value, __u8);
	__uint(max_entries, 256);
} decap_vips SEC(".maps");

/* Addresses that a balancer's outer headers come from; IPv4 as IPv4-mapped IPv6 (RFC 4291 §2.5.5.2). */
struct source {
	__u32 prefix_length; /* bits */
	__be32 addr[4];
};

#endif /* MQTT_FWD_BROKER_VIPS_H */
