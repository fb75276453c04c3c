//! The datapath's rules in plain Rust: what bpf/ is compared with.
//!
//! Written from docs/datapath.md, not from the C: it keeps the bytes of a header in a vector,
//! and maps in HashMaps.

use std::collections::{BTreeMap, HashMap};

use mqtt_fwd::config::{OnMisprediction, Service};
use mqtt_fwd::routes::filter::most_specific;

/// A segment as the model sees it.
#[derive(Debug, Clone)]
pub struct Segment {
    pub seq: u32,
    pub ack: u32,
    pub syn: bool,
    pub fin: bool,
    pub payload: Vec<u8>,
}

#[derive(Debug, Clone)]
#[allow(clippy::struct_excessive_bools)]
pub struct Flow {
    pub group: String,
    pub topic: Option<Vec<u8>>,
    pub state: State,
    next: u32,
    ack: u32,
    /// Bytes of the control packet in hand, up to the end of its topic.
    header: Vec<u8>,
    predicted: bool,
    connected: bool,
    published: bool,
    agreed: bool,
    astray: bool,
    may_teach: bool,
    closing: bool,
    /// Segments beyond a hole: first and end sequence number, and how many.
    run: Option<(u32, u32, u32)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Framed,
    Unframed,
    Opaque,
    Reset,
}

#[derive(Debug, Clone, Default)]
pub struct Client {
    pub topic: Vec<u8>,
    pub group: String,
    pub hits: u32,
    pub misses: u32,
    pub group_changes: u16,
    pub mixed: bool,
    seen: Vec<String>,
    was_reset: bool,
}

/// One service, as seen by one datapath.
pub struct Model<'a> {
    service: &'a Service,
    pub flows: HashMap<u64, Flow>,
    pub clients: HashMap<u32, Client>,
    pub counters: BTreeMap<&'static str, u64>,
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

/// Is the payload whole control packets from first to last byte?
fn tiles(mut payload: &[u8]) -> bool {
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
    pub fn new(service: &'a Service) -> Self {
        Self { service, flows: HashMap::new(), clients: HashMap::new(), counters: BTreeMap::new() }
    }

    fn count(&mut self, name: &'static str) {
        *self.counters.entry(name).or_default() += 1;
    }

    fn route(&self, topic: &[u8]) -> String {
        // A topic that is not UTF-8 is nobody's literal, and as good as any other for wildcards.
        let topic = String::from_utf8_lossy(topic);
        most_specific(self.service.routes.iter().map(|r| &r.filter), &topic)
            .and_then(|filter| self.service.routes.iter().find(|r| r.filter == *filter))
            .map_or_else(|| self.service.default_group.clone(), |r| r.group.clone())
    }

    /// Takes a segment; the group that it is sent to.
    pub fn segment(&mut self, client: u32, port: u16, segment: &Segment) -> String {
        let key = u64::from(client) << 16 | u64::from(port);
        let known = self.flows.get(&key);
        if segment.syn && known.is_some_and(|f| f.next == segment.seq.wrapping_add(1) && !f.closing)
        {
            self.count("syn_again");
            return known_group(&self.flows[&key]);
        }
        if segment.syn || known.is_none() {
            return self.open(client, key, segment);
        }

        let mut flow = self.flows.remove(&key).unwrap();
        self.count(if segment.payload.is_empty() { "no_data" } else { "data" });
        if !segment.payload.is_empty() {
            self.payload(client, &mut flow, segment);
        }
        if segment.fin && !flow.closing {
            flow.closing = true;
            self.count("flow_closed");
        }
        let group = known_group(&flow);
        self.flows.insert(key, flow);
        group
    }

    fn open(&mut self, client: u32, key: u64, segment: &Segment) -> String {
        let prediction = self.clients.get(&client).map(|c| c.group.clone());
        self.count(match (segment.syn, &prediction) {
            (false, _) => "flow_adopted",
            (true, Some(_)) => "flow_predicted",
            (true, None) => "flow_new",
        });
        let predicted = prediction.is_some();
        let group = prediction.unwrap_or_else(|| self.service.default_group.clone());
        let flow = Flow {
            group: group.clone(),
            topic: None,
            state: if segment.syn { State::Framed } else { State::Unframed },
            next: segment.seq.wrapping_add(1),
            ack: segment.ack,
            header: Vec::new(),
            predicted,
            connected: false,
            published: false,
            agreed: false,
            astray: false,
            may_teach: segment.syn,
            closing: false,
            run: None,
        };
        self.flows.insert(key, flow);
        group
    }

    fn payload(&mut self, client: u32, flow: &mut Flow, segment: &Segment) {
        let end = segment.seq.wrapping_add(segment.payload.len() as u32);
        match flow.state {
            State::Opaque | State::Reset => return,
            State::Unframed => {
                if tiles(&segment.payload) {
                    self.resynced(flow, end);
                }
                return;
            }
            State::Framed => {}
        }
        let skip = flow.next.wrapping_sub(segment.seq).cast_signed();
        if skip < 0 {
            self.ahead(flow, segment, end);
        } else if skip as usize >= segment.payload.len() {
            self.count("segment_old");
        } else {
            self.bytes(client, flow, segment, skip as usize);
            flow.ack = segment.ack;
            if let Some((start, run_end, _)) = flow.run
                && flow.next == start
                && flow.header.is_empty()
                && flow.state == State::Framed
            {
                flow.next = run_end;
                flow.run = None;
                self.count("resynced");
            }
        }
    }

    fn ahead(&mut self, flow: &mut Flow, segment: &Segment, end: u32) {
        self.count("segment_ahead");
        if let Some((start, run_end, _)) = flow.run {
            if segment.seq.wrapping_sub(start) < run_end.wrapping_sub(start) {
                return;
            }
            if segment.seq != run_end {
                flow.run = None;
            }
        }
        if !tiles(&segment.payload) {
            return;
        }
        let (start, _, count) = flow.run.unwrap_or((segment.seq, 0, 0));
        flow.run = Some((start, end, count + 1));
        if count + 1 < 3 {
            return;
        }
        if start.wrapping_sub(flow.next) > 1 << 20 || segment.ack.wrapping_sub(flow.ack) > 1 << 16 {
            flow.may_teach = false;
        }
        self.resynced(flow, end);
    }

    fn resynced(&mut self, flow: &mut Flow, next: u32) {
        self.count("resynced");
        flow.state = State::Framed;
        flow.next = next;
        flow.header.clear();
        flow.run = None;
    }

    fn bytes(&mut self, client: u32, flow: &mut Flow, segment: &Segment, from: usize) {
        let length = segment.payload.len();
        let mut at = from;
        while at < length && flow.state == State::Framed {
            flow.header.push(segment.payload[at]);
            at += 1;
            if flow.header.len() == 1 && !flow.connected && flow.may_teach {
                if flow.header[0] != 0x10 {
                    flow.state = State::Opaque;
                    self.count("not_mqtt");
                    at = length;
                    break;
                }
                flow.connected = true;
            }
            // A topic is the only long part; do not look at all of it again at each byte.
            if flow.header.len() > 8 && !topic_complete(&flow.header) {
                continue;
            }
            match parse(&flow.header) {
                Parsed::Partial => {}
                Parsed::Malformed => {
                    flow.state = State::Unframed;
                    flow.may_teach = false;
                    flow.run = None;
                    self.count("malformed");
                    at = length;
                }
                Parsed::Packet { topic, left } => {
                    flow.header.clear();
                    if let Some(topic) = topic {
                        self.publish(client, flow, topic);
                    }
                    at += left as usize;
                }
            }
        }
        flow.next = segment.seq.wrapping_add(at as u32);
    }

    fn publish(&mut self, client: u32, flow: &mut Flow, topic: Vec<u8>) {
        if topic.is_empty() || flow.topic.as_ref() == Some(&topic) {
            self.count(if flow.astray { "mispredicted" } else { "publish" });
            return;
        }
        let group = self.route(&topic);
        let right = flow.group == group;
        let may_reset = flow.may_teach && self.learn(client, flow, &topic, &group);
        flow.topic = Some(topic);
        flow.published = true;
        if right {
            flow.astray = false;
            flow.agreed = true;
            self.count("publish");
            return;
        }
        self.count("mispredicted");
        if may_reset && self.service.on_misprediction == OnMisprediction::Reset {
            self.count("reset");
            flow.group = group;
            flow.state = State::Reset;
        } else {
            flow.astray = true;
        }
    }

    /// Whether the flow may be reset.
    fn learn(&mut self, client: u32, flow: &Flow, topic: &[u8], group: &str) -> bool {
        let hit = flow.group == group;
        let known = self.clients.contains_key(&client);
        let mut entry = self.clients.remove(&client).unwrap_or_default();
        let changed = !known || entry.topic != topic;
        if known && entry.group != group {
            entry.group_changes += 1;
            if entry.seen.iter().any(|g| g == group) && !entry.mixed {
                entry.mixed = true;
                self.count("mixed");
            }
        }
        if !entry.seen.iter().any(|g| g == group) {
            entry.seen.push(group.to_owned());
        }
        topic.clone_into(&mut entry.topic);
        group.clone_into(&mut entry.group);
        if !flow.published && flow.predicted {
            if hit {
                entry.hits += 1;
                self.count("prediction_hit");
            } else {
                entry.misses += 1;
                self.count("prediction_miss");
            }
        }
        if changed {
            self.count("learned");
        }
        // Tests are over before the pause is.
        let may_reset = !hit && !(entry.mixed && (flow.agreed || entry.was_reset));
        entry.was_reset |= may_reset;
        self.clients.insert(client, entry);
        may_reset
    }
}

fn known_group(flow: &Flow) -> String {
    flow.group.clone()
}
