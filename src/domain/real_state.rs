//! A real as its health checks and its operator have it.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

/// A real's health.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It is not checked, or no check has ended yet.
    Unchecked,
    Up,
    /// With the last failure.
    Down(String),
}

/// A real of a group, for tables and metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RealState {
    pub service: String,
    pub group: String,
    pub addr: IpAddr,
    /// As configured; 0: no new connections.
    pub weight: u32,
    pub drained: bool,
    pub health: Health,
    /// Its weight at the balancer, in relation to the others of its group; 0: no new connections.
    pub effective_weight: u32,
    /// Since its health changed.
    pub since: Duration,
    /// When the first of the certificates does that it shows (TLS).
    pub certificate_expires: Option<SystemTime>,
}

impl RealState {
    /// Whether an operator took it out of use.
    pub fn is_out(&self) -> bool {
        self.drained && self.effective_weight == 0
    }

    /// In one word or two.
    pub fn text(&self) -> &'static str {
        match self.health {
            _ if self.is_out() => "drained",
            Health::Unchecked => "unchecked",
            Health::Up => "up",
            Health::Down(_) if self.effective_weight > 0 => "down, in use",
            Health::Down(_) => "down",
        }
    }

    /// The last failure; empty: none.
    pub fn error(&self) -> &str {
        match &self.health {
            Health::Down(error) => error,
            Health::Unchecked | Health::Up => "",
        }
    }
}
