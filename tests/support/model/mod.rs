//! The datapath's rules in plain Rust: what bpf/ is compared with.
//!
//! Written from docs/datapath.md, not from the C: it keeps the bytes of a header in a vector,
//! and maps in HashMaps.

#![allow(clippy::cast_possible_wrap)] // lengths of segments

mod framing;
mod learning;

use std::collections::{BTreeMap, HashMap, HashSet};

use mqtt_fwd::domain::filter::most_specific;
use mqtt_fwd::domain::{ANY, OnMisprediction, Service};

/// How far from where a flow is its segments can be.
const FLOW_WINDOW: u32 = 1 << 20;

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
    /// The same before the segment in hand.
    seen: u32,
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
    /// What the first segment with data acknowledged.
    first_ack: Option<u32>,
    /// Went on after a CONNACK: teaches.
    accepted: bool,
    /// Has made its client's record doubt.
    doubted: bool,
    /// Where the flow was ended, and whether that is inside a control packet.
    cut: Option<(u32, bool)>,
    /// Segments beyond a gap: first and end sequence number, and how many.
    candidate: Option<(u32, u32, u32)>,
    /// Another connection on the same addresses: its first sequence number, its group, and
    /// whether a SYN announced it.
    challenger: Option<(u32, String, bool)>,
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
    doubted: bool,
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

/// What is left of a segment at the place where its flow was ended: DISCONNECT and FIN have sequence numbers there.
fn cut(flow: &Flow, seq: u32, forwarded: &mut Forwarded) {
    let Some((cut, inside)) = flow.cut else { return };
    let goodbye: &[u8] = if inside { &[] } else { &[0xe0, 0] };
    let behind = seq.wrapping_sub(cut).cast_signed();
    let (kept, first) = if behind < 0 { (-behind, 0) } else { (0, behind) };
    let (kept, first) = (kept as usize, first as usize);
    if kept >= forwarded.payload.len() || first > goodbye.len() {
        return;
    }
    let removed = forwarded.payload.split_off(kept);
    let added = &goodbye[first..];
    forwarded.payload.extend(&added[..added.len().min(removed.len())]);
    forwarded.fin |= removed.len() > added.len();
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
            forwarded.group = match &flow.challenger {
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
                    self.count("syn_reused_port");
                    let (group, _) = self.predict(client);
                    flow.challenger = Some((first, group.clone(), true));
                    group
                }
            };
            self.flows.insert(key, flow);
            return forwarded;
        }

        self.count(if length == 0 { "no_data" } else { "data" });
        if let Some((seq, group, by_syn)) = flow.challenger.clone() {
            if seq == segment.seq && !(segment.fin && seq == flow.end) {
                self.count("flow_replaced");
                flow = Flow {
                    group,
                    state: if by_syn { State::Framed } else { State::Unframed },
                    trusted: by_syn,
                    next: seq,
                    end: seq,
                    ack: segment.ack,
                    challenger: (!flow.closing).then_some((flow.end, flow.group, false)),
                    ..Flow::default()
                };
            } else if length > 0 && segment.seq == flow.end && by_syn {
                flow.challenger = None;
            }
        }
        if flow.trusted
            && !flow.accepted
            && let Some(first) = flow.first_ack
        {
            let base = if flow.cut.is_some() { flow.ack } else { first };
            if (4..FLOW_WINDOW).contains(&segment.ack.wrapping_sub(base)) {
                self.accept(client, &mut flow);
            }
        }
        if length > 0 {
            let ahead = flow.next.wrapping_sub(segment.seq).cast_signed();
            if flow.first_ack.is_none()
                && flow.state == State::Framed
                && (0..length as i32).contains(&ahead)
            {
                flow.first_ack = Some(segment.ack);
            }
            let end = segment.seq.wrapping_add(length);
            flow.seen = flow.end;
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
            if flow.accepted {
                self.teach_rest(client, &mut flow);
            }
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
            (false, true, _) => "untracked",
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
}
