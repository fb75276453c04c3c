/* SPDX-License-Identifier: GPL-2.0-only */
/* The kernel's function that makes a connection. */
#ifndef MQTT_FWD_TAKEOVER_KERNEL_H
#define MQTT_FWD_TAKEOVER_KERNEL_H

#include "../kernel.h"

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
