//! The sidecar: from the configuration to what the datapath and the balancer hold, and back to
//! something that people can read.
//!
//! ```text
//! Config ─ image ─┐                       ┌─ balancer (gRPC)
//!                 ├─ plan ─ apply ────────┤
//! maps, balancer ─┘  (what differs)       └─ maps (one switch)
//! ```

pub mod apply;
pub mod datapath;
pub mod events;
pub mod health;
pub mod identity;
pub mod image;
pub mod plan;
pub mod run;
pub mod running;
pub mod view;
pub mod watch;

use crate::balancer::client::BalancerError;
use crate::bpf::BpfError;
use crate::config::ConfigError;

/// What can go wrong with any of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error(transparent)]
    Balancer(#[from] BalancerError),
    #[error("service {service}: {problem}")]
    Service { service: String, problem: String },
    #[error("{interface} is not healthy: {problems}")]
    Unhealthy { interface: String, problems: String },
    /// Somebody else is at it.
    #[error("{0}")]
    Busy(String),
    /// Input that is well-formed, and would do harm.
    #[error("{0}")]
    Refused(String),
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
}

/// Result of the sidecar's work.
pub type Result<T, E = Error> = std::result::Result<T, E>;
