//! Connections whose ClientHello has its server name in a later segment (`bpf/forward/handshake/late_name.h`): the
//! datapath leaves their segments to this thread, which reads them, says where the connection belongs, and lets them
//! go on. It alone changes such connections' entries in `handovers`.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use libbpf_rs::Program;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::{debug, warn};

use super::hello::{self, Asked, Stream};
use super::segment::Made;
use crate::config::{Config, Service};
use crate::datapath::Datapath;
use crate::datapath::clients::GroupNumbers;
use crate::datapath::handovers::Hello;
use crate::datapath::misses::{self, Report, Segment};
use crate::domain::Protocol;
use crate::kernel::{BpfError, test_run, xdp};
use crate::reader::Reader;
use crate::state::State;

/// For the segment behind the first: it mostly comes at the same moment.
const PAUSE: Duration = Duration::from_millis(5);
/// For the whole of a connection that is not at its broker yet.
const KEPT: Duration = Duration::from_secs(30);
/// How often configuration and numbers of services are looked up.
const LOOK: Duration = Duration::from_secs(1);
/// Connections, and bytes of their ClientHellos, that are kept at a time.
const CONNECTIONS_MAX: usize = 16_384;
const BYTES_MAX: usize = 64 << 20;

/// Why it does not work.
#[derive(Debug, thiserror::Error)]
pub enum HellosError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error("starting a thread: {0}")]
    Thread(std::io::Error),
}

/// Whether a configuration needs it.
pub fn are_wanted(config: &Config) -> bool {
    config.services.iter().any(|s| s.protocol == Protocol::Tls && s.binding.is_delayed())
}

/// Reads them until it is dropped.
#[derive(Debug)]
pub struct Hellos(Reader);

impl Hellos {
    /// Starts it.
    pub fn start(state: &State) -> Result<Self, HellosError> {
        let mut worker = Worker::new(state.clone())?;
        let reader = Reader::start("hellos", move |ended| {
            if let Err(error) = worker.run(&ended) {
                warn!(%error, "ClientHellos in several segments are not read");
                worker.state.observed.note_hellos(Some(error.to_string()));
            }
        });
        reader.map(Self).map_err(HellosError::Thread)
    }

    /// Whether it reads no more, though it was not told so.
    pub fn has_ended(&self) -> bool {
        self.0.has_ended()
    }
}

/// A client's address, and its service's number.
type Key = (SocketAddr, u16);

/// A connection.
struct Held {
    hello: Hello,
    stream: Stream,
    /// The segments as they came, by their offset.
    frames: Vec<(usize, Vec<u8>)>,
    /// The client's last (RFC 7323 §3).
    timestamps: Option<(u32, u32)>,
    since: Instant,
    /// When what is there is to be acknowledged, if nothing more comes.
    due: Option<Instant>,
}

struct Worker {
    state: State,
    datapath: Datapath,
    program: OwnedFd,
    interface: i32,
    held: HashMap<Key, Held>,
    bytes: usize,
    looked: Option<Instant>,
    services: HashMap<u16, (Service, usize)>,
    groups: GroupNumbers,
}

impl Worker {
    fn new(state: State) -> Result<Self, HellosError> {
        let config = state.config();
        let path = config.pins().program("mqtt_fwd");
        let program = Program::fd_from_pinned_path(&path);
        let program =
            program.map_err(|source| BpfError::Pin { path, action: "opening", source })?;
        Ok(Self {
            datapath: Datapath::open(&config.pins())?,
            program,
            interface: xdp::interface_index(&config.interface)?,
            held: HashMap::new(),
            bytes: 0,
            looked: None,
            services: HashMap::new(),
            groups: GroupNumbers::default(),
            state,
        })
    }

    fn run(&mut self, ended: &UnixStream) -> Result<(), HellosError> {
        let read = RefCell::new(VecDeque::new());
        let pins = self.state.config().pins();
        let ring = misses::ring(&pins, "hellos", |report| read.borrow_mut().push_back(report))?;
        // SAFETY: libbpf's descriptor lives as long as `ring`.
        let ring_fd = unsafe { BorrowedFd::borrow_raw(ring.epoll_fd()) };
        loop {
            if self.looked.is_none_or(|last| last.elapsed() >= LOOK) {
                self.look();
            }
            if self.wait(ring_fd, ended) {
                return Ok(());
            }
            let _ = ring.consume();
            let mut touched = Vec::new();
            for report in read.borrow_mut().drain(..) {
                if let Report::Hello(segment) = report {
                    touched.extend(self.take(&segment)?);
                }
            }
            touched.dedup();
            // A service that has just been added.
            if touched.iter().any(|(_, number)| !self.services.contains_key(number)) {
                self.look();
            }
            for key in touched {
                self.decide(key)?;
            }
            self.acknowledge_due()?;
        }
    }

    /// Waits for segments, or until something is due; whether it is to end.
    fn wait(&self, ring: BorrowedFd<'_>, ended: &UnixStream) -> bool {
        let due = self.held.values().filter_map(|held| held.due).min();
        let timeout = due.map_or(LOOK, |due| due.saturating_duration_since(Instant::now()));
        // Rounded up: it need not be due a moment too early.
        let timeout = u16::try_from(timeout.as_millis() + 1).unwrap_or(u16::MAX);
        let mut fds =
            [PollFd::new(ring, PollFlags::POLLIN), PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::from(timeout));
        fds[1].any().unwrap_or(false)
    }

    fn look(&mut self) {
        self.looked = Some(Instant::now());
        let config = self.state.config();
        let (numbers, sizes) = (self.datapath.service_numbers(), self.datapath.max_packets());
        if let (Ok(numbers), Ok(sizes)) = (numbers, sizes) {
            let all = config.services.iter().filter_map(|service| {
                let addr = SocketAddr::new(service.addr, service.port);
                let number = numbers.get(&addr)?;
                Some((*number, (service.clone(), usize::from(*sizes.get(&addr)?))))
            });
            self.services = all.collect();
        }
        self.held.retain(|_, held| held.since.elapsed() < KEPT);
        self.bytes = self.held.values().map(|held| held.stream.size()).sum();
    }

    /// Takes a segment. Returns its connection, if it is still to be decided.
    fn take(&mut self, segment: &Segment) -> Result<Option<Key>, HellosError> {
        let key = (segment.client, segment.service);
        let Some(hello) = self.datapath.hello(segment.client, segment.service)? else {
            return Ok(None);
        };
        let is_same =
            |held: &Held| (held.hello.start, held.hello.server) == (hello.start, hello.server);
        if !self.held.get(&key).is_some_and(is_same) {
            // What was acknowledged before is lost, with whoever had it.
            let fits = self.held.len() < CONNECTIONS_MAX && self.bytes < BYTES_MAX;
            if hello.acknowledged > 0 || !fits {
                return Ok(None);
            }
            let held = Held {
                hello,
                stream: Stream::default(),
                frames: Vec::new(),
                timestamps: None,
                since: Instant::now(),
                due: None,
            };
            self.held.insert(key, held);
        }
        let Some(held) = self.held.get_mut(&key) else { return Ok(None) };
        held.hello = hello;
        let offset = segment.seq.wrapping_sub(hello.start) as usize;
        let (payload, timestamps) = segment.payload();
        held.timestamps = timestamps;
        let before = held.stream.size();
        held.stream.put(offset, payload);
        self.bytes += held.stream.size() - before;
        if hello.is_bound {
            self.repeat(key);
            return Ok(None);
        }
        if !held.frames.iter().any(|(at, _)| *at == offset) {
            held.frames.push((offset, segment.frame().to_vec()));
        }
        Ok(Some(key))
    }

    /// Reads what is there.
    fn decide(&mut self, key: Key) -> Result<(), HellosError> {
        let Some(held) = self.held.get_mut(&key) else { return Ok(()) };
        let bytes = held.stream.bytes();
        let (name, protocols) = match hello::read(&bytes) {
            Asked::More if bytes.len() < hello::LENGTH_MAX => {
                let is_more = bytes.len() > held.hello.acknowledged as usize;
                held.due = is_more.then(|| Instant::now() + PAUSE);
                return Ok(());
            }
            Asked::For { name, protocols } => (name.unwrap_or_default(), protocols),
            Asked::More | Asked::Nothing => (String::new(), Vec::new()),
        };
        held.due = None;
        let Some((service, _)) = self.services.get(&key.1) else { return Ok(()) };
        let protocols: Vec<&str> = protocols.iter().map(String::as_str).collect();
        let route = service.group_of_hello(&name, &protocols);
        if !self.datapath.decide_hello(&held.hello, route, &mut self.groups)? {
            return Ok(());
        }
        debug!(client = %key.0, name, group = route.map(|r| &*r.group), "ClientHello in segments");
        if held.hello.acknowledged == 0 {
            held.frames.sort_by_key(|(offset, _)| *offset);
            let frames = std::mem::take(&mut held.frames);
            self.held.remove(&key);
            for (_, frame) in frames {
                self.inject(&frame);
            }
        } else {
            held.frames.clear();
            self.repeat(key);
        }
        Ok(())
    }

    /// Acknowledges what came, where nothing followed: the client may wait for that.
    fn acknowledge_due(&mut self) -> Result<(), HellosError> {
        let now = Instant::now();
        let due = |held: &Held| held.due.is_some_and(|due| due <= now);
        let keys: Vec<Key> =
            self.held.iter().filter(|(_, held)| due(held)).map(|(key, _)| *key).collect();
        for key in keys {
            let Some(held) = self.held.get_mut(&key) else { continue };
            held.due = None;
            let length = held.stream.bytes().len();
            let Some((_, first)) = held.frames.iter().find(|(offset, _)| *offset == 0) else {
                continue;
            };
            let first = first.clone();
            if self.datapath.acknowledge_hello(&held.hello, length as u16)? {
                // It is old now, and answered as such.
                self.inject(&first);
            }
        }
        Ok(())
    }

    /// Sends what is acknowledged to its broker, with what followed behind it.
    fn repeat(&self, (client, number): Key) {
        let (Some(held), Some((service, max_packet))) =
            (self.held.get(&(client, number)), self.services.get(&number))
        else {
            return;
        };
        let headers = if client.is_ipv4() { 20 } else { 40 } + 20 + 12;
        let bytes = held.stream.bytes();
        let kept = held.hello.acknowledged as usize;
        for (at, payload) in hello::cut(&bytes, max_packet.saturating_sub(headers), kept) {
            let segment = Made {
                client,
                service: SocketAddr::new(service.addr, service.port),
                seq: held.hello.start.wrapping_add(at as u32),
                ack: held.hello.server,
                timestamps: held.timestamps,
                payload,
            };
            self.inject(&segment.frame());
        }
    }

    fn inject(&self, frame: &[u8]) {
        if let Err(error) = test_run::inject(self.program.as_fd(), self.interface, frame) {
            debug!(%error, "a segment of a ClientHello did not go on; its client repeats it");
        }
    }
}
