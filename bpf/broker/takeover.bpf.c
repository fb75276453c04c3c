// SPDX-License-Identifier: GPL-2.0-only
/*
 * On a broker host with delayed binding: makes the kernel take over connections whose SYN the
 * balancer has answered (bpf_sk_assign_tcp_reqsk, Linux 6.9). Runs behind decap, on what that
 * unwrapped. Only segments that the balancer marked are looked at (abi/handover.h): it marks all
 * until it has seen that the broker has the connection, and established ones pass untouched.
 *
 * ingress, by the socket that is there:
 *   listener     with a cookie      the kernel makes the connection of this very segment
 *                without            it may have overtaken the first: no RST, TCP repeats it
 *   established  this connection    acknowledges what the balancer sent: held back to what the
 *                                   broker has written, or TCP would drop the segment
 *                an older one       RST in its own name, and the segment once more
 *   TIME_WAIT    likewise
 *
 * egress:
 *   the first CONNACK  not what the balancer answered: RST
 *   FIN or RST         before any CONNACK, while the client has one: RST where the client is
 *   RST                to a segment that was not to have one: dropped
 */
#include "takeover/egress.h"
#include "takeover/ingress.h"

struct exported_types {
	enum takeover_counter takeover_counter;
};
EXPORT_TYPES(exported_types);

SEC("tc")
int takeover_ingress(struct __sk_buff *skb)
{
	return from_balancer(skb);
}

SEC("tc")
int takeover_egress(struct __sk_buff *skb)
{
	return from_broker(skb);
}

char _license[] SEC("license") = "GPL";
