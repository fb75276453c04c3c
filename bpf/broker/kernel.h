/* SPDX-License-Identifier: GPL-2.0-only */
/* The kernel's sockets, as far as they are read here. */
#ifndef MQTT_FWD_BROKER_KERNEL_H
#define MQTT_FWD_BROKER_KERNEL_H

#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_core_read.h>
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

struct tcp_request_sock {
	__u32 rcv_isn;
	__u32 snt_isn;
} KERNEL_TYPE;

/* What a connection's TIME_WAIT socket expects next. */
static __always_inline __u32 time_wait_rcv_nxt(struct tcp_timewait_sock *tw)
{
	struct tcp_timewait_sock___own *own = (void *)tw;

	if (bpf_core_field_exists(own->tw_rcv_nxt))
		return BPF_CORE_READ(own, tw_rcv_nxt);
	return tw->tw_sk.__tw_common.skc_tw_rcv_nxt;
}

#endif /* MQTT_FWD_BROKER_KERNEL_H */
