//! Clients that are sent to the fast path: one after the other, and those that come back ever more rarely.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Clients that are remembered.
const CLIENTS: usize = 100_000;
/// Before a client is sent away again; twice as long each time.
const FIRST: Duration = Duration::from_secs(600);
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// Those of all threads.
#[derive(Debug, Default)]
pub struct Returns(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    clients: HashMap<String, Returned>,
    /// When the next one may go.
    next: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Returned {
    until: Instant,
    wait: Duration,
}

impl Returns {
    /// Whether a client may be sent away now; if so, it is remembered.
    pub fn may_return(&self, client: &str, now: Instant, per_second: u32) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.next.is_some_and(|at| now < at) {
            return false;
        }
        if state.clients.len() >= CLIENTS {
            state.clients.retain(|_, r| now < r.until);
            if state.clients.len() >= CLIENTS {
                state.clients.clear();
            }
        }
        let wait = match state.clients.get(client) {
            Some(r) if now < r.until => return false,
            Some(r) => (r.wait * 2).min(LONGEST),
            None => FIRST,
        };
        state.clients.insert(client.to_owned(), Returned { until: now + wait, wait });
        state.next = Some(now + Duration::from_secs(1) / per_second);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_let_go_one_after_the_other_and_seldom_twice() {
        let returns = Returns::default();
        let start = Instant::now();
        let may = |id, ms| returns.may_return(id, start + Duration::from_millis(ms), 10);
        assert!(may("a", 0));
        assert!(!may("b", 50));
        assert!(may("b", 100));
        assert!(!may("a", 10_000));
        assert!(may("a", 601_000));
        assert!(!may("a", 1_300_000), "twice as long");
    }
}
