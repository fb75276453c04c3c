/* SPDX-License-Identifier: GPL-2.0-only */
/* Predictions: client address → the group of the topic that it published last. */
#ifndef MQTT_FWD_LEARN_H
#define MQTT_FWD_LEARN_H

#include "event.h"
#include "route.h"

struct binding {
	__u16 group;
	__u16 epoch; /* 0: no usable group */
	__u32 predicted;
};

/* A mixed client's flows are reset for a misprediction this often at most: its next topic
 * is as likely to be wrong again, and a client that is reset all the time gets nothing done.
 */
#define MIXED_RESET_PAUSE_S 10

static __always_inline __u32 now_s(void)
{
	return bpf_ktime_get_boot_ns() / 1000000000ULL;
}

static __always_inline void saturating_inc16(__u16 *n)
{
	if (*n != 0xffff)
		*n += 1;
}

/*
 * The group that a flow of this client is bound to as long as nothing better is known. A
 * prediction from before a change of routes counts by its topic's new group, which user
 * space has put beside the topic before it switched generations.
 */
__noinline int predict(const struct conn *c, const struct service_table *t,
		       const struct service *svc, struct binding *b)
{
	struct client *client;

	if (!c || !t || !svc || !b)
		return 0;
	client = client_find(c);
	if (client) {
		if (client->generation != t->generation) {
			__u64 key = client->topic;
			const struct topic *topic = bpf_map_lookup_elem(&topics, &key);
			const struct topic_verdict *v =
				topic ? &topic->verdict[t->generation & 1] : NULL;

			if (v && v->generation == t->generation) {
				client->group = v->group;
				client->epoch = v->epoch;
				client->generation = v->generation;
			}
		}
		if (group_alive(client->group, client->epoch)) {
			b->group = client->group;
			b->epoch = client->epoch;
			b->predicted = true;
			return 0;
		}
	}

	__u32 key = svc->default_group;
	const struct group *g = bpf_map_lookup_elem(&groups, &key);
	b->group = svc->default_group;
	b->epoch = g ? g->epoch : 0;
	b->predicted = false;
	return 0;
}

/* Keep the topic's text and verdict, for people and for changes of routes. */
static __always_inline void topic_store(struct work *w, __u64 hash, const struct binding *to,
					const struct service *svc, __u32 generation)
{
	struct topic_verdict verdict = {
		.generation = generation, .group = to->group, .epoch = to->epoch
	};
	struct topic *known = bpf_map_lookup_elem(&topics, &hash);

	if (known) {
		known->verdict[generation & 1] = verdict;
		return;
	}
	w->topic.verdict[0] = verdict;
	w->topic.verdict[1] = verdict;
	w->topic.service = svc->id;
	w->topic.length = w->stream.whole.length;
	__builtin_memcpy(w->topic.text, w->stream.text, TOPIC_TEXT_MAX);
	bpf_map_update_elem(&topics, &hash, &w->topic, BPF_ANY);
}

/*
 * A flow that proved itself published `hash`, which belongs to `to`. Returns true if the
 * flow may be reset for it (see MIXED_RESET_PAUSE_S).
 */
__noinline int learn(const struct conn *c, const struct flow *f, __u64 hash,
		     const struct binding *to, __u32 generation)
{
	if (!c || !f || !to)
		return false;

	struct client *client = client_find(c);
	__u32 bit = 1U << (to->group & 31);
	bool first = !(f->flags & FLOW_PUBLISHED);
	bool hit = f->group == to->group;
	bool changed = true;

	if (client) {
		changed = client->topic != hash;
		if (client->group != to->group) {
			saturating_inc16(&client->group_changes);
			if (client->groups_seen & bit && !(client->flags & CLIENT_MIXED)) {
				client->flags |= CLIENT_MIXED;
				count(REASON_MIXED);
			}
		}
		client->groups_seen |= bit;
		client->topic = hash;
		client->learned_s = now_s();
		client->generation = generation;
		client->group = to->group;
		client->epoch = to->epoch;
	} else {
		__u32 zero = 0;
		struct work *w = bpf_map_lookup_elem(&work, &zero);

		if (!w)
			return !hit;
		w->client = (struct client){
			.topic = hash,
			.groups_seen = bit,
			.learned_s = now_s(),
			.generation = generation,
			.group = to->group,
			.epoch = to->epoch,
		};
		if (client_store(c, &w->client))
			count(REASON_MAP_FULL);
		client = client_find(c);
		if (!client)
			return !hit;
	}

	if (first && f->flags & FLOW_PREDICTED) {
		if (hit) {
			client->hits++;
			count(REASON_PREDICTION_HIT);
		} else {
			client->misses++;
			count(REASON_PREDICTION_MISS);
		}
	}
	if (changed) {
		count(REASON_LEARNED);
		report_event(c, EVENT_LEARNED, from_to(f->group, to->group), hash, 0);
	}
	if (hit)
		return false;
	if (client->flags & CLIENT_MIXED &&
	    (f->flags & FLOW_AGREED ||
	     (client->reset_s && now_s() - client->reset_s < MIXED_RESET_PAUSE_S)))
		return false;
	client->reset_s = now_s();
	return true;
}

#endif /* MQTT_FWD_LEARN_H */
