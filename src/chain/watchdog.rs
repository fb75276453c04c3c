//! Keeps the chain as it was loaded, on its own clock: anything that others remove from it is restored
//! within half a second, whatever the balancer does meanwhile.

use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, info, warn};

use super::katran_guard::KatranProgramGuard;
use crate::config::{BalancerKind, Config};
use crate::kernel::held::ChainHandle;
use crate::kernel::load::{self, LoadSpec};
use crate::kernel::{BpfError, Result};
use crate::state::Observed;

const INTERVAL: Duration = Duration::from_millis(500);

/// Runs until it is dropped.
pub async fn run(config: Arc<Config>, observed: Arc<Observed>) {
    let spec = Arc::new(config.load_spec());
    let own_balancer = config.balancer == BalancerKind::Embedded;
    let (mut handle, mut guard) = (None, KatranProgramGuard::default());
    loop {
        let (config, spec) = (Arc::clone(&config), Arc::clone(&spec));
        let observed = Arc::clone(&observed);
        let poll = move || {
            let handle = poll(&spec, own_balancer, handle, &observed);
            if !own_balancer
                && let Err(error) = guard.poll(&spec.pins, &config.balancer_endpoint, &observed)
            {
                debug!(%error, "restoring the balancer's position failed");
            }
            (handle, guard)
        };
        (handle, guard) = tokio::task::spawn_blocking(poll).await.unwrap_or_default();
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Once. Returns the handle to go on with.
fn poll(
    spec: &LoadSpec,
    own_balancer: bool,
    handle: Option<ChainHandle>,
    observed: &Observed,
) -> Option<ChainHandle> {
    let handle = match handle {
        Some(handle) => handle,
        None => ChainHandle::open(spec, own_balancer)
            .inspect_err(|error| debug!(%error, "opening the chain failed"))
            .ok()?,
    };
    match restore(spec, &handle, observed) {
        Ok(true) => Some(handle),
        Ok(false) => {
            info!("programs or maps were replaced by another process; keeping the new ones");
            None
        }
        Err(error) => {
            // `chain::health` reports it as long as it lasts.
            debug!(%error, "restoring the chain failed");
            Some(handle)
        }
    }
}

/// Whether the handle's programs and maps are still the ones in use.
fn restore(spec: &LoadSpec, handle: &ChainHandle, observed: &Observed) -> Result<bool, BpfError> {
    let done = handle.restore(spec)?;
    observed.chain_repairs.add(done.put_back.len() as u64);
    for what in &done.put_back {
        warn!("put back {what}: it was removed by another process");
    }
    if done.rootless {
        load::load(spec)?;
        warn!(interface = spec.interface, "the root program was gone; attached a new one");
        return Ok(false);
    }
    Ok(!done.replaced)
}
