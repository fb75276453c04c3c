//! Files in /run: what one process of this host tells others, and what it notes for its next start.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

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

/// What outlives the process that wrote it. The kernel gives a namespace's inode, which is in the file's name, to a
/// later one, so the file also says which one it is of.
#[derive(Serialize, Deserialize)]
struct Note<T> {
    namespace: u64,
    note: T,
}

/// Reads what [`write_note`] wrote; `None` also if that was of another namespace.
pub fn read_note<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let of: Note<T> = read(path)?;
    (of.namespace == namespace::cookie()).then_some(of.note)
}

/// Writes a file for this interface's next `run` or `host`, whole or not at all.
pub fn write_note(path: &Path, note: &impl Serialize) -> io::Result<()> {
    write(path, &Note { namespace: namespace::cookie(), note })
}

/// Writes a file, whole or not at all.
pub fn write(path: &Path, value: &impl Serialize) -> io::Result<()> {
    fs::create_dir_all(DIR)?;
    let beside = path.with_extension("new");
    fs::write(&beside, serde_json::to_vec(value)?)?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A container that gets the number of one that is gone must not find its drains.
    #[test]
    fn a_note_is_read_only_in_the_namespace_that_it_is_of() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("note.json");
        let own = namespace::cookie();
        assert_ne!(own, 0, "Linux 5.14 has cookies");
        for (namespace, expected) in [(own, Some(7)), (own + 1, None), (0, None)] {
            write(&path, &Note { namespace, note: 7 }).unwrap();
            assert_eq!(read_note::<u32>(&path), expected);
        }
    }
}
