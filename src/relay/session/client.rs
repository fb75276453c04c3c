//! What a client says: where each of its packets goes.

use std::io::IoSlice;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::io::AsyncWrite;

use super::super::hello::Kind;
use super::super::ids::{GONE, Slot};
use super::super::scan::{self, Header, Malformed, kind};
use super::super::stream;
use super::super::subscriptions::Request;
use super::super::table::Broker;
use super::super::upstream::State;
use super::{BUFFER, End, HIGH, Piece, SCRATCH, Session, Step, append};

impl Session {
    pub(super) fn read_client(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        // Its acknowledgements and PINGREQs are read even if it is slow to read what brokers have.
        let full = self.out.len() + self.behind.len() > 2 * HIGH
            || self.upstreams.iter().any(|u| u.out.len() > HIGH);
        if !self.greeted || full {
            return Ok(false);
        }
        BUFFER.with_borrow_mut(|buffer| {
            let kept = self.rest.len();
            if buffer.len() < kept + SCRATCH / 2 {
                buffer.resize(kept + SCRATCH, 0);
            }
            buffer[..kept].copy_from_slice(&self.rest);
            let mut length = kept;
            if !self.waits {
                match stream::read(&mut self.client, cx, &mut buffer[..], kept) {
                    Poll::Pending => return Ok(false),
                    Poll::Ready(Ok(0)) => {
                        return Err(End::ClientGone(std::io::ErrorKind::UnexpectedEof.into()));
                    }
                    Poll::Ready(Ok(n)) => length += n,
                    Poll::Ready(Err(e)) => return Err(End::ClientGone(e)),
                }
                self.last_in = Instant::now();
            }
            let mut pieces = Vec::new();
            let mut at = 0;
            let waited = std::mem::take(&mut self.waits);
            let end = self.client_said(&mut buffer[..length], &mut at, &mut pieces);
            self.tell_brokers(cx, buffer, &pieces);
            self.rest.clear();
            if at < length {
                self.rest.extend_from_slice(&buffer[at..length]);
            } else {
                self.rest = Vec::new();
            }
            end.map_or(Ok(!(waited && self.waits && at == 0)), Err)
        })
    }

    /// Deals with the client's bytes from `at` on. How the session ended, if it did.
    pub(super) fn client_said(
        &mut self,
        buffer: &mut [u8],
        at: &mut usize,
        pieces: &mut Vec<(Slot, Piece)>,
    ) -> Option<End> {
        let now = Instant::now();
        while *at < buffer.len() {
            if let Some((slot, left)) = self.passing {
                let n = left.min(buffer.len() - *at);
                if let Some(slot) = slot {
                    append(pieces, slot, *at..*at + n);
                }
                *at += n;
                self.passing = (n < left).then_some((slot, left - n));
                continue;
            }
            let h = match scan::header(&buffer[*at..]) {
                Ok(Some(h)) => h,
                Ok(None) => return None,
                Err(e) => return Some(End::Protocol(e)),
            };
            if h.total() > self.worker.limits.max_packet {
                return Some(too_large("control packet larger than max_packet_size"));
            }
            let step = if h.kind() == kind::PUBLISH {
                self.publish(buffer, *at, h, pieces, now)
            } else if h.total() > SCRATCH {
                return Some(too_large("control packet larger than any should be"));
            } else if buffer.len() - *at < h.total() {
                return None;
            } else {
                self.control(buffer, *at, h, pieces, now)
            };
            match step {
                Ok(Step::Took(n)) => *at += n,
                Ok(Step::More) if buffer.len() - *at > SCRATCH => {
                    return Some(too_large("PUBLISH with a header larger than any should be"));
                }
                Ok(Step::More) => return None,
                Ok(Step::Wait) => {
                    self.waits = true;
                    return None;
                }
                Err(end) => return Some(end),
            }
        }
        None
    }

    pub(super) fn publish(
        &mut self,
        buffer: &[u8],
        at: usize,
        h: Header,
        pieces: &mut Vec<(Slot, Piece)>,
        now: Instant,
    ) -> Result<Step, End> {
        let read = scan::publish(&buffer[at..], h, self.hello.v5).map_err(End::Protocol)?;
        let Some(p) = read else { return Ok(Step::More) };
        let there = (buffer.len() - at).min(h.total());
        if self.leaving && p.qos > 0 {
            // It cannot be acknowledged any more: the client repeats it on its next connection.
            self.pass(None, h, there);
            return Ok(Step::Took(there));
        }
        if p.alias > self.alias_max {
            let what = "topic alias larger than CONNACK allows";
            return Err(End::Protocol(Malformed { code: 0x94, what }));
        }
        let known;
        let topic = if p.topic.is_empty() {
            known = self.aliases.get(&p.alias).cloned();
            known.as_deref().ok_or(End::Protocol(Malformed {
                code: 0x82,
                what: "topic alias that stands for nothing",
            }))?
        } else {
            p.topic
        };
        let down = |b| self.worker.is_down(self.table.broker(b).addr);
        let found = self.table.broker_of(topic, down);
        let broker = found.unwrap_or(self.upstreams[usize::from(self.home)].broker);
        let again = p.qos > 0 && self.inflight.contains_key(&p.id);
        if p.qos > 0 && !again && self.inflight.len() >= usize::from(self.receive_max) {
            let what = "more messages at a time than CONNACK allows";
            return Err(End::Protocol(Malformed { code: 0x93, what }));
        }
        let there_is = self.upstreams.iter().find(|u| u.broker == broker);
        let unavailable = match there_is {
            Some(up) if up.is_ready() || up.is_opening() => false,
            // One that is up would have been chosen, if there were any.
            up => up.is_some_and(|u| u.refused) || down(broker),
        };
        if unavailable && !again {
            return Err(End::Unavailable(self.table.broker(broker).group.clone()));
        }
        let slot = if again { self.inflight[&p.id] } else { self.open(broker, Kind::Beside, now) };
        let up = &mut self.upstreams[usize::from(slot)];
        if up.is_opening() {
            return Ok(Step::Wait);
        }
        let Some(welcome) = up.welcome.as_ref().filter(|_| matches!(up.state, State::Ready(_)))
        else {
            return Err(End::Unavailable(self.table.broker(broker).group.clone()));
        };
        if p.qos > 0 && !again && up.inflight >= welcome.receive_max {
            let what = "more messages at a time than their broker takes";
            return Err(End::Protocol(Malformed { code: 0x93, what }));
        }
        if h.total() > welcome.max_packet {
            return Err(too_large("PUBLISH larger than its broker takes"));
        }
        let alias = if p.alias <= welcome.alias_max { p.alias } else { 0 };
        if p.qos > 0 && !again {
            up.inflight += 1;
            self.inflight.insert(p.id, slot);
        }
        up.last_used = now;
        let mut from = 0;
        if p.alias != 0 {
            let told = alias != 0
                && up.aliases.insert(alias, topic.into()).is_some_and(|before| *before == *topic);
            // As it is, if the broker knows the alias, or learns it by this.
            if alias == 0 || (p.topic.is_empty() && !told) {
                let mut made = Vec::new();
                scan::publish_again(h, &p, topic, alias, &mut made);
                pieces.push((slot, Piece::Made(made)));
                from = p.payload_at;
            }
            if !p.topic.is_empty() {
                self.aliases.insert(p.alias, p.topic.into());
            }
        }
        append(pieces, slot, at + from..at + there);
        self.pass(Some(slot), h, there);
        self.stats().published.add(1);
        if found.is_some() {
            self.count_group(broker);
        }
        Ok(Step::Took(there))
    }

    /// Notes what of a message is still to come.
    pub(super) fn pass(&mut self, slot: Option<Slot>, h: Header, there: usize) {
        self.passing = (there < h.total()).then_some((slot, h.total() - there));
    }

    /// Whether the client publishes to one group.
    pub(super) fn count_group(&mut self, broker: Broker) {
        let group = &self.table.broker(broker).group;
        match &mut self.published {
            Some((one, count)) if **one == **group => *count += 1,
            Some((one, count)) if *count == 0 => {
                *one = group.as_str().into();
                *count = 1;
            }
            other => *other = None,
        }
    }

    /// Any packet of the client's but PUBLISH and DISCONNECT. It is there as a whole.
    pub(super) fn control(
        &mut self,
        buffer: &mut [u8],
        at: usize,
        h: Header,
        pieces: &mut Vec<(Slot, Piece)>,
        now: Instant,
    ) -> Result<Step, End> {
        let range = at..at + h.total();
        let packet = &buffer[range.clone()];
        let id = || scan::id(packet, h).map_err(End::Protocol);
        match h.kind() {
            kind::PUBACK | kind::PUBREC | kind::PUBCOMP => {
                let id = id()?;
                let failed = scan::reason(packet, h) >= 0x80;
                match self.deliveries.owner(id) {
                    // Of a broker that is gone; the client is helped to forget it.
                    Some((GONE, _)) | None if h.kind() == kind::PUBREC && !failed => {
                        let pubrel = acknowledgement(kind::PUBREL << 4 | 2, id, self.hello.v5);
                        self.tell_client(&pubrel);
                    }
                    Some((GONE, _)) => self.deliveries.done(id),
                    Some((slot, own)) => {
                        buffer[at + h.length..at + h.length + 2]
                            .copy_from_slice(&own.to_be_bytes());
                        append(pieces, slot, range);
                        if h.kind() != kind::PUBREC || failed {
                            self.deliveries.done(id);
                        }
                    }
                    None => {}
                }
            }
            kind::PUBREL => {
                let id = id()?;
                match self.inflight.get(&id) {
                    Some(slot) => append(pieces, *slot, range),
                    // Of a connection before this one: whoever has the message knows it.
                    None if self.hello.persistent && !self.releases.contains_key(&id) => {
                        let ready = (0..self.upstreams.len() as Slot)
                            .filter(|slot| self.upstreams[usize::from(*slot)].is_ready());
                        let all: Vec<Slot> = ready.collect();
                        for slot in &all {
                            append(pieces, *slot, range.clone());
                        }
                        self.releases.insert(id, all);
                    }
                    None if self.hello.persistent => {}
                    None => {
                        self.tell_client(&acknowledgement(kind::PUBCOMP << 4, id, self.hello.v5));
                    }
                }
            }
            kind::SUBSCRIBE | kind::UNSUBSCRIBE => return self.request(packet, pieces, now),
            kind::PINGREQ => self.tell_client(&[kind::PINGRESP << 4, 0]),
            kind::DISCONNECT => return Err(End::Disconnected(packet.to_vec())),
            _ => {
                let what = "control packet that a connected client does not send";
                return Err(End::Protocol(Malformed { code: 0x82, what }));
            }
        }
        Ok(Step::Took(h.total()))
    }

    /// SUBSCRIBE or UNSUBSCRIBE: to every broker that can have messages for its topic filters.
    pub(super) fn request(
        &mut self,
        packet: &[u8],
        pieces: &mut Vec<(Slot, Piece)>,
        now: Instant,
    ) -> Result<Step, End> {
        let (id, request) = Request::read(packet, self.hello.v5).map_err(End::Protocol)?;
        if self.subscriptions.exceeds(&request, self.worker.limits.subscriptions as usize) {
            let what = "more subscriptions than [relay] subscriptions allows";
            return Err(End::Protocol(Malformed { code: 0x97, what }));
        }
        let mut wanted: Vec<(Slot, Vec<usize>)> = Vec::new();
        for i in 0..request.len() {
            for broker in self.table.brokers_for(request.filter(i)) {
                let slot = self.open_or_retry(broker, now);
                match wanted.iter_mut().find(|(s, _)| *s == slot) {
                    Some((_, filters)) => filters.push(i),
                    None => wanted.push((slot, vec![i])),
                }
            }
        }
        if wanted.iter().any(|(slot, _)| self.upstreams[usize::from(*slot)].is_opening()) {
            return Ok(Step::Wait);
        }
        if matches!(request, Request::Subscribe(..)) {
            for (slot, _) in &wanted {
                self.upstreams[usize::from(*slot)].subscribed = true;
            }
        }
        wanted.retain(|(slot, _)| self.upstreams[usize::from(*slot)].is_ready());
        for (slot, filters) in &wanted {
            pieces.push((*slot, Piece::Made(request.packet(id, filters, self.hello.v5))));
            self.upstreams[usize::from(*slot)].last_used = now;
        }
        self.subscriptions.begin(id, &request, wanted);
        if let Some(answer) = self.subscriptions.finished(id, self.hello.v5) {
            self.tell_client(&answer);
        }
        Ok(Step::Took(packet.len()))
    }

    /// Gives every broker what is for it, in one write each.
    pub(super) fn tell_brokers(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &[u8],
        pieces: &[(Slot, Piece)],
    ) {
        let now = Instant::now();
        for (slot, up) in self.upstreams.iter_mut().enumerate() {
            let of_slot = pieces.iter().filter(|(s, _)| usize::from(*s) == slot);
            let mut slices: Vec<IoSlice<'_>> =
                of_slot.map(|(_, piece)| IoSlice::new(piece.slice(buffer))).collect();
            if slices.is_empty() {
                continue;
            }
            up.last_out = now;
            // What is wrong with its connection is found when it is read.
            let stream: &mut (dyn AsyncWrite + Unpin) = match &mut up.state {
                State::Ready(stream) | State::Opening(stream) => stream,
                _ => continue,
            };
            if up.out.write(&mut &mut *stream, cx, &mut slices).is_err() {
                up.broken = true;
            }
        }
    }

    /// Something made here for the client: behind the message that it is just getting.
    pub(super) fn tell_client(&mut self, bytes: &[u8]) {
        if self.getting.is_some() {
            self.behind.extend_from_slice(bytes);
        } else {
            self.out.push(bytes);
        }
    }
}

fn too_large(what: &'static str) -> End {
    End::Protocol(Malformed { code: 0x95, what })
}

/// PUBREL or PUBCOMP for an identifier that nobody knows (MQTT 5: reason code 0x92).
fn acknowledgement(first: u8, id: u16, v5: bool) -> Vec<u8> {
    let [high, low] = id.to_be_bytes();
    if v5 { vec![first, 3, high, low, 0x92] } else { vec![first, 2, high, low] }
}
