//! Accepting connections, and handshakes up to CONNECT. Each thread has listening sockets of its own (SO_REUSEPORT),
//! and serves what it accepts.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tracing::{debug, warn};

use super::memory::{self, Held};
use super::session::{self, End, Session};
use super::stream::Stream;
use super::tls::Tls;
use super::websocket::WebSocket;
use super::worker::{Shared, Worker};
use super::{Port, RelayError};
use crate::domain::RelayLimits;
use crate::mqtt::connect::Connect;
use crate::mqtt::proxy_header;
use crate::mqtt::wire::{self, kind};

/// Starts the threads, each with sockets of its own for all listening addresses.
pub fn start(
    shared: &Arc<Shared>,
    limits: RelayLimits,
    ports: &[Port],
    threads: usize,
) -> Result<Vec<std::thread::JoinHandle<()>>, RelayError> {
    // All listening sockets are opened before the first connection is accepted.
    let sockets = || -> Result<Vec<(Port, std::net::TcpListener)>, RelayError> {
        ports.iter().map(|port| Ok((port.clone(), super::listen(port.addr)?))).collect()
    };
    let sockets = (0..threads).map(|_| sockets()).collect::<Result<Vec<_>, _>>()?;
    let mut started = Vec::new();
    for (number, sockets) in sockets.into_iter().enumerate() {
        let shared = Arc::clone(shared);
        let thread = std::thread::Builder::new()
            .name(format!("relay-{number}"))
            .spawn(move || work(&shared, limits, sockets))
            .map_err(|source| RelayError::Io { what: "starting a thread", source })?;
        started.push(thread);
    }
    Ok(started)
}

fn work(shared: &Arc<Shared>, limits: RelayLimits, sockets: Vec<(Port, std::net::TcpListener)>) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return tracing::error!(%error, "starting a thread's executor"),
    };
    let local = tokio::task::LocalSet::new();
    let mut by_service: Vec<Rc<Worker>> = Vec::new();
    for (port, socket) in sockets {
        while by_service.len() <= port.service {
            let service = by_service.len();
            by_service.push(Rc::new(Worker::new(Arc::clone(shared), limits, service)));
        }
        let worker = Rc::clone(&by_service[port.service]);
        local.spawn_local(async move {
            match TcpListener::from_std(socket) {
                Ok(listener) => accept(&listener, &worker, &port).await,
                Err(error) => tracing::error!(%error, "listening failed"),
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
            biased;
            () = worker.shared.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Most likely out of file descriptors, which other connections will free.
                warn!(%error, "accepting a connection failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (worker, port) = (Rc::clone(worker), port.clone());
        if port.listener.accept_proxy.iter().any(|n| n.contains(&from.ip().to_canonical())) {
            tokio::task::spawn_local(
                async move { behind_a_proxy(stream, from, &worker, &port).await },
            );
        } else {
            admit(stream, from, worker, port, false);
        }
    }
}

/// Serves a connection, if there is room for it. `checks`: a balancer in front may go without a word, as its health
/// checks do.
fn admit(stream: TcpStream, from: SocketAddr, worker: Rc<Worker>, port: Port, checks: bool) {
    let Some(admitted) = worker.shared.admit(from.ip(), &worker.limits) else {
        worker.stats.refused.add(1);
        return;
    };
    worker.stats.accepted.add(1);
    tokio::task::spawn_local(async move {
        // Counted until this task ends, even by a panic.
        let _admitted = admitted;
        serve(stream, from, &worker, &port, checks).await;
    });
}

/// A balancer in front of this one says who the client is, which limits are for, and which brokers are told.
async fn behind_a_proxy(
    mut stream: TcpStream,
    proxy: SocketAddr,
    worker: &Rc<Worker>,
    port: &Port,
) {
    let timeout = worker.limits.connect_timeout;
    match tokio::time::timeout(timeout, proxy_header::read(&mut stream)).await {
        Ok(Ok(client)) => {
            admit(stream, client.unwrap_or(proxy), Rc::clone(worker), port.clone(), true);
        }
        Ok(Err(error)) => {
            worker.stats.failed_handshakes.add(1);
            debug!(%proxy, %error, "not a PROXY header");
        }
        Err(_) => {
            worker.stats.failed_handshakes.add(1);
            debug!(%proxy, "no PROXY header within connect_timeout");
        }
    }
}

/// Serves one connection.
async fn serve(
    stream: TcpStream,
    from: SocketAddr,
    worker: &Rc<Worker>,
    port: &Port,
    checks: bool,
) {
    let timeout = worker.limits.connect_timeout;
    let (mut stream, connect, rest) =
        // Boxed, so that the connection's task does not keep the handshakes' memory.
        match tokio::time::timeout(timeout, Box::pin(handshake(stream, worker, port))).await {
            Ok(Ok(introduced)) => introduced,
            Ok(Err(error)) => {
                let is_check = checks && error.kind() == io::ErrorKind::UnexpectedEof;
                worker.stats.failed_handshakes.add(u64::from(!is_check));
                if error.kind() == io::ErrorKind::OutOfMemory {
                    worker.stats.out_of_memory.add(1);
                }
                return debug!(client = %from, %error, "not an MQTT client");
            }
            Err(_) => {
                worker.stats.failed_handshakes.add(1);
                return debug!(client = %from, "no CONNECT within connect_timeout");
            }
        };
    let connect = match connect {
        Ok(connect) => connect,
        Err(Refusal { malformed, v5 }) => {
            worker.stats.protocol_errors.add(1);
            debug!(client = %from, %malformed, "CONNECT is refused");
            let connack = match (malformed.code, v5) {
                // MQTT 3.1.1 §3.1.2.2: return code 1 for an unsupported protocol level.
                (0x84, _) => vec![kind::CONNACK << 4, 2, 0, 1],
                (NOT_AUTHORIZED, true) => vec![kind::CONNACK << 4, 3, 0, NOT_AUTHORIZED, 0],
                (NOT_AUTHORIZED, false) => vec![kind::CONNACK << 4, 2, 0, 5],
                _ => Vec::new(),
            };
            return session::close_gracefully(&mut stream, connack).await;
        }
    };
    if connect.authenticates {
        // Enhanced authentication with one broker does not authenticate the client to the others.
        const BAD_METHOD: u8 = 0x8c;
        let refusal = vec![kind::CONNACK << 4, 3, 0, BAD_METHOD, 0];
        return session::close_gracefully(&mut stream, refusal).await;
    }
    let addrs = (from, port.addr);
    let mut session = Session::new(Rc::clone(worker), stream, addrs, port.is_direct, connect, rest);
    let end = tokio::select! {
        end = &mut session => end,
        () = worker.shared.stop.cancelled() => End::Shutdown,
    };
    match &end {
        End::Protocol(_) => worker.stats.protocol_errors.add(1),
        End::BrokerLost(_) | End::Unavailable(_) => worker.stats.broker_lost.add(1),
        End::OutOfMemory(_) => worker.stats.out_of_memory.add(1),
        _ => {}
    }
    Box::pin(session.finish(end)).await;
}

/// Not authorized (MQTT 5 §3.2.2.2).
const NOT_AUTHORIZED: u8 = 0x87;

/// A CONNECT that no broker gets.
struct Refusal {
    malformed: wire::Malformed,
    v5: bool,
}

/// The user names that a listener takes.
enum User {
    Any,
    /// Not one without a password: that would be one from a certificate.
    WithPassword,
    /// The certificate's; `None`: it has none that can be read.
    Named(Option<String>),
}

impl User {
    fn admit(&self, mut connect: Connect) -> Result<Connect, Refusal> {
        let what = match self {
            Self::WithPassword if connect.has_username && !connect.has_password => {
                "user name without a password, where those come from certificates"
            }
            Self::Named(None) => {
                "a certificate in which username_from_certificate finds no name (X.509 v3)"
            }
            Self::Any | Self::WithPassword => return Ok(connect),
            Self::Named(Some(name)) => {
                connect.set_username(name);
                return Ok(connect);
            }
        };
        let malformed = wire::Malformed { code: NOT_AUTHORIZED, what };
        Err(Refusal { malformed, v5: connect.v5 })
    }
}

/// TLS and WebSocket handshakes, and CONNECT. Also returns what the client sent after it.
async fn handshake(
    stream: TcpStream,
    worker: &Worker,
    port: &Port,
) -> io::Result<(Stream, Result<Connect, Refusal>, Vec<u8>)> {
    let most = worker.limits.max_packet;
    let held = Held::new(&worker.shared.memory);
    let mut user = if port.trusts_names { User::WithPassword } else { User::Any };
    let mut stream = match (&port.tls, port.listener.websocket) {
        (None, false) => Stream::Tcp(stream),
        (None, true) => Stream::Ws(Box::new(WebSocket::accept(stream, most, held).await?)),
        (Some(tls), websocket) => {
            let stream = tls.accept(stream).await?;
            if let Some(which) = tls.names_users() {
                user = User::Named(Tls::username(&stream, which));
            }
            if websocket {
                Stream::Wss(Box::new(WebSocket::accept(stream, most, held).await?))
            } else {
                Stream::Tls(Box::new(stream))
            }
        }
    };
    let mut bytes = Vec::with_capacity(512);
    // A CONNECT of 16 KiB, enough for tokens and certificates, always has room.
    let mut large_connect = Held::new(&worker.shared.connecting);
    loop {
        large_connect.set(bytes.capacity().saturating_sub(memory::CONNECTION))?;
        let header = match wire::header(&bytes) {
            Ok(header) => header,
            Err(malformed) => {
                return Ok((stream, Err(Refusal { malformed, v5: false }), Vec::new()));
            }
        };
        if let Some(h) = header {
            let large = h.total() > most.min(256 << 10);
            if h.kind() != kind::CONNECT || large {
                let what = if large { "CONNECT too large" } else { "not CONNECT first" };
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            if bytes.len() >= h.total() {
                stream.connected();
                let rest = bytes.split_off(h.total());
                let read = Connect::read(&bytes);
                let connect = read.map_err(|malformed| Refusal { malformed, v5: false });
                return Ok((stream, connect.and_then(|connect| user.admit(connect)), rest));
            }
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}
