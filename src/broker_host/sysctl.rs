//! Kernel settings of a broker host.

use std::fs;
use std::path::PathBuf;

use super::notes::Notes;
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

/// Whether a value will do: 2 is more than 1 for tcp_syncookies, and for tcp_timestamps.
pub fn is_enough(key: &str, wanted: i32, value: i32) -> bool {
    let more_is_enough = key.ends_with("tcp_syncookies") || key.ends_with("tcp_timestamps");
    value == wanted || (more_is_enough && value > wanted)
}

/// Sets a key and notes what it was; whether it was another value.
pub fn set(notes: &mut Notes, interface: &str, key: &str, value: i32) -> Result<bool> {
    let path = PathBuf::from("/proc/sys").join(key);
    let io = |action| {
        let path = path.clone();
        move |source| BpfError::Io { path, action, source }
    };
    let before = fs::read_to_string(&path).map_err(io("reading"))?.trim().to_owned();
    if before.parse().is_ok_and(|before| is_enough(key, value, before)) {
        return Ok(false);
    }
    notes.settings.entry(key.to_owned()).or_insert(before);
    notes.write(interface)?;
    fs::write(&path, value.to_string()).map_err(io("writing"))?;
    Ok(true)
}

/// Puts back what was there before.
pub fn restore(notes: &Notes) -> Vec<String> {
    let mut done = Vec::new();
    for (key, before) in &notes.settings {
        let path = PathBuf::from("/proc/sys").join(key);
        // The interface, and the key with it, may be gone.
        if fs::write(&path, before).is_ok() {
            done.push(format!("{key} = {before}"));
        }
    }
    done
}
