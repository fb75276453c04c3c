/* SPDX-License-Identifier: GPL-2.0-only */
/* A client's record: its groups, weighed against each other. */
#ifndef MQTT_FWD_LEARN_WEIGH_H
#define MQTT_FWD_LEARN_WEIGH_H

#include "../../maps/config.h"

/* Messages that a record remembers. */
#define WEIGHT_MAX 64

/* A place in the record. What is compared is what is the index, so that the verifier knows its bounds. */
static __always_inline __u32 checked_place(__u32 place)
{
	asm volatile("" : "+r"(place));
	if (place >= CLIENT_GROUPS)
		place = 0;
	asm volatile("" : "+r"(place));
	return place;
}

static __always_inline __u32 best_place(const struct client *client)
{
	return checked_place(client->best);
}

static __always_inline binding_t client_best(const struct client *client)
{
	return READ_ONCE(client->group[best_place(client)]);
}

/* From here on only this group counts. */
static __always_inline void client_forget_others(struct client *client, binding_t group,
						 __u8 weight, __u32 generation)
{
	client->weight[0] = weight;
	client->weight[1] = 0;
	client->weight[2] = 0;
	WRITE_ONCE(client->group[0], group);
	WRITE_ONCE(client->group[1], 0);
	WRITE_ONCE(client->group[2], 0);
	client->best = 0;
	client->flags &= ~CLIENT_MULTI_GROUP;
	client->generation = generation;
}

/*
 * More messages of one of the record's groups. Of more than WEIGHT_MAX, so many are the others' no
 * longer; a group that has none left is forgotten.
 */
static __always_inline void client_weigh(struct client *client, __u32 which, __u32 messages)
{
	__u32 sum = 0, excess, others = 0;

	for (__u32 i = 0; i < CLIENT_GROUPS; i++) {
		__u32 weight = client->weight[i];

		if (i == which) {
			weight += messages;
			weight = weight < WEIGHT_MAX ? weight : WEIGHT_MAX;
			client->weight[i] = weight;
		}
		sum += weight;
	}
	excess = sum > WEIGHT_MAX ? sum - WEIGHT_MAX : 0;
	for (__u32 i = 0; i < CLIENT_GROUPS; i++) {
		__u32 weight = client->weight[i];
		__u32 less = weight < excess ? weight : excess;

		if (i == which)
			continue;
		excess -= less;
		weight -= less;
		client->weight[i] = weight;
		others += weight;
		if (!weight && i != client->best)
			WRITE_ONCE(client->group[i], 0);
	}
	if (!others)
		client->flags &= ~CLIENT_MULTI_GROUP;
}

/* The place of a group in the record: its own, a free one, or the lightest. */
static __always_inline __u32 client_place(const struct client *client, binding_t group)
{
	__u32 place = 0, lightest = ~0U;

	for (__u32 i = 0; i < CLIENT_GROUPS; i++) {
		__u32 weight = client->weight[i];

		if (client->group[i] == group)
			return i;
		if (i == client->best)
			weight = WEIGHT_MAX + 2;
		else if (!client->group[i])
			weight = 0;
		else
			weight++;
		if (weight < lightest) {
			lightest = weight;
			place = i;
		}
	}
	return place;
}

#endif /* MQTT_FWD_LEARN_WEIGH_H */
