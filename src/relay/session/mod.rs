//! One client: its connection, and those to the brokers that it uses.
//!
//! ```text
//!              ┌─ PUBLISH: its topic's broker ────────────────────────────┐
//!              │  PUBREL, acks: the broker of that packet identifier      │
//! client ──────┤  SUBSCRIBE: every broker that can have messages for it   ├──── brokers
//!   │  in place│  PINGREQ: answered here; DISCONNECT: all                 │ in place  │
//!   └──────────┴───◄── messages, acks, SUBACKs put together ◄─────────────┴───────────┘
//! ```
//!
//! Everything of a client is one task of one thread. Bytes are read into a buffer of the thread's and
//! written from there, one write a broker; only what does not go at once, or is no whole header yet,
//! is kept. Nobody is read from while whoever it is for does not take more.

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
use tracing::debug;

use super::hello::{Hello, Kind};
use super::ids::{Deliveries, Slot};
use super::scan::{Malformed, kind};
use super::stats::Stats;
use super::stream::{Pending, Stream};
use super::subscriptions::Subscriptions;
use super::table::{Broker, Table};
use super::upstream::{RETRY, State, Upstream};
use super::worker::Worker;

/// Of what waits for one side; above it, the other is not read.
const HIGH: usize = 64 << 10;
/// What is read at a time.
const SCRATCH: usize = 128 << 10;
/// Reads of one client before others have their turn.
const TURNS: usize = 8;
/// For all brokers to say whether they have the client's session.
const SESSIONS_TIMEOUT: Duration = Duration::from_secs(3);
/// For the client to get its CONNACK.
const GREET_TIMEOUT: Duration = Duration::from_secs(15);
/// A broker's connection that is not used any more is ended.
const UNUSED: Duration = Duration::from_secs(10);
/// Subscribers look for a new configuration so often.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH]);
}

/// How a session ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// With the packet.
    #[error("the client said DISCONNECT")]
    Disconnected(Vec<u8>),
    #[error("the client's connection is gone: {0}")]
    ClientGone(std::io::Error),
    #[error("the client did not keep to the protocol: {0}")]
    Protocol(Malformed),
    #[error("nothing came from the client for one and a half times its keepalive")]
    Silent,
    /// It has told the client why if the protocol has words for that.
    #[error("broker {0} ended it")]
    ByBroker(SocketAddr),
    #[error("broker {0} was lost, with messages under way")]
    BrokerLost(SocketAddr),
    #[error("no broker of group {0:?} takes the client")]
    Unavailable(String),
    #[error("the fast path takes the client from here")]
    LetGo,
    #[error("the relay stops")]
    Shutdown,
}

/// Bytes on their way: in the thread's buffer, or made here.
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

/// Puts a range behind what goes to the same place.
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

/// What becomes of a packet of the client's.
enum Step {
    /// So many bytes are dealt with.
    Took(usize),
    /// More bytes are needed.
    More,
    /// Its broker does not take it yet.
    Wait,
}

/// A client with its brokers.
#[allow(clippy::struct_excessive_bools)] // they are independent of each other
pub struct Session {
    worker: Rc<Worker>,
    table: Arc<Table>,
    /// Of the configuration that the table is of.
    generation: u64,
    /// Client and service.
    addrs: (SocketAddr, SocketAddr),
    hello: Hello,
    /// The identifier that the first broker gave.
    assigned: Option<String>,
    client: Stream,
    out: Pending,
    /// Read of the client and not dealt with.
    rest: Vec<u8>,
    /// The rest waits for a broker.
    waits: bool,
    /// A broker's connection may have begun to be opened.
    opened: bool,
    /// A message of the client's that is being passed on: to whom, and how many bytes are to come.
    passing: Option<(Option<Slot>, usize)>,
    /// Whose message the client is just getting.
    getting: Option<Slot>,
    /// For the client, once it has that message.
    behind: Vec<u8>,
    upstreams: Vec<Upstream>,
    home: Slot,
    /// Who has the client's will.
    will: Option<Slot>,
    /// CONNACK, until it can be given to the client; `None`: the client has it.
    connack: Option<Vec<u8>>,
    greeted: bool,
    /// The client was told that its session is there.
    resumed: bool,
    /// The client's messages at QoS 1 and 2, by identifier.
    inflight: HashMap<u16, Slot>,
    /// PUBRELs of the client's for messages of an earlier connection, and who has not answered.
    releases: HashMap<u16, Vec<Slot>>,
    deliveries: Deliveries,
    subscriptions: Subscriptions,
    aliases: HashMap<u16, Box<str>>,
    /// The highest alias that the client may use, and how many messages at QoS 1 and 2 at a time.
    alias_max: u16,
    receive_max: u16,
    keepalive: u16,
    last_in: Instant,
    since: Instant,
    /// The group that the client publishes to, and how many messages; `None`: several.
    published: Option<(Box<str>, u64)>,
    leaving: bool,
    timer: Pin<Box<Sleep>>,
}

impl Session {
    /// A session of a client that has sent CONNECT, and `rest` behind it.
    pub fn new(
        worker: Rc<Worker>,
        client: Stream,
        addrs: (SocketAddr, SocketAddr),
        hello: Hello,
        rest: Vec<u8>,
    ) -> Self {
        let now = Instant::now();
        let generation = worker.generation();
        let table = worker.table();
        let mut session = Self {
            generation,
            addrs,
            assigned: None,
            client,
            out: Pending::default(),
            waits: !rest.is_empty(),
            opened: false,
            rest,
            passing: None,
            getting: None,
            behind: Vec::new(),
            upstreams: Vec::new(),
            home: 0,
            will: None,
            connack: None,
            greeted: false,
            resumed: false,
            inflight: HashMap::new(),
            releases: HashMap::new(),
            deliveries: Deliveries::default(),
            subscriptions: Subscriptions::default(),
            aliases: HashMap::new(),
            alias_max: 0,
            receive_max: u16::MAX,
            keepalive: hello.keepalive,
            last_in: now,
            since: now,
            published: Some(("".into(), 0)),
            leaving: false,
            timer: Box::pin(tokio::time::sleep(Duration::from_secs(3600))),
            hello,
            worker,
            table,
        };
        session.open_first(now);
        session
    }

    /// The broker that answers CONNECT: of the default group, and by the client's id alone, so that a
    /// connection of the same id ends the one before, whichever relays they come through.
    fn home_broker(&self) -> Broker {
        let down = |b| self.worker.is_down(self.table.broker(b).addr);
        let own = self.addrs.0.to_string();
        let id = &self.hello.client_id;
        let key = if id.is_empty() { own.as_bytes() } else { id.as_bytes() };
        self.table.home_of(key, down)
    }

    /// Opens home, and whoever else has to know of the client from the beginning.
    fn open_first(&mut self, now: Instant) {
        let home = self.home_broker();
        let down = |b| self.worker.is_down(self.table.broker(b).addr);
        let will = self.hello.will.as_deref();
        let will = will.map(|topic| self.table.broker_of(topic, down).unwrap_or(home));
        let kind = if will.is_none_or(|w| w == home) { Kind::Own } else { Kind::Home };
        self.home = self.open(home, kind, now);
        self.will = Some(self.home).filter(|_| will.is_some());
        // An identifier that home is to give is not known yet.
        if self.hello.client_id.is_empty() && self.assigned.is_none() && self.hello.v5 {
            return;
        }
        self.open_others(now);
    }

    fn open_others(&mut self, now: Instant) {
        let home = self.upstreams[usize::from(self.home)].broker;
        let down = |b| self.worker.is_down(self.table.broker(b).addr);
        let will = self.hello.will.as_deref();
        let will = will.and_then(|topic| self.table.broker_of(topic, down));
        if let Some(will) = will.filter(|w| *w != home) {
            self.will = Some(self.open(will, Kind::Will, now));
        }
        if self.hello.persistent {
            for broker in self.table.all().filter(|b| *b != home).collect::<Vec<_>>() {
                self.open(broker, Kind::Beside, now);
            }
        }
    }

    fn stats(&self) -> &Stats {
        &self.worker.stats
    }

    /// The slot of a broker's connection, which begins to be opened if there is none.
    fn open(&mut self, broker: Broker, kind: Kind, now: Instant) -> Slot {
        if let Some(slot) = self.upstreams.iter().position(|u| u.broker == broker) {
            if matches!(self.upstreams[slot].state, State::Closed | State::Waiting(_)) {
                self.upstreams[slot].again(kind, now);
                self.opened = true;
            }
            return slot as Slot;
        }
        self.opened = true;
        let addr = self.table.broker(broker).addr;
        self.upstreams.push(Upstream::new(broker, addr, kind, self.keepalive, now));
        (self.upstreams.len() - 1) as Slot
    }

    /// The same for a subscription, which others can do without: a broker that is down is tried
    /// again by itself.
    fn open_or_retry(&mut self, broker: Broker, now: Instant) -> Slot {
        let known = self.upstreams.iter().position(|u| u.broker == broker);
        if let Some(slot) = known
            && (self.upstreams[slot].refused
                || !matches!(self.upstreams[slot].state, State::Closed))
        {
            return slot as Slot;
        }
        let slot = self.open(broker, Kind::Beside, now);
        let up = &mut self.upstreams[usize::from(slot)];
        if self.worker.is_down(up.addr) {
            up.close(State::Waiting(now + RETRY));
        }
        slot
    }

    /// One turn. Returns what is to be done when it ended.
    fn turn(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        if self.worker.generation() != self.generation {
            self.follow_the_configuration(Instant::now())?;
        }
        for _ in 0..TURNS {
            let mut progress = false;
            for slot in 0..self.upstreams.len() {
                progress |= self.drive(slot as Slot, cx)?;
            }
            progress |= self.read_client(cx)?;
            progress |= self.flush(cx)?;
            // A connection that has just begun to be opened has to be looked at once.
            progress |= std::mem::take(&mut self.opened);
            if !progress {
                return self.rest_until_something_happens(cx);
            }
        }
        cx.waker().wake_by_ref();
        Ok(())
    }

    /// Ends all connections as the end wants it.
    pub async fn finish(mut self, end: End) {
        debug!(client = %self.addrs.0, id = self.hello.client_id, "session ended: {end}");
        let whole = self.passing.is_none();
        let goodbye: &[u8] = match &end {
            End::Disconnected(packet) => packet,
            End::LetGo => &[kind::DISCONNECT << 4, 0],
            // Without one, the broker publishes the will.
            _ => &[],
        };
        let mut streams = Vec::new();
        for (slot, up) in self.upstreams.iter_mut().enumerate() {
            let state = std::mem::replace(&mut up.state, State::Closed);
            let (State::Ready(stream) | State::Opening(stream)) = state else { continue };
            let mut last = up.out.take();
            let cut = !whole && self.passing.is_some_and(|p| p.0 == Some(slot as Slot));
            if !cut {
                last.extend_from_slice(goodbye);
            }
            streams.push(finish_stream(stream, last));
        }
        let code = match &end {
            End::Protocol(malformed) => Some(malformed.code),
            End::Silent => Some(0x8d),
            End::BrokerLost(_) | End::Unavailable(_) => Some(0x89),
            End::Shutdown => Some(0x8b),
            _ => None,
        };
        let mut last = self.out.take();
        if self.getting.is_none() {
            match code {
                Some(_) if !self.greeted && self.hello.v5 => {
                    last.extend_from_slice(&[kind::CONNACK << 4, 3, 0, 0x88, 0]);
                }
                Some(_) if !self.greeted => last.extend_from_slice(&[kind::CONNACK << 4, 2, 0, 3]),
                Some(code) if self.hello.v5 => {
                    last.extend_from_slice(&[kind::DISCONNECT << 4, 2, code, 0]);
                }
                _ => {}
            }
        }
        let client = (!matches!(end, End::ClientGone(_))).then_some(self.client);
        let all: Vec<_> = streams.into_iter().map(tokio::task::spawn_local).collect();
        if let Some(client) = client {
            finish_stream(client, last).await;
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
            // A client that leaves when it was let go has not lost anything.
            Err(End::ClientGone(_)) if self.leaving => Poll::Ready(End::LetGo),
            Err(end) => Poll::Ready(end),
        }
    }
}

/// Writes the last bytes, and closes when the other side has read them: closed before, the kernel
/// would answer what is still to come with RST, and the last bytes may be lost with it.
pub async fn finish_stream<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, last: Vec<u8>) {
    const PATIENCE: Duration = Duration::from_secs(5);
    let goodbye = async {
        stream.write_all(&last).await?;
        stream.shutdown().await?;
        let mut scrap = [0; 512];
        while stream.read(&mut scrap).await? > 0 {}
        Ok::<(), std::io::Error>(())
    };
    let _ = tokio::time::timeout(PATIENCE, goodbye).await;
}
