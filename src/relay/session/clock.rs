//! Writes, timers, configuration changes, and the return to the fast path.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::AsyncWrite as _;

use super::super::ids::Slot;
use super::super::upstream::{State, Upstream};
use super::brokers::Lost;
use super::{
    CONNACK_TIMEOUT, End, HIGH, ROUTES_INTERVAL, SESSIONS_TIMEOUT, Session, UNUSED, disconnect,
};
use crate::brokers::router::{Broker, Budget};
use crate::mqtt::connect::Kind;
use crate::mqtt::wire::kind;

impl Session {
    /// Flushes all connections. Returns whether anything was written.
    pub(super) fn flush(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let mut progress = false;
        if !self.handshake.sent {
            self.send_connack(Instant::now());
            progress |= self.handshake.sent;
        }
        for up in &mut self.upstreams {
            let (State::Ready(stream) | State::Opening(stream)) = &mut up.state else { continue };
            match up.out.flush(stream, cx) {
                Ok(wrote) => progress |= wrote,
                // Handled when the connection is read, after what it still has.
                Err(_) if !up.broken => (up.broken, progress) = (true, true),
                Err(_) => {}
            }
        }
        progress |= self.outbound.pending.flush(&mut self.client, cx).map_err(End::ClientGone)?;
        if self.leaving && self.outbound.pending.is_empty() {
            // Half-close: the client's last messages may still arrive.
            let _ = Pin::new(&mut self.client).poll_shutdown(cx).map_err(End::ClientGone)?;
        }
        Ok(progress)
    }

    pub(super) fn arm_timer(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        loop {
            let now = Instant::now();
            let mut acted = false;
            let next = self.run_timers(now, &mut acted)?;
            if acted {
                // Poll again, to write or to connect.
                cx.waker().wake_by_ref();
                return Ok(());
            }
            // Resetting costs more than a wake-up that is too early.
            if self.timer.is_elapsed() || self.timer.deadline() > next.into() {
                self.timer.as_mut().reset(next.into());
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Ok(());
            }
        }
    }

    /// Goes on in a moment. A session that woke itself would come before all whose sockets have something: those are
    /// asked only now and then.
    pub(super) fn pause(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        const PAUSE: Duration = Duration::from_millis(1);
        self.timer.as_mut().reset(tokio::time::Instant::now() + PAUSE);
        match self.timer.as_mut().poll(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(()) => self.arm_timer(cx),
        }
    }

    /// Runs the timers that are due. Returns the next deadline.
    pub(super) fn run_timers(&mut self, now: Instant, acted: &mut bool) -> Result<Instant, End> {
        let mut next = now + Duration::from_secs(3600);
        if self.keepalive.seconds > 0 && self.handshake.sent {
            if self.inbound.blocked || self.upstreams.iter().any(|u| u.out.len() > HIGH) {
                // Not while the client is not read.
                self.keepalive.last_in = now;
            }
            let silent = self.keepalive.last_in
                + Duration::from_millis(u64::from(self.keepalive.seconds) * 1500);
            if now >= silent {
                return Err(End::Silent);
            }
            next = next.min(silent);
        }
        if !self.handshake.sent {
            if now >= self.since + CONNACK_TIMEOUT {
                let home = self.upstreams[usize::from(self.home)].broker;
                return Err(End::Unavailable(self.table.broker(home).group.clone()));
            }
            let sessions = self.since + SESSIONS_TIMEOUT + Duration::from_millis(1);
            next = next.min(if now < sessions { sessions } else { self.since + CONNACK_TIMEOUT });
        }
        if !self.subscriptions.is_empty() {
            // To notice a new configuration.
            next = next.min(now + ROUTES_INTERVAL);
        }
        for slot in 0..self.upstreams.len() as Slot {
            let up = &mut self.upstreams[usize::from(slot)];
            if let Some(due) = up.deadline()
                && due <= now
            {
                *acted = true;
                let unread = self.outbound.pending.len() > HIGH
                    || self.outbound.delivering.is_some_and(|s| s != slot);
                match up.state {
                    // PINGRESP may be queued behind deliveries that are not read.
                    State::Ready(_) if up.keepalive.pinged.is_some() && unread => {
                        up.keepalive.pinged = Some(now);
                    }
                    State::Waiting(_) if up.subscribed || self.connect.persistent => {
                        let kind = if self.handshake.sent { Kind::Resume } else { Kind::Secondary };
                        up.reconnect(kind, now);
                    }
                    State::Waiting(_) => up.state = State::Closed,
                    State::Ready(_) if up.keepalive.pinged.is_none() => {
                        // Not within a message, which is traffic itself.
                        if self.inbound.forwarding.is_none_or(|p| p.0 != Some(slot)) {
                            up.out.push(&[kind::PINGREQ << 4, 0]);
                            up.keepalive.pinged = Some(now);
                        }
                        up.keepalive.last_out = now;
                    }
                    _ => self.broker_lost(slot, &Lost::Silent, now)?,
                }
            }
            self.close_unused(slot, now);
            let up = &self.upstreams[usize::from(slot)];
            if let Some(due) = up.deadline() {
                next = next.min(due);
            }
            if up.is_ready() && now < up.last_used + UNUSED {
                next = next.min(up.last_used + UNUSED);
            }
        }
        let before = self.leaving;
        let due = self.return_to_fast_path(now)?;
        *acted |= before != self.leaving;
        if let Some(due) = due {
            next = next.min(due);
        }
        Ok(next.max(now + Duration::from_millis(1)))
    }

    /// Closes a broker connection that is no longer needed.
    pub(super) fn close_unused(&mut self, slot: Slot, now: Instant) {
        let newer = |up: &Upstream| {
            self.upstreams.iter().any(|u| u.is_ready() && u.last_used > up.last_used)
        };
        let up = &self.upstreams[usize::from(slot)];
        let needed = self.will == Some(slot)
            || up.subscribed
            || self.connect.persistent
            || !self.handshake.sent;
        let passing = self.inbound.forwarding.is_some() || self.outbound.delivering == Some(slot);
        if needed || passing || !up.is_ready() || !up.is_quiet() || !newer(up) {
            return;
        }
        if now < up.last_used + UNUSED {
            return;
        }
        let up = &mut self.upstreams[usize::from(slot)];
        if let State::Ready(stream) = std::mem::replace(&mut up.state, State::Closed) {
            tokio::task::spawn_local(disconnect(stream, vec![kind::DISCONNECT << 4, 0]));
        }
        up.close(State::Closed);
    }

    /// Applies a new configuration: routes, and brokers added or removed.
    pub(super) fn apply_new_routes(&mut self, now: Instant) -> Result<(), End> {
        // Indices of brokers change, so not within a message.
        if self.inbound.forwarding.is_some() {
            return Ok(());
        }
        self.generation = self.worker.generation();
        let table = self.worker.table();
        for up in &mut self.upstreams {
            match table.find(up.addr) {
                Some(broker) => up.broker = broker,
                // The client reconnects, and gets the new brokers.
                None if !matches!(up.state, State::Closed) => return Err(End::BrokerLost(up.addr)),
                None => up.broker = Broker::MAX,
            }
        }
        if self.upstreams[usize::from(self.home)].broker == Broker::MAX {
            return Err(End::BrokerLost(self.upstreams[usize::from(self.home)].addr));
        }
        let before = std::mem::replace(&mut self.table, table);
        let table = Arc::clone(&self.table);
        let (mut old_budget, mut new_budget) = (Budget::of_packet(), Budget::of_packet());
        // Of each filter, the brokers that it had and those that it needs.
        let filters: HashMap<String, (Vec<SocketAddr>, Vec<Broker>)> = self
            .subscriptions
            .filters()
            .map(|filter| {
                let had = before.brokers_for(filter, &mut old_budget);
                let had = had.into_iter().map(|broker| before.broker(broker).addr);
                // Rather twice than not at all.
                let had = had.filter(|_| !old_budget.is_spent()).collect();
                (filter.to_owned(), (had, table.brokers_for(filter, &mut new_budget)))
            })
            .collect();
        let brokers: BTreeSet<Broker> =
            filters.values().flat_map(|(_, needs)| needs).copied().collect();
        for broker in brokers {
            let slot = self.open_or_retry(broker, now);
            self.subscribes_at(slot);
            let up = &self.upstreams[usize::from(slot)];
            let addr = up.addr;
            if up.is_ready() {
                self.resubscribe(slot, |filter| {
                    filters
                        .get(filter)
                        .is_none_or(|(had, needs)| needs.contains(&broker) && !had.contains(&addr))
                });
            }
        }
        Ok(())
    }

    /// Disconnects a client that the datapath would bind to its group next time. Returns when to try again.
    pub(super) fn return_to_fast_path(&mut self, now: Instant) -> Result<Option<Instant>, End> {
        let Some(after) = self.worker.limits.return_after else { return Ok(None) };
        if self.leaving {
            let patience = self.keepalive.last_in + Duration::from_secs(10);
            return if now < patience { Ok(Some(patience)) } else { Err(End::Returned) };
        }
        // As many messages of one group as the datapath wants to have seen (bpf/forward/learn/weigh.h).
        const MESSAGES: u64 = 64;
        let one_group = self.published.as_ref().is_some_and(|(_, count)| *count >= MESSAGES);
        let will_elsewhere = self.will_broker().is_some_and(|broker| {
            let group = &self.table.broker(broker).group;
            self.published.as_ref().is_none_or(|(one, _)| **one != **group)
        });
        let candidate = one_group
            && self.is_direct
            && !will_elsewhere
            && self.handshake.sent
            && self.subscriptions.is_empty()
            && !self.connect.persistent
            && self.deliveries.is_empty();
        if !candidate {
            return Ok(None);
        }
        if now < self.since + after {
            return Ok(Some(self.since + after));
        }
        // What comes while the client does not know would be lost at QoS 0.
        const UNDER_WAY: Duration = Duration::from_secs(1);
        let idle = self.inbound.qos_0.is_none_or(|last| now >= last + UNDER_WAY)
            && self.in_flight.messages.is_empty()
            && self.inbound.forwarding.is_none()
            && self.inbound.unparsed.is_empty()
            && self.outbound.delivering.is_none()
            && self.upstreams.iter().all(Upstream::is_quiet);
        let id = &self.connect.client_id;
        let key = if id.is_empty() { self.addrs.0.ip().to_string() } else { id.clone() };
        let (limits, returns) = (self.worker.limits, &self.worker.shared.returns);
        if !idle || !returns.may_return(&key, now, limits.returns_per_second) {
            return Ok(Some(now + Duration::from_secs(1)));
        }
        if self.connect.v5 {
            const SERVER_MOVED: u8 = 0x9d;
            self.outbound.pending.push(&[kind::DISCONNECT << 4, 2, SERVER_MOVED, 0]);
        }
        self.leaving = true;
        self.keepalive.last_in = now;
        self.stats().returned.add(1);
        Ok(Some(now + Duration::from_millis(1)))
    }
}
