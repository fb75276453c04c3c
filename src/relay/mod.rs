//! The relay: an MQTT proxy for clients that cannot be bound to one broker. It runs on hosts that are
//! prepared like broker hosts, and is a group of its service like any other.
//!
//! ```text
//! listeners ─► limits ─► TLS, WebSocket ─► CONNECT ─► session ─► brokers      a thread each, SO_REUSEPORT
//! └─────────────────── accept ───────────────────┘      │
//!            crate::mqtt  subscriptions  ids  crate::brokers ────┘
//! ```

mod accept;
mod ids;
mod memory;
mod parts;
mod returns;
mod session;
pub mod stats;
mod stream;
mod subscriptions;
mod tls;
mod upstream;
mod websocket;
mod worker;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpSocket;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use crate::brokers::router::{Router, RouterError};
use crate::brokers::tls::TlsError;
use crate::config::Config;
use crate::domain::{Protocol, RelayListener};
use crate::mqtt::connect::{Connack, Connect};
use crate::{metrics, systemd};
use tls::Tls;
use worker::Shared;

/// Runs every whole-packet parser over some bytes: for fuzz tests.
#[doc(hidden)]
pub fn read_anything(bytes: &[u8], v5: bool) {
    let _ = Connect::read(bytes);
    let _ = Connack::read(bytes, v5);
    let _ = subscriptions::Request::read(bytes, v5);
    let _ = subscriptions::codes(bytes, 2, v5);
}

/// The relay cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// No service has a relay.
    #[error(
        "no service has a relay: write relay = \"NAME\" into a [[service]], the name of the group that \
         runs `mqtt-fwd relay`"
    )]
    NoService,
    /// Too many routes, or a group's TLS files.
    #[error(transparent)]
    Router(#[from] RouterError),
    /// A listening socket cannot be opened.
    #[error("listening on {addr}: {source}{}", hint(.source))]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A certificate or key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Threads, signals.
    #[error("{what}: {source}")]
    Io {
        /// The operation.
        what: &'static str,
        /// The error.
        source: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrNotAvailable => {
            "; the relay's host has the service's address on lo: `mqtt-fwd host up --vip …`"
        }
        io::ErrorKind::AddrInUse => "; another program listens there, a broker perhaps: `ss -ltnp`",
        _ => "",
    }
}

/// A listening address.
#[derive(Clone)]
struct Port {
    /// Index among the services with a relay.
    service: usize,
    addr: SocketAddr,
    /// The service's own port, at which the datapath may bind clients to brokers.
    is_direct: bool,
    listener: RelayListener,
    tls: Option<Arc<Tls>>,
    /// Brokers trust user names without a password, since another listener takes those from certificates.
    trusts_names: bool,
}

fn tables(config: &Config) -> Result<Vec<Arc<Router>>, RelayError> {
    let relayed = config.services.iter().filter(|service| service.relay.is_some());
    relayed.map(|service| Ok(Arc::new(Router::new(config, service)?))).collect()
}

fn ports(config: &Config) -> Result<Vec<Port>, RelayError> {
    let mut all = Vec::new();
    let relayed = config.services.iter().filter(|service| service.relay.is_some());
    for (service, s) in relayed.enumerate() {
        let plain =
            RelayListener { port: s.port, tls: None, websocket: false, accept_proxy: Vec::new() };
        let names_users = |l: &RelayListener| {
            l.tls.as_ref().is_some_and(|tls| tls.username_from_certificate.is_some())
        };
        let trusts_names = s.listeners.iter().any(names_users);
        // Where TLS is spoken, a listener has the service's own port.
        let plain = (s.protocol == Protocol::Mqtt).then_some(plain);
        for listener in plain.into_iter().chain(s.listeners.iter().cloned()) {
            let load = |tls| Tls::load(tls, listener.websocket);
            let tls = listener.tls.as_ref().map(load).transpose()?.map(Arc::new);
            let addr = SocketAddr::new(s.addr, listener.port);
            let is_direct = listener.port == s.port;
            all.push(Port { service, addr, is_direct, listener, tls, trusts_names });
        }
    }
    Ok(all)
}

/// Runs until SIGTERM or SIGINT; SIGHUP reloads configuration and certificates.
pub fn run(config: &Config) -> Result<(), RelayError> {
    let tables = tables(config)?;
    if tables.is_empty() {
        return Err(RelayError::NoService);
    }
    let ports = ports(config)?;
    let mut limits = config.relay;
    let max_memory = limits.max_memory.unwrap_or_else(memory::half_of_the_machine);
    let shared = Arc::new(Shared::new(tables, max_memory));
    limits.connections = raise_descriptors(limits.connections);
    let threads = match limits.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n as usize,
    };
    let workers = accept::start(&shared, limits, &ports, threads)?;
    for port in &ports {
        let how = match (&port.tls, port.listener.websocket) {
            (None, false) => "MQTT",
            (Some(_), false) => "MQTT over TLS",
            (None, true) => "MQTT over WebSocket",
            (Some(_), true) => "MQTT over WebSocket and TLS",
        };
        info!(addr = %port.addr, threads, "listening for {how}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| RelayError::Io { what: "starting the executor", source })?;
    let metrics = config
        .metrics
        .map(|addr| metrics::bind(addr).map_err(|source| RelayError::Listen { addr, source }))
        .transpose()?;
    if let Some(listener) = metrics {
        runtime.spawn(metrics::serve(listener, Metrics(Arc::clone(&shared))));
    }
    systemd::ready();
    runtime.block_on(supervise(config, &shared, &ports, max_memory))?;
    systemd::stopping();
    shared.stop.cancel();
    info!(connections = shared.stats.connections.get(), "ending");
    for worker in workers {
        let _ = worker.join();
    }
    Ok(())
}

/// The relay's counters over HTTP.
struct Metrics(Arc<Shared>);

impl metrics::Source for Metrics {
    async fn families(&self) -> Vec<metrics::Family> {
        let memory = metrics::number(self.0.memory.used.get());
        let family = metrics::Family::gauge(
            "relay_memory_bytes",
            "Memory that clients have the relay keep, of max_memory",
        );
        let mut families = self.0.stats.families();
        families.push(family.with(&[], memory));
        families
    }

    fn health(&self) -> (bool, Vec<String>) {
        if self.0.memory.is_full() {
            return (
                false,
                vec!["[relay] max_memory is in use: no connection is accepted".to_owned()],
            );
        }
        (true, Vec::new())
    }
}

/// Raises RLIMIT_NOFILE to its hard limit: a client takes a descriptor, and each of its broker
/// connections another. Returns how many clients that is enough for: one more, and those that are there
/// could not reach their brokers.
fn raise_descriptors(connections: u32) -> u32 {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    const EACH: u64 = 3;
    const OWN: u64 = 100;
    let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) else { return connections };
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, most, most) {
        warn!(%error, "raising the number of open files");
    }
    let enough = u32::try_from(most.saturating_sub(OWN) / EACH).unwrap_or(u32::MAX);
    if enough < connections {
        warn!(
            "{most} files may be open (LimitNOFILE, ulimit -n), so {enough} clients are accepted at a time, \
             not {connections} ([relay] connections)"
        );
    }
    connections.min(enough)
}

/// Handles signals, and logs the counters once a minute.
async fn supervise(
    config: &Config,
    shared: &Shared,
    ports: &[Port],
    max_memory: u64,
) -> Result<(), RelayError> {
    let handler = |kind| {
        signal(kind).map_err(|source| RelayError::Io { what: "waiting for signals", source })
    };
    let mut hangup = handler(SignalKind::hangup())?;
    let mut terminate = handler(SignalKind::terminate())?;
    let mut interrupt = handler(SignalKind::interrupt())?;
    let mut minute = tokio::time::interval(Duration::from_secs(60));
    minute.tick().await;
    let mut memory = tokio::time::interval(Duration::from_millis(250));
    loop {
        tokio::select! {
            _ = hangup.recv() => {
                systemd::reloading();
                reload(config, shared, ports);
                systemd::ready();
            }
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = minute.tick() => report(shared),
            _ = memory.tick() => shared.memory.check(max_memory),
        }
    }
}

fn report(shared: &Shared) {
    let s = &shared.stats;
    info!(
        connections = s.connections.get(),
        accepted = s.accepted.get(),
        refused = s.refused.get(),
        failed_handshakes = s.failed_handshakes.get(),
        published = s.published.get(),
        delivered = s.delivered.get(),
        returned = s.returned.get(),
        memory = shared.memory.used.get(),
        out_of_memory = s.out_of_memory.get(),
        broker_lost = s.broker_lost.get(),
        protocol_errors = s.protocol_errors.get(),
        "statistics"
    );
}

/// Reloads configuration and certificates; on an error, the previous ones stay in force.
fn reload(config: &Config, shared: &Shared, ports: &[Port]) {
    for port in ports {
        if let Some(tls) = &port.tls {
            match tls.reload() {
                Ok(()) => info!(addr = %port.addr, "certificate reloaded"),
                Err(error) => {
                    warn!(addr = %port.addr, %error, "certificate not reloaded, the previous one stays in force");
                }
            }
        }
    }
    let new = match Config::load(&config.path) {
        Ok(new) => new,
        Err(error) => {
            return warn!(%error, "configuration not reloaded, the previous one stays in force");
        }
    };
    let services = |c: &Config| -> Vec<(String, IpAddr, u16)> {
        let relayed = c.services.iter().filter(|s| s.relay.is_some());
        relayed.map(|s| (s.name.clone(), s.addr, s.port)).collect()
    };
    if services(&new) != services(config) {
        return warn!("services with a relay were added, removed or changed: restart the relay");
    }
    match tables(&new) {
        Ok(tables) => {
            shared.set_tables(tables);
            info!("configuration reloaded: routes and brokers; other keys need a restart");
        }
        Err(error) => warn!(%error, "configuration not reloaded, the previous one stays in force"),
    }
}

fn listen(addr: SocketAddr) -> Result<std::net::TcpListener, RelayError> {
    const BACKLOG: u32 = 4096;
    let open = || {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket.set_reuseport(true)?;
        // Accepted connections inherit it.
        socket.set_nodelay(true)?;
        socket.bind(addr)?;
        socket.listen(BACKLOG)?.into_std()
    };
    // Tokio's sockets have to be created within a runtime.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    let runtime =
        runtime.map_err(|source| RelayError::Io { what: "starting the executor", source })?;
    let _inside = runtime.enter();
    open().map_err(|source| RelayError::Listen { addr, source })
}
