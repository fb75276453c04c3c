//! A client's session: its connection, and those to its brokers.
//!
//! ```text
//!              ┌─ PUBLISH: its topic's broker ────────────────────────────┐
//!              │  PUBREL, acks: the broker of that packet identifier      │
//! client ──────┤  SUBSCRIBE: every broker that can have messages for it   ├──── brokers
//!   │  in place│  PINGREQ: answered here; DISCONNECT: all                 │ in place  │
//!   └──────────┴───◄── messages, acks, SUBACKs put together ◄─────────────┴───────────┘
//! ```
//!
//! A session is one task on one thread. Bytes are read into a buffer of the thread and written from
//! there, with one system call for each destination; only incomplete headers and what a socket does not
//! accept are copied. Backpressure: a source is not read while its destination is full.

mod brokers;
mod client;
mod clock;

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::Sleep;
use tokio_util::either::Either;
use tracing::debug;

use super::ids::{Deliveries, Slot};
use super::memory::{Held, TooMuch};
use super::stats::Stats;
use super::stream::{Pending, Stream};
use super::subscriptions::Subscriptions;
use super::upstream::{RETRY, State, Upstream};
use super::worker::Worker;
use crate::brokers::connection::BrokerStream;
use crate::brokers::router::{Broker, Router};
use crate::mqtt::connect::{Connect, Kind};
use crate::mqtt::proxy_header;
use crate::mqtt::wire::{Malformed, kind};

/// Buffered bytes above which the source is no longer read.
const HIGH: usize = 64 << 10;
/// Bytes to read at a time.
const SCRATCH: usize = 128 << 10;
/// Bytes for a client above which it is not read either. Deliveries alone do not reach it, so that
/// acknowledgements and PINGREQs of a client that is slow to read still count.
const REPLIES_HIGH: usize = HIGH + 3 * SCRATCH;
/// Rounds of reading before other tasks get their turn.
const TURNS: usize = 8;
/// How long CONNACK waits for all brokers' session present.
const SESSIONS_TIMEOUT: Duration = Duration::from_secs(3);
/// From CONNECT to CONNACK.
const CONNACK_TIMEOUT: Duration = Duration::from_secs(15);
/// Idle time after which an unneeded broker connection is closed.
const UNUSED: Duration = Duration::from_secs(10);
/// How often idle subscribers check for a new configuration.
const ROUTES_INTERVAL: Duration = Duration::from_secs(10);

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH]);
}

/// How a session ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// With its DISCONNECT.
    #[error("DISCONNECT received")]
    Disconnected(Vec<u8>),
    #[error("client connection lost: {0}")]
    ClientGone(std::io::Error),
    #[error("protocol error: {0}")]
    Protocol(Malformed),
    #[error("keepalive timeout: nothing received for 1.5 × the client's keepalive")]
    Silent,
    /// Its reason was forwarded, if it gave one.
    #[error("ended by broker {0}")]
    ByBroker(SocketAddr),
    #[error("connection to broker {0} lost with messages in flight")]
    BrokerLost(SocketAddr),
    #[error("no broker of group {0:?} available")]
    Unavailable(String),
    #[error(transparent)]
    OutOfMemory(#[from] TooMuch),
    #[error("returned to the fast path")]
    Returned,
    #[error("relay shutting down")]
    Shutdown,
}

/// Bytes to be written: a range of the thread's buffer, or made here.
enum Piece {
    Range(Range<usize>),
    Made(Vec<u8>),
}

impl Piece {
    fn slice<'a>(&'a self, buffer: &'a [u8]) -> &'a [u8] {
        match self {
            Self::Range(range) => &buffer[range.clone()],
            Self::Made(bytes) => bytes,
        }
    }
}

/// Appends a range, merged with the last one if they are adjacent.
fn append<K: PartialEq>(pieces: &mut Vec<(K, Piece)>, to: K, range: Range<usize>) {
    if let Some((last, Piece::Range(before))) = pieces.last_mut()
        && *last == to
        && before.end == range.start
    {
        before.end = range.end;
        return;
    }
    pieces.push((to, Piece::Range(range)));
}

/// A PUBREL that went to all brokers.
struct Release {
    /// Brokers that have not answered.
    waiting: Vec<Slot>,
    /// One of them had the message.
    known: bool,
}

/// Result of handling a packet of the client.
enum Step {
    /// This many bytes were handled.
    Took(usize),
    /// More bytes are needed.
    More,
    /// Its broker connection is not open yet.
    Wait,
}

/// CONNACK, from home to the client.
#[derive(Default)]
struct Handshake {
    /// Home's CONNACK, until it is sent.
    connack: Option<Vec<u8>>,
    sent: bool,
    /// The client was told that its session is present.
    resumed: bool,
    /// The client identifier that home assigned.
    assigned: Option<String>,
}

/// What the client sends.
struct Inbound {
    /// Bytes received that were not handled yet.
    unparsed: Vec<u8>,
    /// They wait for a broker connection.
    blocked: bool,
    /// When the last PUBLISH came, if that was at QoS 0.
    qos_0: Option<Instant>,
    /// The last packet took so long that other clients have their turn before the next.
    yields: bool,
    /// The message being forwarded: its destination (`None`: discarded), and bytes still to be received.
    forwarding: Option<(Option<Slot>, usize)>,
}

/// What the client gets.
#[derive(Default)]
struct Outbound {
    pending: Pending,
    /// The broker whose delivery is in progress.
    delivering: Option<Slot>,
    /// Packets behind that delivery.
    deferred: Vec<u8>,
}

/// The client's messages at QoS 1 and 2 that brokers have not finished.
struct InFlight {
    messages: HashMap<u16, Slot>,
    /// PUBRELs for messages of an earlier connection, which went to all brokers.
    releases: HashMap<u16, Release>,
    /// Receive maximum of home's CONNACK.
    max: u16,
}

/// The client's topic aliases (MQTT 5 §3.3.2.3.4).
#[derive(Default)]
struct Aliases {
    topics: HashMap<u16, Rc<str>>,
    /// Total length of the topics.
    bytes: usize,
    /// Topic alias maximum of home's CONNACK.
    max: u16,
}

impl Aliases {
    /// Bytes of topics: what a client can have kept here, and a reference at each broker.
    const MOST: usize = 64 << 10;

    /// The topic that an alias stands for from now on; `topic` is empty if it is to be known.
    fn topic(&mut self, alias: u16, topic: &str) -> Result<Rc<str>, Malformed> {
        const UNKNOWN: Malformed =
            Malformed { code: 0x82, what: "topic alias that stands for nothing" };
        const QUOTA: Malformed =
            Malformed { code: 0x97, what: "topic aliases for more than 64 KiB of topics" };
        let known = self.topics.get(&alias);
        if topic.is_empty() {
            return known.cloned().ok_or(UNKNOWN);
        }
        let bytes = self.bytes - known.map_or(0, |t| t.len()) + topic.len();
        if bytes > Self::MOST {
            return Err(QUOTA);
        }
        self.bytes = bytes;
        let topic: Rc<str> = topic.into();
        self.topics.insert(alias, Rc::clone(&topic));
        Ok(topic)
    }
}

/// The client's keepalive.
struct Keepalive {
    seconds: u16,
    /// When something was last received.
    last_in: Instant,
}

/// A client's session.
pub struct Session {
    worker: Rc<Worker>,
    table: Arc<Router>,
    /// Generation of the table.
    generation: u64,
    /// Client and service.
    addrs: (SocketAddr, SocketAddr),
    /// It came to the port at which the datapath may bind it to a broker.
    is_direct: bool,
    connect: Connect,
    client: Stream,
    handshake: Handshake,
    inbound: Inbound,
    outbound: Outbound,
    /// A broker connection was begun, and has to be polled.
    opened: bool,
    upstreams: Vec<Upstream>,
    home: Slot,
    /// The broker with the will.
    will: Option<Slot>,
    in_flight: InFlight,
    deliveries: Deliveries,
    subscriptions: Subscriptions,
    aliases: Aliases,
    keepalive: Keepalive,
    since: Instant,
    /// The group that the client publishes to, and its messages; `None`: several groups.
    published: Option<(Box<str>, u64)>,
    leaving: bool,
    timer: Pin<Box<Sleep>>,
    held: Held,
    /// Brokers that hold something of the session since earlier connections, as far as is known.
    parts: Vec<SocketAddr>,
}

impl Session {
    /// A session for a client that sent CONNECT, and `rest` after it.
    pub fn new(
        worker: Rc<Worker>,
        client: Stream,
        addrs: (SocketAddr, SocketAddr),
        is_direct: bool,
        connect: Connect,
        rest: Vec<u8>,
    ) -> Self {
        let now = Instant::now();
        let generation = worker.generation();
        let table = worker.table();
        let blocked = !rest.is_empty();
        let mut session = Self {
            generation,
            addrs,
            is_direct,
            client,
            handshake: Handshake::default(),
            inbound: Inbound {
                unparsed: rest,
                blocked,
                qos_0: None,
                yields: false,
                forwarding: None,
            },
            outbound: Outbound::default(),
            opened: false,
            upstreams: Vec::new(),
            home: 0,
            will: None,
            in_flight: InFlight {
                messages: HashMap::new(),
                releases: HashMap::new(),
                max: u16::MAX,
            },
            deliveries: Deliveries::default(),
            subscriptions: Subscriptions::default(),
            aliases: Aliases::default(),
            keepalive: Keepalive { seconds: connect.keepalive, last_in: now },
            since: now,
            published: Some(("".into(), 0)),
            leaving: false,
            timer: Box::pin(tokio::time::sleep(Duration::from_secs(3600))),
            held: Held::new(&worker.shared.memory),
            parts: if connect.clean {
                worker.shared.parts.set(worker.service, &connect.client_id, Vec::new());
                Vec::new()
            } else {
                worker.shared.parts.of(worker.service, &connect.client_id)
            },
            connect,
            worker,
            table,
        };
        session.open_first(now);
        session
    }

    /// The broker that answers CONNECT: in the default group, chosen by the client identifier alone, so
    /// that session takeover works across relays.
    fn home_broker(&self) -> Broker {
        let addr = self.addrs.0.to_string();
        let id = &self.connect.client_id;
        let key = if id.is_empty() { &addr } else { id };
        self.table.home_of(key.as_bytes(), |b| self.is_down(b))
    }

    /// Whether a broker is down, or wants nothing of this client.
    fn is_down(&self, broker: Broker) -> bool {
        let turned_away = |u: &Upstream| u.turned_away.is_some_and(|until| Instant::now() < until);
        self.worker.is_down(self.table.broker(broker).addr)
            || self.upstreams.iter().any(|u| u.broker == broker && turned_away(u))
    }

    /// The broker of the will's topic, if there is a will and its topic has a group.
    fn will_broker(&self) -> Option<Broker> {
        self.table.broker_of(self.connect.will.as_deref()?, |b| self.is_down(b))
    }

    /// Opens the connections that are needed from the beginning.
    fn open_first(&mut self, now: Instant) {
        let home = self.home_broker();
        let elsewhere = self.will_broker().is_some_and(|will| will != home);
        let kind = if elsewhere { Kind::WithoutWill } else { Kind::Original };
        self.home = self.open(home, kind, now);
        if self.connect.will.is_some() && !elsewhere {
            self.will = Some(self.home);
        }
        // Home's CONNACK will assign the client identifier that the others need.
        if !(self.connect.v5 && self.connect.client_id.is_empty()) {
            self.open_secondaries(now);
        }
    }

    fn open_secondaries(&mut self, now: Instant) {
        let home = self.upstreams[usize::from(self.home)].broker;
        if let Some(will) = self.will_broker().filter(|will| *will != home) {
            self.will = Some(self.open(will, Kind::WithWill, now));
        }
        if self.connect.persistent {
            for broker in self.table.all().filter(|b| *b != home).collect::<Vec<_>>() {
                self.open(broker, Kind::Secondary, now);
            }
        }
    }

    fn stats(&self) -> &Stats {
        &self.worker.stats
    }

    /// The connection to a broker, opened if necessary.
    fn open(&mut self, broker: Broker, kind: Kind, now: Instant) -> Slot {
        if let Some(slot) = self.upstreams.iter().position(|u| u.broker == broker) {
            if matches!(self.upstreams[slot].state, State::Closed | State::Waiting(_)) {
                self.upstreams[slot].reconnect(kind, now);
                self.opened = true;
            }
            return slot as Slot;
        }
        self.opened = true;
        let info = Arc::clone(self.table.broker(broker));
        let header = info.proxy_protocol.then(|| proxy_header::header(self.addrs.0, self.addrs.1));
        self.upstreams.push(Upstream::new(broker, info, header, kind, self.keepalive.seconds, now));
        (self.upstreams.len() - 1) as Slot
    }

    /// The same, reconnected if another kind of CONNECT was sent.
    fn open_as(&mut self, broker: Broker, kind: Kind, now: Instant) -> Slot {
        let slot = self.open(broker, kind, now);
        let up = &mut self.upstreams[usize::from(slot)];
        if up.kind != kind {
            up.reconnect(kind, now);
            self.opened = true;
        }
        slot
    }

    /// The same for a subscription, which does not wait for brokers that are down: they are retried.
    fn open_or_retry(&mut self, broker: Broker, now: Instant) -> Slot {
        let known = self.upstreams.iter().position(|u| u.broker == broker);
        if let Some(slot) = known
            && (self.upstreams[slot].refused
                || !matches!(self.upstreams[slot].state, State::Closed))
        {
            return slot as Slot;
        }
        let slot = self.open(broker, Kind::Secondary, now);
        let up = &mut self.upstreams[usize::from(slot)];
        if self.worker.is_down(up.addr) {
            up.close(State::Waiting(now + RETRY));
        }
        slot
    }

    /// Makes as much progress as possible. An error is the session's end.
    fn turn(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        if self.worker.generation() != self.generation {
            self.apply_new_routes(Instant::now())?;
        }
        for _ in 0..TURNS {
            let mut progress = false;
            for slot in 0..self.upstreams.len() {
                progress |= self.drive(slot as Slot, cx)?;
            }
            progress |= self.read_client(cx)?;
            progress |= self.flush(cx)?;
            // A new connection has to be polled once to be woken.
            progress |= std::mem::take(&mut self.opened);
            if std::mem::take(&mut self.inbound.yields) {
                return self.pause(cx);
            }
            self.held.set(self.memory())?;
            if !progress {
                return self.arm_timer(cx);
            }
        }
        cx.waker().wake_by_ref();
        Ok(())
    }

    /// Bytes that are kept for the client, beyond what any connection takes.
    fn memory(&self) -> usize {
        let identifiers = self.in_flight.messages.len() + self.deliveries.len();
        self.inbound.unparsed.len()
            + self.outbound.pending.len()
            + self.outbound.deferred.len()
            + self.aliases.bytes
            + self.subscriptions.memory()
            + identifiers * 64
            + self.upstreams.iter().map(Upstream::memory).sum::<usize>()
    }

    /// A broker has, or is to get, subscriptions of the client.
    fn subscribes_at(&mut self, slot: Slot) {
        let up = &mut self.upstreams[usize::from(slot)];
        up.subscribed = true;
        if self.connect.persistent && !self.parts.contains(&up.addr) {
            self.parts.push(up.addr);
            let parts = self.parts.clone();
            let id = self.handshake.assigned.as_deref().unwrap_or(&self.connect.client_id);
            self.worker.shared.parts.set(self.worker.service, id, parts);
        }
    }

    /// Closes all connections.
    pub async fn finish(mut self, end: End) {
        debug!(client = %self.addrs.0, id = self.connect.client_id, "session ended: {end}");
        let whole = self.inbound.forwarding.is_none();
        let goodbye: &[u8] = match &end {
            End::Disconnected(packet) => packet,
            End::Returned => &[kind::DISCONNECT << 4, 0],
            // Without DISCONNECT, the broker publishes the will.
            _ => &[],
        };
        let mut streams = Vec::new();
        for (slot, up) in self.upstreams.iter_mut().enumerate() {
            let state = std::mem::replace(&mut up.state, State::Closed);
            let (State::Ready(stream) | State::Opening(stream)) = state else { continue };
            let mut last = up.out.take();
            let cut = !whole && self.inbound.forwarding.is_some_and(|p| p.0 == Some(slot as Slot));
            if cut || goodbye.is_empty() {
                streams.push(Either::Left(close_gracefully(stream, last)));
            } else {
                last.extend_from_slice(goodbye);
                streams.push(Either::Right(disconnect(stream, last)));
            }
        }
        let code = match &end {
            End::Protocol(malformed) => Some(malformed.code),
            End::Silent => Some(0x8d),
            End::BrokerLost(_) | End::Unavailable(_) => Some(0x89),
            End::OutOfMemory(_) => Some(0x97),
            End::Shutdown => Some(0x8b),
            _ => None,
        };
        let mut last = self.outbound.pending.take();
        if self.outbound.delivering.is_none() {
            match code {
                Some(_) if !self.handshake.sent && self.connect.v5 => {
                    last.extend_from_slice(&[kind::CONNACK << 4, 3, 0, 0x88, 0]);
                }
                Some(_) if !self.handshake.sent => {
                    last.extend_from_slice(&[kind::CONNACK << 4, 2, 0, 3]);
                }
                Some(code) if self.connect.v5 => {
                    last.extend_from_slice(&[kind::DISCONNECT << 4, 2, code, 0]);
                }
                _ => {}
            }
        }
        let all: Vec<_> = streams.into_iter().map(tokio::task::spawn_local).collect();
        match end {
            End::ClientGone(_) => drop(self.client),
            // It sends nothing more that could be answered with RST. TLS and WebSocket have closing handshakes
            // of their own.
            End::Disconnected(_) if matches!(self.client, Stream::Tcp(_)) => {
                let _ = tokio::time::timeout(PATIENCE, self.client.write_all(&last)).await;
                drop(self.client);
            }
            _ => close_gracefully(self.client, last).await,
        }
        for one in all {
            let _ = one.await;
        }
    }
}

impl Future for Session {
    type Output = End;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<End> {
        match self.turn(cx) {
            Ok(()) => Poll::Pending,
            // Expected of a client that was sent to the fast path.
            Err(End::ClientGone(_)) if self.leaving => Poll::Ready(End::Returned),
            Err(end) => Poll::Ready(end),
        }
    }
}

/// How long a peer may take to close in turn.
const PATIENCE: Duration = Duration::from_secs(5);

/// Writes the last bytes and closes after the peer has: closing earlier would answer its data with RST,
/// which may discard those bytes.
pub async fn close_gracefully<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, last: Vec<u8>) {
    let goodbye = async {
        close(&mut stream, &last).await?;
        read_to_end(&mut stream).await
    };
    let _ = tokio::time::timeout(PATIENCE, goodbye).await;
}

async fn close<S: AsyncWrite + Unpin>(stream: &mut S, last: &[u8]) -> std::io::Result<()> {
    stream.write_all(last).await?;
    stream.shutdown().await
}

/// Writes the last bytes, DISCONNECT at their end, and leaves it to the broker to close first, as it does
/// then (MQTT 5 §3.14.4). Who closes first is in TIME_WAIT for a minute, and on this side that would take one
/// of 28,000 ports to that broker: 470 connections a second, and no more.
pub async fn disconnect(mut stream: BrokerStream, last: Vec<u8>) {
    const BROKER_CLOSES: Duration = Duration::from_secs(1);
    let goodbye = async {
        stream.write_all(&last).await?;
        stream.flush().await?;
        let closed = async {
            read_to_end(&mut stream).await?;
            match &mut stream {
                Either::Left(_) => Ok(()),
                // That was the end of TLS, which TCP's follows.
                Either::Right(tls) => read_to_end(tls.get_mut().0).await,
            }
        };
        if let Ok(ended) = tokio::time::timeout(BROKER_CLOSES, closed).await {
            return ended;
        }
        stream.shutdown().await?;
        read_to_end(&mut stream).await
    };
    let _ = tokio::time::timeout(PATIENCE, goodbye).await;
}

async fn read_to_end<S: AsyncRead + Unpin>(stream: &mut S) -> std::io::Result<()> {
    let mut scrap = [0; 512];
    while stream.read(&mut scrap).await? > 0 {}
    Ok(())
}

/// PUBREL or PUBCOMP of the relay's own; in MQTT 5 with reason code 0x92 if the identifier is unknown.
fn acknowledgement(first: u8, id: u16, v5: bool, known: bool) -> Vec<u8> {
    let [high, low] = id.to_be_bytes();
    if v5 && !known { vec![first, 3, high, low, 0x92] } else { vec![first, 2, high, low] }
}
