//! Client → brokers: where each packet goes.

use std::io::IoSlice;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::io::AsyncWrite;

use super::super::ids::{GONE, Slot};
use super::super::stream;
use super::super::subscriptions::Request;
use super::super::upstream::State;
use super::{
    BUFFER, End, HIGH, Piece, REPLIES_HIGH, Release, SCRATCH, Session, Step, acknowledgement,
    append,
};
use crate::brokers::router::{Broker, Budget};
use crate::mqtt::connect::Kind;
use crate::mqtt::wire::{self, Header, Malformed, kind};

/// Topic filters of a packet whose handling nobody notices.
const FILTERS_UNHEARD: usize = 50;

impl Session {
    pub(super) fn read_client(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let full = self.outbound.pending.len() + self.outbound.deferred.len() > REPLIES_HIGH
            || self.upstreams.iter().any(|u| u.out.len() > HIGH);
        if !self.handshake.sent || full {
            return Ok(false);
        }
        BUFFER.with_borrow_mut(|buffer| {
            let kept = self.inbound.unparsed.len();
            if buffer.len() < kept + SCRATCH / 2 {
                buffer.resize(kept + SCRATCH, 0);
            }
            buffer[..kept].copy_from_slice(&self.inbound.unparsed);
            let mut length = kept;
            if !self.inbound.blocked {
                match stream::read(&mut self.client, cx, &mut buffer[..], kept) {
                    Poll::Pending => return Ok(false),
                    Poll::Ready(Ok(0)) => {
                        return Err(End::ClientGone(std::io::ErrorKind::UnexpectedEof.into()));
                    }
                    Poll::Ready(Ok(n)) => length += n,
                    Poll::Ready(Err(e)) => return Err(End::ClientGone(e)),
                }
                self.keepalive.last_in = Instant::now();
            }
            let mut pieces = Vec::new();
            let mut at = 0;
            let waited = std::mem::take(&mut self.inbound.blocked);
            let end = self.parse_client(&mut buffer[..length], &mut at, &mut pieces);
            if matches!(end, Some(End::Disconnected(_))) {
                self.leave_for_disconnect(buffer, &pieces);
            } else {
                self.write_to_brokers(cx, buffer, &pieces);
            }
            self.inbound.unparsed = buffer[at..length].to_vec();
            end.map_or(Ok(!(waited && self.inbound.blocked && at == 0)), Err)
        })
    }

    /// Handles the client's bytes from `at` on. Returns the session's end, if this was it.
    pub(super) fn parse_client(
        &mut self,
        buffer: &mut [u8],
        at: &mut usize,
        pieces: &mut Vec<(Slot, Piece)>,
    ) -> Option<End> {
        let now = Instant::now();
        while *at < buffer.len() {
            if let Some((slot, left)) = self.inbound.forwarding {
                let n = left.min(buffer.len() - *at);
                if let Some(slot) = slot {
                    append(pieces, slot, *at..*at + n);
                }
                *at += n;
                self.inbound.forwarding = (n < left).then_some((slot, left - n));
                continue;
            }
            let h = match wire::header(&buffer[*at..]) {
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
                return Some(too_large("control packet too large"));
            } else if buffer.len() - *at < h.total() {
                return None;
            } else {
                self.control(buffer, *at, h, pieces, now)
            };
            match step {
                Ok(Step::Took(n)) if self.inbound.yields => {
                    *at += n;
                    self.inbound.blocked = *at < buffer.len();
                    return None;
                }
                Ok(Step::Took(n)) => *at += n,
                Ok(Step::More) if buffer.len() - *at > SCRATCH => {
                    return Some(too_large("PUBLISH header too large"));
                }
                Ok(Step::More) => return None,
                Ok(Step::Wait) => {
                    self.inbound.blocked = true;
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
        let read = wire::publish(&buffer[at..], h, self.connect.v5).map_err(End::Protocol)?;
        let Some(p) = read else { return Ok(Step::More) };
        let there = (buffer.len() - at).min(h.total());
        if self.leaving && p.qos > 0 {
            // It can no longer be acknowledged: the client repeats it on its next connection.
            self.pass(None, h, there);
            return Ok(Step::Took(there));
        }
        if p.alias > self.aliases.max {
            let what = "topic alias larger than CONNACK allows";
            return Err(End::Protocol(Malformed { code: 0x94, what }));
        }
        let aliased = match p.alias {
            0 => None,
            alias => Some(self.aliases.topic(alias, p.topic).map_err(End::Protocol)?),
        };
        let topic = aliased.as_deref().unwrap_or(p.topic);
        let found = self.table.broker_of(topic, |b| self.is_down(b));
        let broker = found.unwrap_or(self.upstreams[usize::from(self.home)].broker);
        let again = p.qos > 0 && self.in_flight.messages.contains_key(&p.id);
        if p.qos > 0 && !again && self.in_flight.messages.len() >= usize::from(self.in_flight.max) {
            let what = "more messages at a time than CONNACK allows";
            return Err(End::Protocol(Malformed { code: 0x93, what }));
        }
        let there_is = self.upstreams.iter().find(|u| u.broker == broker);
        let unavailable = match there_is {
            Some(up) if up.is_ready() || up.is_opening() => false,
            // The table prefers brokers that are up, so none is.
            up => up.is_some_and(|u| u.refused) || self.is_down(broker),
        };
        if unavailable && !again {
            return Err(End::Unavailable(self.table.broker(broker).group.clone()));
        }
        let slot = if again {
            self.in_flight.messages[&p.id]
        } else {
            self.open(broker, Kind::Secondary, now)
        };
        let up = &mut self.upstreams[usize::from(slot)];
        if up.is_opening() {
            return Ok(Step::Wait);
        }
        let Some(connack) = up.connack.as_ref().filter(|_| matches!(up.state, State::Ready(_)))
        else {
            return Err(End::Unavailable(self.table.broker(broker).group.clone()));
        };
        if p.qos > 0 && !again && up.inflight >= connack.receive_max {
            let what = "exceeds the broker's receive maximum";
            return Err(End::Protocol(Malformed { code: 0x93, what }));
        }
        if h.total() > connack.max_packet {
            return Err(too_large("PUBLISH exceeds the broker's maximum packet size"));
        }
        let alias = if p.alias <= connack.alias_max { p.alias } else { 0 };
        if p.qos > 0 && !again {
            up.inflight += 1;
            self.in_flight.messages.insert(p.id, slot);
        }
        up.last_used = now;
        self.inbound.qos_0 = (p.qos == 0).then_some(now);
        let up = &mut self.upstreams[usize::from(slot)];
        let mut from = 0;
        if let Some(topic) = &aliased {
            let told = alias != 0
                && up
                    .aliases
                    .insert(alias, Rc::clone(topic))
                    .is_some_and(|before| before == *topic);
            // Forwarded unchanged if this packet sets the alias, or the broker knows it.
            if alias == 0 || (p.topic.is_empty() && !told) {
                let mut made = Vec::new();
                wire::rewrite_publish(h, &p, topic, alias, &mut made);
                pieces.push((slot, Piece::Made(made)));
                from = p.payload_at;
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

    /// Records the part of a message that is still to be received.
    pub(super) fn pass(&mut self, slot: Option<Slot>, h: Header, there: usize) {
        self.inbound.forwarding = (there < h.total()).then_some((slot, h.total() - there));
    }

    /// Tracks whether the client publishes to a single group.
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

    /// Handles any complete packet but PUBLISH.
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
        let id = || wire::id(packet, h).map_err(End::Protocol);
        match h.kind() {
            kind::PUBACK | kind::PUBREC | kind::PUBCOMP => {
                let id = id()?;
                let failed = wire::reason(packet, h) >= 0x80;
                match self.deliveries.owner(id) {
                    // Its broker was lost: the relay completes the exchange.
                    Some((GONE, _)) | None if h.kind() == kind::PUBREC && !failed => {
                        let pubrel =
                            acknowledgement(kind::PUBREL << 4 | 2, id, self.connect.v5, false);
                        self.send_to_client(&pubrel);
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
                match self.in_flight.messages.get(&id) {
                    Some(slot) => append(pieces, *slot, range),
                    // Of an earlier connection: ask all brokers.
                    None if self.connect.persistent
                        && !self.in_flight.releases.contains_key(&id) =>
                    {
                        let ready = (0..self.upstreams.len() as Slot)
                            .filter(|slot| self.upstreams[usize::from(*slot)].is_ready());
                        let all: Vec<Slot> = ready.collect();
                        for slot in &all {
                            append(pieces, *slot, range.clone());
                        }
                        self.in_flight.releases.insert(id, Release { waiting: all, known: false });
                    }
                    None if self.connect.persistent => {}
                    None => {
                        let pubcomp =
                            acknowledgement(kind::PUBCOMP << 4, id, self.connect.v5, false);
                        self.send_to_client(&pubcomp);
                    }
                }
            }
            kind::SUBSCRIBE | kind::UNSUBSCRIBE => return self.request(packet, pieces, now),
            kind::PINGREQ => self.send_to_client(&[kind::PINGRESP << 4, 0]),
            kind::DISCONNECT => return Err(End::Disconnected(packet.to_vec())),
            _ => {
                let what = "control packet that a connected client does not send";
                return Err(End::Protocol(Malformed { code: 0x82, what }));
            }
        }
        Ok(Step::Took(h.total()))
    }

    /// Sends SUBSCRIBE or UNSUBSCRIBE to every broker that may have messages for its topic filters.
    pub(super) fn request(
        &mut self,
        packet: &[u8],
        pieces: &mut Vec<(Slot, Piece)>,
        now: Instant,
    ) -> Result<Step, End> {
        let (id, request) = Request::read(packet, self.connect.v5).map_err(End::Protocol)?;
        if self.subscriptions.exceeds(&request, self.worker.limits.subscriptions as usize) {
            let what = "more subscriptions than [relay] subscriptions allows";
            return Err(End::Protocol(Malformed { code: 0x97, what }));
        }
        // Others of this thread get their turn before the next packet.
        self.inbound.yields |= request.len() > FILTERS_UNHEARD;
        let mut wanted: Vec<(Slot, Vec<usize>)> = Vec::new();
        let mut budget = Budget::of_packet();
        for i in 0..request.len() {
            for broker in self.table.brokers_for(request.filter(i), &mut budget) {
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
                self.subscribes_at(*slot);
            }
        }
        wanted.retain(|(slot, _)| self.upstreams[usize::from(*slot)].is_ready());
        for (slot, filters) in &wanted {
            pieces.push((*slot, Piece::Made(request.packet(id, filters, self.connect.v5))));
            self.upstreams[usize::from(*slot)].last_used = now;
        }
        self.subscriptions.begin(id, &request, wanted);
        if let Some(answer) = self.subscriptions.finished(id, self.connect.v5) {
            self.send_to_client(&answer);
        }
        Ok(Step::Took(packet.len()))
    }

    /// Writes to each broker what is for it, with one system call.
    pub(super) fn write_to_brokers(
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
            up.keepalive.last_out = now;
            // Handled when the connection is read.
            let stream: &mut (dyn AsyncWrite + Unpin) = match &mut up.state {
                State::Ready(stream) | State::Opening(stream) => stream,
                _ => continue,
            };
            if up.out.write(&mut &mut *stream, cx, &mut slices).is_err() {
                up.broken = true;
            }
        }
    }

    /// What came with DISCONNECT is written with it.
    fn leave_for_disconnect(&mut self, buffer: &[u8], pieces: &[(Slot, Piece)]) {
        for (slot, piece) in pieces {
            self.upstreams[usize::from(*slot)].out.push(piece.slice(buffer));
        }
    }

    /// Sends a packet of the relay's own to the client, after the delivery in progress.
    pub(super) fn send_to_client(&mut self, bytes: &[u8]) {
        if self.outbound.delivering.is_some() {
            self.outbound.deferred.extend_from_slice(bytes);
        } else {
            self.outbound.pending.push(bytes);
        }
    }
}

fn too_large(what: &'static str) -> End {
    End::Protocol(Malformed { code: 0x95, what })
}
