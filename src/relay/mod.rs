//! The relay: an MQTT proxy for clients that cannot be bound to one broker. It runs on hosts that are
//! prepared like broker hosts, and is a group of its service like any other.
//!
//! ```text
//! listeners ─► limits ─► TLS, WebSocket ─► CONNECT ─► session ─► brokers      a thread each, SO_REUSEPORT
//!                                                       │
//!            connect  subscriptions  ids  scan  table ────┘
//! ```

pub mod broker;
pub(crate) mod connect;
mod ids;
pub mod proxy;
pub mod scan;
mod session;
pub mod stats;
mod stream;
mod subscriptions;
pub mod table;
mod tls;
mod unsent;
mod upstream;
mod websocket;
mod worker;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{debug, info, warn};

use crate::config::Config;
use crate::domain::{RelayLimits, RelayListener};
use crate::{metrics, service};
use connect::Connect;
use scan::kind;
use session::{End, Session};
use stream::Stream;
use table::Table;
use tls::Tls;
use websocket::WebSocket;
use worker::{Shared, Worker};

/// Runs every whole-packet parser over some bytes: for fuzz tests.
#[doc(hidden)]
pub fn read_anything(bytes: &[u8], v5: bool) {
    let _ = Connect::read(bytes);
    let _ = connect::Connack::read(bytes, v5);
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
    Table(#[from] table::TableError),
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
    Tls(#[from] tls::TlsError),
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
            "; the relay's host has the service's address on lo: `mqtt-fwd real up --vip …`"
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
    listener: RelayListener,
    tls: Option<Arc<Tls>>,
}

fn tables(config: &Config) -> Result<Vec<Arc<Table>>, RelayError> {
    let relayed = config.services.iter().filter(|service| service.relay.is_some());
    relayed.map(|service| Ok(Arc::new(Table::new(config, service)?))).collect()
}

fn ports(config: &Config) -> Result<Vec<Port>, RelayError> {
    let mut all = Vec::new();
    let relayed = config.services.iter().filter(|service| service.relay.is_some());
    for (service, s) in relayed.enumerate() {
        let plain = RelayListener { port: s.port, tls: None, websocket: false };
        for listener in [plain].into_iter().chain(s.listeners.iter().cloned()) {
            let tls = listener.tls.as_ref().map(Tls::load).transpose()?.map(Arc::new);
            all.push(Port { service, addr: SocketAddr::new(s.addr, listener.port), listener, tls });
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
    let shared = Arc::new(Shared::new(tables));
    let mut limits = config.relay;
    limits.connections = raise_descriptors(limits.connections);
    let threads = match limits.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n as usize,
    };
    let mut workers = Vec::new();
    for number in 0..threads {
        // All listening sockets are opened before the first connection is accepted.
        let sockets: Vec<(Port, std::net::TcpListener)> = ports
            .iter()
            .map(|port| Ok((port.clone(), listen(port.addr)?)))
            .collect::<Result<_, RelayError>>()?;
        let shared = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(format!("relay-{number}"))
            .spawn(move || work(&shared, limits, sockets))
            .map_err(|source| RelayError::Io { what: "starting a thread", source })?;
        workers.push(thread);
    }
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
    service::ready();
    runtime.block_on(supervise(config, &shared, &ports))?;
    service::stopping();
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
        self.0.stats.families()
    }

    fn health(&self) -> (bool, Vec<String>) {
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
async fn supervise(config: &Config, shared: &Shared, ports: &[Port]) -> Result<(), RelayError> {
    let handler = |kind| {
        signal(kind).map_err(|source| RelayError::Io { what: "waiting for signals", source })
    };
    let mut hangup = handler(SignalKind::hangup())?;
    let mut terminate = handler(SignalKind::terminate())?;
    let mut interrupt = handler(SignalKind::interrupt())?;
    let mut minute = tokio::time::interval(Duration::from_secs(60));
    minute.tick().await;
    loop {
        tokio::select! {
            _ = hangup.recv() => {
                service::reloading();
                reload(config, shared, ports);
                service::ready();
            }
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = minute.tick() => report(shared),
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

/// A worker thread, with its own listening sockets.
fn work(shared: &Arc<Shared>, limits: RelayLimits, sockets: Vec<(Port, std::net::TcpListener)>) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return tracing::error!(%error, "starting a thread's executor"),
    };
    let local = tokio::task::LocalSet::new();
    let mut by_service: Vec<Rc<Worker>> = Vec::new();
    for (port, socket) in sockets {
        while by_service.len() <= port.service {
            let number = by_service.len();
            by_service.push(Rc::new(Worker::new(Arc::clone(shared), limits, number)));
        }
        let worker = Rc::clone(&by_service[port.service]);
        local.spawn_local(async move {
            match TcpListener::from_std(socket) {
                Ok(listener) => accept(&listener, &worker, &port).await,
                Err(error) => tracing::error!(%error, "listening"),
            }
        });
    }
    let stopped = async {
        shared.stop.cancelled().await;
        // Sessions end gracefully.
        for _ in 0..60 {
            if shared.stats.connections.get() == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    local.block_on(&runtime, stopped);
}

async fn accept(listener: &TcpListener, worker: &Rc<Worker>, port: &Port) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = worker.shared.stop.cancelled() => return,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Most likely out of file descriptors, which other connections will free.
                warn!(%error, "accepting a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if !worker.shared.admit(from.ip(), &worker.limits) {
            worker.stats.refused.add(1);
            continue;
        }
        worker.stats.accepted.add(1);
        let (worker, port) = (Rc::clone(worker), port.clone());
        tokio::task::spawn_local(async move {
            let _admitted = Admitted { shared: Arc::clone(&worker.shared), from: from.ip() };
            serve(stream, from, &worker, &port).await;
        });
    }
}

/// Counts an admitted connection until it is dropped, even by a panic.
struct Admitted {
    shared: Arc<Shared>,
    from: IpAddr,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.shared.release(self.from);
    }
}

/// Serves one connection.
async fn serve(stream: TcpStream, from: SocketAddr, worker: &Rc<Worker>, port: &Port) {
    let timeout = Duration::from_secs(worker.limits.connect_timeout_s.into());
    let (mut stream, connect, rest) =
        // Boxed, so that the connection's task does not keep the handshakes' memory.
        match tokio::time::timeout(timeout, Box::pin(handshake(stream, worker, port))).await {
            Ok(Ok(introduced)) => introduced,
            Ok(Err(error)) => {
                worker.stats.failed_handshakes.add(1);
                return debug!(client = %from, %error, "not an MQTT client");
            }
            Err(_) => {
                worker.stats.failed_handshakes.add(1);
                return debug!(client = %from, "no CONNECT within connect_timeout_s");
            }
        };
    let connect = match connect {
        Ok(connect) => connect,
        Err(malformed) => {
            worker.stats.protocol_errors.add(1);
            debug!(client = %from, %malformed, "CONNECT is refused");
            // MQTT 3.1.1 §3.1.2.2: return code 1 for an unsupported protocol level.
            let refusal: &[u8] =
                if malformed.code == 0x84 { &[kind::CONNACK << 4, 2, 0, 1] } else { &[] };
            return session::close_gracefully(&mut stream, refusal.to_vec()).await;
        }
    };
    if connect.authenticates {
        // Enhanced authentication with one broker does not authenticate the client to the others.
        const BAD_METHOD: u8 = 0x8c;
        let refusal = vec![kind::CONNACK << 4, 3, 0, BAD_METHOD, 0];
        return session::close_gracefully(&mut stream, refusal).await;
    }
    let mut session = Session::new(Rc::clone(worker), stream, (from, port.addr), connect, rest);
    let end = tokio::select! {
        end = &mut session => end,
        () = worker.shared.stop.cancelled() => End::Shutdown,
    };
    match &end {
        End::Protocol(_) => worker.stats.protocol_errors.add(1),
        End::BrokerLost(_) | End::Unavailable(_) => worker.stats.broker_lost.add(1),
        _ => {}
    }
    Box::pin(session.finish(end)).await;
}

/// TLS and WebSocket handshakes, and CONNECT. Also returns what the client sent after it.
async fn handshake(
    stream: TcpStream,
    worker: &Worker,
    port: &Port,
) -> io::Result<(Stream, Result<Connect, scan::Malformed>, Vec<u8>)> {
    let most = worker.limits.max_packet;
    let mut username = None;
    let mut stream = match (&port.tls, port.listener.websocket) {
        (None, false) => Stream::Tcp(stream),
        (None, true) => Stream::Ws(Box::new(WebSocket::accept(stream, most).await?)),
        (Some(tls), websocket) => {
            let stream = tls.accept(stream).await?;
            username = tls.username(&stream);
            if websocket {
                Stream::Wss(Box::new(WebSocket::accept(stream, most).await?))
            } else {
                Stream::Tls(Box::new(stream))
            }
        }
    };
    let mut bytes = Vec::with_capacity(512);
    loop {
        let header = match scan::header(&bytes) {
            Ok(header) => header,
            Err(malformed) => return Ok((stream, Err(malformed), Vec::new())),
        };
        if let Some(h) = header {
            let large = h.total() > most.min(256 << 10);
            if h.kind() != kind::CONNECT || large {
                let what = if large { "CONNECT too large" } else { "not CONNECT first" };
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            if bytes.len() >= h.total() {
                let rest = bytes.split_off(h.total());
                let connect = Connect::read(&bytes).map(|mut connect| {
                    if let Some(name) = &username {
                        connect.set_username(name);
                    }
                    connect
                });
                return Ok((stream, connect, rest));
            }
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}
