//! Where the parts of persistent sessions lie: the brokers at which a client has subscribed.
//!
//! Some brokers (RabbitMQ, aedes) say "session present" only where they hold a subscription. So once a client
//! is back, the answers of brokers that hold none of its session say nothing about it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};

/// Clients of each of two generations, of which the older is forgotten when the newer is full.
const CLIENTS: usize = 50_000;

/// A service, by its index, and a client identifier.
type Client = (usize, String);

/// Those of all threads, since the relay's start.
#[derive(Debug, Default)]
pub struct Parts(Mutex<[HashMap<Client, Vec<SocketAddr>>; 2]>);

impl Parts {
    /// The brokers that hold something of a client's session; empty: none is known to.
    pub fn of(&self, service: usize, id: &str) -> Vec<SocketAddr> {
        let generations = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (service, id.to_owned());
        generations.iter().find_map(|g| g.get(&key)).cloned().unwrap_or_default()
    }

    /// Replaces them. A client without an identifier has no session that it could find again.
    pub fn set(&self, service: usize, id: &str, brokers: Vec<SocketAddr>) {
        if id.is_empty() {
            return;
        }
        let mut generations = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (service, id.to_owned());
        generations[1].remove(&key);
        if brokers.is_empty() {
            generations[0].remove(&key);
            return;
        }
        if generations[0].len() >= CLIENTS {
            generations[1] = std::mem::take(&mut generations[0]);
        }
        generations[0].insert(key, brokers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_set_last_are_known_and_their_number_is_bounded() {
        let parts = Parts::default();
        let broker: SocketAddr = "10.0.0.1:1883".parse().unwrap();
        for n in 0..3 * CLIENTS {
            parts.set(0, &n.to_string(), vec![broker]);
        }
        assert!(parts.of(0, "0").is_empty());
        let last = (3 * CLIENTS - 1).to_string();
        assert_eq!(parts.of(0, &last), [broker]);
        assert!(parts.of(1, &last).is_empty(), "another service's");
        parts.set(0, &last, Vec::new());
        assert!(parts.of(0, &last).is_empty());
        let known = parts.0.lock().unwrap();
        assert!(known[0].len() + known[1].len() <= 2 * CLIENTS);
    }
}
