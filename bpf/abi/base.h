/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What every header of abi/ needs. abi/ declares the types that the datapath (C) and user space
 * (Rust, through the skeletons' BTF) share, each once. __be16/__be32 fields hold network byte
 * order, everything else host order. Padding is explicit: map keys are compared byte for byte.
 *
 * The pins of a load are kept under a hash of these types as BTF has them (src/kernel/layout.rs),
 * so a change here needs no version number: the next load migrates what is pinned.
 */
#ifndef MQTT_FWD_BASE_H
#define MQTT_FWD_BASE_H

#include <linux/types.h>

#define SIZE_IS(type, bytes) _Static_assert(sizeof(type) == (bytes), #type " must be " #bytes " B")

/*
 * BTF, and with it the skeleton, has only types that something uses. EXPORT_TYPES(struct)
 * makes it have those that are otherwise only used inside functions.
 */
#define EXPORT_TYPES(type) const volatile struct type type __attribute__((used))

#endif /* MQTT_FWD_BASE_H */
