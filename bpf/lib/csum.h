/* SPDX-License-Identifier: GPL-2.0-only */
/* Internet checksums (RFC 1071) and their incremental update (RFC 1624). */
#ifndef MQTT_FWD_CSUM_H
#define MQTT_FWD_CSUM_H

#include <linux/types.h>
#include <bpf/bpf_helpers.h>

static __always_inline __u16 csum_fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* RFC 1624 eqn. 3: HC' = ~(~HC + ~m + m'), for a 32-bit field, all in network order. */
static __always_inline __sum16 csum_replace4(__sum16 check, __be32 from, __be32 to)
{
	__u64 sum = (__u64)(__u16)~check + (__u32)~from + to;

	/* 34 bits, 20, 17. */
	sum = (sum >> 16) + (sum & 0xffff);
	sum = (sum >> 16) + (sum & 0xffff);
	return ~((sum >> 16) + sum);
}

/* The same for a 16-bit field. */
static __always_inline __sum16 csum_replace2(__sum16 check, __be16 from, __be16 to)
{
	return ~csum_fold((__u64)(__u16)~check + (__u16)~from + to);
}

/* Adds so many words to a sum that is not folded yet. */
static __always_inline __u64 sum_words(const __be32 *word, __u32 words, __u64 sum)
{
#pragma unroll
	for (__u32 i = 0; i < words; i++)
		sum += word[i];
	return sum;
}

/* The sum of data that begins at an odd offset: as if it began at an even one (RFC 1071 §2 B). */
static __always_inline __u16 csum_swap(__u16 sum)
{
	return sum << 8 | sum >> 8;
}

#endif /* MQTT_FWD_CSUM_H */
