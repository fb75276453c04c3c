//! What is in place before the first thread starts.

use std::fs::File;

use nix::fcntl::Flock;
use tracing::{debug, warn};

use super::Result;
use super::balancer::Embedded;
use crate::config::{BalancerKind, Config};
use crate::instance;
use crate::kernel::{load, privileges};

/// Programs and maps, and the lock that this process is the one `run` by.
#[derive(Debug)]
pub struct Loaded {
    pub(super) config: Config,
    pub(super) balancer: Option<Embedded>,
    pub(super) lock: Flock<File>,
}

/// Loads, and then gives up the privileges that only loading takes. Those are a thread's own, so
/// this comes before all threads.
pub fn load(config: Config) -> Result<Loaded> {
    let lock = instance::lock(&config)?;
    // Listening first: whoever serves there already keeps its programs in their positions.
    let listener = match config.balancer {
        BalancerKind::Embedded => Some(Embedded::listen(&config)?),
        BalancerKind::Katran => None,
    };
    load::load(&config.load_spec())?;
    let balancer = listener.map(|listener| Embedded::load(&config, listener)).transpose()?;
    match privileges::drop_others(config.balancer == BalancerKind::Katran) {
        Ok(kept) => debug!("capabilities kept: {}", kept.join(", ")),
        Err(error) => warn!(%error, "capabilities that are not needed could not be dropped"),
    }
    Ok(Loaded { config, balancer, lock })
}
