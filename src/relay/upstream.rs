//! A session's connection to one broker.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::stream::Pending;
use crate::brokers::connection::{BrokerInfo, BrokerStream};
use crate::brokers::router::Broker;
use crate::mqtt::connect::{Connack, Kind};

/// From TCP's SYN to CONNACK.
pub const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause before a failed connection is retried.
pub const RETRY: Duration = Duration::from_secs(1);

type Connecting = Pin<Box<dyn Future<Output = io::Result<BrokerStream>> + Send>>;

/// State of a broker connection.
pub enum State {
    /// The handshakes of TCP and TLS.
    Connecting(Connecting),
    /// CONNECT was sent.
    Opening(BrokerStream),
    /// CONNACK was received.
    Ready(BrokerStream),
    /// Failed; retried at that time.
    Waiting(Instant),
    /// Not in use.
    Closed,
}

/// A broker's deliveries to the client, as far as they are in progress.
#[derive(Debug, Default)]
pub struct Delivery {
    /// Bytes still to be forwarded of the one in progress.
    pub forwarding: usize,
    /// Those held back by the client's receive maximum.
    pub deferred: Vec<u8>,
    /// Bytes still to be received of the last of them.
    pub deferring: usize,
}

impl Delivery {
    fn is_empty(&self) -> bool {
        self.forwarding == 0 && self.deferred.is_empty()
    }
}

/// Keepalive towards a broker (MQTT 3.1.1 §3.1.2.10).
#[derive(Debug)]
pub struct Keepalive {
    /// 0: none.
    pub seconds: u16,
    /// When something was last written.
    pub last_out: Instant,
    /// When the unanswered PINGREQ was sent.
    pub pinged: Option<Instant>,
}

impl Keepalive {
    /// When PINGREQ is due, or PINGRESP overdue.
    fn deadline(&self) -> Instant {
        match self.pinged {
            Some(at) => at + Duration::from_secs(u64::from(self.seconds / 2).max(5)),
            None => self.last_out + Duration::from_millis(u64::from(self.seconds) * 750),
        }
    }
}

/// A connection to a broker.
#[allow(clippy::struct_excessive_bools)] // they are independent of each other
pub struct Upstream {
    /// Which.
    pub broker: Broker,
    /// Where it listens.
    pub addr: SocketAddr,
    info: Arc<BrokerInfo>,
    /// The PROXY protocol header that it wants.
    header: Option<Vec<u8>>,
    /// Its state.
    pub state: State,
    /// Which CONNECT it gets.
    pub kind: Kind,
    /// CONNECTs to be sent on further connections after this one, to discard a session.
    pub then: VecDeque<Kind>,
    /// Its CONNACK.
    pub connack: Option<Connack>,
    /// Bytes to be written.
    pub out: Pending,
    /// Bytes received that are no complete packet yet.
    pub rest: Vec<u8>,
    /// Its deliveries to the client.
    pub delivery: Delivery,
    /// The client's messages at QoS 1 and 2 in flight.
    pub inflight: u16,
    /// Topic aliases set on this connection.
    pub aliases: HashMap<u16, Rc<str>>,
    /// Its keepalive.
    pub keepalive: Keepalive,
    /// When the client last used it.
    pub last_used: Instant,
    /// When the connection attempt began.
    pub since: Instant,
    /// It has subscriptions of the client, or is to get them.
    pub subscribed: bool,
    /// It refused CONNECT.
    pub refused: bool,
    /// It closed behind CONNECT, and is not asked again until then.
    pub turned_away: Option<Instant>,
    /// A write failed.
    pub broken: bool,
    /// `rest` may hold a complete packet.
    pub has_unparsed: bool,
}

impl Upstream {
    /// Begins to connect.
    pub fn new(
        broker: Broker,
        info: Arc<BrokerInfo>,
        header: Option<Vec<u8>>,
        kind: Kind,
        keepalive: u16,
        now: Instant,
    ) -> Self {
        Self {
            broker,
            addr: info.addr,
            state: State::Connecting(Box::pin(info.open(header.clone()))),
            info,
            header,
            kind,
            then: VecDeque::new(),
            connack: None,
            out: Pending::default(),
            rest: Vec::new(),
            delivery: Delivery::default(),
            inflight: 0,
            aliases: HashMap::new(),
            keepalive: Keepalive { seconds: keepalive, last_out: now, pinged: None },
            last_used: now,
            since: now,
            subscribed: false,
            refused: false,
            turned_away: None,
            broken: false,
            has_unparsed: false,
        }
    }

    /// Replaces the connection by a new one.
    pub fn reconnect(&mut self, kind: Kind, now: Instant) {
        let (then, subscribed) = (std::mem::take(&mut self.then), self.subscribed);
        let (info, header) = (Arc::clone(&self.info), self.header.take());
        *self = Self::new(self.broker, info, header, kind, self.keepalive.seconds, now);
        (self.then, self.subscribed) = (then, subscribed);
    }

    /// Drops the connection.
    pub fn close(&mut self, state: State) {
        self.state = state;
        self.out = Pending::default();
        self.rest = Vec::new();
        self.delivery = Delivery::default();
        self.inflight = 0;
        self.aliases = HashMap::new();
        self.connack = None;
        self.keepalive.pinged = None;
        self.subscribed = false;
        (self.broken, self.has_unparsed) = (false, false);
    }

    /// Whether CONNACK was received.
    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready(_))
    }

    /// Whether the broker has CONNECT, and has not answered.
    pub fn is_asked(&self) -> bool {
        matches!(self.state, State::Opening(_))
    }

    /// Whether the connection is being opened.
    pub fn is_opening(&self) -> bool {
        matches!(self.state, State::Connecting(_) | State::Opening(_))
    }

    /// Whether nothing would be lost with it.
    pub fn is_quiet(&self) -> bool {
        self.inflight == 0 && self.out.is_empty() && self.delivery.is_empty()
    }

    /// Bytes that are kept for it.
    pub fn memory(&self) -> usize {
        let aliases = self.aliases.len() * 32;
        self.out.len() + self.rest.len() + self.delivery.deferred.len() + aliases
    }

    /// Its next timeout.
    pub fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Connecting(_) | State::Opening(_) => Some(self.since + OPEN_TIMEOUT),
            State::Waiting(until) => Some(until),
            State::Closed => None,
            State::Ready(_) if self.keepalive.seconds == 0 => None,
            State::Ready(_) => Some(self.keepalive.deadline()),
        }
    }
}
