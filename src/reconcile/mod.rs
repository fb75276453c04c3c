//! From the configuration to what the datapath and the balancer hold.
//!
//! ```text
//! Config ─ image ─┐                       ┌─ balancer (gRPC)
//!                 ├─ plan ─ apply ────────┤
//! maps, balancer ─┘  (what differs)       └─ maps (one switch)
//! ```

pub mod apply;
pub mod gateway;
pub mod plan;
pub mod watch;

use crate::balancer::client::BalancerError;
use crate::datapath::image::ImageError;
use crate::datapath::plan::PlanError;
use crate::handover::HandoverError;
use crate::kernel::BpfError;

/// Why a configuration is not applied.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error(transparent)]
    Balancer(#[from] BalancerError),
    #[error(transparent)]
    Plan(PlanError),
    #[error(transparent)]
    Handover(#[from] HandoverError),
    #[error(transparent)]
    Gateway(#[from] gateway::GatewayError),
}

impl From<PlanError> for ReconcileError {
    fn from(error: PlanError) -> Self {
        match error {
            PlanError::Bpf(error) => Self::Bpf(error),
            other => Self::Plan(other),
        }
    }
}

impl From<ImageError> for ReconcileError {
    fn from(error: ImageError) -> Self {
        Self::Plan(error.into())
    }
}

type Result<T, E = ReconcileError> = std::result::Result<T, E>;
