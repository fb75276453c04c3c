//! Where things are pinned, and the lock on it.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{FsType, statfs};

use super::{BpfError, Result};

/// Name of the directory below `mqtt_fwd/<interface>`. Changes with the layout of any map.
pub const VERSION: &str = "v1";

/// `BPF_FS_MAGIC` of `<linux/magic.h>`.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Paths on bpffs of one interface.
#[derive(Debug, Clone)]
pub struct Pins {
    bpffs: PathBuf,
    interface: String,
    root_array: PathBuf,
}

impl Pins {
    /// `root_array` defaults to Katran's convention, `jmp_<interface>`.
    pub fn new(bpffs: &Path, interface: &str, root_array: Option<&Path>) -> Self {
        Self {
            bpffs: bpffs.to_owned(),
            interface: interface.to_owned(),
            root_array: root_array
                .map_or_else(|| bpffs.join(format!("jmp_{interface}")), Path::to_owned),
        }
    }

    /// The chain's program array.
    pub fn root_array(&self) -> &Path {
        &self.root_array
    }

    /// Where libbpf pins a map of this name by itself, and so where a patched Katran finds it.
    pub fn service_vips(&self) -> PathBuf {
        self.bpffs.join("mqtt_service_vips")
    }

    fn interface_dir(&self) -> PathBuf {
        self.bpffs.join("mqtt_fwd").join(&self.interface)
    }

    /// All that is only ours.
    pub fn dir(&self) -> PathBuf {
        self.interface_dir().join(VERSION)
    }

    /// The embedded balancer's.
    pub fn balancer_dir(&self) -> PathBuf {
        self.dir().join("balancer")
    }

    /// A map of `mqtt_fwd`.
    pub fn map(&self, name: &str) -> PathBuf {
        match name {
            "root_array" => self.root_array.clone(),
            "mqtt_service_vips" => self.service_vips(),
            _ => self.dir().join(name),
        }
    }

    /// A program; its pin is the sign that it is ours.
    pub fn program(&self, name: &str) -> PathBuf {
        self.dir().join(format!("prog_{name}"))
    }

    /// Is there a bpffs, and nothing of another version on it?
    pub fn check(&self) -> Result<()> {
        let is_bpffs =
            statfs(&self.bpffs).is_ok_and(|s| s.filesystem_type() == FsType(BPF_FS_MAGIC as _));
        if !is_bpffs {
            return Err(BpfError::NoBpffs { path: self.bpffs.clone() });
        }
        for entry in fs::read_dir(self.interface_dir()).into_iter().flatten().flatten() {
            if entry.file_name() != VERSION {
                return Err(BpfError::OtherVersion { path: entry.path(), ours: VERSION });
            }
        }
        Ok(())
    }

    /// Makes the directories and takes the lock. It ends with the value, and with the process.
    pub fn lock(&self) -> Result<Flock<File>> {
        let dir = self.interface_dir();
        make_dir(&self.dir())?;
        let file = File::open(&dir).map_err(|source| BpfError::Io {
            path: dir.clone(),
            action: "opening",
            source,
        })?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| BpfError::Locked { path: dir })
    }

    /// Removes our directories as far as they are empty.
    pub fn remove_dirs(&self) {
        for dir in [self.balancer_dir(), self.dir(), self.interface_dir()] {
            // Fails where something is left or nothing was there: both are fine.
            let _ = fs::remove_dir(dir);
        }
    }
}

/// A directory that only root can look into, with its parents.
pub fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| BpfError::Io {
        path: path.to_owned(),
        action: "making the directory",
        source,
    })
}

/// Removes a pin; whether there was one.
pub fn remove_pin(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(BpfError::Io { path: path.to_owned(), action: "removing", source }),
    }
}
