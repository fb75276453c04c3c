//! What a broker host was like before `real up`, so that `real down` can put it back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::net::ChangedRoute;
use crate::kernel::{BpfError, Result};

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

/// Notes are kept by network namespace: interfaces of two may have the same name.
fn path(interface: &str) -> PathBuf {
    let namespace = fs::metadata("/proc/self/ns/net").map(|m| m.ino()).unwrap_or_default();
    PathBuf::from("/run/mqtt-fwd").join(format!("real-{namespace}-{interface}.json"))
}

impl Notes {
    /// What is noted; nothing if there is nothing to be read.
    pub fn read(interface: &str) -> Self {
        fs::read_to_string(path(interface))
            .ok()
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or_default()
    }

    /// Writes them, before anything is changed that they are about. Whole or not at all.
    pub fn write(&self, interface: &str) -> Result<()> {
        let path = path(interface);
        let beside = path.with_extension("new");
        let write = || {
            fs::create_dir_all("/run/mqtt-fwd")?;
            fs::write(&beside, serde_json::to_string(self)?)?;
            fs::rename(&beside, &path)
        };
        write().map_err(|source| BpfError::Io { path: path.clone(), action: "writing", source })
    }

    /// Forgets them: undone, or of a namespace that had this one's number before.
    pub fn forget(interface: &str) {
        let _ = fs::remove_file(path(interface));
    }
}
