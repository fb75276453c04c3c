//! Where programs and maps are pinned, who they belong to, and the lock on it.
//!
//! ```text
//! <bpffs>/mqtt_fwd/<interface>/            ours; the lock
//!     namespace -> net:<inode>             whose interface this is
//!     apply/                               the lock of who applies a configuration
//!     prog_mqtt_fwd, prog_xdp_root, …      programs that we put somewhere
//!     mqtt_fwd -> mqtt_fwd-<hash>          maps of an object, by a hash of their layout and sizes:
//!     balancer -> balancer-<hash>          while one is exchanged for another, there are two
//! <bpffs>/jmp_<interface>                  the chain, ours or Katran's
//! <bpffs>/jmp_<interface>_inner_dst        the chain's map `vip_inner_dst`, ours and Katran's
//! ```

use std::ffi::CString;
use std::fs::{self, DirBuilder, File};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use libbpf_rs::Program;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{FsType, statfs};

use super::xdp::ProgramInfo;
use super::{BpfError, Result};

/// For another process that loads or unloads.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// A directory that is only there to be locked.
const APPLY: &str = "apply";

/// `BPF_FS_MAGIC` of `<linux/magic.h>`.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Programs that are pinned.
pub const PROGRAMS: [&str; 4] = ["xdp_root", "mqtt_fwd", ADOPT, "balancer_ingress"];

/// In no chain: the sidecar runs it on segments of a fleet's connections.
pub const ADOPT: &str = "mqtt_adopt";

/// An object whose maps are pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Object {
    /// `mqtt_fwd`.
    MqttFwd,
    /// The embedded balancer.
    Balancer,
    /// The broker host's.
    BrokerHost,
}

impl Object {
    fn name(self) -> &'static str {
        match self {
            Self::MqttFwd => "mqtt_fwd",
            Self::Balancer => "balancer",
            Self::BrokerHost => "broker_host",
        }
    }
}

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

    /// Beside the program array, which is where a patched Katran looks for it, or leaves its own.
    pub fn service_vips(&self) -> PathBuf {
        let mut path = self.root_array.clone().into_os_string();
        path.push("_inner_dst");
        path.into()
    }

    /// All that is only ours.
    pub fn dir(&self) -> PathBuf {
        self.bpffs.join("mqtt_fwd").join(&self.interface)
    }

    /// Where an object's maps are, whichever build pinned them.
    pub fn current(&self, object: Object) -> PathBuf {
        self.dir().join(object.name())
    }

    /// Where an object's maps of this layout and these sizes are.
    pub fn of_hash(&self, object: Object, hash: &str) -> PathBuf {
        self.dir().join(format!("{}-{hash}", object.name()))
    }

    /// The directory that [`Pins::current`] leads to.
    pub fn current_target(&self, object: Object) -> Option<PathBuf> {
        fs::read_link(self.current(object)).ok().map(|target| self.dir().join(target))
    }

    /// Makes [`Pins::current`] lead to a directory, in one step for readers.
    pub fn set_current(&self, object: Object, dir: &Path) -> Result<()> {
        let link = self.current(object);
        // bpffs takes no names with a dot.
        let new = self.dir().join(format!("new_{}", object.name()));
        let failed = |action| {
            let path = link.clone();
            move |source| BpfError::Io { path, action, source }
        };
        remove_pin(&new)?;
        symlink(dir.file_name().unwrap_or_default(), &new).map_err(failed("linking"))?;
        fs::rename(&new, &link).map_err(failed("linking"))
    }

    /// A map of an object.
    pub fn map_of(&self, object: Object, name: &str) -> PathBuf {
        self.place(&self.current(object), name)
    }

    /// A map of `mqtt_fwd`.
    pub fn map(&self, name: &str) -> PathBuf {
        self.map_of(Object::MqttFwd, name)
    }

    /// Where a map is pinned whose object's maps are in `dir`: two are not ours alone.
    pub fn place(&self, dir: &Path, name: &str) -> PathBuf {
        match name {
            "root_array" => self.root_array.clone(),
            "vip_inner_dst" => self.service_vips(),
            _ => dir.join(name),
        }
    }

    /// A program; its pin is the sign that it is ours.
    pub fn program(&self, name: &str) -> PathBuf {
        self.dir().join(format!("prog_{name}"))
    }

    /// A pinned program, if there is one.
    pub fn pinned_program(&self, name: &str) -> Option<(OwnedFd, ProgramInfo)> {
        let path = self.program(name);
        let fd = path.exists().then(|| Program::fd_from_pinned_path(&path).ok()).flatten()?;
        let info = ProgramInfo::by_fd(fd.as_fd())?;
        Some((fd, info))
    }

    /// What our own pins say about a program of which the kernel tells only the identifier.
    pub fn identify(&self, program: ProgramInfo) -> ProgramInfo {
        if program.map_ids.is_some() {
            return program;
        }
        let ours = PROGRAMS.iter().filter_map(|name| self.pinned_program(name));
        ours.map(|(_, info)| info).find(|info| info.id == program.id).unwrap_or(program)
    }

    /// Whether there is a bpffs.
    pub fn check(&self) -> Result<()> {
        let is_bpffs =
            statfs(&self.bpffs).is_ok_and(|s| s.filesystem_type() == FsType(BPF_FS_MAGIC as _));
        if is_bpffs { Ok(()) } else { Err(BpfError::NoBpffs { path: self.bpffs.clone() }) }
    }

    /// Makes the directory and takes the lock, which another process holds for the second or two
    /// that loading takes. It ends with the value, and with the process.
    pub fn lock(&self) -> Result<Flock<File>> {
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            match self.try_lock() {
                Err(BpfError::Locked { .. }) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                result => return result,
            }
        }
    }

    /// The lock, if it is free.
    pub fn try_lock(&self) -> Result<Flock<File>> {
        try_lock_dir(&self.dir())
    }

    /// The lock on what the configuration is applied to, if it is free.
    pub fn try_lock_apply(&self) -> Result<Flock<File>> {
        try_lock_dir(&self.dir().join(APPLY))
    }

    /// Removes an object's maps, of all layouts; what was removed.
    pub fn remove_object(&self, object: Object) -> Result<Vec<PathBuf>> {
        let mut removed = Vec::new();
        remove_pin(&self.current(object))?;
        for entry in fs::read_dir(self.dir()).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_of_object =
                name.strip_prefix(object.name()).is_some_and(|rest| rest.starts_with('-'));
            if is_of_object && entry.file_type().is_ok_and(|t| t.is_dir()) {
                removed.extend(remove_pins_in(&entry.path())?);
            }
        }
        Ok(removed)
    }

    /// Removes our directory if it is empty.
    pub fn remove_dir(&self) {
        let _ = fs::remove_dir(self.dir().join(APPLY));
        // Fails where something is left or nothing was there: both are fine.
        let _ = fs::remove_dir(self.dir());
    }
}

fn try_lock_dir(dir: &Path) -> Result<Flock<File>> {
    make_dir(dir)?;
    let failed = |source| BpfError::Io { path: dir.to_owned(), action: "opening", source };
    let file = File::open(dir).map_err(failed)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| BpfError::Locked { path: dir.to_owned() })
}

/// Removes a directory of pins, with what is in it.
pub fn remove_pins_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if remove_pin(&entry.path())? {
            removed.push(entry.path());
        }
    }
    let _ = fs::remove_dir(dir);
    Ok(removed)
}

/// A directory that only root can look into, with its parents.
pub fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| BpfError::Io {
        path: path.to_owned(),
        action: "making the directory",
        source,
    })
}

/// Pins a map or a program.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let failed = |source| BpfError::Io { path: path.to_owned(), action: "pinning", source };
    let text =
        CString::new(path.as_os_str().as_bytes()).map_err(|e| failed(std::io::Error::from(e)))?;
    // SAFETY: the descriptor is open and the text ends with a zero, for the whole call.
    match unsafe { libbpf_sys::bpf_obj_pin(object.as_raw_fd(), text.as_ptr()) } {
        0 => Ok(()),
        _ => Err(failed(std::io::Error::last_os_error())),
    }
}

/// Removes a pin; whether there was one.
pub fn remove_pin(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(BpfError::Io { path: path.to_owned(), action: "removing", source }),
    }
}
