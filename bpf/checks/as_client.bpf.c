// SPDX-License-Identifier: GPL-2.0-only
/*
 * On the balancer: gives what `mqtt-fwd test` sends to a service to user space, which puts it into
 * the XDP program as if it had come in on the interface, from a client: there is no other way in for
 * a host's own packets. The answers come back as answers to clients do.
 *
 * tcx: Linux 6.6.
 */
#include "../abi/check.h"

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

/* Always of this number, in each network namespace. */
#define LOOPBACK 1

/* By socket cookie. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, __u64);
	__type(value, __u8);
	__uint(max_entries, CHECK_SOCKETS);
} client_sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 21);
} client_frames SEC(".maps");

SEC("tcx/egress")
int take_frame(struct __sk_buff *skb)
{
	__u64 cookie = bpf_get_socket_cookie(skb);
	__u32 length = skb->len;
	struct client_frame *frame;

	if (!bpf_map_lookup_elem(&client_sockets, &cookie))
		return TC_ACT_UNSPEC;
	/* Gone for TCP: one that cannot be kept is one that was lost on the way. */
	frame = bpf_ringbuf_reserve(&client_frames, sizeof(*frame), 0);
	if (frame) {
		int copied = 0;

		frame->length = length;
		if (length <= sizeof(frame->bytes)) {
			/* Or clang makes one comparison of both, which is no bound. */
			barrier_var(length);
			copied = length >= ETH_HLEN &&
				 !bpf_skb_load_bytes(skb, 0, frame->bytes, length);
		}
		if (copied)
			bpf_ringbuf_submit(frame, 0);
		else
			bpf_ringbuf_discard(frame, 0);
	}
	/*
	 * To where it is nobody's: dropped here, it would be what TCP has not sent, and an
	 * acknowledgement of it a lie.
	 */
	return bpf_redirect(LOOPBACK, 0);
}

char _license[] SEC("license") = "GPL";
