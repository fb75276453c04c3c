//! One connection of a client's to one broker.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use super::hello::{Kind, Welcome};
use super::stream::Pending;
use super::table::Broker;

/// For TCP to connect, and for the broker to answer CONNECT.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Before a broker that was not reached is tried again.
pub const RETRY: Duration = Duration::from_secs(1);

type Connecting = Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>;

/// How far a connection is.
pub enum State {
    /// TCP's handshake.
    Connecting(Connecting),
    /// CONNECT was sent.
    Opening(TcpStream),
    /// The broker has taken it.
    Ready(TcpStream),
    /// Not reached; to be tried again.
    Waiting(Instant),
    /// Not needed.
    Closed,
}

/// A connection to a broker.
#[allow(clippy::struct_excessive_bools)] // they are independent of each other
pub struct Upstream {
    /// Which.
    pub broker: Broker,
    /// Where it listens.
    pub addr: SocketAddr,
    /// How far it is.
    pub state: State,
    /// How CONNECT was sent, or will be.
    pub kind: Kind,
    /// To be connected again, so, when CONNECT is answered: a session that was there is replaced.
    pub then: VecDeque<Kind>,
    /// What CONNACK said.
    pub welcome: Option<Welcome>,
    /// What it has not taken yet.
    pub out: Pending,
    /// What was read of it and not understood yet.
    pub rest: Vec<u8>,
    /// Bytes of a message of its that are still to be passed on.
    pub passing: usize,
    /// Messages for which the client has no room (its receive maximum).
    pub parked: Vec<u8>,
    /// Bytes of the last of them that are still to come.
    pub parking: usize,
    /// The client's messages at QoS 1 and 2 that it has not acknowledged.
    pub inflight: u16,
    /// Topic aliases that it knows.
    pub aliases: HashMap<u16, Box<str>>,
    /// In seconds; 0: none.
    pub keepalive: u16,
    /// When something was sent last.
    pub last_out: Instant,
    /// When it was last used for the client.
    pub last_used: Instant,
    /// A PINGREQ that was not answered.
    pub pinged: Option<Instant>,
    /// When it began to connect.
    pub since: Instant,
    /// It has subscriptions of the client's.
    pub subscribed: bool,
    /// It did not take the client's CONNECT.
    pub refused: bool,
    /// Writing failed.
    pub broken: bool,
    /// The rest is to be looked at without waiting for more.
    pub held: bool,
}

impl Upstream {
    /// One that begins to connect.
    pub fn new(broker: Broker, addr: SocketAddr, kind: Kind, keepalive: u16, now: Instant) -> Self {
        Self {
            broker,
            addr,
            state: connect(addr),
            kind,
            then: VecDeque::new(),
            welcome: None,
            out: Pending::default(),
            rest: Vec::new(),
            passing: 0,
            parked: Vec::new(),
            parking: 0,
            inflight: 0,
            aliases: HashMap::new(),
            keepalive,
            last_out: now,
            last_used: now,
            pinged: None,
            since: now,
            subscribed: false,
            refused: false,
            broken: false,
            held: false,
        }
    }

    /// Connects anew, with nothing of the connection before.
    pub fn again(&mut self, kind: Kind, now: Instant) {
        let (then, subscribed) = (std::mem::take(&mut self.then), self.subscribed);
        *self = Self::new(self.broker, self.addr, kind, self.keepalive, now);
        (self.then, self.subscribed) = (then, subscribed);
    }

    /// Gives it up, until it is needed.
    pub fn close(&mut self, state: State) {
        self.state = state;
        self.out = Pending::default();
        self.rest = Vec::new();
        self.parked = Vec::new();
        (self.passing, self.parking, self.inflight) = (0, 0, 0);
        self.aliases = HashMap::new();
        self.welcome = None;
        self.pinged = None;
        self.subscribed = false;
        (self.broken, self.held) = (false, false);
    }

    /// Whether the broker has taken the connection.
    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready(_))
    }

    /// Whether it is being opened.
    pub fn is_opening(&self) -> bool {
        matches!(self.state, State::Connecting(_) | State::Opening(_))
    }

    /// Whether it holds nothing that would be lost with it.
    pub fn is_quiet(&self) -> bool {
        self.inflight == 0 && self.out.is_empty() && self.passing == 0 && self.parked.is_empty()
    }

    /// When something has to be done about it, if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Connecting(_) | State::Opening(_) => Some(self.since + OPEN_TIMEOUT),
            State::Waiting(until) => Some(until),
            State::Closed => None,
            State::Ready(_) if self.keepalive == 0 => None,
            State::Ready(_) => Some(match self.pinged {
                Some(at) => at + self.patience(),
                None => self.last_out + self.pause(),
            }),
        }
    }

    /// Without anything sent; then it is pinged.
    fn pause(&self) -> Duration {
        Duration::from_millis(u64::from(self.keepalive) * 750)
    }

    /// For its answer.
    fn patience(&self) -> Duration {
        Duration::from_secs(u64::from(self.keepalive / 2).max(5))
    }
}

/// TCP's handshake with a broker.
pub fn connect(addr: SocketAddr) -> State {
    State::Connecting(Box::pin(async move {
        let stream = TcpStream::connect(addr).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }))
}
