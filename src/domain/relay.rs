//! Listeners and limits of the relay.

use std::path::PathBuf;

use ipnet::IpNet;
use tokio_rustls::rustls::pki_types::ServerName;

/// An additional port of the relay, for TLS or WebSocket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayListener {
    /// TCP port, at the service's address.
    pub port: u16,
    /// TLS.
    pub tls: Option<RelayTls>,
    /// MQTT over WebSocket.
    pub websocket: bool,
    /// Networks of balancers in front, which say who the client is (PROXY protocol).
    pub accept_proxy: Vec<IpNet>,
}

/// A certificate and its key, both PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Certificate chain.
    pub certificate: PathBuf,
    /// Private key.
    pub key: PathBuf,
}

/// TLS towards brokers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokerTls {
    /// Their TCP port for it.
    pub port: u16,
    /// CA certificates (PEM) that theirs are verified with.
    pub ca: PathBuf,
    /// Name in their certificates; `None`: each its address.
    pub server_name: Option<ServerName<'static>>,
    /// What is shown to them.
    pub certificate: Option<Certificate>,
}

/// TLS towards clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayTls {
    /// At least one. The first is for clients that ask for no name of another (SNI).
    pub certificates: Vec<Certificate>,
    /// CA certificates for client authentication.
    pub client_ca: Option<PathBuf>,
    /// Which name of the client's certificate brokers get as its user name.
    pub username_from_certificate: Option<CertificateName>,
}

/// A name in an X.509 certificate (RFC 5280 §4.1.2.6, §4.2.1.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CertificateName {
    /// The subject's common name.
    CommonName,
    /// The first DNS name of the subject's alternative names.
    SanDns,
    /// The first URI.
    SanUri,
    /// The first e-mail address.
    SanEmail,
}

/// Limits of the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelayLimits {
    /// Worker threads; 0: one for each CPU.
    pub threads: u32,
    /// Concurrent connections.
    pub connections: u32,
    /// Concurrent connections of an IPv4 address or IPv6 /64.
    pub connections_per_address: u32,
    /// New connections per second of the same.
    pub connections_per_second: u32,
    /// Timeout for TLS, WebSocket and CONNECT.
    pub connect_timeout: std::time::Duration,
    /// Largest control packet, bytes.
    pub max_packet: usize,
    /// What clients may have the relay keep, bytes; `None`: half of the host's memory.
    pub max_memory: Option<u64>,
    /// Subscriptions of a client.
    pub subscriptions: u32,
    /// How long a client must use a single group before it is sent to the fast path; `None`: never.
    pub return_after: Option<std::time::Duration>,
    /// Clients sent to the fast path per second.
    pub returns_per_second: u32,
}

impl Default for RelayLimits {
    fn default() -> Self {
        Self {
            threads: 0,
            connections: 100_000,
            connections_per_address: 10_000,
            connections_per_second: 1000,
            connect_timeout: std::time::Duration::from_secs(10),
            // The protocol's maximum is 256 MiB.
            max_packet: 16 << 20,
            max_memory: None,
            subscriptions: 10_000,
            return_after: Some(std::time::Duration::from_secs(30)),
            returns_per_second: 10,
        }
    }
}
