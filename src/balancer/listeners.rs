//! Who listens at a balancer's endpoint. Katran sets SO_REUSEPORT: a second server starts without
//! a word, takes the balancer's position, and connections are divided between the two.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use procfs::net::TcpState;
use procfs::process::FDTarget;

/// Processes of this host that listen at a `host:port`, as `name (pid)`. None are found for
/// addresses of other hosts and unix sockets, nor in other PID namespaces.
pub fn processes(endpoint: &str) -> Vec<String> {
    owners(&sockets(endpoint))
}

fn owners(sockets: &BTreeSet<u64>) -> Vec<String> {
    let all = procfs::process::all_processes().into_iter().flatten().flatten();
    let listening = all.filter(|process| {
        process
            .fd()
            .into_iter()
            .flatten()
            .flatten()
            .any(|fd| matches!(fd.target, FDTarget::Socket(inode) if sockets.contains(&inode)))
    });
    let name = |process: procfs::process::Process| {
        let name = process.stat().map_or_else(|_| "?".to_owned(), |stat| stat.comm);
        format!("{name} (pid {})", process.pid)
    };
    listening.map(name).collect()
}

fn sockets(endpoint: &str) -> BTreeSet<u64> {
    let Ok(endpoint) = endpoint.replace("localhost", "127.0.0.1").parse::<SocketAddr>() else {
        return BTreeSet::new();
    };
    let all = procfs::net::tcp().into_iter().chain(procfs::net::tcp6()).flatten();
    let here = |local: SocketAddr| {
        local.port() == endpoint.port()
            && (local.ip().is_unspecified() || local.ip().to_canonical() == endpoint.ip())
    };
    all.filter(|socket| socket.state == TcpState::Listen && here(socket.local_address))
        .map(|socket| socket.inode)
        .collect()
}

/// What to say if more than one listens.
pub fn complaint(endpoint: &str) -> Option<String> {
    let sockets = sockets(endpoint);
    // Looking through all processes is worth it only then.
    let processes = if sockets.len() > 1 { owners(&sockets) } else { Vec::new() };
    (processes.len() > 1).then(|| {
        format!(
            "{} servers listen at {endpoint} and each gets some of the calls: {}; stop all but one",
            processes.len(),
            processes.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_found_by_its_port() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let found = processes(&endpoint);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].ends_with(&format!("(pid {})", std::process::id())), "{found:?}");
        assert_eq!(complaint(&endpoint), None);
        assert!(processes("unix:/run/x").is_empty());
        drop(listener);
        assert!(processes(&endpoint).is_empty());
    }
}
