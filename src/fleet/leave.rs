//! What a balancer that is unloaded leaves to the others: connections whose CONNECT it has answered and that no broker
//! has yet. No other host knows of those.
//!
//! ```text
//! ring `fleet_reports`   what its `run` did not read any more, in order   ─► store
//! map `handovers`        what that may have read, and not yet written     ─► store, if there is nothing
//! ```

use std::net::SocketAddr;

use super::store::{self, Left, StoreError};
use crate::config::Config;
use crate::datapath::Datapath;
use crate::datapath::misses::{self, Report};
use crate::kernel::{self, BpfError};

/// Why they are lost.
#[derive(Debug, thiserror::Error)]
pub enum LeaveError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error("{count} connections that no broker has yet, for they could not be given to {source}")]
    Store { count: usize, source: StoreError },
}

/// Puts them into the store; how many. For when no program of this balancer runs any more, and its maps are still pinned.
pub async fn leave(config: &Config) -> Result<usize, LeaveError> {
    let Some(store) = config.fleet.as_ref().and_then(|fleet| fleet.store.as_ref()) else {
        return Ok(0);
    };
    let datapath = Datapath::open(&config.pins())?;
    let places = datapath.places(config)?;
    let mut all: Vec<(String, SocketAddr, Left)> = unread(config)?
        .into_iter()
        .filter_map(|report| match report {
            Report::Kept((client, service), kept) => {
                let places = places.get(&service)?;
                Some((places.name.clone(), client, Left::Kept(places.waiting(&kept)?)))
            }
            Report::Given((client, service)) => {
                Some((places.get(&service)?.name.clone(), client, Left::Given))
            }
            Report::Missed(_) | Report::Hello(_) => None,
        })
        .collect();
    let known = datapath.waiting(&places, store::KEPT_S.into())?;
    let count = known.len();
    all.extend(known.into_iter().map(|(name, client, kept)| (name, client, Left::Known(kept))));
    if !all.is_empty() {
        store::leave(store, &all).await.map_err(|source| LeaveError::Store { count, source })?;
    }
    Ok(count)
}

/// What the datapath told a `run` that is no more.
fn unread(config: &Config) -> kernel::Result<Vec<Report>> {
    let mut all = Vec::new();
    let ring = misses::ring(&config.pins(), "fleet_reports", |report| all.push(report))?;
    let _ = ring.consume();
    drop(ring);
    Ok(all)
}
