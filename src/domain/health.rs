//! How brokers are checked.

use std::time::Duration;

/// A service's health checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// What is sent, and expected.
    pub kind: CheckKind,
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
}

/// What a check is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckKind {
    /// The port accepts connections.
    Tcp,
    /// It answers this CONNECT with CONNACK, return code 0.
    Mqtt {
        /// The packet.
        connect: Vec<u8>,
    },
}

impl HealthCheck {
    /// With the defaults.
    pub fn tcp() -> Self {
        Self {
            kind: CheckKind::Tcp,
            port: None,
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(1),
            rise: 2,
            fall: 3,
        }
    }
}

/// The check's CONNECT: a clean session, with the protocol level's own shape (MQTT 3.1.1 §3.1, MQTT 5
/// §3.1).
pub fn connect(
    level: u8,
    client_id: &str,
    username: Option<&str>,
    password: Option<&str>,
) -> Vec<u8> {
    let text = |s: &str| [&(s.len() as u16).to_be_bytes(), s.as_bytes()].concat();
    let flags = 0x02 | u8::from(username.is_some()) << 7 | u8::from(password.is_some()) << 6;
    let mut body = text("MQTT");
    body.extend([level, flags, 0, 10]);
    if level == 5 {
        body.push(0);
    }
    for field in [Some(client_id), username, password].into_iter().flatten() {
        body.extend(text(field));
    }
    let mut packet = vec![0x10];
    let mut length = body.len();
    while length > 0x7f {
        packet.push((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    packet.push(length as u8);
    packet.extend(body);
    packet
}
