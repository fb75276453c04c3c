/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The chain on the interface, and the stages of this object.
 */
#ifndef MQTT_FWD_MAPS_PROGRAMS_H
#define MQTT_FWD_MAPS_PROGRAMS_H

#include "../abi/config.h"
#include "../lib/map.h"
#include "../lib/predecessor.h"

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
	__uint(max_entries, ROOT_ARRAY_SIZE);
} root_array SEC(".maps");

/*
 * The programs of this object, which tail-call each other: what one needs to know of the other's
 * findings is in scratch.tail_args. Each has a stack, and the verifier's budget, of its own.
 */
enum stage {
	STAGE_FORWARD,
	STAGE_HANDSHAKE,
	STAGE_HELLO,
	STAGE_HANDOVER,
	STAGE_RESCUE,
	STAGE_MISS,
	STAGES,
};

int mqtt_fwd(struct xdp_md *ctx);
int mqtt_handshake(struct xdp_md *ctx);
int mqtt_hello(struct xdp_md *ctx);
int mqtt_handover(struct xdp_md *ctx);
int mqtt_rescue(struct xdp_md *ctx);
int mqtt_miss(struct xdp_md *ctx);

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(max_entries, STAGES);
	__array(values, int(struct xdp_md *));
} stages SEC(".maps") = {
	.values =
		{
			[STAGE_FORWARD] = (void *)&mqtt_fwd,
			[STAGE_HANDSHAKE] = (void *)&mqtt_handshake,
			[STAGE_HELLO] = (void *)&mqtt_hello,
			[STAGE_HANDOVER] = (void *)&mqtt_handover,
			[STAGE_RESCUE] = (void *)&mqtt_rescue,
			[STAGE_MISS] = (void *)&mqtt_miss,
		},
};

#endif /* MQTT_FWD_MAPS_PROGRAMS_H */
