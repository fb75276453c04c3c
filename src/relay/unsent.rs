//! SUBSCRIBEs that wait for connections to brokers. What another client publishes after them has to wait as well:
//! one broker would have seen the SUBSCRIBE first.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::subscriptions::Request;
use crate::domain::filter::TopicFilter;

/// How long messages wait at most: a broker that hangs must not stop publishers.
const PATIENCE: Duration = Duration::from_millis(100);
/// Topic filters listed at a time; messages do not wait for more.
const FILTERS_MAX: usize = 64;

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
}

#[derive(Debug)]
struct Entry {
    number: u64,
    service: usize,
    filter: TopicFilter,
    since: Instant,
}

impl Unsent {
    /// Lists a SUBSCRIBE until the ticket is dropped.
    pub fn add(self: &Arc<Self>, service: usize, request: &Request, now: Instant) -> Ticket {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let number = list.next;
        list.next += 1;
        let free = FILTERS_MAX.saturating_sub(list.entries.len());
        for i in (0..request.len()).take(free) {
            // An invalid one is refused by its broker.
            if let Ok(filter) = TopicFilter::parse(super::table::unshared(request.filter(i))) {
                list.entries.push(Entry { number, service, filter, since: now });
            }
        }
        self.count.store(list.entries.len(), Ordering::Release);
        Ticket { unsent: Arc::clone(self), number }
    }

    /// Whether a message that was received at `at` has to wait for an earlier SUBSCRIBE.
    pub fn precedes(&self, service: usize, topic: &str, at: Instant, now: Instant) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.entries.iter().any(|entry| {
            entry.service == service
                && entry.since <= at
                && now < entry.since + PATIENCE
                && entry.filter.matches(topic)
        })
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
        let mut list = self.unsent.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.entries.retain(|entry| entry.number != self.number);
        self.unsent.count.store(list.entries.len(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
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
    fn messages_wait_for_earlier_subscriptions_to_their_topic_and_not_for_long() {
        let unsent = Arc::new(Unsent::default());
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let ticket = unsent.add(1, &subscribe(&["a/+", "$share/g/b/#"]), at(10));
        assert!(unsent.precedes(1, "a/x", at(11), at(11)));
        assert!(unsent.precedes(1, "b/x/y", at(11), at(50)));
        assert!(!unsent.precedes(1, "c", at(11), at(11)), "another topic");
        assert!(!unsent.precedes(0, "a/x", at(11), at(11)), "another service");
        assert!(!unsent.precedes(1, "a/x", at(9), at(11)), "received before");
        assert!(!unsent.precedes(1, "a/x", at(11), at(110)), "long enough");
        let other = unsent.add(1, &subscribe(&["a/#"]), at(20));
        drop(ticket);
        assert!(unsent.precedes(1, "a/x", at(30), at(30)));
        assert!(!unsent.precedes(1, "b/x/y", at(30), at(30)));
        drop(other);
        assert!(!unsent.precedes(1, "a/x", at(30), at(30)));
    }

    #[test]
    fn what_strangers_subscribe_to_is_bounded() {
        let unsent = Arc::new(Unsent::default());
        let now = Instant::now();
        let full = unsent.add(0, &subscribe(&["a"; FILTERS_MAX - 1]), now);
        let _next = unsent.add(0, &subscribe(&["b", "c"]), now);
        assert!(unsent.precedes(0, "b", now, now) && !unsent.precedes(0, "c", now, now));
        drop(full);
        assert_eq!(unsent.count.load(Ordering::Relaxed), 1);
    }
}
