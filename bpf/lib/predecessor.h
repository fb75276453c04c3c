/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef MQTT_FWD_PREDECESSOR_H
#define MQTT_FWD_PREDECESSOR_H

#include "map.h"

/* During an upgrade: the program before this one, which knows the flows not yet moved here. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
	__uint(max_entries, 1);
} predecessor SEC(".maps");

/* 0: there is none, and the verifier takes out what would ask it. */
const volatile __u32 has_predecessor = 1;

#endif /* MQTT_FWD_PREDECESSOR_H */
