//! What the relay is told: where it listens, and what a client may cost.

use std::path::PathBuf;

/// An address beside a service's own that the relay listens on, for clients that its service's balancer
/// cannot read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayListener {
    /// TCP port, at the service's address.
    pub port: u16,
    /// In TLS.
    pub tls: Option<RelayTls>,
    /// In WebSocket messages.
    pub websocket: bool,
}

/// Certificates, all PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayTls {
    /// The relay's certificate, and those between it and the root.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Clients have to have a certificate of one of these authorities.
    pub client_ca: Option<PathBuf>,
    /// Brokers get the common name of a client's certificate as its user name.
    pub username_from_certificate: bool,
}

/// Bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelayLimits {
    /// Threads; 0: one a processor.
    pub threads: u32,
    /// Connections at a time.
    pub connections: u32,
    /// Connections at a time of one IPv4 address, or IPv6 network of 64 bits.
    pub connections_per_address: u32,
    /// New connections a second of the same.
    pub connections_per_second: u32,
    /// Seconds for TLS, WebSocket and CONNECT.
    pub connect_timeout_s: u16,
    /// Bytes of the largest control packet.
    pub max_packet: usize,
    /// Subscriptions of a client.
    pub subscriptions: u32,
    /// When a client that uses one group is sent to the fast path; `None`: never.
    pub return_after: Option<std::time::Duration>,
    /// How many of those a second, of each thread.
    pub returns_per_second: u32,
}

impl Default for RelayLimits {
    fn default() -> Self {
        Self {
            threads: 0,
            connections: 100_000,
            connections_per_address: 10_000,
            connections_per_second: 1000,
            connect_timeout_s: 10,
            // MQTT's own bound is 256 MiB.
            max_packet: 16 << 20,
            subscriptions: 10_000,
            return_after: Some(std::time::Duration::from_secs(30)),
            returns_per_second: 10,
        }
    }
}
