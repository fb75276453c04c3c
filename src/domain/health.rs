//! How brokers are checked.

use std::time::Duration;

/// A service's health checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// What is sent, and expected.
    pub kind: CheckKind,
    /// The way that it goes.
    pub path: CheckPath,
    /// The service's own, unless another is named.
    pub port: Option<u16>,
    /// From one check to the next.
    pub interval: Duration,
    /// For the whole of one check.
    pub timeout: Duration,
    /// Successes in a row that make a real up.
    pub rise: u32,
    /// Failures in a row that make it down.
    pub fall: u32,
    /// Whether its connections are reset then, so that clients come to another.
    pub resets: bool,
    /// For how long a real that is back gets fewer new connections than its weight says.
    pub slow_start: Duration,
}

/// How a check gets to a real.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckPath {
    /// To the host's own address.
    Direct,
    /// To the service's address, wrapped as clients' packets are.
    Encapsulated,
}

/// What a check is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckKind {
    /// The port accepts connections.
    Tcp,
    /// It shows a certificate that its group trusts, for the name that is asked for.
    Tls,
    /// It accepts this client: CONNACK with code 0.
    Mqtt {
        /// Protocol level: MQTT 5 in place of 3.1.1.
        v5: bool,
        client_id: String,
        username: Option<String>,
        password: Option<String>,
    },
}

impl HealthCheck {
    /// With the defaults.
    pub fn tcp() -> Self {
        Self {
            kind: CheckKind::Tcp,
            path: CheckPath::Direct,
            port: None,
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(1),
            rise: 2,
            fall: 3,
            resets: false,
            slow_start: Duration::ZERO,
        }
    }
}
