//! The state of `run`: what it works by, what it has seen, and what others ask it for. `run` builds it and passes it to
//! whoever shows it.

mod fleet;
mod observed;
mod requests;

use std::sync::Arc;

use tokio::sync::{mpsc, watch};

pub use fleet::{Asked, Fleet, Member, TIMES};
pub use observed::{LastTest, Observed};
pub use requests::{Answer, Edits, RefusedEdits, Request, Unmade};

use crate::config::Config;
use crate::domain::{Problem, RealState};
use crate::health_checks::Reals;

/// A handle on the state.
#[derive(Debug, Clone)]
pub struct State {
    config: watch::Receiver<Arc<Config>>,
    pub reals: Arc<Reals>,
    pub observed: Arc<Observed>,
    pub requests: mpsc::Sender<Request>,
}

/// What `run` knows and others cannot see from outside.
#[derive(Debug, Clone)]
pub struct Seen {
    pub reals: Vec<RealState>,
    pub problems: Vec<Problem>,
}

impl State {
    /// A handle on its parts.
    pub fn new(
        config: watch::Receiver<Arc<Config>>,
        reals: Arc<Reals>,
        observed: Arc<Observed>,
        requests: mpsc::Sender<Request>,
    ) -> Self {
        Self { config, reals, observed, requests }
    }

    /// The configuration in force.
    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.borrow())
    }

    /// The same with the weights that reals have by their health.
    pub fn in_effect(&self) -> Config {
        self.reals.in_effect(&self.config())
    }

    /// Reals and problems now.
    pub fn seen(&self) -> Seen {
        Seen { reals: self.reals.list(&self.config()), problems: self.observed.problems() }
    }
}
