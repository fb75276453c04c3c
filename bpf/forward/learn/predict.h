/* SPDX-License-Identifier: GPL-2.0-only */
/* The group of a connection, by what was learned of its client. */
#ifndef MQTT_FWD_LEARN_PREDICT_H
#define MQTT_FWD_LEARN_PREDICT_H

#include "record.h"

/*
 * Whether a client is bound to its group straight although there is a relay: what it published lately
 * speaks of one group. Behind an address there may be many clients, so it must have published much,
 * and never anything to another. Global (see event.h).
 */
__noinline int client_settled(const struct client *client, __u32 by_id)
{
	__u32 best, known = 0;

	if (!client)
		return false;
	best = client->best;
	if (client->flags & (CLIENT_MULTI_GROUP | CLIENT_MISJUDGED | CLIENT_FOR_RELAY))
		return false;
	for (__u32 i = 0; i < CLIENT_GROUPS; i++)
		known += client->group[i] != 0;
	if (known != 1)
		return false;
	return by_id || (!client->group_changes && client->weight[best == 1   ? 1
								  : best == 2 ? 2
									      : 0] == WEIGHT_MAX);
}

/*
 * The binding of a flow of which nothing better is known: by prediction (PREDICTED is set), else
 * to the relay, else to the default group; 0: there is no usable group.
 */
#define PREDICTED (1ULL << 32)

__noinline __u64 predict(const struct conn *c, const struct service_table *t,
			 const struct service *svc, __u64 id)
{
	struct scratch *w = scratch();

	if (!c || !t || !svc || !w)
		return 0;
	binding_t relay = relay_of(svc);
	w->id = id;
	for (int by_id = 1; by_id >= 0; by_id--) {
		struct client *client = NULL;

		if (!by_id || id)
			client = client_find(c, by_id);
		if (client) {
			client_reroute(client, t);
			binding_t best = client_best(client);
			if (group_of(best) && (!relay || client_settled(client, by_id)))
				return best | PREDICTED;
		}
		/* Of a client with an id, its address says less than the relay is worth. */
		if (relay && (client || id))
			break;
	}
	return relay ?: binding_now(svc->default_group);
}

/* The binding that a client id alone decides on; 0: it does not. */
static __always_inline binding_t client_steady(const struct conn *c, const struct service_table *t,
					       const struct service *svc, const struct scratch *w)
{
	struct client *client = w->id ? client_find(c, true) : NULL;
	binding_t best;

	if (!client || client->flags & (CLIENT_MULTI_GROUP | CLIENT_MISJUDGED | CLIENT_DOUBTED))
		return 0;
	client_reroute(client, t);
	if (svc->relay != NO_GROUP && !client_settled(client, true))
		return 0;
	best = client_best(client);
	return group_of(best) ? best : 0;
}

/* The relay, for a client id that belongs there whatever it says first; 0: it does not. */
static __always_inline binding_t client_relayed(const struct conn *c, const struct service *svc,
						const struct scratch *w)
{
	struct client *client = NULL;

	if (svc->relay != NO_GROUP && w->id)
		client = client_find(c, true);
	return client && client->flags & (CLIENT_MULTI_GROUP | CLIENT_FOR_RELAY) ? relay_of(svc)
										 : 0;
}

#endif /* MQTT_FWD_LEARN_PREDICT_H */
