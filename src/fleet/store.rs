//! The store: what no broker has yet lies there for some seconds, so that any balancer can go on with it. It may be
//! lost at any time: established connections do not need it.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{AsyncConnectionConfig, Client, Cmd, Pipeline, RedisError, TlsCertificates, Value};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use super::asking::Key;
use crate::domain::fleet::Store as Config;
use crate::domain::waiting::Waiting;
use crate::state::State;

/// Seconds that a connection without a broker is kept: longer than its client may be silent (`asker::SILENT_AT_LAST_S`).
pub(super) const KEPT_S: u32 = 30;
/// Wishes that wait for the store; beyond that, they are given up.
const WAITING_MAX: usize = 65_536;
/// For so long, while the store is not there: then a client that says nothing is bound without it.
const WORTH: Duration = Duration::from_secs(20);
/// Of those, in one pipeline.
const PIPELINE_MAX: usize = 512;
/// A store that takes longer is taken for lost.
const PATIENCE: Duration = Duration::from_millis(500);
/// From one try to read what the fleet has learned to the next.
const JOIN_PAUSE: Duration = Duration::from_millis(50);
/// From one look at the members to the next.
pub(super) const BEAT: Duration = Duration::from_secs(1);
/// From one try to reach a store that is lost to the next: until then, connections that move before their first message
/// are reset.
const TRY_AGAIN: Duration = Duration::from_millis(200);

/// Why there is no store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("store {address}: {source}")]
    Client { address: String, source: RedisError },
    #[error("{path}: {source}")]
    Ca { path: String, source: io::Error },
    #[error("a pair of sockets: {0}")]
    Wake(io::Error),
}

/// What is wanted of it.
#[derive(Debug)]
enum Wish {
    Keep {
        key: String,
        value: String,
    },
    /// If there is none under this key.
    GiveBack {
        key: String,
        value: String,
        since: Instant,
    },
    Forget {
        key: String,
    },
    Take {
        of: Key,
        key: String,
    },
}

/// What is to be kept once the store is there again: of each client's address the last.
#[derive(Debug, Default)]
struct PutOff(HashMap<String, (Instant, String)>);

impl PutOff {
    fn add(&mut self, key: String, value: String, since: Instant) {
        if self.0.len() < WAITING_MAX || self.0.contains_key(&key) {
            self.0.insert(key, (since, value));
        }
    }

    fn forget(&mut self, key: &str) {
        self.0.remove(key);
    }

    /// What is still worth it. It must not displace what another balancer has kept since.
    fn take(&mut self) -> impl Iterator<Item = Wish> {
        let all = std::mem::take(&mut self.0).into_iter();
        let worth = all.filter(|(_, (since, _))| since.elapsed() < WORTH);
        worth.map(|(key, (since, value))| Wish::GiveBack { key, value, since })
    }
}

/// What came of taking a connection; `Err`: the store did not say.
type Taken = (Key, Result<Option<Waiting>, ()>);

/// What the asking thread has of it.
#[derive(Debug)]
pub struct Store {
    wishes: mpsc::Sender<Wish>,
    taken: Receiver<Taken>,
    /// Readable when something was taken.
    pub wake: UnixStream,
    task: tokio::task::JoinHandle<()>,
    runtime: Handle,
    state: State,
}

impl Drop for Store {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn key_of(service: &str, client: SocketAddr) -> String {
    format!("mqtt-fwd:waiting:{service}:{client}")
}

impl Store {
    /// Connects to it, now or when it is there.
    pub fn start(config: &Config, state: &State) -> Result<Self, StoreError> {
        let client = client(config)?;
        let (near, far) = UnixStream::pair().map_err(StoreError::Wake)?;
        for end in [&near, &far] {
            end.set_nonblocking(true).map_err(StoreError::Wake)?;
        }
        let (wishes, receiver) = mpsc::channel(WAITING_MAX);
        let (sender, taken) = channel();
        let task = Task {
            client,
            address: config.address(),
            state: state.clone(),
            taken: sender,
            wake: far,
        };
        let task = tokio::spawn(task.run(receiver));
        let runtime = Handle::current();
        Ok(Self { wishes, taken, wake: near, task, runtime, state: state.clone() })
    }

    /// Wishes for nothing more, and waits until all is carried out, within reason. Not for use in a task.
    pub fn finish(mut self) {
        self.wishes = mpsc::channel(1).0;
        let task = tokio::time::timeout(PATIENCE, &mut self.task);
        let _ = self.runtime.block_on(task);
    }

    /// Keeps a connection that no broker has yet.
    pub fn keep(&self, service: &str, client: SocketAddr, waiting: &Waiting) {
        if let Ok(value) = serde_json::to_string(waiting) {
            let _ = self.wishes.try_send(Wish::Keep { key: key_of(service, client), value });
        }
    }

    /// Keeps what was taken and is of another connection, or of a segment that was lost.
    pub fn give_back(&self, service: &str, client: SocketAddr, waiting: &Waiting) {
        if let Ok(value) = serde_json::to_string(waiting) {
            let (key, since) = (key_of(service, client), Instant::now());
            let _ = self.wishes.try_send(Wish::GiveBack { key, value, since });
        }
    }

    /// A broker is given it now.
    pub fn forget(&self, service: &str, client: SocketAddr) {
        let _ = self.wishes.try_send(Wish::Forget { key: key_of(service, client) });
    }

    /// Takes it, for this balancer alone to go on with; false: the store is not there to ask.
    pub fn take(&self, service: &str, of: Key) -> bool {
        self.state.observed.fleet.store_lost().is_none()
            && self.wishes.try_send(Wish::Take { of, key: key_of(service, of.client) }).is_ok()
    }

    /// What was taken meanwhile.
    pub fn taken(&mut self) -> Vec<Taken> {
        let mut bytes = [0; 256];
        while matches!(self.wake.read(&mut bytes), Ok(1..)) {}
        self.taken.try_iter().collect()
    }
}

fn client(config: &Config) -> Result<Client, StoreError> {
    let failed = |source| StoreError::Client { address: config.address(), source };
    let Some(ca) = &config.ca else { return Client::open(config.url.as_str()).map_err(failed) };
    let pem =
        fs::read(ca).map_err(|source| StoreError::Ca { path: ca.display().to_string(), source })?;
    let tls = TlsCertificates { client_tls: None, root_cert: Some(pem) };
    Client::build_with_tls(config.url.as_str(), tls).map_err(failed)
}

fn keep(key: &str, value: &str) -> Cmd {
    let mut cmd = Cmd::set(key, value);
    cmd.arg("EX").arg(KEPT_S);
    cmd
}

fn keep_if_none(key: &str, value: &str) -> Cmd {
    let mut cmd = keep(key, value);
    cmd.arg("NX");
    cmd
}

/// What a balancer leaves.
#[derive(Debug)]
pub enum Left {
    /// Kept here, and nobody else knows.
    Kept(Waiting),
    /// Kept here; others may have been told, and gone on with it.
    Known(Waiting),
    /// Given to a broker.
    Given,
}

/// Leaves all of it, in order, without the tasks of a balancer that runs.
pub async fn leave(config: &Config, all: &[(String, SocketAddr, Left)]) -> Result<(), StoreError> {
    let failed = |source| StoreError::Client { address: config.address(), source };
    let client = client(config)?;
    let timeouts = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(PATIENCE))
        .set_response_timeout(Some(PATIENCE));
    let mut connection =
        client.get_multiplexed_async_connection_with_config(&timeouts).await.map_err(failed)?;
    for some in all.chunks(PIPELINE_MAX) {
        let mut pipeline = Pipeline::with_capacity(some.len());
        for (service, client, left) in some {
            let key = key_of(service, *client);
            let value = |waiting| serde_json::to_string(waiting).unwrap_or_default();
            pipeline.add_command(match left {
                Left::Kept(waiting) => keep(&key, &value(waiting)),
                Left::Known(waiting) => keep_if_none(&key, &value(waiting)),
                Left::Given => Cmd::del(key),
            });
        }
        pipeline.exec_async(&mut connection).await.map_err(failed)?;
    }
    Ok(())
}

struct Task {
    client: Client,
    address: String,
    state: State,
    taken: Sender<Taken>,
    wake: UnixStream,
}

impl Task {
    async fn run(mut self, mut wishes: mpsc::Receiver<Wish>) {
        let config = ConnectionManagerConfig::new()
            .set_number_of_retries(1)
            .set_connection_timeout(Some(PATIENCE))
            .set_response_timeout(Some(PATIENCE));
        let mut connection =
            match ConnectionManager::new_lazy_with_config(self.client.clone(), config) {
                Ok(connection) => connection,
                Err(error) => {
                    warn!(store = self.address, %error, "the fleet's store is not used");
                    return;
                }
            };
        let mut members = super::members::Members::new(&self.state);
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // On its own: what it reads and writes may be much, and connections do not wait for it.
        let learned = tokio::spawn(learned(self.state.clone(), connection.clone()));
        let _end = AbortOnDrop(learned);
        let mut new = Vec::with_capacity(PIPELINE_MAX);
        let mut waiting = VecDeque::new();
        let mut put_off = PutOff::default();
        loop {
            tokio::select! {
                biased;
                // First, or a burst of connections would make this member seem gone.
                _ = beat.tick() => {
                    let result = tokio::time::timeout(PATIENCE * 2, members.beat(&mut connection)).await;
                    let result = result.unwrap_or_else(|_| Err(timed_out()));
                    if result.is_ok() {
                        waiting.extend(put_off.take());
                    } else {
                        beat.reset_after(TRY_AGAIN);
                    }
                    self.note(result);
                }
                () = std::future::ready(()), if !waiting.is_empty() => {
                    let result = self.carry_out(&mut connection, &mut waiting).await;
                    // A store that is back is noticed by the next wish, or the next beat.
                    if result.is_ok() {
                        waiting.extend(put_off.take());
                    } else {
                        self.put_off(&mut waiting, &mut put_off);
                    }
                    self.note(result);
                }
                count = wishes.recv_many(&mut new, PIPELINE_MAX) => {
                    if count == 0 {
                        return;
                    }
                    waiting.extend(new.drain(..));
                }
            }
        }
    }

    /// The store is not there: nothing is taken now, and what is to be kept waits for it.
    fn put_off(&mut self, waiting: &mut VecDeque<Wish>, put_off: &mut PutOff) {
        let mut answers = Vec::new();
        for wish in waiting.drain(..) {
            match wish {
                Wish::Keep { key, value } => put_off.add(key, value, Instant::now()),
                Wish::GiveBack { key, value, since } => put_off.add(key, value, since),
                Wish::Forget { key } => put_off.forget(&key),
                Wish::Take { of, .. } => answers.push((of, Err(()))),
            }
        }
        self.tell(answers);
    }

    fn tell(&mut self, answers: Vec<Taken>) {
        let mut some = false;
        for answer in answers {
            some |= self.taken.send(answer).is_ok();
        }
        if some {
            let _ = self.wake.write(&[1]);
        }
    }

    /// The next wishes, in one pipeline; if that fails, they are still there.
    async fn carry_out(
        &mut self,
        connection: &mut ConnectionManager,
        waiting: &mut VecDeque<Wish>,
    ) -> Result<(), RedisError> {
        let count = waiting.len().min(PIPELINE_MAX);
        let mut pipeline = Pipeline::with_capacity(count);
        for wish in waiting.range(..count) {
            pipeline.add_command(match wish {
                Wish::Keep { key, value } => keep(key, value),
                Wish::GiveBack { key, value, .. } => keep_if_none(key, value),
                Wish::Forget { key } => Cmd::del(key),
                Wish::Take { key, .. } => Cmd::get_del(key),
            });
        }
        let values =
            tokio::time::timeout(PATIENCE, pipeline.query_async::<Vec<Value>>(connection)).await;
        let values = values.unwrap_or_else(|_| Err(timed_out()))?;
        let mut answers = Vec::new();
        for (wish, value) in waiting.drain(..count).zip(values) {
            let Wish::Take { of, .. } = wish else { continue };
            let found = match value {
                Value::BulkString(bytes) => serde_json::from_slice(&bytes)
                    .inspect_err(|error| {
                        debug!(%error, "the store has something else under a connection's name");
                    })
                    .ok(),
                _ => None,
            };
            answers.push((of, Ok(found)));
        }
        self.tell(answers);
        Ok(())
    }

    fn note(&self, result: Result<(), RedisError>) {
        let fleet = &self.state.observed.fleet;
        let before = fleet.store_lost().is_some();
        match result {
            Ok(()) if before => {
                info!(store = self.address, "the fleet's store is there");
                fleet.note_store(None);
            }
            Ok(()) => {}
            Err(error) => {
                if !before {
                    warn!(store = self.address, %error, "the fleet's store is not there");
                }
                fleet.note_store(Some(format!("{}: {error}", self.address)));
            }
        }
    }
}

/// What the fleet learns of clients, as long as it is not ended.
async fn learned(state: State, mut connection: ConnectionManager) {
    let mut learned = super::learned::Learned::new(&state);
    loop {
        if let Err(error) = learned.exchange(&mut connection).await {
            debug!(%error, "learned clients are not exchanged");
        }
        // Who was restarted has forgotten all of them.
        tokio::time::sleep(if learned.has_joined() { BEAT } else { JOIN_PAUSE }).await;
    }
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn timed_out() -> RedisError {
    io::Error::from(io::ErrorKind::TimedOut).into()
}
