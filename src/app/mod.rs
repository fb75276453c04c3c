//! `run` in the foreground: load, apply, watch, until it is told to end. Forwarding does not depend on it: programs and
//! maps are pinned and stay.
//!
//! ```text
//! load ─► state ─► tasks (API, metrics, watchdog, checks, rescue, saving) ─► signals, requests, polls ─► drain
//! ```

mod balancer;
mod control;
mod load;
mod reload;
mod run;
mod tasks;

use std::net::SocketAddr;

pub use self::balancer::run_balancer;
pub use self::load::{Loaded, load};
pub use self::run::run;
use crate::api::ApiError;
use crate::datapath::embedded::Refusal;
use crate::instance::InstanceError;
use crate::kernel::BpfError;
use crate::reconcile::gateway::GatewayError;

/// Why `run` does not start, or ends.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error("embedded balancer: {0}")]
    Embedded(#[from] Refusal),
    #[error(transparent)]
    Gateway(#[from] GatewayError),
    #[error("the configuration says balancer = \"katran\"; start that instead")]
    NoEmbedded,
    #[error("listening at {endpoint} (is another balancer running?): {source}")]
    Listen { endpoint: String, source: std::io::Error },
    #[error("listening at {addr} (metrics): {source}")]
    ListenMetrics { addr: SocketAddr, source: std::io::Error },
    #[error("serving at {endpoint}: {source}")]
    Serve { endpoint: String, source: std::io::Error },
    #[error("handling signals: {0}")]
    Signals(std::io::Error),
}

type Result<T, E = RunError> = std::result::Result<T, E>;
