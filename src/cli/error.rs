//! The rooms' errors, and the exit code of each.

use std::path::PathBuf;

use crate::api::ApiError;
use crate::app::RunError;
use crate::balancer::by_hand::ByHandError;
use crate::balancer::client::BalancerError;
use crate::broker_host::HostError;
use crate::clients::ClientsError;
use crate::config::ConfigError;
use crate::config::edit::EditError;
use crate::connectivity::ConnectivityError;
use crate::datapath::plan::PlanError;
use crate::handover::HandoverError;
use crate::handover::keys::KeyError;
use crate::inspect::InspectError;
use crate::inspect::explain::Unknown;
use crate::instance::InstanceError;
use crate::kernel::BpfError;
use crate::reconcile::ReconcileError;
use crate::relay::RelayError;
use crate::replay::ReplayError;

/// Done.
pub const DONE: u8 = 0;
/// Something failed that is not the user's input.
pub const FAILED: u8 = 1;
/// The command line or the configuration is wrong.
pub const USAGE: u8 = 2;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    Balancer(#[from] BalancerError),
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error(transparent)]
    ByHand(#[from] ByHandError),
    #[error(transparent)]
    Clients(#[from] ClientsError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Connectivity(#[from] ConnectivityError),
    #[error(transparent)]
    Edit(#[from] EditError),
    #[error(transparent)]
    Handover(#[from] HandoverError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Inspect(#[from] InspectError),
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Reconcile(#[from] ReconcileError),
    #[error(transparent)]
    Relay(#[from] RelayError),
    #[error(transparent)]
    Replay(#[from] ReplayError),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
    #[error("there is no [fleet] in the configuration: this balancer is alone")]
    NoFleet,
    #[error("`run` is not running here, and only it knows; start it with `mqtt-fwd run`")]
    NoRun,
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Failed(String),
    #[error("{interface} is not healthy: {problems}")]
    Unhealthy { interface: String, problems: String },
    #[error("{path} is not what is in force; `mqtt-fwd apply` brings it into force")]
    Differs { path: PathBuf },
}

impl From<Unknown> for Error {
    fn from(error: Unknown) -> Self {
        InspectError::from(error).into()
    }
}

impl Error {
    /// What the process ends with.
    pub fn exit_code(&self) -> u8 {
        let is_usage = match self {
            Self::Config(_) | Self::Edit(_) | Self::Key(_) | Self::Usage(_) | Self::NoFleet => true,
            Self::Api(error) => {
                matches!(error, ApiError::Refused(_) | ApiError::OtherFile { .. })
            }
            Self::ByHand(error) => !matches!(error, ByHandError::Balancer(_)),
            Self::Clients(error) => !matches!(error, ClientsError::Bpf(_)),
            Self::Host(error) => matches!(error, HostError::Key(_)),
            Self::Inspect(error) => {
                matches!(error, InspectError::Config(_) | InspectError::Unknown(_))
            }
            Self::Replay(error) => {
                matches!(error, ReplayError::Capture { .. } | ReplayError::IpVersion(_))
            }
            Self::Handover(error) => matches!(error, HandoverError::Key(_)),
            Self::Plan(error) => !matches!(error, PlanError::Bpf(_)),
            Self::Reconcile(error) => matches!(error, ReconcileError::Plan(_)),
            _ => false,
        };
        if is_usage { USAGE } else { FAILED }
    }
}
