/* SPDX-License-Identifier: GPL-2.0-only */
/* What one client address has used lately of what all share. */
#ifndef MQTT_FWD_ABI_SHARE_H
#define MQTT_FWD_ABI_SHARE_H

#include "base.h"

enum share_kind {
	SHARE_OF_RESCUES, /* rescues that began */
	SHARE_OF_HANDOVERS, /* connections on their way to a broker */
	SHARE_OF_CLIENTS, /* clients that were not known */
	SHARE_OF_CONNECTIONS, /* new connections, where [limits] bounds them */
	SHARES,
};

struct client_share {
	__u32 window[SHARES]; /* number of it; CLOCK_BOOTTIME */
	__u32 used[SHARES]; /* in that window */
};
SIZE_IS(struct client_share, 32);

/* The messages of a client, where [limits] bounds them. */
struct client_rate {
	__u32 second; /* CLOCK_BOOTTIME */
	__u32 used; /* in that second, and before, as far as it was more than may be */
};
SIZE_IS(struct client_rate, 8);

#endif /* MQTT_FWD_ABI_SHARE_H */
