//! The one `run` of an interface, known to others by a locked file: the lock ends with the process,
//! so the file is never stale.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::run_files;

/// Why this process is not the one, or another one goes on.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    #[error("another `run` already manages {interface}{who}; stop it first")]
    Taken { interface: String, who: String },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("stopping `run` (pid {pid}) failed: {source}")]
    Signal { pid: i32, source: std::io::Error },
    #[error("`run` (pid {pid}) did not exit within 5 s; kill it")]
    GoesOn { pid: i32 },
}

type Result<T, E = InstanceError> = std::result::Result<T, E>;

/// A `run`, as others see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// Its process.
    pub pid: i32,
    /// The configuration that it works by.
    pub config: PathBuf,
    /// What it waits for before it does anything.
    #[serde(default)]
    pub waits_for: Option<String>,
}

impl Running {
    /// Whether it reads the same file.
    pub fn reads(&self, config: &Config) -> bool {
        self.config == absolute(config)
    }

    /// Ends it, and waits until it has ended.
    pub fn end(&self, config: &Config) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(self.pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)
            .map_err(|e| InstanceError::Signal { pid: self.pid, source: e.into() })?;
        let deadline = Instant::now() + Duration::from_secs(5);
        while find(config).is_some_and(|there| there == *self) {
            if Instant::now() > deadline {
                return Err(InstanceError::GoesOn { pid: self.pid });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

fn absolute(config: &Config) -> PathBuf {
    fs::canonicalize(&config.path).unwrap_or_else(|_| config.path.clone())
}

fn path(config: &Config) -> PathBuf {
    run_files::path("run", &config.interface, "json")
}

/// Makes this process the one; it is as long as the value lives.
pub fn lock(config: &Config) -> Result<Flock<File>> {
    let path = path(config);
    let failed = |source| InstanceError::Io { path: path.clone(), source };
    fs::create_dir_all(run_files::DIR).map_err(failed)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(failed)?;
    let Ok(mut file) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
        let who = find(config).map_or_else(String::new, |other| {
            format!(" (pid {}, by {})", other.pid, other.config.display())
        });
        return Err(InstanceError::Taken { interface: config.interface.clone(), who });
    };
    // The previous `run` may have removed it between opening and locking.
    let inode = |found: std::io::Result<fs::Metadata>| found.map(|m| m.ino()).ok();
    if inode(file.metadata()) != inode(fs::metadata(&path)) {
        drop(file);
        return lock(config);
    }
    tell(&mut file, config, None)?;
    Ok(file)
}

/// Tells others what this process waits for.
pub fn tell(file: &mut Flock<File>, config: &Config, waits_for: Option<&str>) -> Result<()> {
    let failed = |source| InstanceError::Io { path: path(config), source };
    let me = Running {
        pid: std::process::id().cast_signed(),
        config: absolute(config),
        waits_for: waits_for.map(str::to_owned),
    };
    file.set_len(0).map_err(failed)?;
    file.rewind().map_err(failed)?;
    file.write_all(&serde_json::to_vec(&me).unwrap_or_default()).map_err(failed)
}

/// Removes what tells others of this process, at its end. The lock is held meanwhile.
pub fn remove(config: &Config) {
    let path = path(config);
    let _ = fs::remove_file(path.with_extension("sock"));
    let _ = fs::remove_file(path);
    // Fails where others have something there.
    let _ = fs::remove_dir(run_files::DIR);
}

/// The interface of the `run` that works by a file, whatever that says now.
pub fn interface_of(file: &Path) -> Option<String> {
    let file = fs::canonicalize(file).ok()?;
    let begin = run_files::path("run", "", "");
    let begin = begin.file_name()?.to_str()?.trim_end_matches('.').to_owned();
    let mut there = fs::read_dir(run_files::DIR).ok()?.flatten();
    let of_file = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let interface = name.strip_prefix(&begin)?.strip_suffix(".json")?.to_owned();
        let running: Running = run_files::read(&entry.path())?;
        // One that has crashed leaves its file behind.
        (running.config == file && find_on(&interface).is_some()).then_some(interface)
    };
    there.find_map(of_file)
}

/// The `run` of a configuration's interface, if one is running.
pub fn find(config: &Config) -> Option<Running> {
    find_on(&config.interface)
}

/// The same, by the interface alone.
pub fn find_on(interface: &str) -> Option<Running> {
    let path = run_files::path("run", interface, "json");
    let file = File::open(&path).ok()?;
    // If the lock can be had, no process holds it.
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_) => None,
        Err(_) => run_files::read(&path),
    }
}
