//! What is there and how it does: status, overview, doctor, difference, explanations, metrics. Functions of the
//! configuration, the datapath and the state of `run`; they ask nothing of `run`, which may be this process.

pub mod diff;
pub mod doctor;
pub mod explain;
pub mod fleet;
pub mod metrics;
pub mod misrouting;
pub mod overview;
pub mod status;
mod told;

use std::sync::Arc;
use std::time::Duration;

use crate::balancer::client::BalancerError;
use crate::config::{Config, ConfigError};
use crate::datapath::Datapath;
use crate::datapath::counts::Counters;
use crate::kernel::{self, BpfError};
use crate::reconcile::ReconcileError;
use crate::replay::ReplayError;
use crate::state::{Seen, State};

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error(transparent)]
    Balancer(#[from] BalancerError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Reconcile(#[from] ReconcileError),
    #[error(transparent)]
    Replay(#[from] ReplayError),
    #[error(transparent)]
    Unknown(#[from] explain::Unknown),
}

type Result<T, E = InspectError> = std::result::Result<T, E>;

/// What is looked at, and from where.
#[derive(Debug, Clone)]
pub struct Context {
    config: Arc<Config>,
    run: Option<State>,
}

impl Context {
    /// From `run` itself.
    pub fn of_run(run: State) -> Self {
        Self { config: run.config(), run: Some(run) }
    }

    /// From another process: only what can be seen from outside.
    pub fn outside(config: Config) -> Self {
        Self { config: Arc::new(config), run: None }
    }

    /// The configuration in force.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The same with the weights that reals have by their health now.
    pub fn in_effect(&self) -> Config {
        self.run.as_ref().map_or_else(|| Config::clone(&self.config), State::in_effect)
    }

    /// Another configuration with them.
    pub fn in_effect_of(&self, config: &Config) -> Config {
        self.run.as_ref().map_or_else(|| config.clone(), |run| run.reals.in_effect(config))
    }

    /// The datapath's counters some minutes ago, and how long that is.
    pub fn counters_before(&self) -> Option<(Duration, Counters)> {
        self.run.as_ref()?.observed.counters_before()
    }

    /// What only `run` sees.
    pub fn seen(&self) -> Option<Seen> {
        self.run.as_ref().map(State::seen)
    }

    /// The pinned maps.
    pub fn datapath(&self) -> kernel::Result<Datapath> {
        Datapath::open(&self.config.pins())
    }
}
