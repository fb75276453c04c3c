//! What a PUBLISH says of its flow and its client.

use super::framing::{TOPIC_BYTES_A_UNIT, TOPIC_COST_KNOWN, TOPIC_COST_WALK, look_ups};
use super::{ANY, Client, Flow, Model, OnMisprediction};

const UNTAUGHT_MAX: u32 = 32;

const WEIGHT_MAX: u32 = 64;

const WEIGHT_LEAD: u32 = 4;

const DOUBT_WEIGHT: u32 = 8;

/// How a PUBLISH's topic came.
pub(super) struct Read {
    /// It lies whole in the segment, and is not long.
    pub(super) whole: bool,
    /// Bytes of the topic in this segment.
    pub(super) bytes: usize,
    /// The sequence number where it is cut off, and whether that is inside it.
    pub(super) start: (u32, bool),
}

/// Of the last 64 messages, so many more are this group's, and so many fewer the others'.
fn weigh(c: &mut Client, which: usize, messages: u32) {
    c.weights[which] = (c.weights[which] + messages).min(WEIGHT_MAX);
    let mut excess = c.weights.iter().sum::<u32>().saturating_sub(WEIGHT_MAX);
    for i in (0..3).filter(|i| *i != which) {
        let less = c.weights[i].min(excess);
        excess -= less;
        c.weights[i] -= less;
        if c.weights[i] == 0 && i != c.best {
            c.groups[i] = None;
        }
    }
    if (0..3).all(|i| i == which || c.weights[i] == 0) {
        c.multi_group = false;
    }
}

impl Model<'_> {
    pub(super) fn publish(
        &mut self,
        client: u32,
        flow: &mut Flow,
        topic: &[u8],
        read: &Read,
        budget: &mut i32,
    ) {
        let Read { whole, start, .. } = *read;
        if topic.is_empty() {
            self.again(flow);
            return;
        }
        if !whole {
            *budget -= (read.bytes / TOPIC_BYTES_A_UNIT) as i32;
        }
        if flow.topic.as_deref() == Some(topic) {
            let weighs = flow.cut.is_none() && flow.trusted && !flow.any;
            if !weighs || flow.untaught + 1 < UNTAUGHT_MAX {
                flow.untaught += u32::from(weighs);
                self.again(flow);
                return;
            }
        }
        let new = self.known.insert(topic.to_owned());
        *budget -= match (whole, new) {
            (true, false) => TOPIC_COST_KNOWN,
            (true, true) => {
                let bytes = topic.len() / TOPIC_BYTES_A_UNIT;
                TOPIC_COST_WALK + look_ups(self.service, topic) + bytes as i32
            }
            (false, _) => TOPIC_COST_WALK + look_ups(self.service, topic),
        };
        if flow.cut.is_some() {
            self.count("publish_lost");
            return;
        }

        let group = self.route(topic);
        let right = flow.group == group;
        let same_group = flow.topic.as_deref() == Some(topic) || (right && !flow.misrouted);
        if !same_group {
            self.teach_rest(client, flow);
        }
        let messages = flow.untaught + 1;
        flow.topic = Some(topic.to_owned());
        (flow.misrouted, flow.any) = (false, false);
        if same_group && right && flow.published && messages < UNTAUGHT_MAX {
            flow.untaught = if flow.trusted { messages } else { 0 };
            self.count("publish");
            return;
        }
        flow.untaught = 0;
        if group == ANY {
            flow.any = true;
            self.count("publish");
            return;
        }
        let mut may_end = false;
        if flow.trusted {
            if !flow.published && flow.predicted {
                self.count(if right { "prediction_hit" } else { "prediction_miss" });
                if flow.accepted {
                    self.outcome(client, right);
                }
            }
            flow.published = true;
            if flow.accepted {
                may_end = self.learn(client, flow, topic, &group, messages);
            } else {
                flow.untaught = messages.min(UNTAUGHT_MAX - 1);
                let known = self.clients.get(&client);
                may_end = !known.is_some_and(|c| c.multi_group && c.was_ended);
            }
        }
        if right {
            self.count("publish");
            return;
        }
        self.count("mispredicted");
        flow.misrouted = true;
        // Of what was forwarded from behind a gap, nothing can be cut off when it is repeated.
        if start.0.wrapping_sub(flow.seen).cast_signed() < 0 {
            (flow.topic, flow.untaught) = (None, 0);
            return;
        }
        if may_end && self.service.on_misprediction == OnMisprediction::Reset {
            self.count("flow_ended");
            self.count("publish_lost");
            flow.cut = Some(start);
            if flow.accepted {
                self.clients.get_mut(&client).unwrap().was_ended = true;
            }
        }
    }

    /// A PUBLISH of the flow's last topic.
    pub(super) fn again(&mut self, flow: &Flow) {
        self.count(match flow {
            Flow { cut: Some(_), .. } => "publish_lost",
            Flow { misrouted: true, .. } => "mispredicted",
            _ => "publish",
        });
    }

    fn outcome(&mut self, client: u32, right: bool) {
        if let Some(known) = self.clients.get_mut(&client) {
            *(if right { &mut known.hits } else { &mut known.misses }) += 1;
        }
    }

    /// The flow has gone on after its CONNACK: what it has shown so far counts.
    pub(super) fn accept(&mut self, client: u32, flow: &mut Flow) {
        flow.accepted = true;
        if flow.published && flow.predicted {
            self.outcome(client, !flow.misrouted);
        }
        self.teach_rest(client, flow);
        if flow.cut.is_some()
            && let Some(known) = self.clients.get_mut(&client)
        {
            known.was_ended = true;
        }
    }

    pub(super) fn teach_rest(&mut self, client: u32, flow: &mut Flow) {
        if flow.untaught == 0 || !flow.trusted {
            return;
        }
        let messages = std::mem::take(&mut flow.untaught);
        if !flow.accepted {
            return;
        }
        let topic = flow.topic.clone().unwrap();
        let group = self.route(&topic);
        if group != ANY {
            self.learn(client, flow, &topic, &group, messages);
        }
    }

    /// Whether a misrouted flow may be ended.
    fn learn(
        &mut self,
        client: u32,
        flow: &mut Flow,
        topic: &[u8],
        group: &str,
        messages: u32,
    ) -> bool {
        let Some(mut c) = self.clients.remove(&client) else {
            let mut c = Client { topic: topic.to_owned(), ..Client::default() };
            c.groups[0] = Some(group.to_owned());
            c.weights[0] = messages.min(WEIGHT_MAX);
            self.clients.insert(client, c);
            self.count("learned");
            return true;
        };
        let was = c.best;
        let mine = c.groups.iter().position(|g| g.as_deref() == Some(group));
        let free = c.groups.iter().position(Option::is_none);
        let place = mine.or(free).unwrap_or_else(|| {
            (0..3).filter(|i| *i != was).min_by_key(|i| (c.weights[*i], *i)).unwrap()
        });
        let of_best = c.weights[was];
        if mine.is_none() {
            c.weights[place] = 0;
            c.groups[place] = Some(group.to_owned());
        }
        let returned = if place == was { c.doubted } else { mine.is_some() && !c.doubted };
        if returned && !c.multi_group {
            c.multi_group = true;
            self.count("multi_group");
        }
        let second = mine.is_some() && c.doubted && !flow.doubted;
        weigh(&mut c, place, messages);
        let (mut may_end, mut taught) = (true, true);
        if place == was {
            c.doubted = false;
        } else {
            c.group_changes = c.group_changes.saturating_add(1);
            let believed = if c.multi_group {
                c.weights[place] > c.weights[was] + WEIGHT_LEAD
            } else {
                of_best < DOUBT_WEIGHT || second
            };
            if believed {
                c.best = place;
                self.count("learned");
            }
            taught = believed;
            may_end = believed || !c.multi_group;
            c.doubted = !believed && !c.multi_group;
            flow.doubted |= c.doubted;
        }
        if taught {
            topic.clone_into(&mut c.topic);
        }
        // Tests are over before the pause is.
        may_end &= !(c.multi_group && c.was_ended);
        self.clients.insert(client, c);
        may_end
    }
}
