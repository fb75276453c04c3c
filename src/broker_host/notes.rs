//! What a broker host was like before `host up`, so that `host down` can put it back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::net::ChangedRoute;
use crate::kernel::{BpfError, Result};
use crate::run_files;

/// Of one interface.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Notes {
    /// Kernel settings: key → value before.
    pub settings: BTreeMap<String, String>,
    /// Addresses that were put on lo.
    pub loopback: BTreeSet<IpAddr>,
    /// Routes whose MSS was changed.
    pub routes: Vec<ChangedRoute>,
}

fn path(interface: &str) -> PathBuf {
    run_files::path("host", interface, "json")
}

impl Notes {
    /// What is noted; nothing if there is nothing to be read.
    pub fn read(interface: &str) -> Self {
        run_files::read_note(&path(interface)).unwrap_or_default()
    }

    /// Writes them, before anything is changed that they are about. Whole or not at all.
    pub fn write(&self, interface: &str) -> Result<()> {
        let path = path(interface);
        run_files::write_note(&path, self).map_err(|source| BpfError::Io {
            path,
            action: "writing",
            source,
        })
    }

    /// Forgets them: what they are about is undone, or gone with the interface.
    pub fn forget(interface: &str) {
        let _ = fs::remove_file(path(interface));
    }
}
