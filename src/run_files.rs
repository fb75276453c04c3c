//! Files in /run: what one process of this host tells others, and what it notes for its next start.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::kernel::namespace;

/// Where they are.
pub const DIR: &str = "/run/mqtt-fwd";

/// A file about an interface of this network namespace: two may have one of the same name.
pub fn path(kind: &str, interface: &str, extension: &str) -> PathBuf {
    Path::new(DIR).join(format!("{kind}-{}-{interface}.{extension}", namespace::own()))
}

/// Reads a file; `None`: there is none, or it is not one of these.
pub fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Writes a file, whole or not at all.
pub fn write(path: &Path, value: &impl Serialize) -> io::Result<()> {
    fs::create_dir_all(DIR)?;
    let beside = path.with_extension("new");
    fs::write(&beside, serde_json::to_vec(value)?)?;
    fs::rename(&beside, path)
}
