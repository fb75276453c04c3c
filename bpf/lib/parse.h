/* SPDX-License-Identifier: GPL-2.0-only */
/* Header parsing with a cursor: each parse_*() checks bounds and advances, or returns NULL. */
#ifndef MQTT_FWD_PARSE_H
#define MQTT_FWD_PARSE_H

#include <stdbool.h>

#include <linux/bpf.h>
#include <linux/icmpv6.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* The UAPI headers leave these to libc's. */
#ifndef AF_INET
#define AF_INET 2
#define AF_INET6 10
#endif

/* RFC 792. <linux/icmp.h> would pull in libc, of the build machine's word size at that. */
#define ICMP_DEST_UNREACH 3
#define ICMP_FRAG_NEEDED 4

struct icmphdr {
	__u8 type;
	__u8 code;
	__sum16 checksum;
	__be16 unused;
	__be16 mtu; /* ICMP_FRAG_NEEDED: of the next hop (RFC 1191 §4) */
};

#define IP_DF 0x4000
#define IP_FRAGMENT_MASK 0x3fff /* more-fragments flag and fragment offset (RFC 791 §3.1) */

/*
 * The context's fields are u32 and become pointers as they are read. clang ≤ 16 may spill the
 * u32 in between, which the verifier refuses; read in assembly, they are pointers at once.
 */
static __always_inline void *frame_start(const struct xdp_md *ctx)
{
	void *p;

	asm volatile("%[p] = *(u32 *)(%[ctx] + %[field])"
		     : [p] "=r"(p)
		     : [ctx] "r"(ctx), [field] "i"(__builtin_offsetof(struct xdp_md, data)));
	return p;
}

static __always_inline void *frame_end(const struct xdp_md *ctx)
{
	void *p;

	asm volatile("%[p] = *(u32 *)(%[ctx] + %[field])"
		     : [p] "=r"(p)
		     : [ctx] "r"(ctx), [field] "i"(__builtin_offsetof(struct xdp_md, data_end)));
	return p;
}

static __always_inline __u32 frame_length(const struct xdp_md *ctx)
{
	__u64 length = frame_end(ctx) - frame_start(ctx);

	barrier_var(length); /* or clang goes on with the two pointers, in 32 bits */
	return length;
}

/*
 * Copies `length` bytes of the frame, one at least and `max` at most, which is a power of two. The
 * verifier has to see both bounds in the register that is passed; clang would compare another.
 */
static __always_inline bool frame_copy(struct xdp_md *ctx, __u32 offset, void *to, __u32 length,
				       const __u32 max)
{
	if (!length || length > max)
		return false;
	barrier_var(length);
	return !bpf_xdp_load_bytes(ctx, offset, to, ((length - 1) & (max - 1)) + 1);
}

struct cursor {
	void *pos;
	void *end;
};

static __always_inline struct cursor cursor_of(struct xdp_md *ctx)
{
	return (struct cursor){
		.pos = frame_start(ctx),
		.end = frame_end(ctx),
	};
}

#define PARSE_FN(name, type)                                        \
	static __always_inline type *parse_##name(struct cursor *c) \
	{                                                           \
		type *header = c->pos;                              \
		if ((void *)(header + 1) > c->end)                  \
			return NULL;                                \
		c->pos = header + 1;                                \
		return header;                                      \
	}

PARSE_FN(eth, struct ethhdr)
PARSE_FN(ipv4, struct iphdr)
PARSE_FN(ipv6, struct ipv6hdr)
PARSE_FN(tcp, struct tcphdr)
PARSE_FN(udp, struct udphdr)
PARSE_FN(icmp, struct icmphdr)
PARSE_FN(icmp6, struct icmp6hdr)
#undef PARSE_FN

static __always_inline void copy_addr6(__be32 to[4], const struct in6_addr *from)
{
	__builtin_memcpy(to, from, 16);
}

#endif /* MQTT_FWD_PARSE_H */
