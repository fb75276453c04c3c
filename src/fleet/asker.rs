//! The thread that asks broker hosts for connections, and carries their answers out.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::{debug, warn};

use super::asking::{Asking, Decided, Found, Key, Next};
use super::key;
use super::store::{Store, StoreError};
use crate::datapath::Datapath;
use crate::datapath::misses::{self, Adopter, Answer, Places, Report, Segment};
use crate::domain::waiting::Waiting;
use crate::handover::keys::{KeyFile, now};
use crate::handover::silent::{self, Binder};
use crate::kernel::ask::{self, Question};
use crate::kernel::decap::AskKeys;
use crate::kernel::{BpfError, boot_time, xdp};
use crate::reader::Reader;
use crate::state::{Fleet, State};

/// From one time that reals, groups and keys are looked at to the next; each host is asked as often, if for nothing.
const LOOK: Duration = Duration::from_secs(1);
/// For a service that is not known yet.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// While nothing is held, and while something is: then what nobody answers has to be given up in time.
const IDLE_MS: u16 = 500;
const BUSY_MS: u16 = 20;
/// Datagrams that are read at a time.
const ANSWERS_MAX: usize = 4096;
/// While something is to be asked for once more.
const AGAIN_MS: u16 = 2;
/// How long an entry that came from the store too late is kept for its client's next try.
const LATE: Duration = Duration::from_secs(10);
/// After this process or another member was away, no connection is ended as unknown for this long: what they keep is
/// still on its way to the store.
const SETTLING: Duration = Duration::from_secs(3);
/// And none is taken for silent, within what its CONNECT is in the store: its client may have spoken to who was away, and
/// TCP repeats that after a while.
const LISTENING: Duration = Duration::from_secs(10);
const SILENT_AT_LAST_S: u64 = 20;
/// This process is away if it does not get to work for that long.
const AWAY: Duration = Duration::from_secs(1);
/// Bytes: so that a burst of answers is not lost.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Why nothing is asked for.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("a UDP socket for questions: {0}")]
    Socket(io::Error),
    #[error("starting a thread: {0}")]
    Thread(io::Error),
}

/// Asks until it is dropped.
#[derive(Debug)]
pub struct Asker(Reader);

impl Asker {
    /// Starts it.
    pub fn start(state: &State) -> Result<Self, AskError> {
        let mut worker = Worker::new(state.clone())?;
        let reader = Reader::start("fleet", move |ended| {
            if let Err(error) = worker.run(&ended) {
                warn!(%error, "connections of other balancers are not asked for");
                worker.fleet().note_idle(Some(error.to_string()));
            }
        });
        reader.map(Self).map_err(AskError::Thread)
    }

    /// Whether it asks no more, though it was not told so.
    pub fn has_ended(&self) -> bool {
        self.0.has_ended()
    }
}

struct Worker {
    state: State,
    datapath: Datapath,
    adopter: Adopter,
    binder: Binder,
    asking: Asking,
    store: Option<Store>,
    /// What was taken from the store for a segment that was given up meanwhile: its client repeats it, here or at another
    /// balancer, so it is in the store again, too.
    late: HashMap<Key, (Waiting, Instant)>,
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
    /// Who does not answer.
    deaf: BTreeSet<IpAddr>,
    /// Since it was away.
    here: Instant,
}

impl Worker {
    fn new(state: State) -> Result<Self, AskError> {
        let config = state.config();
        let pins = config.pins();
        let fleet = config.fleet.as_ref();
        let store = fleet.and_then(|fleet| fleet.store.as_ref());
        let store = store.map(|store| Store::start(store, &state)).transpose()?;
        if store.is_none() {
            state.observed.fleet.note_store(None);
        }
        Ok(Self {
            datapath: Datapath::open(&pins)?,
            adopter: Adopter::open(&pins, xdp::interface_index(&config.interface)?)?,
            binder: Binder::open(&config)?,
            asking: Asking::default(),
            store,
            late: HashMap::new(),
            v4: socket(Ipv4Addr::UNSPECIFIED.into()).map_err(AskError::Socket)?,
            v6: socket(Ipv6Addr::UNSPECIFIED.into()).ok(),
            port: fleet.map_or(0, |fleet| fleet.ask_port),
            keys: AskKeys::default(),
            epoch: 0,
            services: BTreeMap::new(),
            gone: BTreeSet::new(),
            looked: None,
            deaf: BTreeSet::new(),
            here: Instant::now(),
            state,
        })
    }

    fn run(&mut self, ended: &UnixStream) -> Result<(), AskError> {
        let read = RefCell::new(VecDeque::new());
        let pins = self.state.config().pins();
        let ring =
            misses::ring(&pins, "fleet_reports", |report| read.borrow_mut().push_back(report))?;
        // SAFETY: libbpf's descriptor lives as long as `ring`.
        let ring_fd = unsafe { BorrowedFd::borrow_raw(ring.epoll_fd()) };
        let mut last = Instant::now();
        loop {
            if self.looked.is_none_or(|last| last.elapsed() >= LOOK) {
                self.look();
                last = Instant::now();
            }
            if self.wait(ring_fd, ended) {
                // What is still in the ring, the next process reads.
                if let Some(store) = self.store.take() {
                    store.finish();
                }
                return Ok(());
            }
            let now = Instant::now();
            if now.duration_since(last) > AWAY {
                self.here = now;
            }
            last = now;
            let _ = ring.consume();
            let mut full = 0;
            for report in read.borrow_mut().drain(..) {
                match report {
                    Report::Missed(segment) => full += u64::from(!self.asking.hold(segment, now)),
                    Report::Kept(key, kept) => self.keep(key, &kept),
                    Report::Given(key) => self.forget(key),
                    // Of another ring (`handover::hellos`).
                    Report::Hello(_) => {}
                }
            }
            self.fleet().not_held.add(full);
            for (service, keys) in self.asking.take_new() {
                self.fleet().asked.add(keys.len() as u64);
                for keys in keys.chunks(ask::CONNECTIONS_MAX) {
                    self.ask(service, keys);
                }
            }
            for (service, keys) in self.asking.take_due(Instant::now()) {
                for keys in keys.chunks(ask::CONNECTIONS_MAX) {
                    self.ask(service, keys);
                }
            }
            self.read_answers();
            self.read_taken();
            let expired = self.asking.expire(Instant::now());
            self.fleet().unanswered.add(expired as u64);
        }
    }

    fn fleet(&self) -> &Fleet {
        &self.state.observed.fleet
    }

    /// Waits for segments, answers, or until it is time to look again; whether it is to end.
    fn wait(&self, ring: BorrowedFd<'_>, ended: &UnixStream) -> bool {
        let timeout = if self.asking.asks_again() {
            AGAIN_MS
        } else if self.asking.is_idle() {
            IDLE_MS
        } else {
            BUSY_MS
        };
        let timeout = PollTimeout::from(timeout);
        let mut fds = vec![
            PollFd::new(ring, PollFlags::POLLIN),
            PollFd::new(ended.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.v4.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(self.v6.as_ref().map(|v6| PollFd::new(v6.as_fd(), PollFlags::POLLIN)));
        fds.extend(self.store.as_ref().map(|s| PollFd::new(s.wake.as_fd(), PollFlags::POLLIN)));
        let _ = poll(&mut fds, timeout);
        fds[1].any().unwrap_or(false)
    }

    /// Takes up the configuration in force, keys, and who is down; asks everybody for nothing, so that who does not
    /// answer is known before it matters.
    fn look(&mut self) {
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
        let asked = self.fleet().reals().into_iter();
        self.deaf = asked.filter_map(|(real, asked)| asked.deaf().map(|_| real)).collect();
        let numbers: Vec<u16> = self.services.keys().copied().collect();
        let mut greeted = BTreeSet::new();
        for number in numbers {
            let of_service = self.services[&number].reals.keys().copied();
            let reals: Vec<IpAddr> = of_service.filter(|real| greeted.insert(*real)).collect();
            self.ask_reals(number, &[], &reals);
        }
        self.late.retain(|_, (_, since)| since.elapsed() < LATE);
        self.look_for_silent();
        self.looked = Some(Instant::now());
    }

    /// Whether neither this process nor a member that is waited for has been away for so long.
    fn none_away_for(&self, time: Duration) -> bool {
        let others = self.fleet().none_away_for();
        self.here.elapsed() >= time && others.is_none_or(|others| others >= time)
    }

    /// Clients that said nothing after their CONNECT was answered here.
    fn look_for_silent(&mut self) {
        let silent_s =
            if self.none_away_for(LISTENING) { silent::SILENT_S } else { SILENT_AT_LAST_S };
        match self.datapath.silent_handovers(silent_s) {
            Ok(all) => {
                for silent in all {
                    let connect = Segment::of_silent(&silent, silent::connect_again(&silent));
                    self.asking.hold_silent(silent, connect, Instant::now());
                }
            }
            Err(error) => debug!(%error, "silent clients are not looked for"),
        }
    }

    fn keep(&mut self, (client, service): misses::Connection, kept: &misses::Kept) {
        // Its configuration is newer than the last look.
        let is_long_ago = self.looked.is_none_or(|last| last.elapsed() > LOOK_AGAIN);
        if !self.services.contains_key(&service) && is_long_ago {
            self.look();
        }
        if let (Some(store), Some(places)) = (&self.store, self.services.get(&service))
            && let Some(waiting) = places.waiting(kept)
        {
            store.keep(&places.name, client, &waiting);
        }
    }

    fn give_back(&self, key: &Key, waiting: &Waiting) {
        if let (Some(store), Some(places)) = (&self.store, self.services.get(&key.service)) {
            store.give_back(&places.name, key.client, waiting);
        }
    }

    fn forget(&self, (client, service): misses::Connection) {
        if let (Some(store), Some(places)) = (&self.store, self.services.get(&service)) {
            store.forget(&places.name, client);
        }
    }

    /// No broker host has it.
    fn ask_store(&mut self, key: Key) {
        let now = Instant::now();
        let late = self.late.get(&key).filter(|(waiting, _)| self.asking.is_of(&key, waiting));
        let decided = if let Some((waiting, _)) = late.cloned() {
            self.late.remove(&key);
            self.forget((key.client, key.service));
            self.asking.stored(key, Some(waiting), now)
        } else {
            let (store, places) = (self.store.as_ref(), self.services.get(&key.service));
            let asked = !self.asking.only_acknowledges(&key)
                && store.zip(places).is_some_and(|(store, places)| store.take(&places.name, key));
            if asked {
                self.asking.note_asked(&key, true);
                None
            } else {
                self.asking.without_store(key, now)
            }
        };
        if let Some(decided) = decided {
            self.carry_out(decided);
        }
    }

    fn read_taken(&mut self) {
        let taken = self.store.as_mut().map(Store::taken).unwrap_or_default();
        for (key, answer) in taken {
            let now = Instant::now();
            let decided = match answer {
                Ok(waiting) if !self.asking.holds(&key) => {
                    if let Some(waiting) = waiting {
                        self.give_back(&key, &waiting);
                        self.late.insert(key, (waiting, now));
                    }
                    None
                }
                // Of another connection on these addresses, or what comes before the segment was lost.
                Ok(Some(waiting)) if !self.asking.is_of(&key, &waiting) => {
                    self.give_back(&key, &waiting);
                    let is_behind = self.asking.is_behind(&key, &waiting);
                    if is_behind { None } else { self.asking.stored(key, None, now) }
                }
                Ok(waiting) => self.asking.stored(key, waiting, now),
                Err(()) => {
                    self.asking.note_asked(&key, false);
                    self.asking.without_store(key, now)
                }
            };
            if let Some(decided) = decided {
                self.carry_out(decided);
            }
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
        let question =
            Question { nonce, epoch: self.epoch, service: addr, connections: &connections };
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
            // Bounded: a stranger who floods the port must not keep the thread here.
            for _ in 0..ANSWERS_MAX {
                let socket = if v6 { self.v6.as_ref() } else { Some(&self.v4) };
                let Some(Ok((length, from))) = socket.map(|s| s.recv_from(&mut bytes)) else {
                    break;
                };
                let real = from.ip();
                let Some((nonce, had)) = ask::read_answer(&self.keys, &bytes[..length]) else {
                    continue;
                };
                self.fleet().note_answer(real);
                let (services, gone, deaf) = (&self.services, &self.gone, &self.deaf);
                let is_deaf = |real: IpAddr| self.store.is_some() && deaf.contains(&real);
                let is_gone = |service: u16, real: IpAddr| {
                    let name = services.get(&service).map(|places| places.name.clone());
                    name.is_some_and(|name| gone.contains(&(name, real)))
                };
                let next =
                    self.asking.answered(nonce, real, &had, &is_gone, &is_deaf, Instant::now());
                for next in next {
                    match next {
                        Next::Decided(decided) => self.carry_out(*decided),
                        Next::AskStore(key) => self.ask_store(key),
                        Next::Nowhere(key) => {
                            if let Some(decided) = self.asking.without_store(key, Instant::now()) {
                                self.carry_out(decided);
                            }
                        }
                    }
                }
            }
        }
    }

    /// Whether a broker host of a service, which is not known to be down, does not answer.
    fn is_one_deaf(&self, places: &Places) -> bool {
        let is_gone = |real: &IpAddr| self.gone.contains(&(places.name.clone(), *real));
        places.reals.keys().any(|real| self.deaf.contains(real) && !is_gone(real))
    }

    fn carry_out(&self, decided: Decided) {
        let fleet = self.fleet();
        let Decided { service, segments, silent, found, time } = decided;
        let Some(places) = self.services.get(&service) else { return };
        debug!(client = %segments[0].client, ?found, ?time, "asked for");
        let answer = match (found, silent) {
            (Found::At(real), _) => {
                // It is configured no more: TCP repeats the segment.
                let Some(binding) = places.reals.get(&real) else { return };
                fleet.found.add(1);
                Answer::Real(*binding)
            }
            // Who does not answer may have it.
            (Found::Gone | Found::Nowhere, Some(_)) if self.is_one_deaf(places) => return,
            (Found::Gone, Some(_)) => Answer::Elsewhere,
            // Nobody else has gone on with it.
            (Found::Kept(_) | Found::Nowhere, Some(silent)) => {
                if let Err(error) = self.binder.bind(&self.datapath, &silent) {
                    fleet.failed.add(1);
                    debug!(client = %silent.client, %error, "a silent client was not bound");
                }
                return;
            }
            (Found::Kept(waiting), None) => {
                let Some(kept) = places.kept(&waiting) else { return };
                fleet.stored.add(1);
                Answer::Waiting(Box::new(kept))
            }
            (Found::Gone | Found::Nowhere, None) if !self.none_away_for(SETTLING) => {
                fleet.unanswered.add(1);
                return;
            }
            (Found::Gone | Found::Nowhere, None) => {
                fleet.nowhere.add(1);
                Answer::Nobody
            }
        };
        for segment in &segments {
            if let Err(error) = self.adopter.carry_out(segment, &answer) {
                fleet.failed.add(1);
                debug!(client = %segment.client, %error, "an answer could not be carried out");
            }
        }
        fleet.note_time(boot_time().saturating_sub(segments[0].when));
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
