/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * SipHash-1-3 (Aumasson, Bernstein: "SipHash: a fast short-input PRF"), keyed so that nobody
 * can prepare topics that collide. Fed with 8-byte words, or in pieces with the same result.
 */
#ifndef MQTT_FWD_SIPHASH_H
#define MQTT_FWD_SIPHASH_H

#include <linux/types.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

struct siphash {
	__u64 v0, v1, v2, v3;
};

struct siphash_stream {
	struct siphash h;
	__u64 word; /* bytes that do not fill a word yet */
	__u32 length;
	__u32 pad;
};

static __always_inline __u64 load_le64(const void *p)
{
	__u64 word = *(const __u64 *)p;

	return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? word : __builtin_bswap64(word);
}

static __always_inline __u64 load_be64(const void *p)
{
	return __builtin_bswap64(load_le64(p));
}

#define ROTL64(x, n) (((x) << (n)) | ((x) >> (64 - (n))))

static __always_inline void sip_round(struct siphash *h)
{
	h->v0 += h->v1;
	h->v1 = ROTL64(h->v1, 13) ^ h->v0;
	h->v0 = ROTL64(h->v0, 32);
	h->v2 += h->v3;
	h->v3 = ROTL64(h->v3, 16) ^ h->v2;
	h->v0 += h->v3;
	h->v3 = ROTL64(h->v3, 21) ^ h->v0;
	h->v2 += h->v1;
	h->v1 = ROTL64(h->v1, 17) ^ h->v2;
	h->v2 = ROTL64(h->v2, 32);
}

static __always_inline void siphash_init(struct siphash *h, __u64 key0, __u64 key1)
{
	h->v0 = key0 ^ 0x736f6d6570736575ULL;
	h->v1 = key1 ^ 0x646f72616e646f6dULL;
	h->v2 = key0 ^ 0x6c7967656e657261ULL;
	h->v3 = key1 ^ 0x7465646279746573ULL;
}

static __always_inline void siphash_word(struct siphash *h, __u64 word)
{
	h->v3 ^= word;
	sip_round(h);
	h->v0 ^= word;
}

/* `tail` holds the length % 8 bytes that are left, little endian. Never 0: 0 means "no topic". */
static __always_inline __u64 siphash_final(struct siphash *h, __u64 tail, __u32 length)
{
	siphash_word(h, tail | (__u64)length << 56);
	h->v2 ^= 0xff;
	sip_round(h);
	sip_round(h);
	sip_round(h);
	__u64 hash = h->v0 ^ h->v1 ^ h->v2 ^ h->v3;
	return hash ? hash : 1;
}

/* SipHash-2-4, for authentication. Its input is whole words here. */
static __always_inline void siphash24_word(struct siphash *h, __u64 word)
{
	h->v3 ^= word;
	sip_round(h);
	sip_round(h);
	h->v0 ^= word;
}

static __always_inline __u64 siphash24_final(struct siphash *h, __u32 length)
{
	siphash24_word(h, (__u64)length << 56);
	h->v2 ^= 0xff;
	sip_round(h);
	sip_round(h);
	sip_round(h);
	sip_round(h);
	return h->v0 ^ h->v1 ^ h->v2 ^ h->v3;
}

static __always_inline void siphash_stream_init(struct siphash_stream *s, __u64 key0, __u64 key1)
{
	siphash_init(&s->h, key0, key1);
	s->word = 0;
	s->length = 0;
	s->pad = 0;
}

/* Up to eight bytes, wherever in a word the stream is; what is above them in `word` is 0. */
static __always_inline void siphash_stream_bytes(struct siphash_stream *s, __u64 word, __u32 bytes)
{
	__u32 have = s->length & 7;

	s->word |= word << 8 * have;
	if (have + bytes >= 8) {
		siphash_word(&s->h, s->word);
		s->word = have ? word >> ((64 - 8 * have) & 63) : 0;
	}
	s->length += bytes;
}

static __always_inline __u64 siphash_stream_final(struct siphash_stream *s)
{
	return siphash_final(&s->h, s->word, s->length);
}

#endif /* MQTT_FWD_SIPHASH_H */
