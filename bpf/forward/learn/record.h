/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What is learned from clients' messages: client address, or client id → the group of most of its recent
 * messages. The only writer of clients, client_ids and topics.
 */
#ifndef MQTT_FWD_LEARN_RECORD_H
#define MQTT_FWD_LEARN_RECORD_H

#include "../../lib/clock.h"
#include "../event.h"
#include "../flow/flow.h"
#include "weigh.h"

/* By how many a group of a multi-group client must lead before the prediction changes. */
#define WEIGHT_LEAD 4
/* A multi-group client's flows are ended this often at most: its next message may well be the
 * old group's again, and a client that reconnects all the time gets nothing done. */
#define MULTI_GROUP_PAUSE_S 60

#define SATURATING_INC(n, max)    \
	do {                      \
		if ((n) != (max)) \
			(n)++;    \
	} while (0)

/* By its client id, or else by its address. */
static __always_inline struct client *client_find(const struct conn *c, bool by_id)
{
	struct scratch *w = scratch();

	if (!w)
		return NULL;
	if (by_id && w->id) {
		struct client_id *known = bpf_map_lookup_elem(&client_ids, &w->id);
		return known ? &known->client : NULL;
	}
	if (c->v6) {
		w->client_key = client6_of(c);
		return bpf_map_lookup_elem(&clients6, &w->client_key);
	}
	struct client4 key = client4_of(c);
	return bpf_map_lookup_elem(&clients, &key);
}

/* Adds w->client. */
static __always_inline void client_add(const struct conn *c, struct scratch *w)
{
	long failed;

	if (c->v6) {
		w->client_key = client6_of(c);
		failed = bpf_map_update_elem(&clients6, &w->client_key, &w->client, BPF_ANY);
	} else {
		struct client4 key = client4_of(c);
		failed = bpf_map_update_elem(&clients, &key, &w->client, BPF_ANY);
	}
	if (failed)
		count(REASON_MAP_FULL);
	else
		map_used(c->v6 ? TRACKED_CLIENTS6 : TRACKED_CLIENTS, 1, 0);
}

/*
 * Remembers the client whose id w->client_id has, if it is new: what it publishes will be learned
 * from its flow.
 */
static __always_inline int client_id_keep(struct scratch *w)
{
	if (!w->id || bpf_map_lookup_elem(&client_ids, &w->id))
		return 0;
	__builtin_memset(&w->client_id.client, 0, sizeof(w->client_id.client));
	w->client_id.client.learned_s = now_s();
	if (bpf_map_update_elem(&client_ids, &w->id, &w->client_id, BPF_NOEXIST))
		count(REASON_MAP_FULL);
	else
		map_used(TRACKED_CLIENT_IDS, 1, 0);
	return 0;
}

/*
 * The routes were changed since the record was made. That is no evidence about the client: its
 * last topic has another group now, which user space has put beside it, and which groups it was
 * seen in under the old routes says nothing under the new ones.
 */
static __always_inline void client_reroute(struct client *client, const struct service_table *t)
{
	if (client->generation == t->generation)
		return;

	__u64 key = client->topic;
	const struct topic *topic = bpf_map_lookup_elem(&topics, &key);
	const struct topic_verdict *v = topic ? &topic->verdict[t->generation & 1] : NULL;
	__u32 best = client->best;

	if (v && v->generation == t->generation)
		client_forget_others(client,
				     binding_group(v->binding) == ANY_GROUP ? 0 : v->binding,
				     client->weight[best == 1	? 1
						    : best == 2 ? 2
								: 0],
				     t->generation);
}

/* The client subscribes. */
__noinline int learn_subscribes(const struct conn *c)
{
	struct client *client;

	if (!c)
		return 0;
	client = client_find(c, true);
	if (client)
		client->flags |= CLIENT_SUBSCRIBES;
	return 0;
}

/* Stores the topic in w->stream with its group (w->publish), for people, for changes of routes, and so as not to walk again. */
static __noinline int topic_store(struct scratch *w, const struct service *svc)
{
	__u32 generation = w->publish.generation;
	struct topic *stored = bpf_map_lookup_elem(&topics, &w->publish.hash);
	struct topic_verdict *verdict;

	if (stored) {
		verdict = generation & 1 ? &stored->verdict[1] : &stored->verdict[0];
		verdict->generation = generation;
		verdict->binding = w->publish.to;
		return 0;
	}
	if (!budget_take(&budgets, BUDGET_TOPICS, topics_per_window)) {
		count(REASON_TOPIC_NOT_STORED);
		return 0;
	}
	w->topic.verdict[0].generation = generation;
	w->topic.verdict[0].binding = w->publish.to;
	w->topic.verdict[1] = w->topic.verdict[0];
	w->topic.service = svc->id;
	w->topic.length = w->stream.whole.length;
	__builtin_memcpy(w->topic.text, w->stream.text, TOPIC_TEXT_MAX);
	if (bpf_map_update_elem(&topics, &w->publish.hash, &w->topic, BPF_ANY))
		count(REASON_MAP_FULL);
	else
		map_used(TRACKED_TOPICS, 1, 0);
	return 0;
}

enum learned {
	LEARNED_MAY_END = 1 << 0, /* the client's next connection would be bound to that group, and
				     this one may be ended for it */
	LEARNED_CHANGED = 1 << 1, /* the prediction was made or changed; group before: << 16 */
};

/* With learn()'s number of messages: the record is the address's, whatever the client id. */
#define LEARN_ADDRESS (1U << 31)

/* A trusted flow published messages of topic `hash`, which belongs to `group`: enum learned. */
__noinline __u32 learn(const struct conn *c, const struct service_table *t, __u64 hash,
		       binding_t group, __u32 messages)
{
	bool changed = false, may_end = true, by_id;
	struct client *client;

	if (!c || !t || !group)
		return 0;
	struct scratch *w = scratch();
	if (!w)
		return 0;
	by_id = w->id && !(messages & LEARN_ADDRESS);
	messages &= ~LEARN_ADDRESS;
	client = client_find(c, by_id);
	if (!client) {
		/* A client id's record was made when the flow was, and is gone. */
		if (by_id)
			return 0;
		__builtin_memset(&w->client, 0, sizeof(w->client));
		w->client.topic = hash;
		w->client.group[0] = group;
		w->client.weight[0] = messages < WEIGHT_MAX ? messages : WEIGHT_MAX;
		w->client.learned_s = now_s();
		w->client.generation = t->generation;
		client_add(c, w);
		return LEARNED_MAY_END | LEARNED_CHANGED | NO_GROUP << 16;
	}

	client_reroute(client, t);
	__u32 was = client->best;
	was = was == 1 ? 1 : was == 2 ? 2 : 0;
	binding_t before = client->group[was];
	if (client->generation != t->generation || !group_of(before)) {
		/* Nothing that it says counts any more. */
		client_forget_others(client, group, 0, t->generation);
		client_weigh(client, 0, messages);
		changed = before != group;
	} else {
		__u32 place = client_place(client, group);

		place = place == 1 ? 1 : place == 2 ? 2 : 0;
		if (client->group[place] != group) {
			client->weight[place] = 0;
			WRITE_ONCE(client->group[place], group);
		} else if (place != was && !(client->flags & CLIENT_MULTI_GROUP)) {
			/* It left this group, and is back. */
			client->flags |= CLIENT_MULTI_GROUP;
			count(REASON_MULTI_GROUP);
		}
		client_weigh(client, place, messages);
		if (place != was) {
			SATURATING_INC(client->group_changes, 0xff);
			/* Seen once, a change of topic is believed at once. */
			changed = !(client->flags & CLIENT_MULTI_GROUP) ||
				  client->weight[place] > client->weight[was] + WEIGHT_LEAD;
			if (changed)
				client->best = place;
			else
				may_end = false;
		}
	}
	client->topic = may_end ? hash : client->topic;
	client->learned_s = now_s();
	if (may_end && client->flags & CLIENT_MULTI_GROUP && client->ended_s &&
	    (__u16)(now_s() - client->ended_s) < MULTI_GROUP_PAUSE_S)
		may_end = false;
	return (may_end ? LEARNED_MAY_END : 0) |
	       (changed ? LEARNED_CHANGED | (before ? binding_group(before) : NO_GROUP) << 16 : 0);
}

/* How good the prediction was that a flow was bound by, and that a flow is ended for it. */
__noinline int learn_outcome(const struct conn *c, __u32 hit, __u32 ended)
{
	struct client *client;

	if (!c)
		return 0;
	client = client_find(c, true);
	if (!client)
		return 0;
	if (ended)
		client->ended_s = (__u16)now_s() ?: 1;
	else if (hit)
		SATURATING_INC(client->hits, 0xffff);
	else
		SATURATING_INC(client->misses, 0xffff);
	return 0;
}

/* The client id alone decided, and was wrong: no longer. */
__noinline int learn_misjudged(const struct conn *c)
{
	struct client *client;

	if (!c)
		return 0;
	client = client_find(c, true);
	if (client && !(client->flags & CLIENT_MISJUDGED)) {
		client->flags |= CLIENT_MISJUDGED;
		count(REASON_CLIENT_MISJUDGED);
	}
	return 0;
}

#endif /* MQTT_FWD_LEARN_RECORD_H */
