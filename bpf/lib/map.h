/* SPDX-License-Identifier: GPL-2.0-only */
/* Declaring maps, and reading what other CPUs write. */
#ifndef MQTT_FWD_MAP_H
#define MQTT_FWD_MAP_H

#include <stdbool.h>

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define MAP_WITH_FLAGS(name, map_type, flags, key_type, value_type, entries) \
	struct {                                                             \
		__uint(type, map_type);                                      \
		__uint(map_flags, flags);                                    \
		__type(key, key_type);                                       \
		__type(value, value_type);                                   \
		__uint(max_entries, entries);                                \
	} name SEC(".maps")

#define MAP(name, map_type, key_type, value_type, entries) \
	MAP_WITH_FLAGS(name, map_type, 0, key_type, value_type, entries)

/* Its elements begin on a page, so that those of 64 bytes are a cache line each. */
#define CACHELINE_ARRAY(name, value_type, entries) \
	MAP_WITH_FLAGS(name, BPF_MAP_TYPE_ARRAY, BPF_F_MMAPABLE, __u32, value_type, entries)

/* Exactly one load or store, of what another CPU may write or read meanwhile. */
#define READ_ONCE(x) (*(const volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile typeof(x) *)&(x) = (value))

#endif /* MQTT_FWD_MAP_H */
