//! What the relay has done, counted by all threads.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Takes from it: of those that say how many there are.
    pub fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Stats {
    /// Connections that clients have now.
    pub connections: Counter,
    /// Connections that were taken.
    pub accepted: Counter,
    /// Connections that were refused: over a limit.
    pub refused: Counter,
    /// Connections without a CONNECT that could be read, or a TLS or WebSocket handshake.
    pub strangers: Counter,
    /// Sessions that a broker took.
    pub opened: Counter,
    /// Messages from clients.
    pub published: Counter,
    /// Messages to clients.
    pub delivered: Counter,
    /// Clients that were sent to the fast path.
    pub returned: Counter,
    /// Sessions that ended because a broker was lost or not there.
    pub broker_lost: Counter,
    /// Sessions that ended because their clients did not keep to the protocol.
    pub protocol_errors: Counter,
}
