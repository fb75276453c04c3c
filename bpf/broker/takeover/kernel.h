/* SPDX-License-Identifier: GPL-2.0-only */
/* The kernel's types and functions, as far as they are used here. */
#ifndef MQTT_FWD_TAKEOVER_KERNEL_H
#define MQTT_FWD_TAKEOVER_KERNEL_H

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#define KERNEL_TYPE __attribute__((preserve_access_index))

struct tcp_sock {
	__u32 rcv_nxt;
	__u32 snd_una;
	__u32 write_seq;
} KERNEL_TYPE;

struct sock_common {
	__u32 skc_tw_rcv_nxt;
} KERNEL_TYPE;

struct sock {
	struct sock_common __sk_common;
} KERNEL_TYPE;

struct inet_timewait_sock {
	struct sock_common __tw_common;
} KERNEL_TYPE;

struct tcp_timewait_sock {
	struct inet_timewait_sock tw_sk;
} KERNEL_TYPE;

/* Since Linux 7, as far as can be seen. */
struct tcp_timewait_sock___own {
	__u32 tw_rcv_nxt;
} KERNEL_TYPE;

struct bpf_tcp_req_attrs {
	__u32 rcv_tsval;
	__u32 rcv_tsecr;
	__u16 mss;
	__u8 rcv_wscale;
	__u8 snd_wscale;
	__u8 ecn_ok;
	__u8 wscale_ok;
	__u8 sack_ok;
	__u8 tstamp_ok;
	__u8 usec_ts_ok;
	__u8 reserved[3];
};

extern int bpf_sk_assign_tcp_reqsk(struct __sk_buff *skb, struct sock *sk,
				   struct bpf_tcp_req_attrs *attrs, int attrs__sz) __ksym;

#endif /* MQTT_FWD_TAKEOVER_KERNEL_H */
