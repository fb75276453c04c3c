//! Counters of the relay, shared by all threads.

use crate::counter::Counter;

/// All of them.
#[derive(Debug, Default)]
pub struct Stats {
    /// Client connections at present.
    pub connections: Counter,
    /// Connections accepted.
    pub accepted: Counter,
    /// Connections refused by a limit.
    pub refused: Counter,
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
