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
#include "../share.h"
#include "weigh.h"

/* By how many a group of a multi-group client must lead before the prediction changes. */
#define WEIGHT_LEAD 4
/* Of a group with so many messages, one connection is not enough to say that the client has another. */
#define DOUBT_WEIGHT 8
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

/*
 * Remembers the client whose id w->client_id has, if it is new: what it publishes will be learned
 * from its flow.
 */
static __always_inline int client_id_keep(const struct conn *c, struct scratch *w)
{
	if (!w->id || bpf_map_lookup_elem(&client_ids, &w->id) || !client_admitted(c))
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
 * seen in under the old routes says nothing under the new ones. Global (see event.h).
 */
__noinline int client_reroute_now(struct client *client, const struct service_table *t)
{
	if (!client || !t)
		return 0;

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
	return 0;
}

static __always_inline void client_reroute(struct client *client, const struct service_table *t)
{
	if (client->generation != t->generation)
		client_reroute_now(client, t);
}

/* A flag of the record's is set: it takes many messages that do not speak for it until it is taken back. */
static __always_inline void client_flag(struct client *client, __u8 flag)
{
	__u8 *weight = &client->weight[best_place(client)];

	client->flags |= flag;
	if (*weight > DOUBT_WEIGHT)
		*weight = DOUBT_WEIGHT;
}

/* The client belongs to the relay. */
__noinline int learn_for_relay(const struct conn *c)
{
	struct client *client;

	if (!c)
		return 0;
	client = client_find(c, true);
	if (client)
		client_flag(client, CLIENT_FOR_RELAY);
	return 0;
}

/* The place of a topic (struct topic), whose first bytes are in a map, with zeroes behind them. */
static __always_inline __u64 place_of_text(const __u8 text[TOPIC_TEXT_MAX], __u32 length)
{
	__u32 kept = length < TOPIC_TEXT_MAX ? length : TOPIC_TEXT_MAX;
	struct siphash h;
	__u64 word = 0;

	siphash_init(&h, 0, 0);
#pragma nounroll
	for (__u32 i = 0; i < TOPIC_TEXT_MAX / 8; i++) {
		word = load_le64(text + 8 * i);
		if (8 * i + 8 > kept)
			break;
		siphash_word(&h, word);
		word = 0;
	}
	return siphash_final(&h, word, kept);
}

/*
 * Stores the topic in scratch.stream with its group (scratch.publish), for people, for changes of routes, and so as not
 * to walk again. Global (see event.h).
 */
__noinline int topic_store(const struct service *svc)
{
	struct scratch *w = scratch();
	struct topic_verdict *verdict;
	struct topic *stored;
	__u32 generation;

	if (!svc || !w)
		return 0;
	generation = w->publish.generation;
	stored = bpf_map_lookup_elem(&topics, &w->publish.hash);
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
	w->topic.place = place_of_text(w->stream.text, w->stream.whole.length);
	__builtin_memcpy(w->topic.text, w->stream.text, TOPIC_TEXT_MAX);
	if (bpf_map_update_elem(&topics, &w->publish.hash, &w->topic, BPF_ANY))
		count(REASON_MAP_FULL);
	else
		map_used(TRACKED_TOPICS, 1, 0);
	return 0;
}

/* Whether a flow of the client's was ended of late, and it may well need its group again. */
static __always_inline bool client_paused(const struct client *client)
{
	return client->flags & CLIENT_MULTI_GROUP && client->ended_s &&
	       (__u16)(now_s() - client->ended_s) < MULTI_GROUP_PAUSE_S;
}

/*
 * A flow that is not accepted yet published scratch.publish: whether it may be ended for that. If nothing is known
 * of its client id and its CONNECT was answered here, it is bound by that the next time, so that its broker says
 * what it has to say of CONNECT; only the first time is a refusal a reset.
 */
__noinline int learn_unproven(const struct conn *c, const struct service_table *t, __u32 answered)
{
	const struct scratch *w = scratch();
	struct client *client;

	if (!c || !t || !w)
		return false;
	client = client_find(c, true);
	if (!client)
		return true;
	if (answered && !client_best(client) && w->publish.to) {
		client_forget_others(client, w->publish.to, 1, t->generation);
		client->topic = w->publish.hash;
	}
	return !client_paused(client);
}

enum learned {
	LEARNED_MAY_END = 1 << 0, /* the client's next connection would be bound to that group, and
				     this one may be ended for it */
	LEARNED_CHANGED = 1 << 1, /* the prediction was made or changed; group before: << 16 */
	LEARNED_DOUBT = 1 << 2, /* one more connection will change it */
};

/* With learn()'s number of messages. */
enum learn_how {
	LEARN_MESSAGES = 0xffff,
	LEARN_DOUBTED = 1 << 16, /* the flow has made the record doubt before */
	LEARN_RELAY = 1 << 17, /* there is a relay: whoever publishes to two groups belongs there */
	LEARN_DECAYS = 1 << 18, /* nothing of the flow says that it needs the relay */
	LEARN_ADDRESS = 1 << 19, /* the record is the address's, whatever the client id */
};

/* A new record, of scratch.lesson_group's messages: enum learned. Global (see event.h). */
__noinline __u32 client_add(const struct conn *c, const struct service_table *t, __u32 how)
{
	__u32 messages = how & LEARN_MESSAGES;
	struct scratch *w = scratch();
	long failed;

	if (!c || !t || !w || !client_admitted(c))
		return 0;
	__builtin_memset(&w->client, 0, sizeof(w->client));
	w->client.topic = w->lesson_topic;
	w->client.group[0] = w->lesson_group;
	w->client.weight[0] = messages < WEIGHT_MAX ? messages : WEIGHT_MAX;
	w->client.learned_s = now_s();
	w->client.generation = t->generation;
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
	return LEARNED_MAY_END | LEARNED_CHANGED | (__u32)NO_GROUP << 16;
}

/* What scratch.lesson_group's messages change in a record that is of the same routes: enum learned. Global (see event.h). */
__noinline __u32 client_hear(struct client *client, __u32 how)
{
	struct scratch *w = scratch();
	bool known, believed;
	__u32 place;

	if (!client || !w)
		return 0;
	place = checked_place(client_place(client, w->lesson_group));
	known = client->group[place] == w->lesson_group;
	believed = client->weight[best_place(client)] < DOUBT_WEIGHT ||
		   (known && client->flags & CLIENT_DOUBTED && !(how & LEARN_DOUBTED));
	if (!known) {
		client->weight[place] = 0;
		WRITE_ONCE(client->group[place], w->lesson_group);
	}
	/* It left this group, and is back; or it left, and there is the relay for it. */
	if (!(client->flags & CLIENT_MULTI_GROUP) &&
	    (place == best_place(client)
		     ? client->flags & CLIENT_DOUBTED
		     : how & LEARN_RELAY || (known && !(client->flags & CLIENT_DOUBTED)))) {
		client->flags |= CLIENT_MULTI_GROUP;
		count(REASON_MULTI_GROUP);
	}
	client_weigh(client, place, how & LEARN_MESSAGES);
	if (place == best_place(client)) {
		client->flags &= ~CLIENT_DOUBTED;
		if (client->weight[place] == WEIGHT_MAX && how & LEARN_DECAYS)
			client->flags &= ~(CLIENT_FOR_RELAY | CLIENT_MISJUDGED);
		return LEARNED_MAY_END;
	}
	SATURATING_INC(client->group_changes, 0xff);
	if (client->flags & CLIENT_MULTI_GROUP) {
		believed = client->weight[place] > client->weight[best_place(client)] + WEIGHT_LEAD;
	} else if (!believed) {
		client->flags |= CLIENT_DOUBTED;
		return LEARNED_MAY_END | LEARNED_DOUBT;
	}
	client->flags &= ~CLIENT_DOUBTED;
	if (!believed)
		return how & LEARN_RELAY ? LEARNED_MAY_END : 0;
	client->best = place;
	return LEARNED_MAY_END | LEARNED_CHANGED;
}

/*
 * An accepted flow (mqtt/publish.h) published `how` & LEARN_MESSAGES messages of topic scratch.lesson_topic, which
 * belongs to scratch.lesson_group: enum learned. To be sent to another group takes more than one connection, if
 * there were many messages; to be sent to the relay, where nothing is lost, takes one.
 */
__noinline __u32 learn(const struct conn *c, const struct service_table *t, __u32 how)
{
	struct scratch *w = scratch();
	__u32 learned = LEARNED_MAY_END;
	struct client *client;
	binding_t before;

	if (!c || !t || !w || !w->lesson_group)
		return 0;
	client = client_find(c, w->id && !(how & LEARN_ADDRESS));
	if (!client) {
		/* A client id's record was made when the flow was, and is gone. */
		return w->id && !(how & LEARN_ADDRESS) ? 0 : client_add(c, t, how);
	}
	client_reroute(client, t);
	before = client_best(client);
	if (client->generation != t->generation || !group_of(before)) {
		/* Nothing that it says counts any more. */
		client_forget_others(client, w->lesson_group, 0, t->generation);
		client_weigh(client, 0, how & LEARN_MESSAGES);
		learned |= before != w->lesson_group ? LEARNED_CHANGED : 0;
	} else {
		learned = client_hear(client, how);
	}
	if (learned & LEARNED_MAY_END && !(learned & LEARNED_DOUBT))
		client->topic = w->lesson_topic;
	client->learned_s = now_s();
	if (client_paused(client))
		learned &= ~LEARNED_MAY_END;
	return learned |
	       (learned & LEARNED_CHANGED ? (before ? binding_group(before) : NO_GROUP) << 16 : 0);
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
		client_flag(client, CLIENT_MISJUDGED);
		count(REASON_CLIENT_MISJUDGED);
	}
	return 0;
}

#endif /* MQTT_FWD_LEARN_RECORD_H */
