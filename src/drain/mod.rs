//! Ends the connections that a drained real has left, at a bounded rate: its clients are not to connect again all at
//! once.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use crate::config::Config;
use crate::datapath::Datapath;
use crate::datapath::flows::{FlowsOfReal, Key, Termination, terminate};
use crate::health_checks::Reals;
use crate::kernel::Result;

/// From one batch to the next.
const TICK: Duration = Duration::from_millis(100);
/// Connections may be opened until the balancer has the drain.
const SETTLED: Duration = Duration::from_secs(3);

/// The live flows of a real, of a service or of all.
pub fn flows_of(
    config: &Config,
    datapath: &Datapath,
    service: Option<&str>,
    real: IpAddr,
) -> Result<Vec<Key>> {
    FlowsOfReal::open(config, datapath)?.list(service, real)
}

/// Ends a real's connections, `per_second` of them, as long as it is drained. `listed`: those of when it was drained.
pub async fn terminate_at_rate(
    config: Arc<Config>,
    reals: Arc<Reals>,
    real: IpAddr,
    listed: Vec<Key>,
    per_second: u32,
) {
    let (mut listed, mut ended) = (listed, 0);
    loop {
        match terminate_listed(&config, &reals, real, &listed, per_second).await {
            Ok(n) => ended += n,
            Err(error) => {
                warn!(%real, %error, "the drain's connections stay");
                return;
            }
        }
        tokio::time::sleep(SETTLED).await;
        if !reals.is_drained(real) {
            info!(%real, connections = ended, "drain cancelled; no longer closing its connections");
            return;
        }
        let config = Arc::clone(&config);
        let list = move || flows_of(&config, &Datapath::open(&config.pins())?, None, real);
        match tokio::task::spawn_blocking(list).await {
            Ok(Ok(more)) if !more.is_empty() => listed = more,
            _ => break,
        }
    }
    info!(%real, connections = ended, "drained: its connections end as their clients send");
}

async fn terminate_listed(
    config: &Config,
    reals: &Reals,
    real: IpAddr,
    listed: &[Key],
    per_second: u32,
) -> Result<usize> {
    let mut clock = tokio::time::interval(TICK);
    let (mut allowed, mut ended) = (0.0, 0);
    let mut left = listed;
    while !left.is_empty() && reals.is_drained(real) {
        clock.tick().await;
        allowed += f64::from(per_second) * TICK.as_secs_f64();
        let (now, later) = left.split_at((allowed as usize).min(left.len()));
        allowed -= now.len() as f64;
        left = later;
        if now.is_empty() {
            continue;
        }
        let datapath = Datapath::open(&config.pins())?;
        let flows = FlowsOfReal::open(config, &datapath)?;
        let now: Vec<Key> = now.iter().copied().filter(|key| flows.has(*key, real)).collect();
        ended += terminate(&datapath, &now, Termination::Disconnect)?;
    }
    Ok(ended)
}
