//! Keeps the chain as it was loaded, on its own clock: what others take out of it is back within
//! half a second, whatever the balancer does meanwhile.

use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, info, warn};

use super::observed::Observed;
use super::survivor::Survivor;
use crate::config::{BalancerKind, Config};
use crate::kernel::held::Held;
use crate::kernel::load::{self, LoadSpec};
use crate::kernel::{BpfError, Result};

const INTERVAL: Duration = Duration::from_millis(500);

/// Runs until it is dropped.
pub async fn keep(config: Arc<Config>, observed: Arc<Observed>) {
    let spec = Arc::new(config.load_spec());
    let own_balancer = config.balancer == BalancerKind::Embedded;
    let (mut held, mut survivor) = (None, Survivor::default());
    loop {
        let (config, spec) = (Arc::clone(&config), Arc::clone(&spec));
        let observed = Arc::clone(&observed);
        let look = move || {
            let held = look(&spec, own_balancer, held, &observed);
            if !own_balancer
                && let Err(error) = survivor.look(&spec.pins, &config.balancer_endpoint, &observed)
            {
                debug!(%error, "looking after the balancer's position");
            }
            (held, survivor)
        };
        (held, survivor) = tokio::task::spawn_blocking(look).await.unwrap_or_default();
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
