//! What a session does when its time has come: writing, pinging, retrying, ending what is not used.

use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::time::{Duration, Instant};

use tokio::io::AsyncWrite as _;

use super::super::hello::Kind;
use super::super::ids::Slot;
use super::super::scan::kind;
use super::super::table::Broker;
use super::super::upstream::{State, Upstream};
use super::{
    End, GREET_TIMEOUT, HIGH, LOOK_AGAIN, SESSIONS_TIMEOUT, Session, UNUSED, finish_stream,
};

impl Session {
    /// Writes what waits. Whether anything went.
    pub(super) fn flush(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let mut progress = false;
        if !self.greeted {
            self.greet(Instant::now());
            progress |= self.greeted;
        }
        for up in &mut self.upstreams {
            let (State::Ready(stream) | State::Opening(stream)) = &mut up.state else { continue };
            match up.out.flush(stream, cx) {
                Ok(wrote) => progress |= wrote,
                // Found when it is read, behind what the broker still had to say.
                Err(_) if !up.broken => (up.broken, progress) = (true, true),
                Err(_) => {}
            }
        }
        progress |= self.out.flush(&mut self.client, cx).map_err(End::ClientGone)?;
        if self.leaving && self.out.is_empty() {
            // The client's last messages may still come.
            let _ = Pin::new(&mut self.client).poll_shutdown(cx).map_err(End::ClientGone)?;
        }
        Ok(progress)
    }

    pub(super) fn rest_until_something_happens(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        loop {
            let now = Instant::now();
            let mut acted = false;
            let next = self.look_at_the_clock(now, &mut acted)?;
            if acted {
                // There may be something to be written, or a connection to be opened.
                cx.waker().wake_by_ref();
                return Ok(());
            }
            // Sooner than needed does no harm, and setting it costs more than looking at it.
            if self.timer.is_elapsed() || self.timer.deadline() > next.into() {
                self.timer.as_mut().reset(next.into());
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Ok(());
            }
        }
    }

    /// Does what is due, and says when the next thing is.
    pub(super) fn look_at_the_clock(
        &mut self,
        now: Instant,
        acted: &mut bool,
    ) -> Result<Instant, End> {
        let mut next = now + Duration::from_secs(3600);
        if self.keepalive > 0 && self.greeted {
            if self.waits || self.upstreams.iter().any(|u| u.out.len() > HIGH) {
                // It is not read; who knows what it has said.
                self.last_in = now;
            }
            let silent = self.last_in + Duration::from_millis(u64::from(self.keepalive) * 1500);
            if now >= silent {
                return Err(End::Silent);
            }
            next = next.min(silent);
        }
        if !self.greeted {
            if now >= self.since + GREET_TIMEOUT {
                let home = self.upstreams[usize::from(self.home)].broker;
                return Err(End::Unavailable(self.table.broker(home).group.clone()));
            }
            let sessions = self.since + SESSIONS_TIMEOUT + Duration::from_millis(1);
            next = next.min(if now < sessions { sessions } else { self.since + GREET_TIMEOUT });
        }
        if !self.subscriptions.is_empty() {
            // To see a new configuration.
            next = next.min(now + LOOK_AGAIN);
        }
        for slot in 0..self.upstreams.len() as Slot {
            let up = &mut self.upstreams[usize::from(slot)];
            if let Some(due) = up.deadline()
                && due <= now
            {
                *acted = true;
                let unread = self.out.len() > HIGH || self.getting.is_some_and(|s| s != slot);
                match up.state {
                    // It may have answered behind what the client does not take.
                    State::Ready(_) if up.pinged.is_some() && unread => up.pinged = Some(now),
                    State::Waiting(_) if up.subscribed || self.hello.persistent => {
                        let kind = if self.greeted { Kind::Resume } else { Kind::Beside };
                        up.again(kind, now);
                    }
                    State::Waiting(_) => up.state = State::Closed,
                    State::Ready(_) if up.pinged.is_none() => {
                        // Not into the middle of a message, which says enough.
                        if self.passing.is_none_or(|p| p.0 != Some(slot)) {
                            up.out.push(&[kind::PINGREQ << 4, 0]);
                            up.pinged = Some(now);
                        }
                        up.last_out = now;
                    }
                    _ => self.lost(slot, now)?,
                }
            }
            self.end_unused(slot, now);
            let up = &self.upstreams[usize::from(slot)];
            if let Some(due) = up.deadline() {
                next = next.min(due);
            }
            if up.is_ready() && now < up.last_used + UNUSED {
                next = next.min(up.last_used + UNUSED);
            }
        }
        let before = self.leaving;
        let due = self.let_go(now)?;
        *acted |= before != self.leaving;
        if let Some(due) = due {
            next = next.min(due);
        }
        Ok(next.max(now + Duration::from_millis(1)))
    }

    /// Ends a broker's connection that the client does not need any more, without its will.
    pub(super) fn end_unused(&mut self, slot: Slot, now: Instant) {
        let newer = |up: &Upstream| {
            self.upstreams.iter().any(|u| u.is_ready() && u.last_used > up.last_used)
        };
        let up = &self.upstreams[usize::from(slot)];
        let needed =
            self.will == Some(slot) || up.subscribed || self.hello.persistent || !self.greeted;
        let passing = self.passing.is_some() || self.getting == Some(slot);
        if needed || passing || !up.is_ready() || !up.is_quiet() || !newer(up) {
            return;
        }
        if now < up.last_used + UNUSED {
            return;
        }
        let up = &mut self.upstreams[usize::from(slot)];
        if let State::Ready(stream) = std::mem::replace(&mut up.state, State::Closed) {
            tokio::task::spawn_local(finish_stream(stream, vec![kind::DISCONNECT << 4, 0]));
        }
        up.close(State::Closed);
    }

    /// After a change of the configuration, other brokers may be needed, and some not be there.
    pub(super) fn follow_the_configuration(&mut self, now: Instant) -> Result<(), End> {
        // Numbers of brokers change: not while a message is on its way to one.
        if self.passing.is_some() {
            return Ok(());
        }
        self.generation = self.worker.generation();
        let table = self.worker.table();
        for up in &mut self.upstreams {
            match table.find(up.addr) {
                Some(broker) => up.broker = broker,
                // Its client connects again, and finds the others.
                None if !matches!(up.state, State::Closed) => return Err(End::BrokerLost(up.addr)),
                None => up.broker = Broker::MAX,
            }
        }
        if self.upstreams[usize::from(self.home)].broker == Broker::MAX {
            return Err(End::BrokerLost(self.upstreams[usize::from(self.home)].addr));
        }
        let before = std::mem::replace(&mut self.table, table);
        let table = Arc::clone(&self.table);
        let brokers: Vec<Broker> = self.subscriptions.brokers(|f| table.brokers_for(f)).collect();
        for broker in brokers {
            let slot = self.open_or_retry(broker, now);
            let up = &mut self.upstreams[usize::from(slot)];
            up.subscribed = true;
            if up.is_ready() {
                let old = before.find(up.addr);
                self.subscribe_again(slot, |_, filter| {
                    old.is_none_or(|old| !before.brokers_for(filter).contains(&old))
                });
            }
        }
        Ok(())
    }

    /// A client that has used one group only goes there straight the next time. When to look again.
    pub(super) fn let_go(&mut self, now: Instant) -> Result<Option<Instant>, End> {
        let Some(after) = self.worker.limits.return_after else { return Ok(None) };
        if self.leaving {
            let patience = self.last_in + Duration::from_secs(10);
            return if now < patience { Ok(Some(patience)) } else { Err(End::LetGo) };
        }
        let one_group = self.published.as_ref().is_some_and(|(_, count)| *count > 0);
        let candidate = one_group
            && self.greeted
            && self.subscriptions.is_empty()
            && !self.hello.persistent
            && self.deliveries.is_empty();
        if !candidate {
            return Ok(None);
        }
        if now < self.since + after {
            return Ok(Some(self.since + after));
        }
        let idle = self.inflight.is_empty()
            && self.passing.is_none()
            && self.rest.is_empty()
            && self.getting.is_none()
            && self.upstreams.iter().all(Upstream::is_quiet);
        let id = &self.hello.client_id;
        let key = if id.is_empty() { self.addrs.0.ip().to_string() } else { id.clone() };
        if !idle || !self.worker.may_return(&key, now) {
            return Ok(Some(now + Duration::from_secs(1)));
        }
        if self.hello.v5 {
            const SERVER_MOVED: u8 = 0x9d;
            self.out.push(&[kind::DISCONNECT << 4, 2, SERVER_MOVED, 0]);
        }
        self.leaving = true;
        self.last_in = now;
        self.stats().returned.add(1);
        Ok(Some(now + Duration::from_millis(1)))
    }
}
