//! Interfaces of two network namespaces may have the same name, and the same bpffs for their pins.

use std::fs;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use super::pins::{self, Pins};
use super::{BpfError, Result};

/// The link that says whose the pins are.
const OWNER: &str = "namespace";

/// This process' network namespace, by its inode.
pub fn own() -> u64 {
    fs::metadata("/proc/self/ns/net").map(|m| m.ino()).unwrap_or_default()
}

/// A number of this process' network namespace which, unlike its inode, is not given again until the next boot
/// (`SO_NETNS_COOKIE`, Linux 5.14); 0: the kernel has none.
pub fn cookie() -> u64 {
    let Ok(socket) = UnixDatagram::unbound() else { return 0 };
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the socket is open, and both pointers lead to values of the right size, for the whole call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result == 0 { cookie } else { 0 }
}

/// Makes the pins this namespace's, unless they are one's that still exists.
pub fn claim(pins: &Pins) -> Result<()> {
    let link = pins.dir().join(OWNER);
    let owner = owner(&link);
    let own = own();
    match owner {
        Some(owner) if owner == own => return Ok(()),
        Some(owner) if exists(owner) => {
            return Err(BpfError::OtherNamespace { path: pins.dir(), owner });
        }
        _ => {}
    }
    pins::remove_pin(&link)?;
    let failed = |source| BpfError::Io { path: link.clone(), action: "linking", source };
    symlink(format!("net:{own}"), &link).map_err(failed)
}

/// Removes the link.
pub fn release(pins: &Pins) -> Result<()> {
    pins::remove_pin(&pins.dir().join(OWNER)).map(drop)
}

fn owner(link: &Path) -> Option<u64> {
    fs::read_link(link).ok()?.to_str()?.strip_prefix("net:")?.parse().ok()
}

/// Whether a process is in it, or a name keeps it (`ip netns add`), as far as can be seen from here.
fn exists(namespace: u64) -> bool {
    let text = format!("net:[{namespace}]");
    let named = fs::read_to_string("/proc/self/mountinfo")
        .is_ok_and(|mounts| mounts.lines().any(|mount| mount.contains(&text)));
    named
        || fs::read_dir("/proc").into_iter().flatten().flatten().any(|process| {
            let link = process.path().join("ns/net");
            fs::read_link(link).is_ok_and(|target| target.as_os_str() == text.as_str())
        })
}
