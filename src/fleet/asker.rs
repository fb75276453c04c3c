//! The thread that asks broker hosts for connections, and carries their answers out.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::{debug, warn};

use super::asking::{Asking, Decided, Found, Key, Next};
use super::key;
use crate::datapath::Datapath;
use crate::datapath::misses::{self, Adopter, Answer, Places};
use crate::handover::keys::{KeyFile, now};
use crate::kernel::ask::{self, Question};
use crate::kernel::decap::AskKeys;
use crate::kernel::{BpfError, boot_time, xdp};
use crate::state::{Fleet, State};

/// From one time that reals, groups and keys are looked at to the next; each host is asked as often, if for nothing.
const LOOK: Duration = Duration::from_secs(1);
/// While nothing is held, and while something is: then what nobody answers has to be given up in time.
const IDLE_MS: u16 = 500;
const BUSY_MS: u16 = 20;
/// Bytes: so that a burst of answers is not lost.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Why nothing is asked for.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error("a UDP socket for questions: {0}")]
    Socket(io::Error),
    #[error("starting a thread: {0}")]
    Thread(io::Error),
}

/// Asks until it is dropped.
#[derive(Debug)]
pub struct Asker {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl Asker {
    /// Starts it.
    pub fn start(state: &State) -> Result<Self, AskError> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut worker = Worker::new(state.clone(), Arc::clone(&stop))?;
        let thread = std::thread::Builder::new()
            .name("fleet".to_owned())
            .spawn(move || {
                if let Err(error) = worker.run() {
                    warn!(%error, "connections of other balancers are not asked for");
                }
            })
            .map_err(AskError::Thread)?;
        Ok(Self { stop, thread })
    }

    /// Whether it asks no more, though it was not told so.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct Worker {
    state: State,
    stop: Arc<AtomicBool>,
    datapath: Datapath,
    adopter: Adopter,
    asking: Asking,
    v4: UdpSocket,
    /// `None`: this host has no IPv6.
    v6: Option<UdpSocket>,
    port: u16,
    keys: AskKeys,
    epoch: u32,
    /// By their numbers.
    services: BTreeMap<u16, Places>,
    /// Reals of services that are down, and whose connections are reset for that.
    gone: BTreeSet<(String, IpAddr)>,
    looked: Option<Instant>,
}

impl Worker {
    fn new(state: State, stop: Arc<AtomicBool>) -> Result<Self, AskError> {
        let config = state.config();
        let pins = config.pins();
        let port = config.fleet.as_ref().map_or(0, |fleet| fleet.ask_port);
        Ok(Self {
            datapath: Datapath::open(&pins)?,
            adopter: Adopter::open(&pins, xdp::interface_index(&config.interface)?)?,
            asking: Asking::default(),
            v4: socket(Ipv4Addr::UNSPECIFIED.into()).map_err(AskError::Socket)?,
            v6: socket(Ipv6Addr::UNSPECIFIED.into()).ok(),
            port,
            keys: AskKeys::default(),
            epoch: 0,
            services: BTreeMap::new(),
            gone: BTreeSet::new(),
            looked: None,
            state,
            stop,
        })
    }

    fn run(&mut self) -> Result<(), AskError> {
        let read = RefCell::new(VecDeque::new());
        let pins = self.state.config().pins();
        let ring = misses::ring(&pins, |segment| read.borrow_mut().push_back(segment))?;
        // SAFETY: libbpf's descriptor lives as long as `ring`.
        let ring_fd = unsafe { BorrowedFd::borrow_raw(ring.epoll_fd()) };
        while !self.stop.load(Ordering::Relaxed) {
            if self.looked.is_none_or(|last| last.elapsed() >= LOOK) {
                self.look();
            }
            self.wait(ring_fd);
            let _ = ring.consume();
            let mut full = 0;
            let now = Instant::now();
            for segment in read.borrow_mut().drain(..) {
                full += u64::from(!self.asking.hold(segment, now));
            }
            self.fleet().not_held.add(full);
            for (service, keys) in self.asking.take_new() {
                self.fleet().asked.add(keys.len() as u64);
                for keys in keys.chunks(ask::CONNECTIONS_MAX) {
                    self.ask(service, keys);
                }
            }
            self.read_answers();
            let expired = self.asking.expire(Instant::now());
            self.fleet().unanswered.add(expired as u64);
        }
        Ok(())
    }

    fn fleet(&self) -> &Fleet {
        &self.state.observed.fleet
    }

    /// Waits for segments, answers, or until it is time to look again.
    fn wait(&self, ring: BorrowedFd<'_>) {
        let timeout = PollTimeout::from(if self.asking.is_idle() { IDLE_MS } else { BUSY_MS });
        let mut fds = vec![
            PollFd::new(ring, PollFlags::POLLIN),
            PollFd::new(self.v4.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(self.v6.as_ref().map(|v6| PollFd::new(v6.as_fd(), PollFlags::POLLIN)));
        let _ = poll(&mut fds, timeout);
    }

    /// Takes up the configuration in force, keys, and who is down; asks everybody for nothing, so that who does not
    /// answer is known before it matters.
    fn look(&mut self) {
        self.looked = Some(Instant::now());
        let config = self.state.config();
        match KeyFile::read(&config.handover_key) {
            Ok(file) => {
                let keys = file.cookie_keys(now());
                (self.keys, self.epoch) = (key::ask_keys(&keys), keys.epoch);
            }
            Err(error) => debug!(%error, "the fleet's questions go on with the key from before"),
        }
        match self.datapath.places(&config) {
            Ok(places) => self.services = places,
            Err(error) => debug!(%error, "the fleet's questions go on with the reals from before"),
        }
        self.gone = self.state.reals.to_reset(&config);
        let mut reals: Vec<IpAddr> =
            self.services.values().flat_map(|service| service.reals.keys().copied()).collect();
        reals.sort_unstable();
        reals.dedup();
        self.fleet().asks(&reals);
        let numbers: Vec<u16> = self.services.keys().copied().collect();
        let mut greeted = BTreeSet::new();
        for number in numbers {
            let of_service = self.services[&number].reals.keys().copied();
            let reals: Vec<IpAddr> = of_service.filter(|real| greeted.insert(*real)).collect();
            self.ask_reals(number, &[], &reals);
        }
    }

    fn ask(&mut self, service: u16, keys: &[Key]) {
        let Some(places) = self.services.get(&service) else { return };
        let reals: Vec<IpAddr> = places.reals.keys().copied().collect();
        self.ask_reals(service, keys, &reals);
    }

    fn ask_reals(&mut self, service: u16, keys: &[Key], reals: &[IpAddr]) {
        let Some(addr) = self.services.get(&service).map(|places| places.addr) else { return };
        let Ok(nonce) = getrandom::u64() else { return };
        let connections = self.asking.begin(nonce, keys, reals, Instant::now());
        let question = Question { nonce, epoch: self.epoch, service: addr, connections: &connections };
        let bytes = question.encode(&self.keys);
        for real in reals {
            let socket = if real.is_ipv4() { Some(&self.v4) } else { self.v6.as_ref() };
            self.fleet().note_question(*real);
            if let Some(Err(error)) = socket.map(|s| s.send_to(&bytes, (*real, self.port))) {
                debug!(%real, %error, "not asked");
            }
        }
    }

    fn read_answers(&mut self) {
        let mut bytes = [0; ask::LENGTH_MAX + 1];
        for v6 in [false, true] {
            loop {
                let socket = if v6 { self.v6.as_ref() } else { Some(&self.v4) };
                let Some(Ok((length, from))) = socket.map(|s| s.recv_from(&mut bytes)) else { break };
                let real = from.ip();
                let Some((nonce, had)) = ask::read_answer(&self.keys, &bytes[..length]) else {
                    continue;
                };
                self.fleet().note_answer(real);
                let (services, gone) = (&self.services, &self.gone);
                let is_gone = |service: u16, real: IpAddr| {
                    let name = services.get(&service).map(|places| places.name.clone());
                    name.is_some_and(|name| gone.contains(&(name, real)))
                };
                let next = self.asking.answered(nonce, real, &had, &is_gone, Instant::now());
                for next in next {
                    match next {
                        Next::Decided(decided) => self.carry_out(&decided),
                        Next::AskStore(key) => {
                            if let Some(decided) = self.asking.stored(key, None, Instant::now()) {
                                self.carry_out(&decided);
                            }
                        }
                    }
                }
            }
        }
    }

    fn carry_out(&self, decided: &Decided) {
        let fleet = self.fleet();
        let answer = match &decided.found {
            Found::At(real) => {
                let binding =
                    self.services.get(&decided.service).and_then(|s| s.reals.get(real)).copied();
                // It is configured no more: TCP repeats the segment.
                let Some(binding) = binding else { return };
                fleet.found.add(1);
                Answer::Real(binding)
            }
            Found::Kept(kept) => {
                fleet.stored.add(1);
                Answer::Waiting(*kept)
            }
            Found::Nowhere => {
                fleet.nowhere.add(1);
                Answer::Nobody
            }
        };
        for segment in &decided.segments {
            if let Err(error) = self.adopter.carry_out(segment, &answer) {
                fleet.failed.add(1);
                debug!(client = %segment.client, %error, "an answer could not be carried out");
            }
        }
        fleet.note_time(boot_time().saturating_sub(decided.segments[0].when));
        debug!(client = %decided.segments[0].client, found = ?decided.found, time = ?decided.time, "asked for");
    }
}

/// A socket whose reads and writes do not wait. Answers have a MAC, and no UDP checksum (RFC 6936).
fn socket(addr: IpAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((addr, 0))?;
    socket.set_nonblocking(true)?;
    let sock = socket2::SockRef::from(&socket);
    sock.set_recv_buffer_size(RECEIVE_BUFFER)?;
    if addr.is_ipv6() {
        let on: libc::c_int = 1;
        // SAFETY: the value lives through the call, and has the size given.
        let failed = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_UDP,
                UDP_NO_CHECK6_RX,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        if failed != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(socket)
}

/// <linux/udp.h>
const UDP_NO_CHECK6_RX: libc::c_int = 102;
