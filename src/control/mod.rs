//! The sidecar: brings datapath and balancer to what the configuration says, keeps them there, and
//! says what is wrong.

pub mod api;
pub mod changes;
pub mod checks;
pub mod diff;
pub mod doctor;
pub mod events;
pub mod explain;
pub mod gateway;
pub mod handover;
pub mod health;
pub mod instance;
pub mod keeper;
pub mod known;
pub mod metrics;
pub mod misrouting;
mod mqtt;
pub mod observed;
pub mod overview;
pub mod problem;
pub mod reals_of_flows;
pub mod reconcile;
pub mod release;
pub mod replay;
mod rescue;
pub mod run;
pub mod status;
mod survivor;
pub mod view;
pub mod vips;

use crate::balancer::client::BalancerError;
use crate::config::ConfigError;
use crate::config::edit::EditError;
use crate::datapath::image::ImageError;
use crate::kernel::BpfError;

/// What can go wrong with any of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Edit(#[from] EditError),
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error(transparent)]
    Balancer(#[from] BalancerError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Key(#[from] crate::handover::keys::KeyError),
    #[error(transparent)]
    Host(#[from] crate::broker_host::HostError),
    #[error(transparent)]
    Relay(#[from] crate::relay::RelayError),
    #[error("{0}")]
    Embedded(String),
    #[error("{interface} is not healthy: {problems}")]
    Unhealthy { interface: String, problems: String },
    #[error("{} is not what is in force; `mqtt-fwd apply` brings it into force", .path.display())]
    Differs { path: std::path::PathBuf },
    /// Another process is at it.
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
