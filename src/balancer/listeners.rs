//! Who listens at a balancer's endpoint. Katran sets SO_REUSEPORT: a second server starts without
//! a word, takes the balancer's position, and connections are divided between the two.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::sock_diag;

/// A process that listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    pid: i32,
    name: String,
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.name, self.pid)
    }
}

impl Listener {
    /// Its process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it has one of these BPF maps open.
    pub fn holds_any(&self, map_ids: &[u32]) -> bool {
        let Ok(entries) = std::fs::read_dir(format!("/proc/{}/fdinfo", self.pid)) else {
            return false;
        };
        let map_id = |text: String| -> Option<u32> {
            text.lines().find_map(|l| l.strip_prefix("map_id:")?.trim().parse().ok())
        };
        entries
            .flatten()
            .filter_map(|entry| std::fs::read_to_string(entry.path()).ok())
            .filter_map(map_id)
            .any(|id| map_ids.contains(&id))
    }
}

/// How old [`recent`] may be.
const RECENT: Duration = Duration::from_secs(5);

/// [`listeners`], as they were a few seconds ago.
pub fn recent(endpoint: &str) -> Vec<Listener> {
    static LAST: Mutex<Option<(Instant, String, Vec<Listener>)>> = Mutex::new(None);
    let Ok(mut last) = LAST.lock() else { return Vec::new() };
    match &*last {
        Some((when, of, found)) if when.elapsed() < RECENT && of == endpoint => found.clone(),
        _ => {
            let found = listeners(endpoint);
            *last = Some((Instant::now(), endpoint.to_owned(), found.clone()));
            found
        }
    }
}

/// Processes of this host that listen at a `host:port`. None are found for addresses of other
/// hosts and unix sockets, nor in other PID namespaces.
pub fn listeners(endpoint: &str) -> Vec<Listener> {
    // Looking through all processes is worth it only when the sockets have changed.
    static LAST: Mutex<(BTreeSet<u64>, Vec<Listener>)> = Mutex::new((BTreeSet::new(), Vec::new()));
    let sockets = sockets(endpoint);
    let Ok(mut last) = LAST.lock() else { return Vec::new() };
    if last.0 != sockets {
        *last = (sockets.clone(), owners(&sockets));
    }
    last.1.clone()
}

fn owners(sockets: &BTreeSet<u64>) -> Vec<Listener> {
    if sockets.is_empty() {
        return Vec::new();
    }
    let wanted: Vec<String> = sockets.iter().map(|inode| format!("socket:[{inode}]")).collect();
    let holds = |pid: i32| {
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let mut targets = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        targets.any(|target| wanted.iter().any(|socket| target.as_os_str() == socket.as_str()))
    };
    let listener = |pid: i32| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
        Listener { pid, name: name.map_or_else(|_| "?".to_owned(), |name| name.trim().to_owned()) }
    };
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| holds(*pid)).map(listener).collect()
}

fn sockets(endpoint: &str) -> BTreeSet<u64> {
    let Ok(endpoint) = endpoint.replace("localhost", "127.0.0.1").parse::<SocketAddr>() else {
        return BTreeSet::new();
    };
    let here = |local: SocketAddr| {
        local.port() == endpoint.port()
            && (local.ip().is_unspecified() || local.ip().to_canonical() == endpoint.ip())
    };
    let all = sock_diag::listening().unwrap_or_default();
    all.into_iter().filter(|socket| here(socket.local)).map(|socket| socket.inode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_found_by_its_port() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let found = listeners(&endpoint);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].to_string().ends_with(&format!("(pid {})", std::process::id())));
        assert!(!found[0].holds_any(&[u32::MAX]));
        assert!(listeners("unix:/run/x").is_empty());
        drop(listener);
        assert!(listeners(&endpoint).is_empty());
    }
}
