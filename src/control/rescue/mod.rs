//! Rescue: what misrouted clients sent, as the datapath hands it over (`bpf/forward/rescue.h`), is
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
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use libbpf_rs::{MapHandle, RingBufferBuilder};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::{self, JoinSet};
use tracing::{debug, warn};

use self::stream::{Destination, Stream};
use super::checks::Reals;
use super::observed::Observed;
use super::view::boot_time;
use super::{Error, Result};
use crate::config::Config;
use crate::counter::Counter;
use crate::datapath::Datapath;
use crate::kernel::BpfError;
use crate::kernel::abi::{Pod as _, rescue, rescue_flags, rescuer, words_addr};
use crate::relay::table::Table;

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
/// Age of a piece that no client waits for: of before a restart.
const STALE: Duration = Duration::from_secs(20);
/// At the end of `run`.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// A piece of a client's stream.
#[derive(Debug)]
struct Piece {
    key: Key,
    seq: u32,
    v5: bool,
    last: bool,
    bytes: Vec<u8>,
}

/// Names a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    client: SocketAddr,
    service: u16,
    start: u32,
}

/// What all parts share.
#[derive(Debug)]
struct Shared {
    config: Arc<Mutex<Arc<Config>>>,
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
    pub fn start(
        config: Arc<Mutex<Arc<Config>>>,
        reals: Arc<Reals>,
        observed: Arc<Observed>,
    ) -> Result<Self> {
        let pins = config.lock().unwrap_or_else(PoisonError::into_inner).pins();
        let datapath = Datapath::open(&pins)?;
        let path = pins.map("rescues");
        let ring = MapHandle::from_pinned_path(&path).map_err(|source| BpfError::Pin {
            path: path.clone(),
            action: "opening",
            source,
        })?;
        let shared = Arc::new(Shared {
            config,
            reals,
            observed,
            held: Counter::default(),
            streams: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let (sender, receiver) = unbounded_channel();
        let services = Datapath::open(&pins)?;
        let streams = tokio::spawn(dispatch(Arc::clone(&shared), services, receiver));
        let of_thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("rescue".to_owned())
            .spawn(move || read(&ring, &path, &datapath, &of_thread, &sender))
            .map_err(|source| Error::Io { what: "starting a thread".to_owned(), source })?;
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
fn read(
    ring: &MapHandle,
    path: &Path,
    datapath: &Datapath,
    shared: &Arc<Shared>,
    sender: &UnboundedSender<Piece>,
) {
    let mut builder = RingBufferBuilder::new();
    let to_stream = |bytes: &[u8]| {
        if let Some(piece) = piece(bytes) {
            shared.held.add(piece.held());
            let _ = sender.send(piece);
        } else {
            shared.observed.rescue_lost.add(1);
        }
        // A negative number ends the reading of what is there: libbpf goes on as long as something comes.
        if shared.held.get() > 2 * HELD_MAX { -libc::EAGAIN } else { 0 }
    };
    let added = builder.add(ring, to_stream).map(|_| ());
    let ring = match added.and_then(|()| builder.build()) {
        Ok(ring) => ring,
        Err(error) => return warn!(path = %path.display(), %error, "no rescue: reading"),
    };
    // 0: no sidecar's (release.rs).
    let instance = getrandom::u32().unwrap_or_default().max(1);
    let until = |time: Duration| {
        let full = shared.held.get() > HELD_MAX / 2
            || shared.streams.load(Ordering::Relaxed) > STREAMS_MAX / 2;
        let sign = rescuer { until: time.as_nanos() as u64, instance, full: full.into() };
        if let Err(error) = datapath.rescuer.put(&0, &sign) {
            debug!(%error, "sign of life for the datapath");
        }
    };
    while !shared.stop.load(Ordering::Relaxed) {
        until(boot_time() + ALIVE);
        if shared.held.get() > 2 * HELD_MAX {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        match ring.poll(POLL) {
            Err(error) if !is_pause(&error) => {
                warn!(%error, "no rescue: reading");
                break;
            }
            _ => {}
        }
    }
    until(Duration::ZERO);
    // What came until then is taken, too.
    let _ = ring.consume();
}

fn is_pause(error: &libbpf_rs::Error) -> bool {
    matches!(error.kind(), libbpf_rs::ErrorKind::Interrupted | libbpf_rs::ErrorKind::WouldBlock)
}

impl Piece {
    fn held(&self) -> u64 {
        self.bytes.len() as u64 + PIECE
    }
}

/// A record of the ring buffer; `None`: it is too old.
fn piece(record: &[u8]) -> Option<Piece> {
    let (head, bytes) = record.split_at_checked(size_of::<rescue>())?;
    let head = rescue::from_bytes(head);
    let bytes = bytes.get(..usize::from(head.length))?;
    if boot_time().saturating_sub(Duration::from_nanos(head.time_ns)) > STALE {
        return None;
    }
    let has = |flag: rescue_flags| u32::from(head.flags) & flag.0 != 0;
    let addr = words_addr(head.client, has(rescue_flags::RESCUE_V6));
    Some(Piece {
        key: Key {
            client: SocketAddr::new(addr, u16::from_be(head.client_port)),
            service: head.service,
            start: head.start,
        },
        seq: head.seq,
        v5: has(rescue_flags::RESCUE_MQTT5),
        last: has(rescue_flags::RESCUE_LAST),
        bytes: bytes.to_vec(),
    })
}

/// Gives each piece to its stream, which the first piece begins.
async fn dispatch(shared: Arc<Shared>, datapath: Datapath, mut pieces: UnboundedReceiver<Piece>) {
    let mut streams: HashMap<Key, UnboundedSender<Piece>> = HashMap::new();
    let mut tasks: JoinSet<()> = JoinSet::new();
    let mut keys: HashMap<task::Id, Key> = HashMap::new();
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
        let held = piece.held();
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
            shared.held.sub(held);
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
    tables: HashMap<u16, Destination>,
}

impl Routes {
    fn destination(
        &mut self,
        shared: &Shared,
        datapath: &Datapath,
        service: u16,
    ) -> Option<Destination> {
        let config = Arc::clone(&shared.config.lock().unwrap_or_else(PoisonError::into_inner));
        if self.config.as_ref().is_none_or(|known| !Arc::ptr_eq(known, &config)) {
            self.tables.clear();
            self.config = Some(Arc::clone(&config));
        }
        if let Some(known) = self.tables.get(&service) {
            return Some(known.clone());
        }
        let services = datapath.service_table().ok()?;
        let entry = services.service[..usize::from(services.count)]
            .iter()
            .find(|entry| entry.id == service)?;
        let addr = SocketAddr::new(words_addr(entry.addr, entry.v6 != 0), u16::from_be(entry.port));
        let of_config = config.services.iter().find(|s| SocketAddr::new(s.addr, s.port) == addr)?;
        let table = Table::new(&config, of_config)
            .inspect_err(|error| warn!(%error, "messages are not rescued"))
            .ok()?;
        let destination =
            Destination { name: of_config.name.clone(), addr, table: Arc::new(table) };
        self.tables.insert(service, destination.clone());
        Some(destination)
    }
}
