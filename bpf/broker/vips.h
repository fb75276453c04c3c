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

#endif /* MQTT_FWD_BROKER_VIPS_H */
