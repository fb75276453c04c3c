//! What brokers say: messages for the client, answers to it, and that they are gone.

use std::io::IoSlice;
use std::ops::Range;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tracing::debug;

use super::super::hello::{Kind, Welcome};
use super::super::ids::Slot;
use super::super::scan::{self, Header, kind};
use super::super::upstream::{RETRY, State, Upstream};
use super::super::{proxy, stream, subscriptions};
use super::{BUFFER, End, HIGH, Piece, SCRATCH, SESSIONS_TIMEOUT, Session, append};

impl Session {
    /// Brings a broker's connection on, and passes on what it says.
    pub(super) fn drive(&mut self, slot: Slot, cx: &mut Context<'_>) -> Result<bool, End> {
        let now = Instant::now();
        let up = &mut self.upstreams[usize::from(slot)];
        match &mut up.state {
            State::Closed | State::Waiting(_) => Ok(false),
            State::Connecting(connecting) => match connecting.as_mut().poll(cx) {
                Poll::Pending => Ok(false),
                Poll::Ready(Err(error)) => {
                    debug!(broker = %up.addr, %error, "cannot connect");
                    self.lost(slot, now).map(|()| true)
                }
                Poll::Ready(Ok(stream)) => {
                    if self.table.broker(up.broker).proxy_protocol {
                        up.out.push(&proxy::header(self.addrs.0, self.addrs.1));
                    }
                    up.out.push(&self.hello.connect(up.kind, self.assigned.as_deref()));
                    up.state = State::Opening(stream);
                    up.last_out = now;
                    Ok(true)
                }
            },
            State::Opening(_) | State::Ready(_) => self.read_broker(slot, cx),
        }
    }

    pub(super) fn read_broker(&mut self, slot: Slot, cx: &mut Context<'_>) -> Result<bool, End> {
        let drained = self.deliver_parked(slot);
        let up = &mut self.upstreams[usize::from(slot)];
        let others = self.getting.is_some_and(|getting| getting != slot);
        let early = !self.greeted && up.is_ready();
        if others || early || self.out.len() > HIGH {
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
            let held = std::mem::take(&mut up.held);
            let length = match stream::read(stream, cx, &mut buffer[..], kept) {
                Poll::Ready(Ok(n)) if n > 0 => {
                    up.pinged = None;
                    kept + n
                }
                _ if held => kept,
                Poll::Pending if !up.broken => return Ok(drained),
                _ => return self.lost(slot, Instant::now()).map(|()| true),
            };
            buffer[..kept].copy_from_slice(&up.rest);
            let mut pieces = Vec::new();
            let mut at = 0;
            let end = self.broker_said(slot, &mut buffer[..length], &mut at, &mut pieces);
            let mut slices: Vec<IoSlice<'_>> =
                pieces.iter().map(|((), piece)| IoSlice::new(piece.slice(buffer))).collect();
            let written = self.out.write(&mut self.client, cx, &mut slices);
            let up = &mut self.upstreams[usize::from(slot)];
            if at < length {
                up.rest = buffer[at..length].to_vec();
            } else {
                up.rest = Vec::new();
            }
            written.map_err(End::ClientGone)?;
            if self.getting.is_none() && !self.behind.is_empty() {
                let behind = std::mem::take(&mut self.behind);
                self.out.push(&behind);
            }
            end.map_or(Ok(true), Err)
        })
    }

    /// Deals with a broker's bytes from `at` on. How the session ended, if it did.
    pub(super) fn broker_said(
        &mut self,
        slot: Slot,
        buffer: &mut [u8],
        at: &mut usize,
        pieces: &mut Vec<((), Piece)>,
    ) -> Option<End> {
        while *at < buffer.len() {
            let there = buffer.len() - *at;
            let up = &mut self.upstreams[usize::from(slot)];
            if up.parking > 0 {
                let n = up.parking.min(there);
                up.parked.extend_from_slice(&buffer[*at..*at + n]);
                up.parking -= n;
                *at += n;
                continue;
            }
            if up.passing > 0 {
                let n = up.passing.min(there);
                append(pieces, (), *at..*at + n);
                up.passing -= n;
                *at += n;
                self.getting = (up.passing > 0).then_some(slot);
                continue;
            }
            let Ok(header) = scan::header(&buffer[*at..]) else {
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
            if !self.greeted && up.is_ready() {
                up.held = *at < buffer.len();
                return None;
            }
        }
        None
    }

    /// Whether the client has room for a message of a broker's, which then gets an identifier of the
    /// client's. `None`: more of it is needed.
    pub(super) fn fits(&mut self, slot: Slot, bytes: &mut [u8], h: Header) -> Option<bool> {
        if h.first & 0x06 == 0 {
            return Some(true);
        }
        let id_at = identifier_at(bytes, h)?;
        let id = u16::from_be_bytes([bytes[id_at], bytes[id_at + 1]]);
        let full = self.deliveries.len() >= usize::from(self.hello.receive_max);
        if full && self.deliveries.known(slot, id).is_none() {
            return Some(false);
        }
        let Some(id) = self.deliveries.assign(slot, id) else { return Some(false) };
        bytes[id_at..id_at + 2].copy_from_slice(&id.to_be_bytes());
        Some(true)
    }

    /// A message of a broker's is passed on, or waits behind others. False: more of it is needed.
    pub(super) fn deliver(&mut self, slot: Slot, bytes: &mut [u8], h: Header) -> bool {
        // At QoS 0, nothing has to wait, nor has what waits anything to do with its order.
        let up = &self.upstreams[usize::from(slot)];
        let waits = h.first & 0x06 != 0 && !up.parked.is_empty();
        let Some(fits) = (if waits { Some(false) } else { self.fits(slot, bytes, h) }) else {
            return false;
        };
        let up = &mut self.upstreams[usize::from(slot)];
        if fits {
            up.passing = h.total();
            self.worker.stats.delivered.add(1);
        } else {
            up.parking = h.total();
        }
        true
    }

    /// Delivers what waited for the client's receive maximum. Whether there was any.
    pub(super) fn deliver_parked(&mut self, slot: Slot) -> bool {
        if self.getting.is_some() || self.out.len() > HIGH {
            return false;
        }
        let mut parked = std::mem::take(&mut self.upstreams[usize::from(slot)].parked);
        let mut at = 0;
        while let Ok(Some(h)) = scan::header(&parked[at..]) {
            let whole = parked.len() - at >= h.total();
            if !whole || self.fits(slot, &mut parked[at..], h) != Some(true) {
                break;
            }
            self.out.push(&parked[at..at + h.total()]);
            self.worker.stats.delivered.add(1);
            at += h.total();
        }
        parked.drain(..at);
        if parked.is_empty() {
            parked = Vec::new();
        }
        self.upstreams[usize::from(slot)].parked = parked;
        at > 0
    }

    /// Any whole packet of a broker's but PUBLISH.
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
            kind::CONNACK => return self.welcomed(slot, packet),
            _ if !matches!(up.state, State::Ready(_)) => return Err(broken()),
            kind::PUBACK | kind::PUBREC | kind::PUBCOMP => {
                let id = scan::id(packet, h).map_err(|_| broken())?;
                if let Some(all) = self.releases.get_mut(&id) {
                    all.retain(|s| *s != slot);
                    if h.kind() == kind::PUBCOMP && all.is_empty() {
                        self.releases.remove(&id);
                        append(pieces, (), range);
                    }
                    return Ok(());
                }
                if self.inflight.get(&id) != Some(&slot) {
                    return Ok(());
                }
                if h.kind() != kind::PUBREC || scan::reason(packet, h) >= 0x80 {
                    self.inflight.remove(&id);
                    up.inflight -= 1;
                }
                append(pieces, (), range);
            }
            kind::PUBREL => {
                let id = scan::id(packet, h).map_err(|_| broken())?;
                let Some(id) = self.deliveries.assign(slot, id) else { return Ok(()) };
                buffer[range.start + h.length..range.start + h.length + 2]
                    .copy_from_slice(&id.to_be_bytes());
                append(pieces, (), range);
            }
            kind::SUBACK | kind::UNSUBACK => {
                let id = scan::id(packet, h).map_err(|_| broken())?;
                let codes = subscriptions::codes(packet, h.length, self.hello.v5);
                if let Some(all) = self.subscriptions.answered(slot, id, codes, self.hello.v5) {
                    pieces.push(((), Piece::Made(all)));
                }
            }
            kind::PINGRESP => up.pinged = None,
            // Why a broker leaves is the client's to know, if it takes the client's messages with it.
            kind::DISCONNECT if slot == self.home || !up.is_quiet() => {
                append(pieces, (), range);
                return Err(broken());
            }
            kind::DISCONNECT => up.broken = true,
            _ => return Err(broken()),
        }
        Ok(())
    }

    /// A broker's CONNACK.
    pub(super) fn welcomed(&mut self, slot: Slot, packet: &[u8]) -> Result<(), End> {
        let now = Instant::now();
        let up = &mut self.upstreams[usize::from(slot)];
        let Some(welcome) = Welcome::read(packet, self.hello.v5) else {
            return Err(End::ByBroker(up.addr));
        };
        if welcome.code != 0 {
            if slot == self.home {
                self.out.push(packet);
                self.greeted = true;
                return Err(End::ByBroker(up.addr));
            }
            debug!(broker = %up.addr, code = welcome.code, "CONNECT is refused");
            up.close(State::Closed);
            up.refused = true;
            return Ok(());
        }
        if let Some(kind) = up.then.pop_front() {
            up.again(kind, now);
            return Ok(());
        }
        if let State::Opening(stream) = std::mem::replace(&mut up.state, State::Closed) {
            up.state = State::Ready(stream);
        }
        up.keepalive = welcome.keepalive.unwrap_or(self.hello.keepalive);
        (up.last_used, up.last_out) = (now, now);
        if slot == self.home {
            self.keepalive = up.keepalive;
            (self.alias_max, self.receive_max) = (welcome.alias_max, welcome.receive_max);
            self.connack = Some(packet.to_vec());
            if let Some(id) = &welcome.client_id {
                self.assigned = Some(id.clone());
                self.open_others(now);
            }
        } else if self.resumed && self.greeted && !welcome.session_present {
            // The client was told that its session is there.
            return Err(End::BrokerLost(up.addr));
        } else if up.subscribed && !(self.hello.persistent && welcome.session_present) {
            self.subscribe_again(slot, |_, _| true);
        }
        let up = &mut self.upstreams[usize::from(slot)];
        up.welcome = Some(welcome);
        Ok(())
    }

    /// A broker gets the subscriptions that it should have, and has not.
    pub(super) fn subscribe_again(&mut self, slot: Slot, wanted: impl Fn(&Self, &str) -> bool) {
        let broker = self.upstreams[usize::from(slot)].broker;
        let mut id = u16::MAX;
        let next = || {
            // From the other end than clients count.
            while self.inflight.contains_key(&id) || self.subscriptions.is_open(id) {
                id = (id - 1).max(1);
            }
            let free = id;
            id = (id - 1).max(1);
            free
        };
        let wanted =
            |filter: &str| self.table.brokers_for(filter).contains(&broker) && wanted(self, filter);
        let packets = self.subscriptions.again(wanted, next, self.hello.v5);
        self.upstreams[usize::from(slot)].out.push(&packets);
    }

    /// The client gets its CONNACK when all is known that it says.
    pub(super) fn greet(&mut self, now: Instant) {
        let opening = self.upstreams.iter().any(Upstream::is_opening);
        if opening && now < self.since + SESSIONS_TIMEOUT {
            return;
        }
        let Some(mut connack) = self.connack.take() else { return };
        let present = |u: &Upstream| u.welcome.as_ref().is_some_and(|w| w.session_present);
        let at_home = present(&self.upstreams[usize::from(self.home)]);
        if self.hello.persistent && !self.hello.clean {
            let v5 = self.hello.v5;
            if at_home && !self.upstreams.iter().filter(|u| u.is_ready()).all(present) {
                // One has lost its part: the client has to subscribe again.
                let flags = scan::header(&connack).ok().flatten().map_or(2, |h| h.length);
                connack[flags] &= !1;
            }
            for (slot, up) in self.upstreams.iter_mut().enumerate() {
                if !at_home && slot != usize::from(self.home) && up.is_ready() && present(up) {
                    // What the client is told to be gone must be gone.
                    up.then = if v5 { [].into() } else { [Kind::Beside].into() };
                    up.again(Kind::Anew, now);
                }
            }
        }
        self.resumed = scan::header(&connack)
            .ok()
            .flatten()
            .is_some_and(|h| connack.get(h.length).is_some_and(|flags| flags & 1 == 1));
        self.out.push(&connack);
        self.greeted = true;
        self.stats().opened.add(1);
    }

    /// A broker's connection is gone, or was not to be had.
    pub(super) fn lost(&mut self, slot: Slot, now: Instant) -> Result<(), End> {
        let home = slot == self.home;
        let up = &mut self.upstreams[usize::from(slot)];
        let addr = up.addr;
        let was_ready = up.is_ready();
        let partial = self.getting == Some(slot) || self.passing.is_some_and(|p| p.0 == Some(slot));
        let lossy = partial || up.inflight > 0 || !up.out.is_empty();
        if !was_ready {
            // One that does not answer at all will not the next second either.
            self.worker.down(addr, now.duration_since(up.since));
        }
        if home && was_ready {
            return Err(End::ByBroker(addr));
        }
        // Without its broker, nobody has the client's will.
        if was_ready && (lossy || self.will == Some(slot)) {
            return Err(End::BrokerLost(addr));
        }
        let keeps = up.subscribed || self.hello.persistent;
        let subscribed = up.subscribed;
        // Not all clients of a broker at the same moment.
        let jitter = Duration::from_millis(u64::from(self.addrs.0.port()) % 1000);
        up.close(if keeps { State::Waiting(now + RETRY + jitter) } else { State::Closed });
        up.subscribed = subscribed;
        self.deliveries.forget(slot);
        for answer in self.subscriptions.lost(slot, self.hello.v5) {
            self.tell_client(&answer);
        }
        if home {
            let broker = self.home_broker();
            let other = self.table.broker(broker).addr;
            if self.worker.is_down(other) {
                return Err(End::Unavailable(self.table.broker(broker).group.clone()));
            }
            let will = self.hello.will.is_some();
            let elsewhere = will && self.will.is_some_and(|w| w != slot);
            let kind = if elsewhere { Kind::Home } else { Kind::Own };
            self.home = self.open(broker, kind, now);
            let up = &mut self.upstreams[usize::from(self.home)];
            if up.kind != kind {
                up.again(kind, now);
            }
            self.will = if elsewhere { self.will } else { Some(self.home).filter(|_| will) };
        } else if self.will == Some(slot) {
            // Another broker of its topic's group.
            let down = |b| self.worker.is_down(self.table.broker(b).addr);
            let topic = self.hello.will.clone().unwrap_or_default();
            let Some(broker) = self.table.broker_of(&topic, down) else { return Ok(()) };
            let other = self.table.broker(broker);
            if self.worker.is_down(other.addr) {
                return Err(End::Unavailable(other.group.clone()));
            }
            let slot = self.open(broker, Kind::Will, now);
            let up = &mut self.upstreams[usize::from(slot)];
            if up.kind != Kind::Will {
                up.again(Kind::Will, now);
            }
            self.will = Some(slot);
        }
        Ok(())
    }
}

/// Where a PUBLISH of QoS 1 or 2 has its identifier, if that is there.
fn identifier_at(bytes: &[u8], h: Header) -> Option<usize> {
    let length = bytes.get(h.length..h.length + 2)?;
    let at = h.length + 2 + usize::from(u16::from_be_bytes([length[0], length[1]]));
    (bytes.len() >= at + 2).then_some(at)
}
