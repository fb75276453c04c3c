// SPDX-License-Identifier: GPL-2.0-only
/*
 * The program on the interface. It only calls the chain in root_array, position by position:
 * a tail call does not return, so the next position is reached only if this one is empty.
 * Same name, same map and same order as Katran's own xdp_root: either can be there first.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "../abi/config.h"

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
	__uint(max_entries, ROOT_ARRAY_SIZE);
} root_array SEC(".maps");

SEC("xdp")
int xdp_root(struct xdp_md *ctx)
{
	bpf_tail_call(ctx, &root_array, 0);
	bpf_tail_call(ctx, &root_array, POSITION_MQTT_FWD);
	bpf_tail_call(ctx, &root_array, POSITION_BALANCER);
	return XDP_PASS;
}

char _license[] SEC("license") = "GPL";
