//! What is learned of clients, by the store: each balancer says what it learned, the newest wins, and who joins reads
//! all. Predictions are no more than that: if this is late or lost, a client is learned again.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use redis::aio::ConnectionManager;
use redis::streams::{StreamReadOptions, StreamReadReply};
use redis::{AsyncCommands as _, Cmd, Pipeline, RedisError};
use serde::{Deserialize, Serialize};
use tracing::{debug, info};

use crate::datapath::Datapath;
use crate::datapath::clients::{merge, snapshot};
use crate::domain::client_record::ClientRecord;
use crate::state::State;

/// From one time that is said what was learned to the next.
const PAUSE: Duration = Duration::from_secs(2);
/// Reading the maps takes no more than this part of the time.
const PART: u32 = 10;
/// Records a second that a balancer says, on average.
const RATE: usize = 10_000;
/// Records that are looked at each time: those learned last.
const LOOKED_AT: usize = 200_000;
/// How long a record is kept, seconds.
const KEPT_S: u32 = 7 * 86_400;
/// What was said last, for those who listen; and how much of that is read at once.
const STREAM: &str = "mqtt-fwd:learned";
const STREAM_LENGTH: usize = 100_000;
const READ: usize = 10_000;
/// In one pipeline, and keys of a scan.
const PIPELINE: usize = 1000;

fn key_of(record: &ClientRecord) -> String {
    format!("mqtt-fwd:client:{}:{}:{}", record.service, record.by.key(), record.client)
}

/// A record, and when it was learned, in seconds since 1970.
#[derive(Debug, Serialize, Deserialize)]
struct Said {
    learned: u64,
    by: String,
    record: ClientRecord,
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Said {
    fn record(self) -> ClientRecord {
        ClientRecord { age_s: now().saturating_sub(self.learned), ..self.record }
    }
}

/// What it says, its age apart.
fn content(record: &ClientRecord) -> u64 {
    let mut hasher = DefaultHasher::new();
    let groups: Vec<_> = record.groups.keys().collect();
    (&record.topic, groups, record.multi_group, record.for_relay, record.misjudged)
        .hash(&mut hasher);
    hasher.finish()
}

fn name(record: &ClientRecord) -> u64 {
    let mut hasher = DefaultHasher::new();
    key_of(record).hash(&mut hasher);
    hasher.finish()
}

/// What this balancer has said and heard.
pub struct Learned {
    state: State,
    /// Hashes of names, and of what was last said or heard.
    known: HashMap<u64, u64>,
    /// Where the stream was read up to; `None`: not at all, so all is read first.
    position: Option<String>,
    next: Instant,
}

impl Learned {
    pub fn new(state: &State) -> Self {
        Self { state: state.clone(), known: HashMap::new(), position: None, next: Instant::now() }
    }

    /// Says what is new, and hears what others say.
    pub async fn exchange(&mut self, connection: &mut ConnectionManager) -> Result<(), RedisError> {
        if self.position.is_none() {
            self.join(connection).await?;
        } else {
            self.hear(connection).await?;
        }
        if Instant::now() >= self.next {
            self.say(connection).await?;
        }
        Ok(())
    }

    /// Whether all there was has been read.
    pub fn has_joined(&self) -> bool {
        self.position.is_some()
    }

    /// Reads all there is, once services are in force: before, records have no group.
    async fn join(&mut self, connection: &mut ConnectionManager) -> Result<(), RedisError> {
        let config = self.state.config();
        let in_force = tokio::task::spawn_blocking(move || {
            let datapath = Datapath::open(&config.pins());
            datapath
                .and_then(|datapath| datapath.service_table())
                .is_ok_and(|table| table.count > 0)
        });
        if !in_force.await.unwrap_or(false) {
            return Ok(());
        }
        // From here on; what is said meanwhile is read twice.
        let last: Vec<(String, HashMap<String, String>)> = redis::cmd("XREVRANGE")
            .arg(STREAM)
            .arg("+")
            .arg("-")
            .arg("COUNT")
            .arg(1)
            .query_async(connection)
            .await?;
        let position = last.into_iter().next().map_or_else(|| "0-0".to_owned(), |(id, _)| id);
        let (mut cursor, mut records) = (0u64, Vec::new());
        loop {
            let (next, keys): (u64, Vec<String>) = redis::cmd("SCAN")
                .arg(cursor)
                .arg("MATCH")
                .arg("mqtt-fwd:client:*")
                .arg("COUNT")
                .arg(PIPELINE)
                .query_async(connection)
                .await?;
            if !keys.is_empty() {
                let texts: Vec<Option<String>> = Cmd::mget(keys).query_async(connection).await?;
                records.extend(texts.into_iter().flatten());
            }
            cursor = next;
            if cursor == 0 {
                break;
            }
        }
        let clients = records.len();
        self.take(records).await;
        if clients > 0 {
            info!(clients, "read what the fleet has learned of clients");
        }
        self.position = Some(position);
        Ok(())
    }

    /// Reads what was said since.
    async fn hear(&mut self, connection: &mut ConnectionManager) -> Result<(), RedisError> {
        let Some(position) = self.position.clone() else { return Ok(()) };
        let options = StreamReadOptions::default().count(READ);
        let reply: Option<StreamReadReply> =
            connection.xread_options(&[STREAM], &[position], &options).await?;
        let mut records = Vec::new();
        for entry in reply.into_iter().flat_map(|reply| reply.keys).flat_map(|key| key.ids) {
            records.extend(entry.get::<String>("r"));
            self.position = Some(entry.id);
        }
        self.take(records).await;
        Ok(())
    }

    async fn take(&mut self, texts: Vec<String>) {
        let own = self.state.config().fleet.as_ref().map(|fleet| fleet.name.clone());
        let said = texts.iter().filter_map(|text| serde_json::from_str::<Said>(text).ok());
        let others = said.filter(|said| Some(&said.by) != own.as_ref());
        let records: Vec<_> = others.map(Said::record).collect();
        if records.is_empty() {
            return;
        }
        self.known.extend(records.iter().map(|record| (name(record), content(record))));
        let config = self.state.config();
        let merged = tokio::task::spawn_blocking(move || {
            Datapath::open(&config.pins()).and_then(|datapath| merge(&config, &datapath, records))
        });
        match merged.await {
            Ok(Ok(restored)) => debug!(?restored, "clients that other balancers have learned"),
            Ok(Err(error)) => {
                debug!(%error, "clients that other balancers have learned are not taken");
            }
            Err(_) => {}
        }
    }

    /// Says what was learned and not said yet.
    async fn say(&mut self, connection: &mut ConnectionManager) -> Result<(), RedisError> {
        let begun = Instant::now();
        let config = self.state.config();
        let by = config.fleet.as_ref().map(|fleet| fleet.name.clone()).unwrap_or_default();
        let read = tokio::task::spawn_blocking(move || {
            Datapath::open(&config.pins())
                .and_then(|datapath| snapshot(&config, &datapath, LOOKED_AT))
        });
        let Ok(Ok(records)) = read.await else { return Ok(()) };
        let pause = PAUSE.max(begun.elapsed() * PART);
        let most = RATE * (pause.as_secs() as usize).max(1);
        let is_new =
            |record: &&ClientRecord| self.known.get(&name(record)) != Some(&content(record));
        let new: Vec<&ClientRecord> = records.iter().filter(is_new).take(most).collect();
        let mut said = Vec::new();
        for part in new.chunks(PIPELINE) {
            let mut pipeline = Pipeline::with_capacity(2 * part.len());
            for record in part {
                let learned = now().saturating_sub(record.age_s);
                let text = Said { learned, by: by.clone(), record: (*record).clone() };
                let text = serde_json::to_string(&text).unwrap_or_default();
                let mut set = Cmd::set(key_of(record), &text);
                set.arg("EX").arg(KEPT_S);
                pipeline.add_command(set).ignore();
                let mut add = redis::cmd("XADD");
                add.arg(STREAM)
                    .arg("MAXLEN")
                    .arg("~")
                    .arg(STREAM_LENGTH)
                    .arg("*")
                    .arg("r")
                    .arg(text);
                pipeline.add_command(add).ignore();
                said.push((name(record), content(record)));
            }
            pipeline.query_async::<()>(connection).await?;
        }
        self.known.extend(said);
        self.next = Instant::now() + pause;
        Ok(())
    }
}
