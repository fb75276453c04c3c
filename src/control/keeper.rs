//! Keeps the chain as it was loaded, on its own clock: what others take out of it is back within
//! half a second, whatever the balancer does meanwhile.

use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, info, warn};

use super::observed::Observed;
use crate::kernel::held::Held;
use crate::kernel::load::{self, LoadSpec};
use crate::kernel::{BpfError, Result};

const INTERVAL: Duration = Duration::from_millis(500);

/// Runs until it is dropped.
pub async fn keep(spec: LoadSpec, own_balancer: bool, observed: Arc<Observed>) {
    let mut held: Option<Held> = None;
    loop {
        let (spec, before, observed) = (spec.clone(), held.take(), Arc::clone(&observed));
        let look = move || look(&spec, own_balancer, before, &observed);
        held = tokio::task::spawn_blocking(look).await.ok().flatten();
        tokio::time::sleep(INTERVAL).await;
    }
}

/// One look. Returns what is held from now on.
fn look(
    spec: &LoadSpec,
    own_balancer: bool,
    held: Option<Held>,
    observed: &Observed,
) -> Option<Held> {
    let held = match held {
        Some(held) => held,
        None => Held::open(spec, own_balancer)
            .inspect_err(|error| debug!(%error, "nothing to keep"))
            .ok()?,
    };
    match restore(spec, &held, observed) {
        Ok(true) => Some(held),
        Ok(false) => {
            info!("programs or maps are other ones than before; keeping those");
            None
        }
        Err(error) => {
            // `control::health` says what is wrong as long as it is.
            debug!(%error, "keeping the chain");
            Some(held)
        }
    }
}

/// Whether what is held is still what is in use.
fn restore(spec: &LoadSpec, held: &Held, observed: &Observed) -> Result<bool, BpfError> {
    let done = held.restore(spec)?;
    observed.chain_repairs.add(done.put_back.len() as u64);
    for what in &done.put_back {
        warn!("put back {what}: it was removed by another process");
    }
    if done.rootless {
        load::load(spec)?;
        warn!(interface = spec.interface, "attached a root: the one that was there is gone");
        return Ok(false);
    }
    Ok(!done.replaced)
}
