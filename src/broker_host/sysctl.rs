//! Kernel settings of a broker host, and what they were before.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use crate::kernel::{BpfError, Result};

/// What direct server return needs: no strict reverse path filter, and no ARP answers for the
/// addresses on lo (the network must find them at the balancer).
pub fn wanted(interface: &str) -> Vec<(String, i32)> {
    vec![
        (format!("net/ipv4/conf/{interface}/rp_filter"), 2),
        (format!("net/ipv4/conf/{interface}/arp_ignore"), 1),
        (format!("net/ipv4/conf/{interface}/arp_announce"), 2),
    ]
}

/// What taking connections over needs: that the listener's connections can have what the cookie
/// says, and that a RST carries the mark of what it answers. Conntrack has to take up connections
/// whose SYN it has not seen, where it is loaded.
pub fn wanted_for_takeover() -> Vec<(String, i32)> {
    let mut wanted: Vec<(String, i32)> = [
        "net/ipv4/tcp_syncookies",
        "net/ipv4/tcp_timestamps",
        "net/ipv4/tcp_sack",
        "net/ipv4/tcp_window_scaling",
        "net/ipv4/fwmark_reflect",
        "net/ipv6/fwmark_reflect",
        "net/netfilter/nf_conntrack_tcp_loose",
    ]
    .into_iter()
    .map(|key| (key.to_owned(), 1))
    .collect();
    wanted.retain(|(key, _)| PathBuf::from("/proc/sys").join(key).exists());
    wanted
}

/// The value of a key now.
pub fn value(key: &str) -> Option<i32> {
    fs::read_to_string(PathBuf::from("/proc/sys").join(key)).ok()?.trim().parse().ok()
}

/// Whether a value will do: tcp_syncookies = 2 is more than 1.
pub fn is_enough(key: &str, wanted: i32, value: i32) -> bool {
    value == wanted || (key.ends_with("tcp_syncookies") && value > wanted)
}

/// Sets a key and remembers what it was; whether it was another value.
pub fn set(interface: &str, key: &str, value: i32) -> Result<bool> {
    let path = PathBuf::from("/proc/sys").join(key);
    let io = |action| {
        let path = path.clone();
        move |source| BpfError::Io { path, action, source }
    };
    let before = fs::read_to_string(&path).map_err(io("reading"))?.trim().to_owned();
    if before.parse().is_ok_and(|before| is_enough(key, value, before)) {
        return Ok(false);
    }
    let mut notes = read_notes(interface);
    notes.entry(key.to_owned()).or_insert(before);
    write_notes(interface, &notes)?;
    fs::write(&path, value.to_string()).map_err(io("writing"))?;
    Ok(true)
}

/// Puts back what was there before.
pub fn restore(interface: &str) -> Vec<String> {
    let mut done = Vec::new();
    for (key, before) in read_notes(interface) {
        let path = PathBuf::from("/proc/sys").join(&key);
        // The interface, and the key with it, may be gone.
        if fs::write(&path, &before).is_ok() {
            done.push(format!("{key} = {before}"));
        }
    }
    forget(interface);
    done
}

/// Forgets what is noted: of a namespace that had this one's number before.
pub fn forget(interface: &str) {
    let _ = fs::remove_file(notes_path(interface));
}

/// Notes are kept by network namespace: interfaces of two may have the same name.
fn notes_path(interface: &str) -> PathBuf {
    let namespace = fs::metadata("/proc/self/ns/net").map(|m| m.ino()).unwrap_or_default();
    PathBuf::from("/run/mqtt-fwd").join(format!("real-{namespace}-{interface}.json"))
}

fn read_notes(interface: &str) -> BTreeMap<String, String> {
    fs::read_to_string(notes_path(interface))
        .ok()
        .and_then(|text| serde_json::from_str(&text).ok())
        .unwrap_or_default()
}

fn write_notes(interface: &str, notes: &BTreeMap<String, String>) -> Result<()> {
    let path = notes_path(interface);
    let write = || {
        fs::create_dir_all("/run/mqtt-fwd")?;
        fs::write(&path, serde_json::to_string(notes)?)
    };
    write().map_err(|source| BpfError::Io { path: path.clone(), action: "writing", source })
}
