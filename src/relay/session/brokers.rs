//! Broker → client: deliveries, acknowledgements, CONNACK, lost connections.

use std::fmt::{self, Display, Formatter};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::super::ids::Slot;
use super::super::upstream::{OPEN_TIMEOUT, RETRY, State, Upstream};
use super::super::worker::DOWN;
use super::super::{stream, subscriptions};
use super::{
    BUFFER, End, HIGH, Piece, SCRATCH, SESSIONS_TIMEOUT, Session, acknowledgement, append,
};
use crate::brokers::router::Budget;
use crate::mqtt::connect::{Connack, Kind};
use crate::mqtt::wire::{self, Header, kind};

impl Session {
    /// Advances a broker connection: connects, reads, forwards.
    pub(super) fn drive(&mut self, slot: Slot, cx: &mut Context<'_>) -> Result<bool, End> {
        let now = Instant::now();
        let up = &mut self.upstreams[usize::from(slot)];
        match &mut up.state {
            State::Closed | State::Waiting(_) => Ok(false),
            State::Connecting(connecting) => match connecting.as_mut().poll(cx) {
                Poll::Pending => Ok(false),
                Poll::Ready(Err(error)) => {
                    self.broker_lost(slot, &Lost::Failed(error), now).map(|()| true)
                }
                Poll::Ready(Ok(stream)) => {
                    up.out.push(
                        &self.connect.for_broker(up.kind, self.handshake.assigned.as_deref()),
                    );
                    up.state = State::Opening(stream);
                    up.keepalive.last_out = now;
                    Ok(true)
                }
            },
            State::Opening(_) | State::Ready(_) => self.read_broker(slot, cx),
        }
    }

    pub(super) fn read_broker(&mut self, slot: Slot, cx: &mut Context<'_>) -> Result<bool, End> {
        let drained = self.deliver_parked(slot);
        let up = &mut self.upstreams[usize::from(slot)];
        let others = self.outbound.delivering.is_some_and(|getting| getting != slot);
        let early = !self.handshake.sent && up.is_ready();
        // A message that has begun comes whole.
        let enough = up.delivery.deferred.len() > HIGH && up.delivery.deferring == 0;
        if others || early || enough || self.outbound.pending.len() > HIGH {
            return Ok(drained);
        }
        BUFFER.with_borrow_mut(|buffer| {
            let up = &mut self.upstreams[usize::from(slot)];
            let kept = up.rest.len();
            if buffer.len() < kept + SCRATCH / 2 {
                buffer.resize(kept + SCRATCH, 0);
            }
            let (State::Opening(stream) | State::Ready(stream)) = &mut up.state else {
                return Ok(drained);
            };
            let held = std::mem::take(&mut up.has_unparsed);
            let length = match stream::read(stream, cx, &mut buffer[..], kept) {
                Poll::Ready(Ok(n)) if n > 0 => {
                    up.keepalive.pinged = None;
                    kept + n
                }
                _ if held => kept,
                Poll::Pending if !up.broken => return Ok(drained),
                Poll::Ready(Err(error)) => {
                    return self
                        .broker_lost(slot, &Lost::Failed(error), Instant::now())
                        .map(|()| true);
                }
                _ => return self.broker_lost(slot, &Lost::Closed, Instant::now()).map(|()| true),
            };
            buffer[..kept].copy_from_slice(&up.rest);
            let mut pieces = Vec::new();
            let mut at = 0;
            let end = self.parse_broker(slot, &mut buffer[..length], &mut at, &mut pieces);
            let mut slices: Vec<IoSlice<'_>> =
                pieces.iter().map(|((), piece)| IoSlice::new(piece.slice(buffer))).collect();
            let written = self.outbound.pending.write(&mut self.client, cx, &mut slices);
            let up = &mut self.upstreams[usize::from(slot)];
            up.rest = buffer[at..length].to_vec();
            written.map_err(End::ClientGone)?;
            if self.outbound.delivering.is_none() && !self.outbound.deferred.is_empty() {
                let behind = std::mem::take(&mut self.outbound.deferred);
                self.outbound.pending.push(&behind);
            }
            end.map_or(Ok(true), Err)
        })
    }

    /// Handles a broker's bytes from `at` on. Returns the session's end, if this was it.
    pub(super) fn parse_broker(
        &mut self,
        slot: Slot,
        buffer: &mut [u8],
        at: &mut usize,
        pieces: &mut Vec<((), Piece)>,
    ) -> Option<End> {
        while *at < buffer.len() {
            let there = buffer.len() - *at;
            let up = &mut self.upstreams[usize::from(slot)];
            if up.delivery.deferring > 0 {
                let n = up.delivery.deferring.min(there);
                up.delivery.deferred.extend_from_slice(&buffer[*at..*at + n]);
                up.delivery.deferring -= n;
                *at += n;
                continue;
            }
            if up.delivery.forwarding > 0 {
                let n = up.delivery.forwarding.min(there);
                append(pieces, (), *at..*at + n);
                up.delivery.forwarding -= n;
                *at += n;
                self.outbound.delivering = (up.delivery.forwarding > 0).then_some(slot);
                continue;
            }
            let Ok(header) = wire::header(&buffer[*at..]) else {
                return Some(End::ByBroker(up.addr));
            };
            let h = header?;
            if h.kind() == kind::PUBLISH {
                if !self.deliver(slot, &mut buffer[*at..], h) {
                    return None;
                }
                continue;
            }
            if h.total() > SCRATCH {
                return Some(End::ByBroker(up.addr));
            }
            if there < h.total() {
                return None;
            }
            let range = *at..*at + h.total();
            *at = range.end;
            if let Err(end) = self.answer(slot, buffer, range, h, pieces) {
                return Some(end);
            }
            let up = &mut self.upstreams[usize::from(slot)];
            if !self.handshake.sent && up.is_ready() {
                up.has_unparsed = *at < buffer.len();
                return None;
            }
        }
        None
    }

    /// Whether a delivery is within the client's receive maximum; if so, its identifier is translated.
    /// `None`: the packet is incomplete.
    pub(super) fn fits(&mut self, slot: Slot, bytes: &mut [u8], h: Header) -> Option<bool> {
        if h.first & 0x06 == 0 {
            return Some(true);
        }
        let id_at = identifier_at(bytes, h)?;
        let id = u16::from_be_bytes([bytes[id_at], bytes[id_at + 1]]);
        let full = self.deliveries.len() >= usize::from(self.connect.receive_max);
        if full && self.deliveries.known(slot, id).is_none() {
            return Some(false);
        }
        let Some(id) = self.deliveries.assign(slot, id) else { return Some(false) };
        bytes[id_at..id_at + 2].copy_from_slice(&id.to_be_bytes());
        Some(true)
    }

    /// Decides whether a delivery is forwarded or held back. False: the packet is incomplete.
    pub(super) fn deliver(&mut self, slot: Slot, bytes: &mut [u8], h: Header) -> bool {
        // QoS 0 is not subject to the receive maximum, and its order is independent of QoS 1 and 2.
        let up = &self.upstreams[usize::from(slot)];
        let waits = h.first & 0x06 != 0 && !up.delivery.deferred.is_empty();
        let Some(fits) = (if waits { Some(false) } else { self.fits(slot, bytes, h) }) else {
            return false;
        };
        let up = &mut self.upstreams[usize::from(slot)];
        if fits {
            up.delivery.forwarding = h.total();
            self.worker.stats.delivered.add(1);
        } else {
            up.delivery.deferring = h.total();
        }
        true
    }

    /// Delivers what was held back, as far as the receive maximum allows. Returns whether there was any.
    pub(super) fn deliver_parked(&mut self, slot: Slot) -> bool {
        if self.outbound.delivering.is_some() || self.outbound.pending.len() > HIGH {
            return false;
        }
        let mut parked = std::mem::take(&mut self.upstreams[usize::from(slot)].delivery.deferred);
        let mut at = 0;
        while let Ok(Some(h)) = wire::header(&parked[at..]) {
            let whole = parked.len() - at >= h.total();
            if !whole || self.fits(slot, &mut parked[at..], h) != Some(true) {
                break;
            }
            self.outbound.pending.push(&parked[at..at + h.total()]);
            self.worker.stats.delivered.add(1);
            at += h.total();
        }
        parked.drain(..at);
        if parked.is_empty() {
            parked = Vec::new();
        }
        self.upstreams[usize::from(slot)].delivery.deferred = parked;
        at > 0
    }

    /// Handles any complete packet but PUBLISH.
    pub(super) fn answer(
        &mut self,
        slot: Slot,
        buffer: &mut [u8],
        range: Range<usize>,
        h: Header,
        pieces: &mut Vec<((), Piece)>,
    ) -> Result<(), End> {
        let up = &mut self.upstreams[usize::from(slot)];
        let packet = &buffer[range.clone()];
        let addr = up.addr;
        let broken = || End::ByBroker(addr);
        match h.kind() {
            kind::CONNACK => return self.handle_connack(slot, packet),
            _ if !matches!(up.state, State::Ready(_)) => return Err(broken()),
            kind::PUBACK | kind::PUBREC | kind::PUBCOMP => {
                let id = wire::id(packet, h).map_err(|_| broken())?;
                if self.in_flight.releases.contains_key(&id) {
                    let known = wire::reason(packet, h) == 0;
                    let pubcomp = self.released(id, slot, known);
                    pieces.extend(pubcomp.map(|p| ((), Piece::Made(p))));
                    return Ok(());
                }
                if self.in_flight.messages.get(&id) != Some(&slot) {
                    return Ok(());
                }
                if h.kind() != kind::PUBREC || wire::reason(packet, h) >= 0x80 {
                    self.in_flight.messages.remove(&id);
                    up.inflight -= 1;
                }
                append(pieces, (), range);
            }
            kind::PUBREL => {
                let id = wire::id(packet, h).map_err(|_| broken())?;
                let Some(id) = self.deliveries.assign(slot, id) else { return Ok(()) };
                buffer[range.start + h.length..range.start + h.length + 2]
                    .copy_from_slice(&id.to_be_bytes());
                append(pieces, (), range);
            }
            kind::SUBACK | kind::UNSUBACK => {
                let id = wire::id(packet, h).map_err(|_| broken())?;
                let codes = subscriptions::codes(packet, h.length, self.connect.v5);
                if let Some(all) = self.subscriptions.answered(slot, id, codes, self.connect.v5) {
                    pieces.push(((), Piece::Made(all)));
                }
            }
            kind::PINGRESP => up.keepalive.pinged = None,
            // The client gets the reason if it is affected.
            kind::DISCONNECT if slot == self.home || !up.is_quiet() => {
                append(pieces, (), range);
                return Err(broken());
            }
            kind::DISCONNECT => up.broken = true,
            _ => return Err(broken()),
        }
        Ok(())
    }

    /// Handles CONNACK.
    pub(super) fn handle_connack(&mut self, slot: Slot, packet: &[u8]) -> Result<(), End> {
        let now = Instant::now();
        let up = &mut self.upstreams[usize::from(slot)];
        let Some(connack) = Connack::read(packet, self.connect.v5) else {
            return Err(End::ByBroker(up.addr));
        };
        if connack.code != 0 {
            if slot == self.home {
                self.outbound.pending.push(packet);
                self.handshake.sent = true;
                return Err(End::ByBroker(up.addr));
            }
            debug!(broker = %up.addr, code = connack.code, "CONNECT is refused");
            up.close(State::Closed);
            up.refused = true;
            return Ok(());
        }
        if let Some(kind) = up.then.pop_front() {
            up.reconnect(kind, now);
            return Ok(());
        }
        if let State::Opening(stream) = std::mem::replace(&mut up.state, State::Closed) {
            up.state = State::Ready(stream);
        }
        up.keepalive.seconds = connack.keepalive.unwrap_or(self.connect.keepalive);
        (up.last_used, up.keepalive.last_out) = (now, now);
        if slot == self.home {
            self.keepalive.seconds = up.keepalive.seconds;
            (self.aliases.max, self.in_flight.max) = (connack.alias_max, connack.receive_max);
            self.handshake.connack = Some(packet.to_vec());
            if let Some(id) = &connack.client_id {
                self.handshake.assigned = Some(id.clone());
                self.open_secondaries(now);
            }
        } else if self.handshake.resumed
            && self.handshake.sent
            && !connack.session_present
            && (self.parts.is_empty() || self.parts.contains(&up.addr))
        {
            // The client was told that its session is present.
            return Err(End::BrokerLost(up.addr));
        } else if up.subscribed && !(self.connect.persistent && connack.session_present) {
            let (table, broker) = (Arc::clone(&self.table), up.broker);
            let mut budget = Budget::of_packet();
            self.resubscribe(slot, |filter| {
                table.brokers_for(filter, &mut budget).contains(&broker)
            });
        }
        let up = &mut self.upstreams[usize::from(slot)];
        up.connack = Some(connack);
        Ok(())
    }

    /// A lost broker will not answer PUBREL.
    fn releases_lost(&mut self, slot: Slot) {
        let ids: Vec<u16> = self.in_flight.releases.keys().copied().collect();
        for id in ids {
            if let Some(pubcomp) = self.released(id, slot, false) {
                self.send_to_client(&pubcomp);
            }
        }
    }

    /// A broker answered a PUBREL that was sent to all of them, or was lost; `known`: it had the message.
    /// Returns the client's PUBCOMP if it was the last.
    fn released(&mut self, id: u16, slot: Slot, known: bool) -> Option<Vec<u8>> {
        let release = self.in_flight.releases.get_mut(&id)?;
        release.waiting.retain(|s| *s != slot);
        release.known |= known;
        if !release.waiting.is_empty() {
            return None;
        }
        let known = self.in_flight.releases.remove(&id)?.known;
        Some(acknowledgement(kind::PUBCOMP << 4, id, self.connect.v5, known))
    }

    /// Subscribes again at a broker, to the wanted topic filters.
    pub(super) fn resubscribe(&mut self, slot: Slot, wanted: impl FnMut(&str) -> bool) {
        let mut id = u16::MAX;
        let next = || {
            // Clients count upwards from 1.
            while self.in_flight.messages.contains_key(&id) || self.subscriptions.is_open(id) {
                id = (id - 1).max(1);
            }
            let free = id;
            id = (id - 1).max(1);
            free
        };
        let packets = self.subscriptions.again(wanted, next, self.connect.v5);
        self.upstreams[usize::from(slot)].out.push(&packets);
    }

    /// Sends CONNACK once session present is known for all brokers.
    pub(super) fn send_connack(&mut self, now: Instant) {
        let opening = self.upstreams.iter().any(Upstream::is_opening);
        if opening && now < self.since + SESSIONS_TIMEOUT {
            return;
        }
        let Some(mut connack) = self.handshake.connack.take() else { return };
        let present = |u: &Upstream| u.connack.as_ref().is_some_and(|w| w.session_present);
        let at_home = present(&self.upstreams[usize::from(self.home)]);
        if self.connect.persistent && !self.connect.clean {
            let v5 = self.connect.v5;
            let flags = wire::header(&connack).ok().flatten().map_or(2, |h| h.length);
            let has_part = |u: &&Upstream| self.parts.contains(&u.addr) && u.is_ready();
            if !self.parts.is_empty() {
                // If one broker has lost its part of the session, the client has to subscribe again.
                let answers = self.upstreams.iter().filter(has_part).filter(|u| present(u));
                let whole = answers.count() == self.parts.len();
                connack[flags] = connack[flags] & !1 | u8::from(whole);
            } else if at_home && !self.upstreams.iter().filter(|u| u.is_ready()).all(present) {
                // The same, where it is not known who has a part.
                connack[flags] &= !1;
            }
            let discards = !at_home && self.parts.is_empty();
            for (slot, up) in self.upstreams.iter_mut().enumerate() {
                if discards && slot != usize::from(self.home) && up.is_ready() && present(up) {
                    // The client is told that there is no session: discard the other brokers' parts.
                    up.then = if v5 { [].into() } else { [Kind::Secondary].into() };
                    up.reconnect(Kind::CleanStart, now);
                }
            }
        }
        self.handshake.resumed = wire::header(&connack)
            .ok()
            .flatten()
            .is_some_and(|h| connack.get(h.length).is_some_and(|flags| flags & 1 == 1));
        if !self.handshake.resumed && self.connect.persistent {
            // Whoever has something from now on is known when the client subscribes.
            self.parts.clear();
            let id = self.handshake.assigned.as_deref().unwrap_or(&self.connect.client_id);
            self.worker.shared.parts.set(self.worker.service, id, Vec::new());
        }
        self.outbound.pending.push(&connack);
        self.handshake.sent = true;
        self.stats().opened.add(1);
    }

    /// A broker connection was lost, or could not be opened.
    pub(super) fn broker_lost(&mut self, slot: Slot, why: &Lost, now: Instant) -> Result<(), End> {
        let home = slot == self.home;
        let up = &mut self.upstreams[usize::from(slot)];
        let addr = up.addr;
        let was_ready = up.is_ready();
        let partial = self.outbound.delivering == Some(slot)
            || self.inbound.forwarding.is_some_and(|p| p.0 == Some(slot));
        let lossy = partial || up.inflight > 0 || !up.out.is_empty();
        // A broker that closes behind CONNECT, as it must if that is malformed (MQTT 3.1.1 §4.8), is down for this client only,
        // whose doing must not cost others a broker.
        let turned_away = up.is_asked() && !matches!(why, Lost::Silent);
        if turned_away {
            debug!(broker = %addr, "CONNECT is not answered: {why}");
            up.turned_away = Some(now + DOWN);
        } else if !was_ready {
            if self.worker.is_news(addr) {
                warn!(broker = %addr, "cannot connect to a broker: {why}");
            } else {
                debug!(broker = %addr, "cannot connect to a broker: {why}");
            }
            // Timeouts count for longer than refusals.
            self.worker.down(addr, now.duration_since(up.since));
        }
        if home && was_ready {
            return Err(End::ByBroker(addr));
        }
        // The will was lost with its broker.
        if was_ready && (lossy || self.will == Some(slot)) {
            return Err(End::BrokerLost(addr));
        }
        let keeps = up.subscribed || self.connect.persistent;
        let subscribed = up.subscribed;
        // Jitter.
        let jitter = Duration::from_millis(u64::from(self.addrs.0.port()) % 1000);
        up.close(if keeps { State::Waiting(now + RETRY + jitter) } else { State::Closed });
        up.subscribed = subscribed;
        self.deliveries.forget(slot);
        for answer in self.subscriptions.broker_lost(slot, self.connect.v5) {
            self.send_to_client(&answer);
        }
        self.releases_lost(slot);
        let unavailable = |group: &str| {
            if turned_away { End::ByBroker(addr) } else { End::Unavailable(group.to_owned()) }
        };
        if home {
            let broker = self.home_broker();
            if self.is_down(broker) {
                return Err(unavailable(&self.table.broker(broker).group));
            }
            let kind = if self.will == Some(slot) || self.connect.will.is_none() {
                Kind::Original
            } else {
                Kind::WithoutWill
            };
            self.home = self.open_as(broker, kind, now);
            if self.will == Some(slot) {
                self.will = Some(self.home);
            }
        } else if self.will == Some(slot)
            && let Some(broker) = self.will_broker()
        {
            if self.is_down(broker) {
                return Err(unavailable(&self.table.broker(broker).group));
            }
            self.will = Some(self.open_as(broker, Kind::WithWill, now));
        }
        Ok(())
    }
}

/// How a connection to a broker ended, or why there is none.
pub(super) enum Lost {
    Failed(io::Error),
    Closed,
    /// It did not answer SYN, CONNECT or PINGREQ.
    Silent,
}

impl Display for Lost {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(error) if error.kind() == io::ErrorKind::AddrNotAvailable => write!(
                f,
                "{error}: no local port is free, as too many connections to this broker are open, or in TIME_WAIT \
                 after clients left without DISCONNECT (see `ss -s`). Widen net.ipv4.ip_local_port_range; against \
                 TIME_WAIT, set net.ipv4.tcp_tw_reuse = 1"
            ),
            Self::Failed(error) => error.fmt(f),
            Self::Closed => f.write_str("it closed the connection before CONNACK"),
            Self::Silent => write!(f, "no CONNACK within {} s", OPEN_TIMEOUT.as_secs()),
        }
    }
}

/// Offset of the packet identifier of a PUBLISH at QoS 1 or 2, if that was received.
fn identifier_at(bytes: &[u8], h: Header) -> Option<usize> {
    let length = bytes.get(h.length..h.length + 2)?;
    let at = h.length + 2 + usize::from(u16::from_be_bytes([length[0], length[1]]));
    (bytes.len() >= at + 2).then_some(at)
}
