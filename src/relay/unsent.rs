//! SUBSCRIBEs that wait for connections to brokers, until SUBACK. What another client publishes after them waits as
//! well: one broker would have seen the SUBSCRIBE first. Of SUBSCRIBEs that a client sends at once, this is the first.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use super::subscriptions::Request;
use crate::domain::filter::TopicFilter;

/// How long messages wait at most.
const PATIENCE: Duration = Duration::from_millis(100);
/// How long they do not wait at all after that: a broker that hangs must not slow publishers down again and again.
const PAUSE: Duration = Duration::from_secs(10);
/// Topic filters on the list at most; messages do not wait for others.
const FILTERS_MAX: usize = 64;
/// The same for one SUBSCRIBE, and for the levels of one filter.
const FILTERS_OF_ONE: usize = 8;
const LEVELS_MAX: usize = 32;

/// The SUBSCRIBEs of all threads that wait.
#[derive(Debug, Default)]
pub struct Unsent {
    /// Length of the list, read without its lock for every message.
    count: AtomicUsize,
    list: Mutex<List>,
}

#[derive(Debug, Default)]
struct List {
    entries: Vec<Entry>,
    next: u64,
    /// By service: until when nothing is listed.
    paused: HashMap<usize, Instant>,
    /// Sessions that wait for a SUBSCRIBE, by its number.
    waiting: Vec<(u64, Waker)>,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    service: usize,
    filter: TopicFilter,
    since: Instant,
}

/// A SUBSCRIBE that a message has to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Earlier {
    number: u64,
    /// Then it waits no longer.
    pub until: Instant,
}

impl List {
    fn remove(&mut self, number: u64) {
        self.entries.retain(|entry| entry.number != number);
    }

    /// Takes off what messages no longer wait for.
    fn expire(&mut self, now: Instant) {
        let Self { entries, paused, .. } = self;
        entries.retain(|entry| {
            let waits = now < entry.since + PATIENCE;
            if !waits {
                paused.insert(entry.service, now + PAUSE);
            }
            waits
        });
    }
}

impl Unsent {
    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists a SUBSCRIBE until the ticket is dropped.
    pub fn add(self: &Arc<Self>, service: usize, request: &Request, now: Instant) -> Ticket {
        let mut list = self.lock();
        list.expire(now);
        let number = list.next;
        list.next += 1;
        let paused = list.paused.get(&service).is_some_and(|until| now < *until);
        let room = if paused { 0 } else { FILTERS_MAX - list.entries.len() };
        for i in (0..request.len()).take(room.min(FILTERS_OF_ONE)) {
            // An invalid one is refused by its broker.
            if let Ok(filter) =
                TopicFilter::parse(crate::brokers::router::unshared(request.filter(i)))
                && filter.levels().len() <= LEVELS_MAX
            {
                list.entries.push(Entry { number, service, filter, since: now });
            }
        }
        self.count.store(list.entries.len(), Ordering::Release);
        Ticket { unsent: Arc::clone(self), number }
    }

    /// The SUBSCRIBE that a message has to wait for, if it was received, at `at`, after one.
    pub fn earlier(
        &self,
        service: usize,
        topic: &str,
        at: Instant,
        now: Instant,
    ) -> Option<Earlier> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut list = self.lock();
        list.expire(now);
        self.count.store(list.entries.len(), Ordering::Release);
        let entry = list.entries.iter().find(|entry| {
            entry.service == service && entry.since <= at && entry.filter.matches(topic)
        })?;
        Some(Earlier { number: entry.number, until: entry.since + PATIENCE })
    }

    /// Wakes a session when that SUBSCRIBE is in effect. False: it is already.
    pub fn wake_after(&self, earlier: Earlier, waker: &Waker) -> bool {
        let mut list = self.lock();
        let there = list.entries.iter().any(|entry| entry.number == earlier.number);
        if there {
            list.waiting.push((earlier.number, waker.clone()));
        }
        there
    }
}

/// Takes a SUBSCRIBE off the list when it is dropped.
#[derive(Debug)]
pub struct Ticket {
    unsent: Arc<Unsent>,
    number: u64,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut list = self.unsent.lock();
        list.remove(self.number);
        self.unsent.count.store(list.entries.len(), Ordering::Release);
        let (woken, waiting) =
            std::mem::take(&mut list.waiting).into_iter().partition(|w| w.0 == self.number);
        list.waiting = waiting;
        drop(list);
        let woken: Vec<(u64, Waker)> = woken;
        for (_, waker) in woken {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Wake;

    use super::*;

    fn subscribe(filters: &[&str]) -> Request {
        let mut packet = vec![0, 1];
        for filter in filters {
            packet.extend_from_slice(&(filter.len() as u16).to_be_bytes());
            packet.extend_from_slice(filter.as_bytes());
            packet.push(0);
        }
        let length = packet.len();
        packet.splice(0..0, [0x82, (length & 0x7f) as u8 | 0x80, (length >> 7) as u8]);
        Request::read(&packet, false).unwrap().1
    }

    #[test]
    fn messages_wait_for_earlier_subscriptions_to_their_topic() {
        let unsent = Arc::new(Unsent::default());
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let waits = |service, topic, received| {
            unsent.earlier(service, topic, at(received), at(received)).is_some()
        };
        let ticket = unsent.add(1, &subscribe(&["a/+", "$share/g/b/#"]), at(10));
        assert!(waits(1, "a/x", 11) && waits(1, "b/x/y", 50));
        assert!(!waits(1, "c", 11), "another topic");
        assert!(!waits(0, "a/x", 11), "another service");
        assert!(!waits(1, "a/x", 9), "received before");
        let other = unsent.add(1, &subscribe(&["a/#"]), at(20));
        drop(ticket);
        assert!(waits(1, "a/x", 30) && !waits(1, "b/x/y", 30));
        drop(other);
        assert!(!waits(1, "a/x", 30));
    }

    #[test]
    fn a_broker_that_hangs_delays_messages_once_in_a_while() {
        let unsent = Arc::new(Unsent::default());
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut delayed = 0;
        let mut tickets = Vec::new();
        // A subscriber every 50 ms, none of which ever gets on.
        for ms in (0..30_000).step_by(50) {
            tickets.push(unsent.add(0, &subscribe(&["#"]), at(ms)));
            delayed += u32::from(unsent.earlier(0, "a", at(ms + 1), at(ms + 1)).is_some());
        }
        assert!((6..=9).contains(&delayed), "{delayed}");
        assert!(unsent.lock().entries.len() <= FILTERS_MAX);
        drop(tickets);
        assert_eq!(unsent.count.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_strangers_subscribe_to_is_bounded() {
        let unsent = Arc::new(Unsent::default());
        let now = Instant::now();
        let many: Vec<_> = (0..9).map(|_| unsent.add(0, &subscribe(&["a"; 20]), now)).collect();
        assert_eq!(unsent.lock().entries.len(), FILTERS_MAX);
        drop(many);
        let deep = "a/".repeat(LEVELS_MAX);
        let _ticket = unsent.add(0, &subscribe(&[&deep]), now);
        assert_eq!(unsent.count.load(Ordering::Relaxed), 0);
    }

    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn who_waits_is_woken_when_the_subscription_is_in_effect() {
        let unsent = Arc::new(Unsent::default());
        let woken = Arc::new(Woken(AtomicUsize::new(0)));
        let waker = Waker::from(Arc::clone(&woken));
        let now = Instant::now();
        let ticket = unsent.add(0, &subscribe(&["a"]), now);
        let other = unsent.add(0, &subscribe(&["b"]), now);
        let earlier = unsent.earlier(0, "a", now, now).unwrap();
        assert!(unsent.wake_after(earlier, &waker));
        drop(other);
        assert_eq!(woken.0.load(Ordering::Relaxed), 0);
        drop(ticket);
        assert_eq!(woken.0.load(Ordering::Relaxed), 1);
        assert!(!unsent.wake_after(earlier, &waker), "in effect already");
        assert!(unsent.lock().waiting.is_empty());
    }
}
