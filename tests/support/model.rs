//! The datapath's rules in plain Rust: what bpf/ is compared with.
//!
//! Written from docs/datapath.md, not from the C: it keeps the bytes of a header in a vector,
//! and maps in HashMaps.

#![allow(clippy::cast_possible_wrap)] // lengths of segments

use std::collections::{BTreeMap, HashMap, HashSet};

use mqtt_fwd::domain::filter::most_specific;
use mqtt_fwd::domain::{ANY, OnMisprediction, Service};

/// A segment as the model sees it.
#[derive(Debug, Clone)]
pub struct Segment {
    pub seq: u32,
    pub ack: u32,
    pub syn: bool,
    pub fin: bool,
    pub payload: Vec<u8>,
}

/// What becomes of one.
#[derive(Debug, PartialEq, Eq)]
pub struct Forwarded {
    pub group: String,
    pub payload: Vec<u8>,
    pub fin: bool,
}

#[derive(Debug, Clone, Default)]
#[allow(clippy::struct_excessive_bools)]
pub struct Flow {
    pub group: String,
    pub topic: Option<Vec<u8>>,
    pub state: State,
    next: u32,
    /// Behind the last byte seen.
    end: u32,
    ack: u32,
    /// Bytes of the control packet in hand, up to the end of its topic.
    header: Vec<u8>,
    predicted: bool,
    connected: bool,
    published: bool,
    misrouted: bool,
    any: bool,
    trusted: bool,
    closing: bool,
    untaught: u32,
    /// Where the flow was ended, and whether that is inside a control packet.
    cut: Option<(u32, bool)>,
    /// Segments beyond a gap: first and end sequence number, and how many.
    candidate: Option<(u32, u32, u32)>,
    /// Another connection on the same addresses: its first sequence number, its group, and
    /// whether a SYN announced it.
    rival: Option<(u32, String, bool)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    #[default]
    Framed,
    Unframed,
    Opaque,
}

/// Groups of a client's recent messages, three at most, and which of them it is predicted by.
#[derive(Debug, Clone, Default)]
pub struct Client {
    pub topic: Vec<u8>,
    pub groups: [Option<String>; 3],
    pub weights: [u32; 3],
    pub best: usize,
    pub hits: u16,
    pub misses: u16,
    pub group_changes: u8,
    pub multi_group: bool,
    was_ended: bool,
}

impl Client {
    pub fn group(&self) -> &str {
        self.groups[self.best].as_deref().unwrap_or_default()
    }
}

/// One service, as seen by one datapath.
pub struct Model<'a> {
    service: &'a Service,
    pub flows: HashMap<u64, Flow>,
    pub clients: HashMap<u32, Client>,
    pub counters: BTreeMap<&'static str, u64>,
    /// Topics that the datapath has stored.
    known: &'a mut HashSet<Vec<u8>>,
}

/// What a segment may spend on topics; what one costs that is known, and one that is not.
const TOPIC_BUDGET: i32 = 40;
const TOPIC_COST_KNOWN: i32 = 2;
const TOPIC_COST_WALK: i32 = 24;
const TOPIC_BYTES_A_UNIT: usize = 32;
/// Longer topics are hashed as they come.
const SHORT_TOPIC: usize = 256;
const UNTAUGHT_MAX: u32 = 32;
const WEIGHT_MAX: u32 = 64;
const WEIGHT_LEAD: u32 = 4;
const FLOW_WINDOW: u32 = 1 << 20;

/// How a PUBLISH's topic came.
struct Read {
    /// It lies whole in the segment, and is not long.
    whole: bool,
    /// Bytes of the topic in this segment.
    bytes: usize,
    /// The sequence number where it is cut off, and whether that is inside it.
    start: (u32, bool),
}

/// How many levels of a topic are looked up among the routes' literals.
fn look_ups(service: &Service, topic: &[u8]) -> i32 {
    use mqtt_fwd::domain::filter::Level;
    let longest = service.routes.iter().flat_map(|r| r.filter.levels()).map(|l| match l {
        Level::Literal(text) => text.len(),
        Level::One | Level::Rest => 0,
    });
    let longest = longest.max().unwrap_or(0);
    let levels: Vec<&[u8]> = topic.split(|b| *b == b'/').collect();
    let dollar = topic.first() == Some(&b'$');
    // Prefixes of routes that are alive before each level, unless one '#' takes all that follows.
    (0..levels.len())
        .take_while(|i| !service.routes.is_empty() && *i < 64)
        .filter(|i| {
            let next_literals = service.routes.iter().any(|route| {
                let filter = route.filter.levels();
                let alive = filter.len() > *i
                    && filter[..*i].iter().zip(&levels).enumerate().all(|(j, (f, l))| match f {
                        Level::Literal(text) => text.as_bytes() == *l,
                        Level::One => !(dollar && j == 0),
                        Level::Rest => false,
                    });
                alive
                    && matches!(&filter[*i], Level::Literal(text)
                    if *i > 0 || text.starts_with('$') == dollar || !dollar)
            });
            next_literals && levels[*i].len() <= longest
        })
        .count() as i32
}

enum Parsed {
    /// More bytes are needed.
    Partial,
    Malformed,
    /// A control packet; of a PUBLISH the topic, and what is left after the header.
    Packet {
        topic: Option<Vec<u8>>,
        left: u32,
    },
}

/// Looks at the bytes of a control packet from its first on.
fn parse(header: &[u8]) -> Parsed {
    let first = header[0];
    let (kind, flags) = (first >> 4, first & 0x0f);
    let flags_right = match kind {
        3 => flags & 6 != 6,
        6 | 8 | 10 => flags == 2,
        1 | 4 | 5 | 7 | 12 | 14 | 15 => flags == 0,
        _ => false,
    };
    if !flags_right {
        return Parsed::Malformed;
    }
    let mut remaining = 0usize;
    let mut at = 1;
    loop {
        let Some(byte) = header.get(at) else { return Parsed::Partial };
        remaining |= usize::from(byte & 0x7f) << (7 * (at - 1));
        at += 1;
        if byte & 0x80 == 0 {
            break;
        }
        if at == 5 {
            return Parsed::Malformed;
        }
    }
    let length_right = match kind {
        1 => remaining >= 12,
        3..=7 => remaining >= 2,
        8 | 10 => remaining >= 5,
        12 => remaining == 0,
        _ => true,
    };
    if !length_right {
        return Parsed::Malformed;
    }
    if kind != 3 {
        return Parsed::Packet { topic: None, left: remaining as u32 };
    }
    let Some(length) = header.get(at..at + 2) else { return Parsed::Partial };
    let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
    let identifier = if flags & 6 == 0 { 0 } else { 2 };
    if 2 + length + identifier > remaining {
        return Parsed::Malformed;
    }
    let Some(topic) = header.get(at + 2..at + 2 + length) else { return Parsed::Partial };
    Parsed::Packet { topic: Some(topic.to_vec()), left: (remaining - 2 - length) as u32 }
}

/// Of a PUBLISH whose header has just been read up to the length of its topic, what is still to
/// come, topic and rest; `None`: it is something else, or more or less of it, or has no topic, or is malformed.
fn publish_header(header: &[u8]) -> Option<(usize, usize)> {
    if header[0] >> 4 != 3 {
        return None;
    }
    let varint = header[1..].iter().position(|b| b & 0x80 == 0)? + 1;
    let topic = header.get(1 + varint..1 + varint + 2).filter(|_| header.len() == varint + 3)?;
    let topic = usize::from(u16::from_be_bytes([topic[0], topic[1]]));
    // As if the topic were there, whatever it is.
    match parse(&[header, &vec![0; topic]].concat()) {
        Parsed::Packet { left, .. } if topic > 0 => Some((topic, left as usize)),
        _ => None,
    }
}

/// Is there nothing left for a topic? A long one, or one that is cut off, has to fit, unless it is
/// the first.
fn over_budget(budget: i32, topic: usize, room: usize) -> bool {
    let cost = TOPIC_COST_WALK + (topic.min(room) / TOPIC_BYTES_A_UNIT) as i32;
    let by_bytes = topic > SHORT_TOPIC || topic > room;
    budget <= 0 || (budget < TOPIC_BUDGET && by_bytes && budget < cost)
}

/// Is the payload whole control packets from first to last byte?
fn is_whole_packets(mut payload: &[u8]) -> bool {
    while !payload.is_empty() {
        // The topic itself need not be there yet, only what it takes to know the length.
        let (used, left) = match parse(payload) {
            Parsed::Packet { topic, left } => {
                let varint = payload[1..].iter().take_while(|b| *b & 0x80 != 0).count() + 1;
                (1 + varint + topic.map_or(0, |t| 2 + t.len()), left as usize)
            }
            _ => return false,
        };
        let Some(rest) = payload.get(used + left..) else { return false };
        payload = rest;
    }
    true
}

/// Of a PUBLISH whose header is longer than all but its topic can be.
fn topic_complete(header: &[u8]) -> bool {
    let varint = header[1..].iter().take_while(|b| *b & 0x80 != 0).count() + 1;
    let at = 1 + varint;
    let length = u16::from_be_bytes([header[at], header[at + 1]]);
    header.len() >= at + 2 + usize::from(length)
}

impl<'a> Model<'a> {
    pub fn new(service: &'a Service, known: &'a mut HashSet<Vec<u8>>) -> Self {
        let (flows, clients, counters) = (HashMap::new(), HashMap::new(), BTreeMap::new());
        Self { service, flows, clients, counters, known }
    }

    fn count(&mut self, name: &'static str) {
        *self.counters.entry(name).or_default() += 1;
    }

    /// A group's name, or [`ANY`].
    fn route(&self, topic: &[u8]) -> String {
        // A topic that is not UTF-8 is nobody's literal, and as good as any other for wildcards.
        let topic = String::from_utf8_lossy(topic);
        most_specific(self.service.routes.iter().map(|r| &r.filter), &topic)
            .and_then(|filter| self.service.routes.iter().find(|r| r.filter == *filter))
            .map_or_else(|| self.service.default_group.clone(), |r| r.target.name().to_owned())
    }

    fn predict(&self, client: u32) -> (String, bool) {
        match self.clients.get(&client) {
            Some(known) => (known.group().to_owned(), true),
            None => (self.service.default_group.clone(), false),
        }
    }

    /// Takes a segment; what is sent on.
    pub fn segment(&mut self, client: u32, port: u16, segment: &Segment) -> Forwarded {
        let mut forwarded =
            Forwarded { group: String::new(), payload: segment.payload.clone(), fin: segment.fin };
        let key = u64::from(client) << 16 | u64::from(port);
        let Some(mut flow) = self.flows.remove(&key) else {
            forwarded.group = self.open(client, key, segment);
            return forwarded;
        };
        let length = segment.payload.len() as u32;
        let first = segment.seq.wrapping_add(1);
        if segment.syn {
            forwarded.group = match &flow.rival {
                _ if flow.next == first && !flow.closing => {
                    self.count("syn_again");
                    flow.group.clone()
                }
                Some((seq, group, _)) if *seq == first => {
                    let group = group.clone();
                    self.count("syn_again");
                    group
                }
                _ => {
                    self.count("syn_rival");
                    let (group, _) = self.predict(client);
                    flow.rival = Some((first, group.clone(), true));
                    group
                }
            };
            self.flows.insert(key, flow);
            return forwarded;
        }

        self.count(if length == 0 { "no_data" } else { "data" });
        if let Some((seq, group, by_syn)) = flow.rival.clone() {
            if seq == segment.seq && !(segment.fin && seq == flow.end) {
                self.count("flow_replaced");
                flow = Flow {
                    group,
                    state: if by_syn { State::Framed } else { State::Unframed },
                    trusted: by_syn,
                    next: seq,
                    end: seq,
                    ack: segment.ack,
                    rival: Some((flow.end, flow.group, false)),
                    ..Flow::default()
                };
            } else if length > 0 && segment.seq == flow.end && by_syn {
                flow.rival = None;
            }
        }
        if length > 0 {
            let end = segment.seq.wrapping_add(length);
            if end.wrapping_sub(flow.end).cast_signed() > 0
                && end.wrapping_sub(flow.end) < FLOW_WINDOW
            {
                flow.end = end;
            }
            self.payload(client, &mut flow, segment);
            cut(&flow, segment.seq, &mut forwarded);
        }
        let length = forwarded.payload.len() as u32;
        if segment.fin && !flow.closing && segment.seq.wrapping_add(length) == flow.end {
            self.teach_rest(client, &mut flow);
            flow.closing = true;
            self.count("flow_closed");
        }
        forwarded.group.clone_from(&flow.group);
        self.flows.insert(key, flow);
        forwarded
    }

    fn open(&mut self, client: u32, key: u64, segment: &Segment) -> String {
        let (group, predicted) = self.predict(client);
        self.count(match (segment.syn, segment.fin, predicted) {
            (false, true, _) => "stray",
            (false, false, _) => "flow_adopted",
            (true, _, true) => "flow_predicted",
            (true, _, false) => "flow_new",
        });
        if segment.fin && !segment.syn {
            return group;
        }
        let flow = Flow {
            group: group.clone(),
            state: if segment.syn { State::Framed } else { State::Unframed },
            next: segment.seq.wrapping_add(1),
            end: segment.seq.wrapping_add((segment.payload.len() as u32).max(segment.syn.into())),
            ack: segment.ack,
            predicted,
            trusted: segment.syn,
            ..Flow::default()
        };
        self.flows.insert(key, flow);
        group
    }

    fn payload(&mut self, client: u32, flow: &mut Flow, segment: &Segment) {
        match flow.state {
            State::Opaque => return,
            State::Unframed => {
                if is_whole_packets(&segment.payload) {
                    self.resynced(flow, segment);
                }
                return;
            }
            State::Framed => {}
        }
        let skip = flow.next.wrapping_sub(segment.seq).cast_signed();
        if skip < 0 {
            self.ahead(flow, segment);
        } else if skip as usize >= segment.payload.len() {
            self.count("segment_old");
        } else {
            self.bytes(client, flow, segment, skip as usize);
            flow.ack = segment.ack;
            if let Some((start, end, _)) = flow.candidate
                && flow.next == start
                && flow.header.is_empty()
                && flow.state == State::Framed
            {
                flow.next = end;
                flow.candidate = None;
                self.count("resynced");
            }
        }
    }

    fn ahead(&mut self, flow: &mut Flow, segment: &Segment) {
        let seq = segment.seq;
        self.count("segment_ahead");
        if let Some((start, end, _)) = flow.candidate {
            if seq.wrapping_sub(start) < end.wrapping_sub(start) {
                return;
            }
            if seq != end {
                flow.candidate = None;
            }
        }
        if !is_whole_packets(&segment.payload) {
            return;
        }
        let (start, _, count) = flow.candidate.unwrap_or((seq, 0, 0));
        let end = seq.wrapping_add(segment.payload.len() as u32);
        flow.candidate = Some((start, end, count + 1));
        if count + 1 < 3 {
            return;
        }
        if start.wrapping_sub(flow.next) > 1 << 20 || segment.ack.wrapping_sub(flow.ack) > 1 << 16 {
            flow.trusted = false;
        }
        self.resynced(flow, segment);
    }

    fn resynced(&mut self, flow: &mut Flow, segment: &Segment) {
        self.count("resynced");
        flow.state = State::Framed;
        flow.next = segment.seq.wrapping_add(segment.payload.len() as u32);
        flow.end = flow.next;
        flow.header.clear();
        flow.candidate = None;
    }

    fn bytes(&mut self, client: u32, flow: &mut Flow, segment: &Segment, from: usize) {
        let length = segment.payload.len();
        let seq_at = |at: usize| segment.seq.wrapping_add(at as u32);
        let mut at = from;
        let mut budget = TOPIC_BUDGET;
        // Where the control packet in hand begins, if in this segment.
        let mut start = None;
        while at < length && flow.state == State::Framed {
            if flow.header.is_empty() {
                start = Some(at);
            }
            flow.header.push(segment.payload[at]);
            at += 1;
            if flow.header.len() == 1 && !flow.connected && flow.trusted {
                if flow.header[0] != 0x10 {
                    flow.state = State::Opaque;
                    self.count("not_mqtt");
                    at = length;
                    break;
                }
                flow.connected = true;
            }
            // With no budget left, a PUBLISH whose header lies in the segment is not judged,
            // wherever its topic ends.
            if start.is_some()
                && let Some((topic, left)) = publish_header(&flow.header)
                && over_budget(budget, topic, length - at)
            {
                flow.header.clear();
                self.unjudged(flow);
                at += topic + left;
                continue;
            }
            // A topic is the only long part; do not look at all of it again at each byte.
            if flow.header.len() > 8 && !topic_complete(&flow.header) {
                continue;
            }
            match parse(&flow.header) {
                Parsed::Partial => {}
                Parsed::Malformed => {
                    flow.state = State::Unframed;
                    flow.trusted = false;
                    flow.candidate = None;
                    self.count("malformed");
                    at = length;
                }
                Parsed::Packet { topic, left } => {
                    flow.header.clear();
                    if let Some(topic) = topic {
                        // As the datapath reads it: the header at once, or byte by byte.
                        let read = Read {
                            whole: start.is_some() && topic.len() <= SHORT_TOPIC,
                            bytes: topic.len().min(at - from),
                            start: (seq_at(start.unwrap_or(from)), start.is_none()),
                        };
                        self.publish(client, flow, &topic, &read, &mut budget);
                    }
                    at += left as usize;
                }
            }
        }
        flow.next = seq_at(at);
    }

    fn publish(
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
                let known = self.clients.get_mut(&client).unwrap();
                *(if right { &mut known.hits } else { &mut known.misses }) += 1;
            }
            flow.published = true;
            may_end = self.learn(client, topic, &group, messages);
        }
        if right {
            self.count("publish");
            return;
        }
        self.count("mispredicted");
        flow.misrouted = true;
        if may_end && self.service.on_misprediction == OnMisprediction::Reset {
            self.count("flow_ended");
            self.count("publish_lost");
            flow.cut = Some(start);
            self.clients.get_mut(&client).unwrap().was_ended = true;
        }
    }

    fn unjudged(&mut self, flow: &mut Flow) {
        self.count(if flow.cut.is_some() { "publish_lost" } else { "unjudged" });
        flow.topic = None;
        flow.untaught = 0;
        (flow.misrouted, flow.any) = (false, false);
    }

    /// A PUBLISH of the flow's last topic.
    fn again(&mut self, flow: &Flow) {
        self.count(match flow {
            Flow { cut: Some(_), .. } => "publish_lost",
            Flow { misrouted: true, .. } => "mispredicted",
            _ => "publish",
        });
    }

    fn teach_rest(&mut self, client: u32, flow: &mut Flow) {
        if flow.untaught == 0 || !flow.trusted {
            return;
        }
        let messages = std::mem::take(&mut flow.untaught);
        let topic = flow.topic.clone().unwrap();
        let group = self.route(&topic);
        if group != ANY {
            self.learn(client, &topic, &group, messages);
        }
    }

    /// Whether a misrouted flow may be ended.
    fn learn(&mut self, client: u32, topic: &[u8], group: &str, messages: u32) -> bool {
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
        if mine.is_none() {
            c.weights[place] = 0;
            c.groups[place] = Some(group.to_owned());
        } else if place != was && !c.multi_group {
            c.multi_group = true;
            self.count("multi_group");
        }
        weigh(&mut c, place, messages);
        let mut may_end = true;
        if place != was {
            c.group_changes = c.group_changes.saturating_add(1);
            if !c.multi_group || c.weights[place] > c.weights[was] + WEIGHT_LEAD {
                c.best = place;
                self.count("learned");
            } else {
                may_end = false;
            }
        }
        if may_end {
            topic.clone_into(&mut c.topic);
        }
        // Tests are over before the pause is.
        may_end &= !(c.multi_group && c.was_ended);
        self.clients.insert(client, c);
        may_end
    }
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

/// What is left of a segment that crosses the place where its flow was ended.
fn cut(flow: &Flow, seq: u32, forwarded: &mut Forwarded) {
    let Some((cut, inside)) = flow.cut else { return };
    let kept = cut.wrapping_sub(seq);
    if kept.cast_signed() < 0 || kept as usize >= forwarded.payload.len() {
        return;
    }
    let removed = forwarded.payload.split_off(kept as usize);
    if removed.len() >= 2 {
        forwarded.fin = true;
        if !inside {
            forwarded.payload.extend([0xe0, 0]);
        }
    }
}
