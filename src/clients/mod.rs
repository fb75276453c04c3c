//! Clients' records outside the maps: a file that survives a reboot, and what people export and import.

pub mod file;
pub mod format;
pub mod validate;

use std::path::PathBuf;

use tracing::{debug, info, warn};

use crate::config::Config;
use crate::datapath::Datapath;
use crate::datapath::clients::{restore, snapshot};
use crate::domain::client_record::Restored;
use crate::kernel::BpfError;

/// Most records in the file that `run` writes: those learned last.
const SAVED_MAX: usize = 200_000;

/// Why records are not read, written or taken.
#[derive(Debug, thiserror::Error)]
pub enum ClientsError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}: {source}; nothing was imported")]
    Format { path: PathBuf, source: format::FormatError },
    #[error("{0}; nothing was imported")]
    Invalid(#[from] validate::InvalidRecord),
}

/// Puts the file's records into maps that hold no client, as after a reboot. False: no services are in force, so it is
/// too early.
pub fn load_at_start(config: &Config, datapath: &Datapath) -> bool {
    if datapath.service_table().is_ok_and(|table| table.count == 0) {
        return false;
    }
    let Some(path) = config.clients_file.as_deref().filter(|path| path.exists()) else {
        return true;
    };
    let restored = || -> Result<Option<Restored>, ClientsError> {
        if !datapath.has_no_clients()? {
            return Ok(None);
        }
        Ok(Some(restore(config, datapath, file::read(path)?)?))
    };
    match restored() {
        Ok(Some(Restored { added, without_group, .. })) => {
            info!(clients = added, without_group, file = %path.display(), "clients restored");
        }
        Ok(None) => {}
        Err(error) => warn!(%error, "clients not restored"),
    }
    true
}

/// Writes the file.
pub fn save(config: &Config, datapath: &Datapath) {
    let Some(path) = config.clients_file.as_deref() else { return };
    let saved = || -> Result<usize, ClientsError> {
        let records = snapshot(config, datapath, SAVED_MAX)?;
        // An older file is worth more than an empty one.
        if !records.is_empty() {
            file::write(path, &records)?;
        }
        Ok(records.len())
    };
    match saved() {
        Ok(clients) => debug!(clients, file = %path.display(), "clients saved"),
        Err(error) => warn!(%error, "clients not saved"),
    }
}
