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

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::IoSlice;
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

use super::hello::{Hello, Kind, Welcome};
use super::ids::{Deliveries, GONE, Slot};
use super::scan::{self, Header, Malformed, kind};
use super::stream::{self, Pending, Stream};
use super::subscriptions::{self, Request, Subscriptions};
use super::table::{Broker, Table};
use super::upstream::{RETRY, State, Upstream};
use super::worker::Worker;
use super::{proxy, stats::Stats};

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
            self.generation = self.worker.generation();
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

    // From the client.

    fn read_client(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        // Its acknowledgements and PINGREQs are read even if it is slow to read what brokers have.
        let full = self.out.len() + self.behind.len() > 2 * HIGH
            || self.upstreams.iter().any(|u| u.out.len() > HIGH);
        if !self.greeted || full {
            return Ok(false);
        }
        BUFFER.with_borrow_mut(|buffer| {
            let kept = self.rest.len();
            if buffer.len() < kept + SCRATCH / 2 {
                buffer.resize(kept + SCRATCH, 0);
            }
            buffer[..kept].copy_from_slice(&self.rest);
            let mut length = kept;
            if !self.waits {
                match stream::read(&mut self.client, cx, &mut buffer[..], kept) {
                    Poll::Pending => return Ok(false),
                    Poll::Ready(Ok(0)) => {
                        return Err(End::ClientGone(std::io::ErrorKind::UnexpectedEof.into()));
                    }
                    Poll::Ready(Ok(n)) => length += n,
                    Poll::Ready(Err(e)) => return Err(End::ClientGone(e)),
                }
                self.last_in = Instant::now();
            }
            let mut pieces = Vec::new();
            let mut at = 0;
            let waited = std::mem::take(&mut self.waits);
            let end = self.client_said(&mut buffer[..length], &mut at, &mut pieces);
            self.tell_brokers(cx, buffer, &pieces);
            self.rest.clear();
            if at < length {
                self.rest.extend_from_slice(&buffer[at..length]);
            } else {
                self.rest = Vec::new();
            }
            end.map_or(Ok(!(waited && self.waits && at == 0)), Err)
        })
    }

    /// Deals with the client's bytes from `at` on. How the session ended, if it did.
    fn client_said(
        &mut self,
        buffer: &mut [u8],
        at: &mut usize,
        pieces: &mut Vec<(Slot, Piece)>,
    ) -> Option<End> {
        let now = Instant::now();
        while *at < buffer.len() {
            if let Some((slot, left)) = self.passing {
                let n = left.min(buffer.len() - *at);
                if let Some(slot) = slot {
                    append(pieces, slot, *at..*at + n);
                }
                *at += n;
                self.passing = (n < left).then_some((slot, left - n));
                continue;
            }
            let h = match scan::header(&buffer[*at..]) {
                Ok(Some(h)) => h,
                Ok(None) => return None,
                Err(e) => return Some(End::Protocol(e)),
            };
            if h.total() > self.worker.limits.max_packet {
                return Some(too_large("control packet larger than max_packet_size"));
            }
            let step = if h.kind() == kind::PUBLISH {
                self.publish(buffer, *at, h, pieces, now)
            } else if h.total() > SCRATCH {
                return Some(too_large("control packet larger than any should be"));
            } else if buffer.len() - *at < h.total() {
                return None;
            } else {
                self.control(buffer, *at, h, pieces, now)
            };
            match step {
                Ok(Step::Took(n)) => *at += n,
                Ok(Step::More) if buffer.len() - *at > SCRATCH => {
                    return Some(too_large("PUBLISH with a header larger than any should be"));
                }
                Ok(Step::More) => return None,
                Ok(Step::Wait) => {
                    self.waits = true;
                    return None;
                }
                Err(end) => return Some(end),
            }
        }
        None
    }

    fn publish(
        &mut self,
        buffer: &[u8],
        at: usize,
        h: Header,
        pieces: &mut Vec<(Slot, Piece)>,
        now: Instant,
    ) -> Result<Step, End> {
        let read = scan::publish(&buffer[at..], h, self.hello.v5).map_err(End::Protocol)?;
        let Some(p) = read else { return Ok(Step::More) };
        let there = (buffer.len() - at).min(h.total());
        if self.leaving && p.qos > 0 {
            // It cannot be acknowledged any more: the client repeats it on its next connection.
            self.pass(None, h, there);
            return Ok(Step::Took(there));
        }
        if p.alias > self.alias_max {
            let what = "topic alias larger than CONNACK allows";
            return Err(End::Protocol(Malformed { code: 0x94, what }));
        }
        let known;
        let topic = if p.topic.is_empty() {
            known = self.aliases.get(&p.alias).cloned();
            known.as_deref().ok_or(End::Protocol(Malformed {
                code: 0x82,
                what: "topic alias that stands for nothing",
            }))?
        } else {
            p.topic
        };
        let down = |b| self.worker.is_down(self.table.broker(b).addr);
        let found = self.table.broker_of(topic, down);
        let broker = found.unwrap_or(self.upstreams[usize::from(self.home)].broker);
        let again = p.qos > 0 && self.inflight.contains_key(&p.id);
        if p.qos > 0 && !again && self.inflight.len() >= usize::from(self.receive_max) {
            let what = "more messages at a time than CONNACK allows";
            return Err(End::Protocol(Malformed { code: 0x93, what }));
        }
        let there_is = self.upstreams.iter().find(|u| u.broker == broker);
        let unavailable = match there_is {
            Some(up) if up.is_ready() || up.is_opening() => false,
            // One that is up would have been chosen, if there were any.
            up => up.is_some_and(|u| u.refused) || down(broker),
        };
        if unavailable && !again {
            return Err(End::Unavailable(self.table.broker(broker).group.clone()));
        }
        let slot = if again { self.inflight[&p.id] } else { self.open(broker, Kind::Beside, now) };
        let up = &mut self.upstreams[usize::from(slot)];
        if up.is_opening() {
            return Ok(Step::Wait);
        }
        let Some(welcome) = up.welcome.as_ref().filter(|_| matches!(up.state, State::Ready(_)))
        else {
            return Err(End::Unavailable(self.table.broker(broker).group.clone()));
        };
        if p.qos > 0 && !again && up.inflight >= welcome.receive_max {
            let what = "more messages at a time than their broker takes";
            return Err(End::Protocol(Malformed { code: 0x93, what }));
        }
        if h.total() > welcome.max_packet {
            return Err(too_large("PUBLISH larger than its broker takes"));
        }
        let alias = if p.alias <= welcome.alias_max { p.alias } else { 0 };
        if p.qos > 0 && !again {
            up.inflight += 1;
            self.inflight.insert(p.id, slot);
        }
        up.last_used = now;
        let mut from = 0;
        if p.alias != 0 {
            let told = alias != 0
                && up.aliases.insert(alias, topic.into()).is_some_and(|before| *before == *topic);
            // As it is, if the broker knows the alias, or learns it by this.
            if alias == 0 || (p.topic.is_empty() && !told) {
                let mut made = Vec::new();
                scan::publish_again(h, &p, topic, alias, &mut made);
                pieces.push((slot, Piece::Made(made)));
                from = p.payload_at;
            }
            if !p.topic.is_empty() {
                self.aliases.insert(p.alias, p.topic.into());
            }
        }
        append(pieces, slot, at + from..at + there);
        self.pass(Some(slot), h, there);
        self.stats().published.add(1);
        if found.is_some() {
            self.count_group(broker);
        }
        Ok(Step::Took(there))
    }

    /// Notes what of a message is still to come.
    fn pass(&mut self, slot: Option<Slot>, h: Header, there: usize) {
        self.passing = (there < h.total()).then_some((slot, h.total() - there));
    }

    /// Whether the client publishes to one group.
    fn count_group(&mut self, broker: Broker) {
        let group = &self.table.broker(broker).group;
        match &mut self.published {
            Some((one, count)) if **one == **group => *count += 1,
            Some((one, count)) if *count == 0 => {
                *one = group.as_str().into();
                *count = 1;
            }
            other => *other = None,
        }
    }

    /// Any packet of the client's but PUBLISH and DISCONNECT. It is there as a whole.
    fn control(
        &mut self,
        buffer: &mut [u8],
        at: usize,
        h: Header,
        pieces: &mut Vec<(Slot, Piece)>,
        now: Instant,
    ) -> Result<Step, End> {
        let range = at..at + h.total();
        let packet = &buffer[range.clone()];
        let id = || scan::id(packet, h).map_err(End::Protocol);
        match h.kind() {
            kind::PUBACK | kind::PUBREC | kind::PUBCOMP => {
                let id = id()?;
                let failed = scan::reason(packet, h) >= 0x80;
                match self.deliveries.owner(id) {
                    // Of a broker that is gone; the client is helped to forget it.
                    Some((GONE, _)) | None if h.kind() == kind::PUBREC && !failed => {
                        let pubrel = acknowledgement(kind::PUBREL << 4 | 2, id, self.hello.v5);
                        self.tell_client(&pubrel);
                    }
                    Some((GONE, _)) => self.deliveries.done(id),
                    Some((slot, own)) => {
                        buffer[at + h.length..at + h.length + 2]
                            .copy_from_slice(&own.to_be_bytes());
                        append(pieces, slot, range);
                        if h.kind() != kind::PUBREC || failed {
                            self.deliveries.done(id);
                        }
                    }
                    None => {}
                }
            }
            kind::PUBREL => {
                let id = id()?;
                match self.inflight.get(&id) {
                    Some(slot) => append(pieces, *slot, range),
                    // Of a connection before this one: whoever has the message knows it.
                    None if self.hello.persistent && !self.releases.contains_key(&id) => {
                        let ready = (0..self.upstreams.len() as Slot)
                            .filter(|slot| self.upstreams[usize::from(*slot)].is_ready());
                        let all: Vec<Slot> = ready.collect();
                        for slot in &all {
                            append(pieces, *slot, range.clone());
                        }
                        self.releases.insert(id, all);
                    }
                    None if self.hello.persistent => {}
                    None => {
                        self.tell_client(&acknowledgement(kind::PUBCOMP << 4, id, self.hello.v5));
                    }
                }
            }
            kind::SUBSCRIBE | kind::UNSUBSCRIBE => return self.request(packet, pieces, now),
            kind::PINGREQ => self.tell_client(&[kind::PINGRESP << 4, 0]),
            kind::DISCONNECT => return Err(End::Disconnected(packet.to_vec())),
            _ => {
                let what = "control packet that a connected client does not send";
                return Err(End::Protocol(Malformed { code: 0x82, what }));
            }
        }
        Ok(Step::Took(h.total()))
    }

    /// SUBSCRIBE or UNSUBSCRIBE: to every broker that can have messages for its topic filters.
    fn request(
        &mut self,
        packet: &[u8],
        pieces: &mut Vec<(Slot, Piece)>,
        now: Instant,
    ) -> Result<Step, End> {
        let (id, request) = Request::read(packet, self.hello.v5).map_err(End::Protocol)?;
        if self.subscriptions.exceeds(&request, self.worker.limits.subscriptions as usize) {
            let what = "more subscriptions than [relay] subscriptions allows";
            return Err(End::Protocol(Malformed { code: 0x97, what }));
        }
        let mut wanted: Vec<(Slot, Vec<usize>)> = Vec::new();
        for i in 0..request.len() {
            for broker in self.table.brokers_for(request.filter(i)) {
                let slot = self.open_or_retry(broker, now);
                match wanted.iter_mut().find(|(s, _)| *s == slot) {
                    Some((_, filters)) => filters.push(i),
                    None => wanted.push((slot, vec![i])),
                }
            }
        }
        if wanted.iter().any(|(slot, _)| self.upstreams[usize::from(*slot)].is_opening()) {
            return Ok(Step::Wait);
        }
        if matches!(request, Request::Subscribe(..)) {
            for (slot, _) in &wanted {
                self.upstreams[usize::from(*slot)].subscribed = true;
            }
        }
        wanted.retain(|(slot, _)| self.upstreams[usize::from(*slot)].is_ready());
        for (slot, filters) in &wanted {
            pieces.push((*slot, Piece::Made(request.packet(id, filters, self.hello.v5))));
            self.upstreams[usize::from(*slot)].last_used = now;
        }
        self.subscriptions.begin(id, &request, wanted);
        if let Some(answer) = self.subscriptions.finished(id, self.hello.v5) {
            self.tell_client(&answer);
        }
        Ok(Step::Took(packet.len()))
    }

    /// Gives every broker what is for it, in one write each.
    fn tell_brokers(&mut self, cx: &mut Context<'_>, buffer: &[u8], pieces: &[(Slot, Piece)]) {
        let now = Instant::now();
        for (slot, up) in self.upstreams.iter_mut().enumerate() {
            let of_slot = pieces.iter().filter(|(s, _)| usize::from(*s) == slot);
            let mut slices: Vec<IoSlice<'_>> =
                of_slot.map(|(_, piece)| IoSlice::new(piece.slice(buffer))).collect();
            if slices.is_empty() {
                continue;
            }
            up.last_out = now;
            // What is wrong with its connection is found when it is read.
            let stream: &mut (dyn AsyncWrite + Unpin) = match &mut up.state {
                State::Ready(stream) | State::Opening(stream) => stream,
                _ => continue,
            };
            if up.out.write(&mut &mut *stream, cx, &mut slices).is_err() {
                up.broken = true;
            }
        }
    }

    /// Something made here for the client: behind the message that it is just getting.
    fn tell_client(&mut self, bytes: &[u8]) {
        if self.getting.is_some() {
            self.behind.extend_from_slice(bytes);
        } else {
            self.out.push(bytes);
        }
    }

    // From the brokers.

    /// Brings a broker's connection on, and passes on what it says.
    fn drive(&mut self, slot: Slot, cx: &mut Context<'_>) -> Result<bool, End> {
        let now = Instant::now();
        let up = &mut self.upstreams[usize::from(slot)];
        match &mut up.state {
            State::Closed | State::Waiting(_) => Ok(false),
            State::Connecting(connecting) => match connecting.as_mut().poll(cx) {
                Poll::Pending => Ok(false),
                Poll::Ready(Err(error)) => {
                    debug!(broker = %up.addr, %error, "cannot connect");
                    self.lost(slot, now).map(|()| true)
                }
                Poll::Ready(Ok(stream)) => {
                    if self.table.broker(up.broker).proxy_protocol {
                        up.out.push(&proxy::header(self.addrs.0, self.addrs.1));
                    }
                    up.out.push(&self.hello.connect(up.kind, self.assigned.as_deref()));
                    up.state = State::Opening(stream);
                    up.last_out = now;
                    Ok(true)
                }
            },
            State::Opening(_) | State::Ready(_) => self.read_broker(slot, cx),
        }
    }

    fn read_broker(&mut self, slot: Slot, cx: &mut Context<'_>) -> Result<bool, End> {
        let drained = self.deliver_parked(slot);
        let up = &mut self.upstreams[usize::from(slot)];
        let others = self.getting.is_some_and(|getting| getting != slot);
        let early = !self.greeted && up.is_ready();
        if others || early || self.out.len() > HIGH {
            return Ok(drained);
        }
        BUFFER.with_borrow_mut(|buffer| {
            let up = &mut self.upstreams[usize::from(slot)];
            let kept = up.rest.len();
            if buffer.len() < kept + SCRATCH / 2 {
                buffer.resize(kept + SCRATCH, 0);
            }
            let (State::Opening(stream) | State::Ready(stream)) = &mut up.state else {
                return Ok(drained);
            };
            let held = std::mem::take(&mut up.held);
            let length = match stream::read(stream, cx, &mut buffer[..], kept) {
                Poll::Ready(Ok(n)) if n > 0 => {
                    up.pinged = None;
                    kept + n
                }
                _ if held => kept,
                Poll::Pending if !up.broken => return Ok(drained),
                _ => return self.lost(slot, Instant::now()).map(|()| true),
            };
            buffer[..kept].copy_from_slice(&up.rest);
            let mut pieces = Vec::new();
            let mut at = 0;
            let end = self.broker_said(slot, &mut buffer[..length], &mut at, &mut pieces);
            let mut slices: Vec<IoSlice<'_>> =
                pieces.iter().map(|((), piece)| IoSlice::new(piece.slice(buffer))).collect();
            let written = self.out.write(&mut self.client, cx, &mut slices);
            let up = &mut self.upstreams[usize::from(slot)];
            if at < length {
                up.rest = buffer[at..length].to_vec();
            } else {
                up.rest = Vec::new();
            }
            written.map_err(End::ClientGone)?;
            if self.getting.is_none() && !self.behind.is_empty() {
                let behind = std::mem::take(&mut self.behind);
                self.out.push(&behind);
            }
            end.map_or(Ok(true), Err)
        })
    }

    /// Deals with a broker's bytes from `at` on. How the session ended, if it did.
    fn broker_said(
        &mut self,
        slot: Slot,
        buffer: &mut [u8],
        at: &mut usize,
        pieces: &mut Vec<((), Piece)>,
    ) -> Option<End> {
        while *at < buffer.len() {
            let there = buffer.len() - *at;
            let up = &mut self.upstreams[usize::from(slot)];
            if up.parking > 0 {
                let n = up.parking.min(there);
                up.parked.extend_from_slice(&buffer[*at..*at + n]);
                up.parking -= n;
                *at += n;
                continue;
            }
            if up.passing > 0 {
                let n = up.passing.min(there);
                append(pieces, (), *at..*at + n);
                up.passing -= n;
                *at += n;
                self.getting = (up.passing > 0).then_some(slot);
                continue;
            }
            let Ok(header) = scan::header(&buffer[*at..]) else {
                return Some(End::ByBroker(up.addr));
            };
            let h = header?;
            if h.kind() == kind::PUBLISH {
                if !self.deliver(slot, &mut buffer[*at..], h) {
                    return None;
                }
                continue;
            }
            if h.total() > SCRATCH {
                return Some(End::ByBroker(up.addr));
            }
            if there < h.total() {
                return None;
            }
            let range = *at..*at + h.total();
            *at = range.end;
            if let Err(end) = self.answer(slot, buffer, range, h, pieces) {
                return Some(end);
            }
            let up = &mut self.upstreams[usize::from(slot)];
            if !self.greeted && up.is_ready() {
                up.held = *at < buffer.len();
                return None;
            }
        }
        None
    }

    /// Whether the client has room for a message of a broker's, which then gets an identifier of the
    /// client's. `None`: more of it is needed.
    fn fits(&mut self, slot: Slot, bytes: &mut [u8], h: Header) -> Option<bool> {
        if h.first & 0x06 == 0 {
            return Some(true);
        }
        let id_at = identifier_at(bytes, h)?;
        let id = u16::from_be_bytes([bytes[id_at], bytes[id_at + 1]]);
        let full = self.deliveries.len() >= usize::from(self.hello.receive_max);
        if full && self.deliveries.known(slot, id).is_none() {
            return Some(false);
        }
        let Some(id) = self.deliveries.assign(slot, id) else { return Some(false) };
        bytes[id_at..id_at + 2].copy_from_slice(&id.to_be_bytes());
        Some(true)
    }

    /// A message of a broker's is passed on, or waits behind others. False: more of it is needed.
    fn deliver(&mut self, slot: Slot, bytes: &mut [u8], h: Header) -> bool {
        // At QoS 0, nothing has to wait, nor has what waits anything to do with its order.
        let up = &self.upstreams[usize::from(slot)];
        let waits = h.first & 0x06 != 0 && !up.parked.is_empty();
        let Some(fits) = (if waits { Some(false) } else { self.fits(slot, bytes, h) }) else {
            return false;
        };
        let up = &mut self.upstreams[usize::from(slot)];
        if fits {
            up.passing = h.total();
            self.worker.stats.delivered.add(1);
        } else {
            up.parking = h.total();
        }
        true
    }

    /// Delivers what waited for the client's receive maximum. Whether there was any.
    fn deliver_parked(&mut self, slot: Slot) -> bool {
        if self.getting.is_some() || self.out.len() > HIGH {
            return false;
        }
        let mut parked = std::mem::take(&mut self.upstreams[usize::from(slot)].parked);
        let mut at = 0;
        while let Ok(Some(h)) = scan::header(&parked[at..]) {
            let whole = parked.len() - at >= h.total();
            if !whole || self.fits(slot, &mut parked[at..], h) != Some(true) {
                break;
            }
            self.out.push(&parked[at..at + h.total()]);
            self.worker.stats.delivered.add(1);
            at += h.total();
        }
        parked.drain(..at);
        self.upstreams[usize::from(slot)].parked = parked;
        at > 0
    }

    /// Any whole packet of a broker's but PUBLISH.
    fn answer(
        &mut self,
        slot: Slot,
        buffer: &mut [u8],
        range: Range<usize>,
        h: Header,
        pieces: &mut Vec<((), Piece)>,
    ) -> Result<(), End> {
        let up = &mut self.upstreams[usize::from(slot)];
        let packet = &buffer[range.clone()];
        let addr = up.addr;
        let broken = || End::ByBroker(addr);
        match h.kind() {
            kind::CONNACK => return self.welcomed(slot, packet),
            _ if !matches!(up.state, State::Ready(_)) => return Err(broken()),
            kind::PUBACK | kind::PUBREC | kind::PUBCOMP => {
                let id = scan::id(packet, h).map_err(|_| broken())?;
                if let Some(all) = self.releases.get_mut(&id) {
                    all.retain(|s| *s != slot);
                    if h.kind() == kind::PUBCOMP && all.is_empty() {
                        self.releases.remove(&id);
                        append(pieces, (), range);
                    }
                    return Ok(());
                }
                if self.inflight.get(&id) != Some(&slot) {
                    return Ok(());
                }
                if h.kind() != kind::PUBREC || scan::reason(packet, h) >= 0x80 {
                    self.inflight.remove(&id);
                    up.inflight -= 1;
                }
                append(pieces, (), range);
            }
            kind::PUBREL => {
                let id = scan::id(packet, h).map_err(|_| broken())?;
                let Some(id) = self.deliveries.assign(slot, id) else { return Ok(()) };
                buffer[range.start + h.length..range.start + h.length + 2]
                    .copy_from_slice(&id.to_be_bytes());
                append(pieces, (), range);
            }
            kind::SUBACK | kind::UNSUBACK => {
                let id = scan::id(packet, h).map_err(|_| broken())?;
                let codes = subscriptions::codes(packet, h.length, self.hello.v5);
                if let Some(all) = self.subscriptions.answered(slot, id, codes, self.hello.v5) {
                    pieces.push(((), Piece::Made(all)));
                }
            }
            kind::PINGRESP => up.pinged = None,
            // Why a broker leaves is the client's to know, if it takes the client's messages with it.
            kind::DISCONNECT if slot == self.home || !up.is_quiet() => {
                append(pieces, (), range);
                return Err(broken());
            }
            kind::DISCONNECT => up.broken = true,
            _ => return Err(broken()),
        }
        Ok(())
    }

    /// A broker's CONNACK.
    fn welcomed(&mut self, slot: Slot, packet: &[u8]) -> Result<(), End> {
        let now = Instant::now();
        let up = &mut self.upstreams[usize::from(slot)];
        let Some(welcome) = Welcome::read(packet, self.hello.v5) else {
            return Err(End::ByBroker(up.addr));
        };
        if welcome.code != 0 {
            if slot == self.home {
                self.out.push(packet);
                self.greeted = true;
                return Err(End::ByBroker(up.addr));
            }
            debug!(broker = %up.addr, code = welcome.code, "CONNECT is refused");
            up.close(State::Closed);
            up.refused = true;
            return Ok(());
        }
        if let Some(kind) = up.then.pop_front() {
            up.again(kind, now);
            return Ok(());
        }
        if let State::Opening(stream) = std::mem::replace(&mut up.state, State::Closed) {
            up.state = State::Ready(stream);
        }
        up.keepalive = welcome.keepalive.unwrap_or(self.hello.keepalive);
        (up.last_used, up.last_out) = (now, now);
        if slot == self.home {
            self.keepalive = up.keepalive;
            (self.alias_max, self.receive_max) = (welcome.alias_max, welcome.receive_max);
            self.connack = Some(packet.to_vec());
            if let Some(id) = &welcome.client_id {
                self.assigned = Some(id.clone());
                self.open_others(now);
            }
        } else if self.resumed && self.greeted && !welcome.session_present {
            // The client was told that its session is there.
            return Err(End::BrokerLost(up.addr));
        } else if up.subscribed && !(self.hello.persistent && welcome.session_present) {
            self.subscribe_again(slot, |_, _| true);
        }
        let up = &mut self.upstreams[usize::from(slot)];
        up.welcome = Some(welcome);
        Ok(())
    }

    /// A broker gets the subscriptions that it should have, and has not.
    fn subscribe_again(&mut self, slot: Slot, wanted: impl Fn(&Self, &str) -> bool) {
        let broker = self.upstreams[usize::from(slot)].broker;
        let mut id = u16::MAX;
        let next = || {
            // From the other end than clients count.
            while self.inflight.contains_key(&id) || self.subscriptions.is_open(id) {
                id = (id - 1).max(1);
            }
            let free = id;
            id = (id - 1).max(1);
            free
        };
        let wanted =
            |filter: &str| self.table.brokers_for(filter).contains(&broker) && wanted(self, filter);
        let packets = self.subscriptions.again(wanted, next, self.hello.v5);
        self.upstreams[usize::from(slot)].out.push(&packets);
    }

    /// The client gets its CONNACK when all is known that it says.
    fn greet(&mut self, now: Instant) {
        let opening = self.upstreams.iter().any(Upstream::is_opening);
        if opening && now < self.since + SESSIONS_TIMEOUT {
            return;
        }
        let Some(mut connack) = self.connack.take() else { return };
        let present = |u: &Upstream| u.welcome.as_ref().is_some_and(|w| w.session_present);
        let at_home = present(&self.upstreams[usize::from(self.home)]);
        if self.hello.persistent && !self.hello.clean {
            let v5 = self.hello.v5;
            if at_home && !self.upstreams.iter().filter(|u| u.is_ready()).all(present) {
                // One has lost its part: the client has to subscribe again.
                let flags = scan::header(&connack).ok().flatten().map_or(2, |h| h.length);
                connack[flags] &= !1;
            }
            for (slot, up) in self.upstreams.iter_mut().enumerate() {
                if !at_home && slot != usize::from(self.home) && up.is_ready() && present(up) {
                    // What the client is told to be gone must be gone.
                    up.then = if v5 { [].into() } else { [Kind::Beside].into() };
                    up.again(Kind::Anew, now);
                }
            }
        }
        self.resumed = scan::header(&connack)
            .ok()
            .flatten()
            .is_some_and(|h| connack.get(h.length).is_some_and(|flags| flags & 1 == 1));
        self.out.push(&connack);
        self.greeted = true;
        self.stats().opened.add(1);
    }

    /// A broker's connection is gone, or was not to be had.
    fn lost(&mut self, slot: Slot, now: Instant) -> Result<(), End> {
        let home = slot == self.home;
        let up = &mut self.upstreams[usize::from(slot)];
        let addr = up.addr;
        let was_ready = up.is_ready();
        let partial = self.getting == Some(slot) || self.passing.is_some_and(|p| p.0 == Some(slot));
        let lossy = partial || up.inflight > 0 || !up.out.is_empty();
        if !was_ready {
            // One that does not answer at all will not the next second either.
            self.worker.down(addr, now.duration_since(up.since));
        }
        if home && was_ready {
            return Err(End::ByBroker(addr));
        }
        // Without its broker, nobody has the client's will.
        if was_ready && (lossy || self.will == Some(slot)) {
            return Err(End::BrokerLost(addr));
        }
        let keeps = up.subscribed || self.hello.persistent;
        let subscribed = up.subscribed;
        // Not all clients of a broker at the same moment.
        let jitter = Duration::from_millis(u64::from(self.addrs.0.port()) % 1000);
        up.close(if keeps { State::Waiting(now + RETRY + jitter) } else { State::Closed });
        up.subscribed = subscribed;
        self.deliveries.forget(slot);
        for answer in self.subscriptions.lost(slot, self.hello.v5) {
            self.tell_client(&answer);
        }
        if home {
            let broker = self.home_broker();
            let other = self.table.broker(broker).addr;
            if self.worker.is_down(other) {
                return Err(End::Unavailable(self.table.broker(broker).group.clone()));
            }
            let will = self.hello.will.is_some();
            let elsewhere = will && self.will.is_some_and(|w| w != slot);
            let kind = if elsewhere { Kind::Home } else { Kind::Own };
            self.home = self.open(broker, kind, now);
            let up = &mut self.upstreams[usize::from(self.home)];
            if up.kind != kind {
                up.again(kind, now);
            }
            self.will = if elsewhere { self.will } else { Some(self.home).filter(|_| will) };
        } else if self.will == Some(slot) {
            // Another broker of its topic's group.
            let down = |b| self.worker.is_down(self.table.broker(b).addr);
            let topic = self.hello.will.clone().unwrap_or_default();
            let Some(broker) = self.table.broker_of(&topic, down) else { return Ok(()) };
            let other = self.table.broker(broker);
            if self.worker.is_down(other.addr) {
                return Err(End::Unavailable(other.group.clone()));
            }
            let slot = self.open(broker, Kind::Will, now);
            let up = &mut self.upstreams[usize::from(slot)];
            if up.kind != Kind::Will {
                up.again(Kind::Will, now);
            }
            self.will = Some(slot);
        }
        Ok(())
    }

    // Time.

    /// Writes what waits. Whether anything went.
    fn flush(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let mut progress = false;
        if !self.greeted {
            self.greet(Instant::now());
            progress |= self.greeted;
        }
        for up in &mut self.upstreams {
            let (State::Ready(stream) | State::Opening(stream)) = &mut up.state else { continue };
            match up.out.flush(stream, cx) {
                Ok(wrote) => progress |= wrote,
                // Found when it is read, behind what the broker still had to say.
                Err(_) if !up.broken => (up.broken, progress) = (true, true),
                Err(_) => {}
            }
        }
        progress |= self.out.flush(&mut self.client, cx).map_err(End::ClientGone)?;
        if self.leaving && self.out.is_empty() {
            // The client's last messages may still come.
            let _ = Pin::new(&mut self.client).poll_shutdown(cx).map_err(End::ClientGone)?;
        }
        Ok(progress)
    }

    fn rest_until_something_happens(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        loop {
            let now = Instant::now();
            let mut acted = false;
            let next = self.look_at_the_clock(now, &mut acted)?;
            if acted {
                // There may be something to be written, or a connection to be opened.
                cx.waker().wake_by_ref();
                return Ok(());
            }
            // Sooner than needed does no harm, and setting it costs more than looking at it.
            if self.timer.is_elapsed() || self.timer.deadline() > next.into() {
                self.timer.as_mut().reset(next.into());
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Ok(());
            }
        }
    }

    /// Does what is due, and says when the next thing is.
    fn look_at_the_clock(&mut self, now: Instant, acted: &mut bool) -> Result<Instant, End> {
        let mut next = now + Duration::from_secs(3600);
        if self.keepalive > 0 && self.greeted {
            if self.waits || self.upstreams.iter().any(|u| u.out.len() > HIGH) {
                // It is not read; who knows what it has said.
                self.last_in = now;
            }
            let silent = self.last_in + Duration::from_millis(u64::from(self.keepalive) * 1500);
            if now >= silent {
                return Err(End::Silent);
            }
            next = next.min(silent);
        }
        if !self.greeted {
            if now >= self.since + GREET_TIMEOUT {
                let home = self.upstreams[usize::from(self.home)].broker;
                return Err(End::Unavailable(self.table.broker(home).group.clone()));
            }
            let sessions = self.since + SESSIONS_TIMEOUT + Duration::from_millis(1);
            next = next.min(if now < sessions { sessions } else { self.since + GREET_TIMEOUT });
        }
        if !self.subscriptions.is_empty() {
            // To see a new configuration.
            next = next.min(now + LOOK_AGAIN);
        }
        for slot in 0..self.upstreams.len() as Slot {
            let up = &mut self.upstreams[usize::from(slot)];
            if let Some(due) = up.deadline()
                && due <= now
            {
                *acted = true;
                let unread = self.out.len() > HIGH || self.getting.is_some_and(|s| s != slot);
                match up.state {
                    // It may have answered behind what the client does not take.
                    State::Ready(_) if up.pinged.is_some() && unread => up.pinged = Some(now),
                    State::Waiting(_) if up.subscribed || self.hello.persistent => {
                        let kind = if self.greeted { Kind::Resume } else { Kind::Beside };
                        up.again(kind, now);
                    }
                    State::Waiting(_) => up.state = State::Closed,
                    State::Ready(_) if up.pinged.is_none() => {
                        // Not into the middle of a message, which says enough.
                        if self.passing.is_none_or(|p| p.0 != Some(slot)) {
                            up.out.push(&[kind::PINGREQ << 4, 0]);
                            up.pinged = Some(now);
                        }
                        up.last_out = now;
                    }
                    _ => self.lost(slot, now)?,
                }
            }
            self.end_unused(slot, now);
            let up = &self.upstreams[usize::from(slot)];
            if let Some(due) = up.deadline() {
                next = next.min(due);
            }
            if up.is_ready() && now < up.last_used + UNUSED {
                next = next.min(up.last_used + UNUSED);
            }
        }
        let before = self.leaving;
        let due = self.let_go(now)?;
        *acted |= before != self.leaving;
        if let Some(due) = due {
            next = next.min(due);
        }
        Ok(next.max(now + Duration::from_millis(1)))
    }

    /// Ends a broker's connection that the client does not need any more, without its will.
    fn end_unused(&mut self, slot: Slot, now: Instant) {
        let newer = |up: &Upstream| {
            self.upstreams.iter().any(|u| u.is_ready() && u.last_used > up.last_used)
        };
        let up = &self.upstreams[usize::from(slot)];
        let needed =
            self.will == Some(slot) || up.subscribed || self.hello.persistent || !self.greeted;
        let passing = self.passing.is_some() || self.getting == Some(slot);
        if needed || passing || !up.is_ready() || !up.is_quiet() || !newer(up) {
            return;
        }
        if now < up.last_used + UNUSED {
            return;
        }
        let up = &mut self.upstreams[usize::from(slot)];
        if let State::Ready(stream) = std::mem::replace(&mut up.state, State::Closed) {
            tokio::task::spawn_local(finish_stream(stream, vec![kind::DISCONNECT << 4, 0]));
        }
        up.close(State::Closed);
    }

    /// After a change of the configuration, other brokers may be needed, and some not be there.
    fn follow_the_configuration(&mut self, now: Instant) -> Result<(), End> {
        let table = self.worker.table();
        if Arc::ptr_eq(&table, &self.table) || self.passing.is_some() {
            return Ok(());
        }
        for up in &mut self.upstreams {
            match table.find(up.addr) {
                Some(broker) => up.broker = broker,
                // Its client connects again, and finds the others.
                None if !matches!(up.state, State::Closed) => return Err(End::BrokerLost(up.addr)),
                None => up.broker = Broker::MAX,
            }
        }
        if self.upstreams[usize::from(self.home)].broker == Broker::MAX {
            return Err(End::BrokerLost(self.upstreams[usize::from(self.home)].addr));
        }
        let before = std::mem::replace(&mut self.table, table);
        let table = Arc::clone(&self.table);
        let brokers: Vec<Broker> = self.subscriptions.brokers(|f| table.brokers_for(f)).collect();
        for broker in brokers {
            let slot = self.open_or_retry(broker, now);
            let up = &mut self.upstreams[usize::from(slot)];
            up.subscribed = true;
            if up.is_ready() {
                let old = before.find(up.addr);
                self.subscribe_again(slot, |_, filter| {
                    old.is_none_or(|old| !before.brokers_for(filter).contains(&old))
                });
            }
        }
        Ok(())
    }

    /// A client that has used one group only goes there straight the next time. When to look again.
    fn let_go(&mut self, now: Instant) -> Result<Option<Instant>, End> {
        let Some(after) = self.worker.limits.return_after else { return Ok(None) };
        if self.leaving {
            let patience = self.last_in + Duration::from_secs(10);
            return if now < patience { Ok(Some(patience)) } else { Err(End::LetGo) };
        }
        let one_group = self.published.as_ref().is_some_and(|(_, count)| *count > 0);
        let candidate = one_group
            && self.greeted
            && self.subscriptions.is_empty()
            && !self.hello.persistent
            && self.deliveries.is_empty();
        if !candidate {
            return Ok(None);
        }
        if now < self.since + after {
            return Ok(Some(self.since + after));
        }
        let idle = self.inflight.is_empty()
            && self.passing.is_none()
            && self.rest.is_empty()
            && self.getting.is_none()
            && self.upstreams.iter().all(Upstream::is_quiet);
        let id = &self.hello.client_id;
        let key = if id.is_empty() { self.addrs.0.ip().to_string() } else { id.clone() };
        if !idle || !self.worker.may_return(&key, now) {
            return Ok(Some(now + Duration::from_secs(1)));
        }
        if self.hello.v5 {
            const SERVER_MOVED: u8 = 0x9d;
            self.out.push(&[kind::DISCONNECT << 4, 2, SERVER_MOVED, 0]);
        }
        self.leaving = true;
        self.last_in = now;
        self.stats().returned.add(1);
        Ok(Some(now + Duration::from_millis(1)))
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

fn too_large(what: &'static str) -> End {
    End::Protocol(Malformed { code: 0x95, what })
}

/// PUBREL or PUBCOMP for an identifier that nobody knows (MQTT 5: reason code 0x92).
fn acknowledgement(first: u8, id: u16, v5: bool) -> Vec<u8> {
    let [high, low] = id.to_be_bytes();
    if v5 { vec![first, 3, high, low, 0x92] } else { vec![first, 2, high, low] }
}

/// Where a PUBLISH of QoS 1 or 2 has its identifier, if that is there.
fn identifier_at(bytes: &[u8], h: Header) -> Option<usize> {
    let length = bytes.get(h.length..h.length + 2)?;
    let at = h.length + 2 + usize::from(u16::from_be_bytes([length[0], length[1]]));
    (bytes.len() >= at + 2).then_some(at)
}
