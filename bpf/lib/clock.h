/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef MQTT_FWD_CLOCK_H
#define MQTT_FWD_CLOCK_H

#include <linux/types.h>
#include <bpf/bpf_helpers.h>

/* CLOCK_BOOTTIME in ms, which wraps after 49 days: for differences. */
static __always_inline __u32 now_ms(void)
{
	return bpf_ktime_get_boot_ns() / 1000000;
}

/* CLOCK_BOOTTIME in seconds. */
static __always_inline __u32 now_s(void)
{
	return bpf_ktime_get_boot_ns() / 1000000000ULL;
}

#endif /* MQTT_FWD_CLOCK_H */
