/* SPDX-License-Identifier: GPL-2.0-only */
/* TCP: sequence numbers and options (RFC 9293 §3.4, §3.2; RFC 7323; RFC 2018). */
#ifndef MQTT_FWD_TCP_H
#define MQTT_FWD_TCP_H

#include <stdbool.h>

#include <linux/types.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* Modulo 2^32, so differences, not comparisons. */
static __always_inline bool seq_before(__u32 a, __u32 b)
{
	return (__s32)(a - b) < 0;
}

/* In the 16 bits that begin with the header's length (RFC 9293 §3.1). */
enum tcp_flags { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_PSH = 8, TCP_ACK = 16 };

enum tcp_option {
	TCP_OPTION_END = 0,
	TCP_OPTION_NOP = 1,
	TCP_OPTION_MSS = 2,
	TCP_OPTION_WSCALE = 3,
	TCP_OPTION_SACK = 4,
	TCP_OPTION_TIMESTAMPS = 8,
};

#define TCP_OPTIONS_MAX 40
#define TCP_WSCALE_MAX 14

/* A segment's options. */
struct tcp_options {
	__u16 mss; /* 0: none */
	__u8 wscale;
	__u8 has_wscale;
	__u8 sack;
	__u8 has_timestamps;
	__u8 pad[2];
	__u32 tsval;
	__u32 tsecr;
};

struct tcp_option_scan {
	struct tcp_options o;
	__u32 at;
	__u32 length;
	__u8 bytes[TCP_OPTIONS_MAX + 12]; /* room for the longest option behind any of them */
};

static long tcp_option_step(__u32 index, void *arg)
{
	struct tcp_option_scan *s = *(struct tcp_option_scan **)arg;
	__u32 at = s->at;

	(void)index;
	if (at >= s->length || at >= TCP_OPTIONS_MAX)
		return 1;

	const __u8 *b = s->bytes + at;
	switch (b[0]) {
	case TCP_OPTION_END:
		return 1;
	case TCP_OPTION_NOP:
		s->at = at + 1;
		return 0;
	}
	if (b[1] < 2 || at + b[1] > s->length)
		return 1;
	if (b[0] == TCP_OPTION_MSS && b[1] == 4) {
		s->o.mss = b[2] << 8 | b[3];
	} else if (b[0] == TCP_OPTION_WSCALE && b[1] == 3) {
		s->o.wscale = b[2] < TCP_WSCALE_MAX ? b[2] : TCP_WSCALE_MAX;
		s->o.has_wscale = true;
	} else if (b[0] == TCP_OPTION_SACK && b[1] == 2) {
		s->o.sack = true;
	} else if (b[0] == TCP_OPTION_TIMESTAMPS && b[1] == 10 && at <= TCP_OPTIONS_MAX - 10) {
		s->o.has_timestamps = true;
		s->o.tsval = (__u32)b[2] << 24 | b[3] << 16 | b[4] << 8 | b[5];
		s->o.tsecr = (__u32)b[6] << 24 | b[7] << 16 | b[8] << 8 | b[9];
	}
	s->at = at + b[1];
	return 0;
}

/* Reads s->bytes, s->length of them. In a map, not on the stack: positions are not known then. */
static __always_inline void tcp_options_scan(struct tcp_option_scan *s)
{
	s->at = 0;
	s->o = (struct tcp_options){};
	/* What almost all segments but SYNs have, and nothing else. */
	if (s->length == 12 && s->bytes[0] == TCP_OPTION_NOP && s->bytes[1] == TCP_OPTION_NOP &&
	    s->bytes[2] == TCP_OPTION_TIMESTAMPS)
		s->at = 2;
	bpf_loop(TCP_OPTIONS_MAX, tcp_option_step, &s, 0);
}

#endif /* MQTT_FWD_TCP_H */
