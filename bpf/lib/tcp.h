/* SPDX-License-Identifier: GPL-2.0-only */
/* Arithmetic on sequence numbers (RFC 9293 §3.4): modulo 2^32, so differences, not comparisons. */
#ifndef MQTT_FWD_TCP_H
#define MQTT_FWD_TCP_H

#include <stdbool.h>

#include <linux/types.h>

static __always_inline bool seq_before(__u32 a, __u32 b)
{
	return (__s32)(a - b) < 0;
}

#endif /* MQTT_FWD_TCP_H */
