//! Who is asked for what, and what follows from the answers. No I/O.
//!
//! ```text
//! segment ─► held, by connection ─► a question to all broker hosts ─┬─ one has it ─► its flow is bound there
//!                                                                   ├─ none ─► the store ─┬─ kept ─► it goes on here
//!                                                                   │                     └─ none ─► all once more ─► RST
//!                                                                   └─ not all answered ─► dropped: TCP repeats it
//! ```
//!
//! A connection whose client is silent after its CONNECT was answered here goes the same way before a broker is given
//! it: another balancer may have gone on with it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::datapath::Silent;
use crate::datapath::misses::Segment;
use crate::domain::waiting::Waiting;
use crate::kernel::ask::{Asked, Had};

/// What another balancer has just given a broker may be on its way still: who has it is asked once more after this.
const AGAIN: Duration = Duration::from_millis(25);
/// For so long segments are held; then TCP repeats them.
const PATIENCE: Duration = Duration::from_millis(100);
/// What is not further behind a CONNECT is of its connection (`FLOW_WINDOW`).
const WINDOW: u32 = 1 << 20;
/// Segments that are held, of all connections and of one.
const HELD_MAX: usize = 4096;
const HELD_OF_ONE: usize = 32;

/// What is asked for: a client's connection to a service, by about where its segments are. Of one that is over, a late
/// segment may still come, while the next one on its addresses has begun: those are two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    pub client: SocketAddr,
    /// The service's number.
    pub service: u16,
    /// The upper byte of sequence numbers.
    part: u8,
}

impl Key {
    fn of(segment: &Segment) -> Self {
        let part = (segment.seq >> 24) as u8;
        Self { client: segment.client, service: segment.service, part }
    }
}

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
    Decided(Box<Decided>),
    /// No broker host has it: the store is to be asked.
    AskStore(Key),
    /// Nor has one when asked once more.
    Nowhere(Key),
}

#[derive(Debug)]
struct Pending {
    segments: Vec<Segment>,
    silent: Option<Silent>,
    since: Instant,
    /// Who has not answered yet; `None`: no question is open.
    unanswered: Option<HashSet<IpAddr>>,
    /// The store was asked.
    asked_store: bool,
    /// All are asked once more, soon; they were.
    again: bool,
    twice: bool,
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
    /// Connections that are to be asked for once more, the next one first. Some are decided meanwhile.
    again: VecDeque<(Instant, Key)>,
    /// Connections that nobody was asked for yet, by service.
    new: HashMap<u16, Vec<Key>>,
}

impl Asking {
    /// Holds a segment; false: there are too many.
    pub fn hold(&mut self, segment: Segment, now: Instant) -> bool {
        let key = Key::of(&segment);
        let of_one = self.pending.get(&key).map_or(0, |pending| pending.segments.len());
        if self.held >= HELD_MAX || of_one >= HELD_OF_ONE {
            return false;
        }
        self.held += 1;
        let new = || {
            self.new.entry(key.service).or_default().push(key);
            Pending {
                segments: Vec::new(),
                silent: None,
                since: now,
                unanswered: None,
                asked_store: false,
                again: false,
                twice: false,
            }
        };
        self.pending.entry(key).or_insert_with(new).segments.push(segment);
        true
    }

    /// Holds a silent connection, with its CONNECT.
    pub fn hold_silent(&mut self, silent: Silent, connect: Segment, now: Instant) {
        let key = Key::of(&connect);
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

    /// Connections that are to be asked for once more.
    pub fn take_due(&mut self, now: Instant) -> HashMap<u16, Vec<Key>> {
        let mut due: HashMap<u16, Vec<Key>> = HashMap::new();
        while self.again.front().is_some_and(|(at, _)| *at <= now) {
            let Some((_, key)) = self.again.pop_front() else { break };
            if let Some(pending) = self.pending.get_mut(&key).filter(|pending| pending.again) {
                (pending.again, pending.twice) = (false, true);
                due.entry(key.service).or_default().push(key);
            }
        }
        due
    }

    /// Whether something is to be asked for once more, soon.
    pub fn asks_again(&self) -> bool {
        !self.again.is_empty()
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
            connections.push(Asked { client: key.client, seq: first.seq, ack: first.ack });
        }
        self.rounds.insert(nonce, Round { keys: kept, asked, since: now });
        connections
    }

    /// A broker host has answered. Who `is_gone` need not answer any more. Who `is_deaf` is not waited for before the store
    /// is asked: what that has, no broker has. That nobody has it, all must have said.
    pub fn answered(
        &mut self,
        nonce: u64,
        real: IpAddr,
        had: &[Had],
        is_gone: &dyn Fn(u16, IpAddr) -> bool,
        is_deaf: &dyn Fn(IpAddr) -> bool,
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
                next.extend(
                    self.decide(key, Found::At(real), now)
                        .map(|decided| Next::Decided(Box::new(decided))),
                );
            } else if unanswered
                .iter()
                .all(|real| is_gone(key.service, *real) || (!pending.twice && is_deaf(*real)))
            {
                pending.unanswered = None;
                // Data may have come behind an acknowledgement that the store was not asked for.
                let bare = pending.segments.iter().all(Segment::is_bare);
                let is_all = pending.twice && (pending.asked_store || bare);
                next.push(if is_all { Next::Nowhere(key) } else { Next::AskStore(key) });
            }
        }
        next
    }

    /// What the store has of it: of the segment's connection (`is_of`), or nothing.
    pub fn stored(&mut self, key: Key, kept: Option<Waiting>, now: Instant) -> Option<Decided> {
        match kept {
            Some(kept) => self.decide(key, Found::Kept(kept), now),
            None => self.nowhere(key, Found::Gone, now),
        }
    }

    /// Whether what the store had is what a held segment comes behind.
    pub fn is_of(&self, key: &Key, kept: &Waiting) -> bool {
        let mut segments = self.pending.get(key).into_iter().flat_map(|pending| &pending.segments);
        segments.any(|segment| kept.is_before(segment.seq))
    }

    /// Whether between the two something was lost, which TCP repeats.
    pub fn is_behind(&self, key: &Key, kept: &Waiting) -> bool {
        let first = self.pending.get(key).and_then(|pending| pending.segments.first());
        first.is_some_and(|first| first.seq.wrapping_sub(kept.start) < WINDOW)
    }

    /// The store is being asked, or did not say.
    pub fn note_asked(&mut self, key: &Key, is_asked: bool) {
        if let Some(pending) = self.pending.get_mut(key) {
            pending.asked_store = is_asked;
        }
    }

    /// Whether nothing is held that could go on: acknowledgements alone take nothing out of the store.
    pub fn only_acknowledges(&self, key: &Key) -> bool {
        self.pending.get(key).is_none_or(|pending| pending.segments.iter().all(Segment::is_bare))
    }

    /// There is no store to ask, or it has nothing more to say.
    pub fn without_store(&mut self, key: Key, now: Instant) -> Option<Decided> {
        let asked = self.pending.get(&key)?.asked_store;
        self.nowhere(key, if asked { Found::Gone } else { Found::Nowhere }, now)
    }

    /// Neither at a broker host nor in the store: asked for once more, or so it is.
    fn nowhere(&mut self, key: Key, found: Found, now: Instant) -> Option<Decided> {
        let pending = self.pending.get_mut(&key)?;
        if pending.twice || (pending.silent.is_some() && found == Found::Nowhere) {
            return self.decide(key, found, now);
        }
        if !pending.again {
            pending.again = true;
            self.again.push_back((now + AGAIN, key));
        }
        None
    }

    /// Whether a connection is asked for.
    pub fn holds(&self, key: &Key) -> bool {
        self.pending.contains_key(key)
    }

    fn decide(&mut self, key: Key, found: Found, now: Instant) -> Option<Decided> {
        let pending = self.pending.remove(&key)?;
        self.held -= pending.segments.len();
        Some(Decided {
            service: key.service,
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

#[cfg(test)]
mod tests {
    use super::*;

    const R1: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 3, 201));
    const R2: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 3, 202));

    fn segment(client: &str, seq: u32) -> Segment {
        Segment::of_numbers(client.parse().unwrap(), 0, seq)
    }

    /// Asks both for all that is new; the nonce is 1, 2, …
    fn ask(asking: &mut Asking, nonce: u64, now: Instant) -> usize {
        let new = asking.take_new();
        let keys: Vec<Key> = new.into_values().flatten().collect();
        asking.begin(nonce, &keys, &[R1, R2], now).len()
    }

    const NOBODY_GONE: &dyn Fn(u16, IpAddr) -> bool = &|_, _| false;
    const NOBODY_DEAF: &dyn Fn(IpAddr) -> bool = &|_| false;

    fn decided(next: Vec<Next>) -> Decided {
        match next.into_iter().next() {
            Some(Next::Decided(decided)) => *decided,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_first_host_that_has_it_decides_for_all_that_is_held() {
        let (mut asking, now) = (Asking::default(), Instant::now());
        for seq in [10, 20, 30] {
            assert!(asking.hold(segment("10.1.1.1:1", seq), now));
        }
        assert_eq!(ask(&mut asking, 1, now), 1, "once for all three");
        assert!(asking.answered(1, R2, &[Had::Nothing], NOBODY_GONE, NOBODY_DEAF, now).is_empty());
        let found = decided(asking.answered(1, R1, &[Had::This], NOBODY_GONE, NOBODY_DEAF, now));
        assert_eq!((found.found, found.segments.len()), (Found::At(R1), 3));
        assert!(asking.is_idle() && asking.held == 0);
        // Late, doubled, or of nobody.
        assert!(asking.answered(1, R2, &[Had::This], NOBODY_GONE, NOBODY_DEAF, now).is_empty());
        assert!(asking.answered(9, R1, &[Had::This], NOBODY_GONE, NOBODY_DEAF, now).is_empty());
    }

    #[test]
    fn nobody_is_told_that_nobody_has_it_before_all_have_said_so() {
        let (mut asking, now) = (Asking::default(), Instant::now());
        asking.hold(segment("10.1.1.1:1", 10), now);
        ask(&mut asking, 1, now);
        assert!(asking.answered(1, R1, &[Had::Nothing], NOBODY_GONE, NOBODY_DEAF, now).is_empty());
        assert!(
            asking.answered(1, R1, &[Had::Nothing], NOBODY_GONE, NOBODY_DEAF, now).is_empty(),
            "twice"
        );
        // One that does not answer delays its own only: this one is given up, and TCP repeats it.
        assert_eq!(asking.expire(now + PATIENCE), 1);
        assert!(asking.answered(1, R2, &[Had::This], NOBODY_GONE, NOBODY_DEAF, now).is_empty());

        // One that is down, and whose connections are reset for that, need not answer.
        asking.hold(segment("10.1.1.1:1", 10), now);
        ask(&mut asking, 2, now);
        let next = asking.answered(2, R1, &[Had::Other], &|_, real| real == R2, NOBODY_DEAF, now);
        let Some(Next::AskStore(key)) = next.into_iter().next() else {
            panic!("the store is asked")
        };
        // What another balancer has just given to one may be on its way.
        assert!(asking.without_store(key, now).is_none() && asking.take_due(now).is_empty());
        let now = now + AGAIN;
        let due: Vec<Key> = asking.take_due(now).into_values().flatten().collect();
        asking.begin(3, &due, &[R1, R2], now);
        let next = asking.answered(3, R1, &[Had::Nothing], &|_, real| real == R2, NOBODY_DEAF, now);
        // There was none to ask; it may be there now, or what was held then was an acknowledgement alone.
        let [Next::AskStore(key)] = next[..] else { panic!("{next:?}") };
        assert_eq!(asking.without_store(key, now).unwrap().found, Found::Nowhere);
        assert!(asking.is_idle() && !asking.asks_again());
    }

    #[test]
    fn what_is_not_in_the_store_is_not_asked_for_there_again() {
        let (mut asking, now) = (Asking::default(), Instant::now());
        asking.hold(segment("10.1.1.1:1", 10), now);
        ask(&mut asking, 1, now);
        asking.answered(1, R1, &[Had::Nothing], NOBODY_GONE, NOBODY_DEAF, now);
        let next = asking.answered(1, R2, &[Had::Nothing], NOBODY_GONE, NOBODY_DEAF, now);
        let [Next::AskStore(key)] = next[..] else { panic!("{next:?}") };
        asking.note_asked(&key, true);
        assert!(asking.stored(key, None, now).is_none(), "a host may have just been given it");
        let now = now + AGAIN;
        let due: Vec<Key> = asking.take_due(now).into_values().flatten().collect();
        asking.begin(2, &due, &[R1, R2], now);
        asking.answered(2, R1, &[Had::Nothing], NOBODY_GONE, NOBODY_DEAF, now);
        let next = asking.answered(2, R2, &[Had::Nothing], NOBODY_GONE, NOBODY_DEAF, now);
        let [Next::Nowhere(key)] = next[..] else { panic!("{next:?}") };
        assert_eq!(asking.without_store(key, now).unwrap().found, Found::Gone);
    }

    #[test]
    fn a_late_segment_of_the_last_connection_does_not_decide_for_the_next_one() {
        let (mut asking, now) = (Asking::default(), Instant::now());
        asking.hold(segment("10.1.1.1:1", 3_750_940_276), now);
        asking.hold(segment("10.1.1.1:1", 3_840_900_471), now);
        assert_eq!(ask(&mut asking, 1, now), 2, "each by its own numbers");
        asking.answered(1, R2, &[Had::Nothing, Had::Nothing], NOBODY_GONE, NOBODY_DEAF, now);
        let next =
            asking.answered(1, R1, &[Had::Nothing, Had::This], NOBODY_GONE, NOBODY_DEAF, now);
        assert!(matches!(next[0], Next::AskStore(_)));
        assert!(matches!(&next[1], Next::Decided(d) if d.found == Found::At(R1)));
    }

    #[test]
    fn what_the_store_has_of_another_connection_does_not_count() {
        let (mut asking, now) = (Asking::default(), Instant::now());
        let kept = Waiting {
            start: 100,
            server: 7,
            timestamps: None,
            client_id: (0, 0),
            will_group: None,
            connect: vec![0; 14],
            connect_sum: 0,
        };
        for (seq, is_of_it) in [(114, true), (100, true), (113, true), (115, false), (99, false)] {
            asking.hold(segment("10.1.1.1:1", seq), now);
            let key = asking.take_new().into_values().flatten().next().unwrap();
            assert_eq!(asking.is_of(&key, &kept), is_of_it, "{seq}");
            asking.expire(now + PATIENCE);
        }
    }

    #[test]
    fn a_host_that_is_deaf_does_not_keep_from_the_store_what_no_broker_has() {
        let (mut asking, now) = (Asking::default(), Instant::now());
        asking.hold(segment("10.1.1.1:1", 10), now);
        ask(&mut asking, 1, now);
        let is_deaf: &dyn Fn(IpAddr) -> bool = &|real| real == R2;
        let next = asking.answered(1, R1, &[Had::Nothing], NOBODY_GONE, is_deaf, now);
        let [Next::AskStore(key)] = next[..] else { panic!("{next:?}") };
        // The store has it not: that nobody has it, the deaf one is still to say.
        assert!(asking.stored(key, None, now).is_none());
        let now = now + AGAIN;
        let due: Vec<Key> = asking.take_due(now).into_values().flatten().collect();
        asking.begin(2, &due, &[R1, R2], now);
        assert!(asking.answered(2, R1, &[Had::Nothing], NOBODY_GONE, is_deaf, now).is_empty());
        assert_eq!(asking.expire(now + PATIENCE), 1);
    }

    #[test]
    fn what_is_held_is_bounded() {
        let (mut asking, now) = (Asking::default(), Instant::now());
        let held = (0..100).filter(|_| asking.hold(segment("10.1.1.1:1", 5), now)).count();
        assert_eq!(held, HELD_OF_ONE);
        let held =
            (1..10_000).filter(|port| asking.hold(segment(&format!("10.1.1.2:{port}"), 5), now));
        assert_eq!(held.count(), HELD_MAX - HELD_OF_ONE);
        asking.expire(now + PATIENCE);
        assert!(asking.is_idle() && asking.held == 0 && asking.hold(segment("10.1.1.1:1", 5), now));
    }
}
