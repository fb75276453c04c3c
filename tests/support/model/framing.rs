//! Control packets in a flow's bytes.

use super::learning::Read;
use super::{Flow, Model, Segment, Service, State};

/// What a segment may spend on topics; what one costs that is known, and one that is not.
pub(super) const TOPIC_BUDGET: i32 = 40;

pub(super) const TOPIC_COST_KNOWN: i32 = 2;

pub(super) const TOPIC_COST_WALK: i32 = 24;

pub(super) const TOPIC_BYTES_A_UNIT: usize = 32;

/// Longer topics are hashed as they come.
const SHORT_TOPIC: usize = 256;

/// How many levels of a topic are looked up among the routes' literals.
pub(super) fn look_ups(service: &Service, topic: &[u8]) -> i32 {
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

impl Model<'_> {
    pub(super) fn payload(&mut self, client: u32, flow: &mut Flow, segment: &Segment) {
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

    pub(super) fn ahead(&mut self, flow: &mut Flow, segment: &Segment) {
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

    pub(super) fn resynced(&mut self, flow: &mut Flow, segment: &Segment) {
        self.count("resynced");
        flow.state = State::Framed;
        flow.next = segment.seq.wrapping_add(segment.payload.len() as u32);
        flow.end = flow.next;
        flow.header.clear();
        flow.candidate = None;
    }

    pub(super) fn bytes(&mut self, client: u32, flow: &mut Flow, segment: &Segment, from: usize) {
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

    pub(super) fn unjudged(&mut self, flow: &mut Flow) {
        self.count(if flow.cut.is_some() { "publish_lost" } else { "unjudged" });
        flow.topic = None;
        flow.untaught = 0;
        (flow.misrouted, flow.any) = (false, false);
    }
}
