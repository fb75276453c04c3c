//! Rescue: what misrouted clients sent, as the datapath hands it over (`bpf/forward/end/rescue_stage.h`), is
//! published to the groups that it belongs to.
//!
//! ```text
//! ring buffer ─► reader (a thread) ─► streams, by connection ─► a task each: messages ─► brokers
//! ```
//!
//! What is held in memory is bounded. Beyond half of the bound, or of the number of streams, the datapath is told to
//! rescue nobody else; beyond all of it, streams of large messages are given up; and if brokers hang, the
//! ring buffer is not read: the datapath acknowledges no more then, and the clients wait.

mod broker;
mod stream;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::{self, JoinSet};
use tracing::{debug, warn};

use self::stream::{Destination, Stream};
use crate::brokers::router::Router;
use crate::config::Config;
use crate::counter::Counter;
use crate::datapath::Datapath;
use crate::datapath::names::boot_time;
use crate::datapath::rescues::{Piece, Rescues, StreamKey};
use crate::health_checks::Reals;
use crate::kernel::BpfError;
use crate::state::{Observed, State};

/// The datapath relies on the reader for so long after each sign of life.
const ALIVE: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(500);
/// Bytes in memory.
const HELD_MAX: u64 = 64 << 20;
/// Of that, the share of a stream: with more, it may be given up.
const SHARE: usize = 64 << 10;
/// What a piece takes beside its bytes, roughly.
const PIECE: u64 = 256;
/// Streams at a time.
const STREAMS_MAX: usize = 1024;
/// At the end of `run`.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Why nobody's messages are rescued.
#[derive(Debug, thiserror::Error)]
pub enum RescueError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error("starting a thread: {0}")]
    Thread(std::io::Error),
}

/// What all parts share.
#[derive(Debug)]
struct Shared {
    state: State,
    reals: Arc<Reals>,
    observed: Arc<Observed>,
    /// Bytes read and not yet done with.
    held: Counter,
    /// Streams.
    streams: AtomicUsize,
    stop: AtomicBool,
}

/// Reads and publishes until it is dropped.
#[derive(Debug)]
pub struct Rescuer {
    shared: Arc<Shared>,
    streams: tokio::task::JoinHandle<()>,
}

impl Rescuer {
    /// Starts it.
    pub fn start(state: &State) -> Result<Self, RescueError> {
        let pins = state.config().pins();
        let (of_reader, of_streams) = (Datapath::open(&pins)?, Datapath::open(&pins)?);
        let ring = Rescues::open(&pins)?;
        let shared = Arc::new(Shared {
            reals: Arc::clone(&state.reals),
            observed: Arc::clone(&state.observed),
            state: state.clone(),
            held: Counter::default(),
            streams: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let (sender, receiver) = unbounded_channel();
        let streams = tokio::spawn(dispatch(Arc::clone(&shared), of_streams, receiver));
        let of_thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("rescue".to_owned())
            .spawn(move || read(&ring, &of_reader, &of_thread, &sender))
            .map_err(RescueError::Thread)?;
        Ok(Self { shared, streams })
    }

    /// Whether it reads no more, though it was not told so.
    pub fn has_ended(&self) -> bool {
        self.streams.is_finished()
    }

    /// Takes nothing more, and waits a little for what is being published.
    pub async fn finish(mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let _ = tokio::time::timeout(LAST_WORDS + POLL, &mut self.streams).await;
    }
}

impl Drop for Rescuer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.streams.abort();
    }
}

/// The reader. Ends when told to, and says so to the datapath before.
fn read(ring: &Rescues, datapath: &Datapath, shared: &Shared, sender: &UnboundedSender<Piece>) {
    // 0 is of flows that no sidecar takes (`datapath::flows`).
    let instance = getrandom::u32().unwrap_or_default().max(1);
    let alive_until = |time: Duration| {
        let full = shared.held.get() > HELD_MAX / 2
            || shared.streams.load(Ordering::Relaxed) > STREAMS_MAX / 2;
        if let Err(error) = datapath.put_rescuer(time, instance, full) {
            debug!(%error, "writing the rescue heartbeat failed");
        }
    };
    let is_overfull = || shared.held.get() > 2 * HELD_MAX;
    let take = |piece: Option<Piece>| {
        if let Some(piece) = piece {
            shared.held.add(held(&piece));
            let _ = sender.send(piece);
        } else {
            shared.observed.rescue_lost.add(1);
        }
        !is_overfull()
    };
    let go_on = || loop {
        if shared.stop.load(Ordering::Relaxed) {
            alive_until(Duration::ZERO);
            return None;
        }
        alive_until(boot_time() + ALIVE);
        if !is_overfull() {
            return Some(POLL);
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    if let Err(error) = ring.read(take, go_on) {
        warn!(%error, "misrouted messages are not rescued");
        alive_until(Duration::ZERO);
    }
}

/// What a piece takes.
fn held(piece: &Piece) -> u64 {
    piece.bytes.len() as u64 + PIECE
}

/// Gives each piece to its stream, which the first piece begins.
async fn dispatch(shared: Arc<Shared>, datapath: Datapath, mut pieces: UnboundedReceiver<Piece>) {
    let mut streams: HashMap<StreamKey, UnboundedSender<Piece>> = HashMap::new();
    let mut tasks: JoinSet<()> = JoinSet::new();
    let mut keys: HashMap<task::Id, StreamKey> = HashMap::new();
    let mut routes = Routes::default();
    loop {
        let piece = tokio::select! {
            piece = pieces.recv() => piece,
            Some(ended) = tasks.join_next_with_id() => {
                let id = ended.map_or_else(|failed| failed.id(), |(id, ())| id);
                if let Some(key) = keys.remove(&id) {
                    streams.remove(&key);
                }
                shared.streams.store(streams.len(), Ordering::Relaxed);
                continue;
            }
        };
        let Some(piece) = piece else { break };
        let key = piece.key;
        let size = held(&piece);
        let mut unsent = Some(piece);
        if let Some(stream) = streams.get(&key) {
            unsent = stream.send(unsent.take().expect("just made")).err().map(|e| e.0);
        }
        let Some(piece) = unsent else { continue };
        // Compiling many routes takes a while.
        let destination =
            task::block_in_place(|| routes.destination(&shared, &datapath, key.service));
        let begins = piece.seq == key.start && streams.len() < STREAMS_MAX;
        let Some(destination) = destination.filter(|_| begins) else {
            shared.held.sub(size);
            shared.observed.rescue_lost.add(1);
            continue;
        };
        let (sender, receiver) = unbounded_channel();
        let stream = Stream::new(Arc::clone(&shared), destination, key, piece.v5);
        let _ = sender.send(piece);
        streams.insert(key, sender);
        shared.streams.store(streams.len(), Ordering::Relaxed);
        keys.insert(tasks.spawn(stream.run(receiver)).id(), key);
    }
    drop(streams);
    while tasks.join_next().await.is_some() {}
}

/// Where services' messages go, as the configuration in force says.
#[derive(Default)]
struct Routes {
    config: Option<Arc<Config>>,
    destinations: HashMap<u16, Destination>,
}

impl Routes {
    fn destination(
        &mut self,
        shared: &Shared,
        datapath: &Datapath,
        service: u16,
    ) -> Option<Destination> {
        let config = shared.state.config();
        if self.config.as_ref().is_none_or(|known| !Arc::ptr_eq(known, &config)) {
            self.destinations.clear();
            self.config = Some(Arc::clone(&config));
        }
        if let Some(known) = self.destinations.get(&service) {
            return Some(known.clone());
        }
        let numbers = datapath.service_numbers().ok()?;
        let addr = numbers.into_iter().find_map(|(addr, id)| (id == service).then_some(addr))?;
        let of_config = config.services.iter().find(|s| SocketAddr::new(s.addr, s.port) == addr)?;
        let router = Router::new(&config, of_config)
            .inspect_err(|error| warn!(%error, "messages are not rescued"))
            .ok()?;
        let destination =
            Destination { name: of_config.name.clone(), addr, router: Arc::new(router) };
        self.destinations.insert(service, destination.clone());
        Some(destination)
    }
}
