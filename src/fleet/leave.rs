//! What a balancer that is unloaded leaves to the others: connections whose CONNECT it has answered and that no broker
//! has yet. No other host knows of those.

use super::store::{self, StoreError};
use crate::config::Config;
use crate::datapath::Datapath;
use crate::kernel::BpfError;

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
    let all = datapath.waiting(&datapath.places(config)?, store::KEPT_S.into())?;
    if !all.is_empty() {
        let count = all.len();
        store::keep_all(store, &all).await.map_err(|source| LeaveError::Store { count, source })?;
    }
    Ok(all.len())
}
