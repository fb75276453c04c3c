/* SPDX-License-Identifier: GPL-2.0-only */
/* A PUBLISH whose topic is known: whose it is, and what follows for its flow and client. */
#ifndef MQTT_FWD_PUBLISH_H
#define MQTT_FWD_PUBLISH_H

#include "../flow/cache.h"
#include "../learn/record.h"
#include "../end/begin_rescue.h"
#include "route.h"

/* Messages that a flow gathers before its client's record hears of them: often enough that a
 * connection that is never closed counts. */
#define UNRECORDED_MAX 32

/* What a PUBLISH of the flow's last topic, or with an alias, counts as. */
static __always_inline enum reason publish_reason(const struct flow *f)
{
	if (f->flags & FLOW_ENDED)
		return REASON_PUBLISH_LOST;
	return f->flags & FLOW_MISROUTED ? REASON_MISPREDICTED : REASON_PUBLISH;
}

/*
 * A PUBLISH of the flow's last topic, under the same routes. Returns false, having changed
 * nothing, if it is time to judge the topic again.
 */
static __always_inline bool publish_again(struct flow *f)
{
	if (f->flags & FLOW_TRUSTED && !(f->flags & (FLOW_ENDED | FLOW_ANY_TOPIC))) {
		if (f->unrecorded + 1 >= UNRECORDED_MAX)
			return false;
		f->unrecorded++;
	}
	return true;
}

/* Tells the client's record, and whoever listens. Whether a misrouted flow may be ended. */
static __always_inline bool teach(const struct conn *c, struct flow *f,
				  const struct service_table *t, const struct service *svc,
				  __u64 hash, binding_t group, __u32 messages)
{
	struct scratch *w = scratch();
	__u32 learned, how = messages;

	if (!w)
		return false;
	w->lesson_topic = hash;
	w->lesson_group = group;
	how |= svc->relay != NO_GROUP ? LEARN_RELAY : 0;
	how |= f->connect & FLOW_DOUBTED ? LEARN_DOUBTED : 0;
	how |= f->connect & (FLOW_LASTING | FLOW_FOR_RELAY) ? 0 : LEARN_DECAYS;
	learned = learn(c, t, how);
	if (learned & LEARNED_DOUBT)
		f->connect |= FLOW_DOUBTED;
	if (learned & LEARNED_CHANGED) {
		count(REASON_LEARNED);
		report_event(c, EVENT_LEARNED, from_to(learned >> 16, group), hash, 0);
	}
	if (f->bound_by == BOUND_BY_UNANSWERED)
		learn(c, t, how | LEARN_ADDRESS);
	return learned & LEARNED_MAY_END;
}

/* Tells the client's record of the flow's messages that it does not weigh yet. */
static __always_inline void publish_record_rest(const struct conn *c, struct flow *f,
						const struct service_table *t,
						const struct service *svc)
{
	__u32 messages = f->unrecorded;
	__u64 hash = f->topic;
	struct scratch *w = scratch();

	if (!w || !messages || !(f->flags & FLOW_TRUSTED))
		return;
	w->id = flow_client(f);
	f->unrecorded = 0;
	if (!(f->connect & FLOW_ACCEPTED))
		return;
	const struct topic *topic = bpf_map_lookup_elem(&topics, &hash);
	const struct topic_verdict *v = topic ? &topic->verdict[t->generation & 1] : NULL;

	if (v && v->generation == t->generation && binding_group(v->binding) != ANY_GROUP)
		teach(c, f, t, svc, hash, v->binding, messages);
}

/*
 * A misrouted PUBLISH, or a SUBSCRIBE, that begins at sequence number `start`: its broker is not to see
 * it, nor what follows.
 */
static __always_inline void flow_end(struct scratch *w, struct flow *f, const struct conn *c,
				     __u32 start, bool inside, bool rescued)
{
	f->flags |= FLOW_ENDED;
	if (rescued) {
		f->flags |= FLOW_RESCUED;
		w->end = 0; /* what follows is not framed here */
	}
	if (inside)
		f->flags |= FLOW_END_INSIDE;
	f->end_seq = start;
	count(REASON_FLOW_ENDED);
	if (f->connect & FLOW_ACCEPTED)
		learn_outcome(c, false, true);
}

/* How good the prediction was that the flow was bound by. */
static __always_inline void teach_outcome(const struct conn *c, const struct flow *f, bool right)
{
	learn_outcome(c, right, false);
	if (!right && f->bound_by == BOUND_BY_CLIENT_ID)
		learn_misjudged(c);
}

/*
 * Whether the flow's client went on after a CONNACK: it acknowledged as many bytes as the shortest has. Whoever
 * writes in another's name, blindly or before a broker refuses it, does not, and teaches nothing. Where CONNACK
 * came from here, it takes a byte of the broker's, or a sign of its kernel's, so that a client that only
 * publishes at QoS 0 teaches, too.
 */
static __always_inline bool flow_went_on(const struct flow *f, const struct conn *c)
{
	bool ended = f->flags & FLOW_ENDED, answered = f->bound_by == BOUND_BY_ANSWERED;
	__u32 acked = c->ack - (ended ? f->ack : f->first_ack);
	__u32 enough = !answered ? HANDOVER_CONNACK : ended ? 1 : HANDOVER_CONNACK + 1;

	if (!(f->connect & FLOW_CONNECT_READ))
		return false;
	/* Of a program that did not look at this yet. */
	if (!ended && !f->first_ack)
		return true;
	return (answered && !(f->flags & FLOW_UNCONFIRMED)) ||
	       (acked >= enough && acked < FLOW_WINDOW);
}

/* From here on the flow teaches, and what it has shown so far counts. Global (see event.h). */
__noinline int flow_accept(const struct conn *c, struct flow *f, const struct service_table *t,
			   const struct service *svc)
{
	struct scratch *w = scratch();

	if (!c || !f || !t || !svc || !w)
		return 0;
	f->connect |= FLOW_ACCEPTED;
	w->id = flow_client(f);
	if (f->flags & FLOW_PUBLISHED && f->flags & FLOW_PREDICTED)
		teach_outcome(c, f, !(f->flags & FLOW_MISROUTED));
	if (f->connect & FLOW_FOR_RELAY)
		learn_for_relay(c);
	publish_record_rest(c, f, t, svc);
	if (f->flags & FLOW_ENDED)
		learn_outcome(c, false, true);
	return 0;
}

/*
 * The flow's first PUBLISH, one with another topic than the last, or one after so many that the
 * client's record should hear of them: scratch.publish. Global (see event.h).
 */
__noinline int publish_judge(const struct conn *c, struct flow *f, const struct service_table *t,
			     const struct service *svc)
{
	struct scratch *w = scratch();
	const struct publish *p;
	binding_t bound;
	__u32 messages;
	bool right, relayed, same_group, rescued, may_end = false;

	if (!c || !f || !t || !svc || !w)
		return 0;
	if (f->flags & FLOW_ENDED) {
		count(REASON_PUBLISH_LOST);
		return 0;
	}
	p = &w->publish;
	w->id = flow_client(f);
	bound = flow_binding(f, c);
	/* The relay takes all, but who the client is has to be learned there, too. */
	relayed = svc->relay != NO_GROUP && belongs_to(bound, svc->relay);
	right = relayed || belongs_to(bound, binding_group(p->to));
	same_group = f->topic == p->hash || (right && !relayed && !(f->flags & FLOW_MISROUTED));
	if (!same_group)
		publish_record_rest(c, f, t, svc);
	messages = f->unrecorded + 1;
	flow_topic(f, p->hash, p->print);
	f->generation = p->generation;
	if (same_group && right && f->flags & FLOW_PUBLISHED && messages < UNRECORDED_MAX) {
		/* Another topic of the flow's own group: nothing new about the client. */
		f->flags &= ~(FLOW_MISROUTED | FLOW_ANY_TOPIC);
		f->unrecorded = f->flags & FLOW_TRUSTED ? messages : 0;
		count(REASON_PUBLISH);
		return 0;
	}
	f->unrecorded = 0;
	f->flags &= ~(FLOW_MISROUTED | FLOW_ANY_TOPIC);
	if (binding_group(p->to) == ANY_GROUP || f->flags & FLOW_ROUTED) {
		f->flags |= FLOW_ANY_TOPIC;
		count(REASON_PUBLISH);
		return 0;
	}

	if (f->flags & FLOW_TRUSTED) {
		if (!(f->flags & FLOW_PUBLISHED) && f->flags & FLOW_PREDICTED) {
			count(right ? REASON_PREDICTION_HIT : REASON_PREDICTION_MISS);
			if (f->connect & FLOW_ACCEPTED)
				teach_outcome(c, f, right);
		}
		f->flags |= FLOW_PUBLISHED;
		if (f->connect & FLOW_ACCEPTED) {
			may_end = p->to && teach(c, f, t, svc, p->hash, p->to, messages);
		} else {
			f->unrecorded = messages < UNRECORDED_MAX ? messages : UNRECORDED_MAX - 1;
			may_end = learn_unproven(c, t, f->bound_by == BOUND_BY_ANSWERED) && p->to;
		}
	}
	if (right) {
		count(REASON_PUBLISH);
		return 0;
	}

	count(REASON_MISPREDICTED);
	f->flags |= FLOW_MISROUTED;
	/* Nothing is lost by a rescue, so a client of several groups is ended as often as it takes. */
	may_end = may_end && svc->on_misprediction != MISPREDICTION_KEEP;
	rescued = false;
	if (seq_before(p->start, w->end_before)) {
		/* Repeated behind a gap: its broker has it. The next one will be judged. */
		may_end = false;
		flow_topic(f, 0, 0);
		f->unrecorded = 0;
	} else {
		rescued = f->flags & FLOW_TRUSTED && p->to && rescue_possible(c, f, svc, p->inside);
	}
	if (rescued || may_end) {
		flow_end(w, f, c, p->start, p->inside, rescued);
		if (!rescued)
			count(REASON_PUBLISH_LOST);
	}
	report_event(c, EVENT_MISPREDICTED, from_to(bound, p->to), p->hash,
		     f->flags & FLOW_ENDED ? REPORT_ENDED : 0);
	return 0;
}

/* With relay_judge()'s `how`. */
enum relay_how {
	RELAY_INSIDE = 1 << 0, /* the control packet begins before this segment */
	RELAY_SUBSCRIBER = 1 << 1,
};

/*
 * A control packet, beginning at sequence number `start`, that shows that with a relay the client belongs there: a
 * SUBSCRIBE, since no other broker has all that it may want, or a PUBLISH that cannot be judged. Global (see event.h).
 */
__noinline int relay_judge(const struct conn *c, struct flow *f, const struct service *svc,
			   __u32 start, __u32 how)
{
	struct scratch *w = scratch();
	binding_t bound;

	if (!c || !f || !svc || !w || svc->relay == NO_GROUP || !(f->flags & FLOW_TRUSTED) ||
	    f->flags & (FLOW_ENDED | FLOW_ROUTED))
		return 0;
	w->id = flow_client(f);
	bound = flow_binding(f, c);
	f->connect |= FLOW_FOR_RELAY;
	if (f->connect & FLOW_ACCEPTED)
		learn_for_relay(c);
	if (belongs_to(bound, svc->relay) || !relay_of(svc))
		return 0;
	if (how & RELAY_SUBSCRIBER)
		count(REASON_SUBSCRIBER);
	if (svc->on_misprediction == MISPREDICTION_KEEP || seq_before(start, w->end_before))
		return 0;
	flow_end(w, f, c, start, how & RELAY_INSIDE,
		 rescue_possible(c, f, svc, how & RELAY_INSIDE));
	report_event(c, EVENT_MISPREDICTED, from_to(bound, relay_of(svc)), 0, REPORT_ENDED);
	return 0;
}

#endif /* MQTT_FWD_PUBLISH_H */
