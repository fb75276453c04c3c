//! State shared by the sessions of a thread, and by all threads.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::memory::{self, CONNECTION, Held, Memory};
use super::parts::Parts;
use super::returns::Returns;
use super::stats::Stats;
use crate::brokers::router::Router;
use crate::domain::RelayLimits;

/// How long a broker that was not reached counts as down, at least.
pub const DOWN: Duration = Duration::from_secs(2);

/// Shared by all threads.
#[derive(Debug)]
pub struct Shared {
    /// Counters.
    pub stats: Arc<Stats>,
    tables: RwLock<Vec<Arc<Router>>>,
    generation: AtomicU64,
    clients: Mutex<HashMap<IpAddr, Client>>,
    /// What clients have the relay keep: sessions and their connections.
    pub memory: Arc<Memory>,
    /// The same before CONNECT is there, in excess of what a connection may hold.
    pub connecting: Arc<Memory>,
    /// Clients sent to the fast path.
    pub returns: Returns,
    /// Where sessions lie.
    pub parts: Parts,
    /// Ends all sessions.
    pub stop: CancellationToken,
}

/// Connections of an address, with its token bucket for new ones.
#[derive(Debug)]
struct Client {
    connections: u32,
    /// Token bucket, and when it was last refilled.
    tokens: f64,
    at: Instant,
}

impl Shared {
    /// With the table of each service.
    pub fn new(tables: Vec<Arc<Router>>, max_memory: u64) -> Self {
        const CONNECTING: u64 = 32 << 20;
        let connecting = CONNECTING.min(max_memory / 16);
        // Half of what the relay itself leaves is for what the allocator cannot give back.
        let own = memory::resident() + connecting;
        let sessions = max_memory.saturating_sub(own) / 2;
        Self {
            stats: Arc::default(),
            tables: RwLock::new(tables),
            generation: AtomicU64::new(0),
            clients: Mutex::default(),
            memory: Memory::new(sessions),
            connecting: Memory::new(connecting),
            returns: Returns::default(),
            parts: Parts::default(),
            stop: CancellationToken::new(),
        }
    }

    /// The table of a service.
    pub fn table(&self, service: usize) -> Arc<Router> {
        Arc::clone(&self.tables.read().unwrap_or_else(PoisonError::into_inner)[service])
    }

    /// Replaces all tables.
    pub fn set_tables(&self, tables: Vec<Arc<Router>>) {
        *self.tables.write().unwrap_or_else(PoisonError::into_inner) = tables;
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Admits a connection, within the limits.
    pub fn admit(self: &Arc<Self>, addr: IpAddr, limits: &RelayLimits) -> Option<Admitted> {
        let addr = network_of(addr);
        let now = Instant::now();
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let rate = f64::from(limits.connections_per_second);
        // Bounds the map: addresses without connections are forgotten first.
        if clients.len() as u64 > 2 * self.stats.connections.get() + 100_000 {
            clients.retain(|_, c| c.connections > 0);
        }
        let client =
            clients.entry(addr).or_insert(Client { connections: 0, tokens: rate, at: now });
        let passed = now.duration_since(client.at).as_secs_f64();
        client.tokens = (client.tokens + passed * rate).min(rate);
        client.at = now;
        let full = self.stats.connections.get() >= u64::from(limits.connections);
        if self.memory.is_full() {
            self.stats.out_of_memory.add(1);
            return None;
        }
        if full || client.connections >= limits.connections_per_address || client.tokens < 1.0 {
            return None;
        }
        client.tokens -= 1.0;
        client.connections += 1;
        self.stats.connections.add(1);
        let mut memory = Held::new(&self.memory);
        let _ = memory.set(CONNECTION);
        Some(Admitted { shared: Arc::clone(self), addr, _memory: memory })
    }
}

/// An admitted connection, until it is dropped.
#[derive(Debug)]
pub struct Admitted {
    shared: Arc<Shared>,
    addr: IpAddr,
    _memory: Held,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut clients = self.shared.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get_mut(&self.addr) {
            client.connections -= 1;
        }
        self.shared.stats.connections.sub(1);
    }
}

/// An IPv4 address, or the /64 network of an IPv6 address.
fn network_of(addr: IpAddr) -> IpAddr {
    match addr.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// A service's state in one thread.
#[derive(Debug)]
pub struct Worker {
    /// Shared by all threads.
    pub shared: Arc<Shared>,
    /// Counters.
    pub stats: Arc<Stats>,
    /// Limits.
    pub limits: RelayLimits,
    /// Index of the service.
    pub service: usize,
    down: RefCell<HashMap<SocketAddr, Instant>>,
}

impl Worker {
    /// For a service, by its index.
    pub fn new(shared: Arc<Shared>, limits: RelayLimits, service: usize) -> Self {
        Self { stats: Arc::clone(&shared.stats), shared, limits, service, down: RefCell::default() }
    }

    /// The table in force.
    pub fn table(&self) -> Arc<Router> {
        self.shared.table(self.service)
    }

    /// Changes whenever tables are replaced.
    pub fn generation(&self) -> u64 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// Whether a broker counts as down.
    pub fn is_down(&self, broker: SocketAddr) -> bool {
        self.down.borrow().get(&broker).is_some_and(|until| Instant::now() < *until)
    }

    /// Whether it was not down lately, so that its being down is worth a line in the log.
    pub fn is_news(&self, broker: SocketAddr) -> bool {
        const QUIET: Duration = Duration::from_secs(60);
        self.down.borrow().get(&broker).is_none_or(|until| *until + QUIET < Instant::now())
    }

    /// Marks a broker as down, the longer the longer the attempt took.
    pub fn down(&self, broker: SocketAddr, took: Duration) {
        self.down.borrow_mut().insert(broker, Instant::now() + DOWN + 2 * took);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_so_many_connections_and_opens_so_many_in_a_second() {
        let limits = RelayLimits {
            connections_per_address: 3,
            connections_per_second: 4,
            connections: 5,
            ..RelayLimits::default()
        };
        let shared = Arc::new(Shared::new(Vec::new(), u64::MAX));
        let (a, b): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let admit = |addr| shared.admit(addr, &limits);
        let mut of_a: Vec<Admitted> = (0..3).map(|_| admit(a).unwrap()).collect();
        assert!(admit(a).is_none(), "three at a time");
        of_a.pop();
        of_a.push(admit(a).unwrap());
        of_a.pop();
        assert!(admit(a).is_none(), "four a second");
        let _of_b: Vec<Admitted> = (0..3).map(|_| admit(b).unwrap()).collect();
        let c: IpAddr = "10.0.0.3".parse().unwrap();
        assert!(admit(c).is_none(), "five in all");
        for v6 in ["fd01::1", "fd01::ffff:2"] {
            assert_eq!(network_of(v6.parse().unwrap()).to_string(), "fd01::");
        }
    }
}
