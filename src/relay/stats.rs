//! Counters of the relay, shared by all threads.

use crate::counter::Counter;
use crate::metrics::{Family, build_info, number};

/// All of them.
#[derive(Debug, Default)]
pub struct Stats {
    /// Client connections at present.
    pub connections: Counter,
    /// Connections accepted.
    pub accepted: Counter,
    /// Connections refused by a limit.
    pub refused: Counter,
    /// Connections refused or ended for want of memory.
    pub out_of_memory: Counter,
    /// Connections that ended before CONNECT: TLS, WebSocket, timeout, not MQTT.
    pub failed_handshakes: Counter,
    /// Sessions accepted by their broker.
    pub opened: Counter,
    /// Messages from clients.
    pub published: Counter,
    /// Messages to clients.
    pub delivered: Counter,
    /// Clients sent to the fast path.
    pub returned: Counter,
    /// Sessions ended because a broker was lost or unavailable.
    pub broker_lost: Counter,
    /// Sessions ended by a protocol error of the client.
    pub protocol_errors: Counter,
}

impl Stats {
    /// As metrics.
    pub fn families(&self) -> Vec<Family> {
        let n = |counter: &Counter| number(counter.get());
        vec![
            build_info(),
            Family::gauge("relay_connections", "Client connections at present")
                .with(&[], n(&self.connections)),
            Family::counter("relay_accepted", "Connections accepted").with(&[], n(&self.accepted)),
            Family::counter("relay_sessions", "Sessions accepted by their broker")
                .with(&[], n(&self.opened)),
            Family::counter("relay_messages", "Messages, by direction")
                .with(&[("direction", "to_brokers")], n(&self.published))
                .with(&[("direction", "to_clients")], n(&self.delivered)),
            Family::counter("relay_ended", "Connections ended or refused, by reason")
                .with(&[("reason", "limit")], n(&self.refused))
                .with(&[("reason", "memory")], n(&self.out_of_memory))
                .with(&[("reason", "handshake")], n(&self.failed_handshakes))
                .with(&[("reason", "protocol_error")], n(&self.protocol_errors))
                .with(&[("reason", "broker_lost")], n(&self.broker_lost))
                .with(&[("reason", "returned")], n(&self.returned)),
        ]
    }
}
