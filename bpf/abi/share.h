/* SPDX-License-Identifier: GPL-2.0-only */
/* What one client address has used lately of what all share. */
#ifndef MQTT_FWD_ABI_SHARE_H
#define MQTT_FWD_ABI_SHARE_H

#include "base.h"

enum share_kind {
	SHARE_OF_RESCUES, /* rescues that began */
	SHARE_OF_HANDOVERS, /* connections on their way to a broker */
	SHARE_OF_CLIENTS, /* clients that were not known */
	SHARES,
};

struct client_share {
	__u32 window[SHARES]; /* number of it; CLOCK_BOOTTIME */
	__u32 used[SHARES]; /* in that window */
};
SIZE_IS(struct client_share, 24);

#endif /* MQTT_FWD_ABI_SHARE_H */
