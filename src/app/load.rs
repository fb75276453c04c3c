//! What is in place before the first thread starts.

use std::fs::File;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use nix::fcntl::Flock;
use tracing::{debug, info, warn};

use super::balancer::Embedded;
use super::{Result, RunError};
use crate::config::{BalancerKind, Config};
use crate::kernel::{load, privileges, xdp};
use crate::{instance, metrics, systemd};

/// From one look for an interface that is not there to the next.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// From one word on that to the next.
const SAY_AGAIN: Duration = Duration::from_secs(30);

/// Programs and maps, and the lock that this process is the one `run` by.
#[derive(Debug)]
pub struct Loaded {
    pub(super) config: Config,
    pub(super) balancer: Option<Embedded>,
    pub(super) metrics: Option<TcpListener>,
    pub(super) lock: Flock<File>,
}

/// Loads, and then gives up the privileges that only loading takes. Those are a thread's own, so
/// this comes before all threads.
pub fn load(config: Config) -> Result<Loaded> {
    let mut lock = instance::lock(&config)?;
    // What may be taken comes first: packets are not to depend on a process that ends.
    let bind =
        |addr| metrics::bind(addr).map_err(|source| RunError::ListenMetrics { addr, source });
    let metrics = config.metrics.map(bind).transpose()?;
    wait_for_interface(&config, &mut lock)?;
    // Listening first: whoever serves there already keeps its programs in their positions.
    let listener = match config.balancer {
        BalancerKind::Embedded => Some(Embedded::listen(&config)?),
        BalancerKind::Katran => None,
    };
    load::load(&config.load_spec())?;
    let balancer = listener.map(|listener| Embedded::load(&config, listener)).transpose()?;
    match privileges::drop_others(config.balancer == BalancerKind::Katran, config.fleet.is_some()) {
        Ok(kept) => debug!("capabilities kept: {}", kept.join(", ")),
        Err(error) => warn!(%error, "capabilities that are not needed could not be dropped"),
    }
    Ok(Loaded { config, balancer, metrics, lock })
}

/// One that comes late, as many do after a boot, is no reason to give up.
fn wait_for_interface(config: &Config, lock: &mut Flock<File>) -> Result<()> {
    let interface = &config.interface;
    let mut said: Option<Instant> = None;
    while xdp::interface_index(interface).is_err() {
        if said.is_none_or(|when| when.elapsed() > SAY_AGAIN) {
            warn!(
                "there is no interface {interface}; waiting for it (`ip link` lists those that there are)"
            );
            systemd::waiting(&format!("waiting for interface {interface}"));
            instance::tell(lock, config, Some(&format!("interface {interface}")))?;
            said = Some(Instant::now());
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    if said.is_some() {
        info!("interface {interface} is there");
        instance::tell(lock, config, None)?;
    }
    Ok(())
}
