//! Who is asked for what, and what follows from the answers. No I/O.
//!
//! ```text
//! segment ─► held, by connection ─► a question to all broker hosts ─┬─ one has it ─► its flow is bound there
//!                                                                   ├─ none ─► the store ─┬─ kept ─► it goes on here
//!                                                                   │                     └─ none ─► RST
//!                                                                   └─ not all answered ─► dropped: TCP repeats it
//! ```
//!
//! A connection whose client is silent after its CONNECT was answered here goes the same way before a broker is given
//! it: another balancer may have gone on with it.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::datapath::Silent;
use crate::datapath::misses::{Key, Segment};
use crate::domain::waiting::Waiting;
use crate::kernel::ask::{Asked, Had};

/// For so long segments are held; then TCP repeats them.
const PATIENCE: Duration = Duration::from_millis(100);
/// Segments that are held, of all connections and of one.
const HELD_MAX: usize = 4096;
const HELD_OF_ONE: usize = 32;

/// What was found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// At this broker host.
    At(IpAddr),
    /// In the store, which has it no more.
    Kept(Waiting),
    /// Not in the store.
    Gone,
    /// The store cannot be asked, or there is none.
    Nowhere,
}

/// A connection about which something was found out, and its held segments in order.
#[derive(Debug)]
pub struct Decided {
    pub service: u16,
    pub segments: Vec<Segment>,
    /// It was silent here.
    pub silent: Option<Silent>,
    pub found: Found,
    /// Since its first segment.
    pub time: Duration,
}

/// What follows from an answer.
#[derive(Debug)]
pub enum Next {
    Decided(Decided),
    /// No broker host has it: the store is to be asked, for the connection of this segment.
    AskStore(Key),
}

#[derive(Debug)]
struct Pending {
    segments: Vec<Segment>,
    silent: Option<Silent>,
    since: Instant,
    /// Who has not answered yet; `None`: nobody was asked yet.
    unanswered: Option<HashSet<IpAddr>>,
}

#[derive(Debug)]
struct Round {
    keys: Vec<Key>,
    asked: HashSet<IpAddr>,
    since: Instant,
}

/// All that is held and asked for.
#[derive(Debug, Default)]
pub struct Asking {
    pending: HashMap<Key, Pending>,
    rounds: HashMap<u64, Round>,
    held: usize,
    /// Connections that nobody was asked for yet, by service.
    new: HashMap<u16, Vec<Key>>,
}

impl Asking {
    /// Holds a segment; false: there are too many.
    pub fn hold(&mut self, segment: Segment, now: Instant) -> bool {
        let key = (segment.client, segment.service);
        let of_one = self.pending.get(&key).map_or(0, |pending| pending.segments.len());
        if self.held >= HELD_MAX || of_one >= HELD_OF_ONE {
            return false;
        }
        self.held += 1;
        let new = || {
            self.new.entry(key.1).or_default().push(key);
            Pending { segments: Vec::new(), silent: None, since: now, unanswered: None }
        };
        self.pending.entry(key).or_insert_with(new).segments.push(segment);
        true
    }

    /// Holds a silent connection, with its CONNECT.
    pub fn hold_silent(&mut self, silent: Silent, connect: Segment, now: Instant) {
        let key = (connect.client, connect.service);
        if !self.pending.contains_key(&key)
            && self.hold(connect, now)
            && let Some(pending) = self.pending.get_mut(&key)
        {
            pending.silent = Some(silent);
        }
    }

    /// Connections that nobody was asked for yet.
    pub fn take_new(&mut self) -> HashMap<u16, Vec<Key>> {
        std::mem::take(&mut self.new)
    }

    /// Those of a question as that has them. One that has gone meanwhile is left out.
    pub fn begin(
        &mut self,
        nonce: u64,
        keys: &[Key],
        reals: &[IpAddr],
        now: Instant,
    ) -> Vec<Asked> {
        let asked: HashSet<IpAddr> = reals.iter().copied().collect();
        let mut kept = Vec::new();
        let mut connections = Vec::new();
        for key in keys {
            let Some(pending) = self.pending.get_mut(key) else { continue };
            let Some(first) = pending.segments.first() else { continue };
            pending.unanswered = Some(asked.clone());
            kept.push(*key);
            connections.push(Asked { client: key.0, seq: first.seq, ack: first.ack });
        }
        self.rounds.insert(nonce, Round { keys: kept, asked, since: now });
        connections
    }

    /// A broker host has answered. `none_left`: whoever is in it need not answer any more.
    pub fn answered(
        &mut self,
        nonce: u64,
        real: IpAddr,
        had: &[Had],
        is_gone: &dyn Fn(u16, IpAddr) -> bool,
        now: Instant,
    ) -> Vec<Next> {
        let Some(round) = self.rounds.get_mut(&nonce) else { return Vec::new() };
        if !round.asked.remove(&real) {
            return Vec::new();
        }
        let keys = round.keys.clone();
        if round.asked.is_empty() {
            self.rounds.remove(&nonce);
        }
        let mut next = Vec::new();
        for (key, had) in keys.into_iter().zip(had) {
            let Some(pending) = self.pending.get_mut(&key) else { continue };
            let Some(unanswered) = &mut pending.unanswered else { continue };
            if !unanswered.remove(&real) {
                continue;
            }
            if *had == Had::This {
                next.extend(self.decide(key, Found::At(real), now).map(Next::Decided));
            } else if unanswered.iter().all(|real| is_gone(key.1, *real)) {
                pending.unanswered = None;
                next.push(Next::AskStore(key));
            }
        }
        next
    }

    /// What the store has of it. One that is not of the segment's connection does not count.
    pub fn stored(&mut self, key: Key, kept: Option<Waiting>, now: Instant) -> Option<Decided> {
        let first = self.pending.get(&key)?.segments.first()?;
        let of_it = kept.filter(|kept| kept.is_before(first.seq));
        self.decide(key, of_it.map_or(Found::Gone, Found::Kept), now)
    }

    /// There is no store to ask.
    pub fn without_store(&mut self, key: Key, now: Instant) -> Option<Decided> {
        self.decide(key, Found::Nowhere, now)
    }

    /// Whether a connection is asked for.
    pub fn holds(&self, key: &Key) -> bool {
        self.pending.contains_key(key)
    }

    fn decide(&mut self, key: Key, found: Found, now: Instant) -> Option<Decided> {
        let pending = self.pending.remove(&key)?;
        self.held -= pending.segments.len();
        Some(Decided {
            service: key.1,
            segments: pending.segments,
            silent: pending.silent,
            found,
            time: now.duration_since(pending.since),
        })
    }

    /// Gives up what was not found out in time: how many connections.
    pub fn expire(&mut self, now: Instant) -> usize {
        let before = self.pending.len();
        let held = &mut self.held;
        self.pending.retain(|_, pending| {
            let keep = now.duration_since(pending.since) < PATIENCE;
            if !keep {
                *held -= pending.segments.len();
            }
            keep
        });
        self.rounds.retain(|_, round| now.duration_since(round.since) < 10 * PATIENCE);
        before - self.pending.len()
    }

    /// Whether anything is held.
    pub fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }
}
