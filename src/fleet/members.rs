//! The fleet's members, as they say it themselves in the store, and in what their configurations differ.
//!
//! What must be equal is written as lines, by table; a member's entry has a hash of each table, and only if that
//! differs are the lines read.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use redis::aio::ConnectionManager;
use redis::{Cmd, Pipeline, RedisError};
use serde::{Deserialize, Serialize};
use siphasher::sip128::{Hasher128 as _, SipHasher24};

use crate::config::Config;
use crate::domain::Protocol;
use crate::handover::keys::{Key, KeyFile, now};
use crate::state::{Member, State};

/// What balancers of different builds have to understand of each other: questions, and what lies in the store.
const FLEET_VERSION: u32 = 1;

/// Seconds that a member is one after its last word, and that its tables stay.
const ALIVE_S: u32 = 5;
const TABLES_S: u32 = 60;
/// Milliseconds without a word after which a member is away.
const AWAY_MS: u64 = 1500;
/// One that is away for so long is not waited for any more.
const GONE: Duration = Duration::from_secs(10);
/// From one time that tables are written to the next, if nothing changes.
const WRITTEN: Duration = Duration::from_secs(20);

const MEMBERS: &str = "mqtt-fwd:members";

/// Lines of each table, in order.
type Tables = BTreeMap<String, BTreeSet<String>>;

/// What a member says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    fleet_version: u32,
    version: String,
    /// Hashes of its tables.
    tables: BTreeMap<String, String>,
    /// Fingerprints of its keys, and of the one in use.
    keys: Vec<String>,
    key_in_use: Option<String>,
}

fn entry_key(name: &str) -> String {
    format!("mqtt-fwd:member:{name}")
}

fn tables_key(name: &str) -> String {
    format!("mqtt-fwd:tables:{name}")
}

/// This member, and what it knows of the others.
pub struct Members {
    state: State,
    written: Option<(BTreeMap<String, String>, Instant)>,
    /// The configuration of which these are the tables.
    tables: Option<(std::sync::Arc<Config>, Tables)>,
    /// Others' tables, as they were read for these hashes.
    others: BTreeMap<String, (BTreeMap<String, String>, Tables)>,
    /// Who is away, or was until lately.
    away: BTreeMap<String, Away>,
}

/// A member that comes and goes is away all the time, so that it is not waited for again and again.
#[derive(Debug, Clone, Copy)]
struct Away {
    since: Instant,
    last: Instant,
}

impl Members {
    pub fn new(state: &State) -> Self {
        Self {
            state: state.clone(),
            written: None,
            tables: None,
            others: BTreeMap::new(),
            away: BTreeMap::new(),
        }
    }

    /// Says who this is, and looks who else is there.
    pub async fn beat(&mut self, connection: &mut ConnectionManager) -> Result<(), RedisError> {
        let config = self.state.config();
        let Some(fleet) = &config.fleet else { return Ok(()) };
        if self.tables.as_ref().is_none_or(|(of, _)| !std::sync::Arc::ptr_eq(of, &config)) {
            self.tables = Some((std::sync::Arc::clone(&config), tables_of(&config)));
        }
        let own = self.tables.as_ref().map(|(_, tables)| tables.clone()).unwrap_or_default();
        let entry = own_entry(&config, &own);
        let mut pipeline = Pipeline::new();
        let text = serde_json::to_string(&entry).unwrap_or_default();
        let mut set = Cmd::set(entry_key(&fleet.name), text);
        set.arg("EX").arg(ALIVE_S);
        pipeline.add_command(set).ignore();
        pipeline.add_command(Cmd::sadd(MEMBERS, &fleet.name)).ignore();
        let is_written = |(hashes, when): &(BTreeMap<String, String>, Instant)| {
            *hashes == entry.tables && when.elapsed() < WRITTEN
        };
        if !self.written.as_ref().is_some_and(is_written) {
            let text = serde_json::to_string(&own).unwrap_or_default();
            let mut set = Cmd::set(tables_key(&fleet.name), text);
            set.arg("EX").arg(TABLES_S);
            pipeline.add_command(set).ignore();
        }
        pipeline.add_command(Cmd::smembers(MEMBERS));
        let (names,): (Vec<String>,) = pipeline.query_async(connection).await?;
        if !self.written.as_ref().is_some_and(is_written) {
            self.written = Some((entry.tables.clone(), Instant::now()));
        }
        let others: Vec<String> = names.into_iter().filter(|name| *name != fleet.name).collect();
        let entries = self.entries(connection, &others).await?;
        self.others.retain(|name, _| entries.contains_key(name));
        let mut members = BTreeMap::new();
        for (name, other) in entries {
            let differences = self.differences(connection, &own, &entry, &name, &other).await?;
            let member = Member {
                version: other.version.clone(),
                differences,
                missing_key: missing_key(&entry, &other),
            };
            members.insert(name, member);
        }
        self.state.observed.fleet.note_members(members);
        Ok(())
    }

    /// Who is there. The names of those that have gone are forgotten, when their tables are.
    async fn entries(
        &mut self,
        connection: &mut ConnectionManager,
        names: &[String],
    ) -> Result<BTreeMap<String, Entry>, RedisError> {
        if names.is_empty() {
            return Ok(BTreeMap::new());
        }
        let mut pipeline = Pipeline::new();
        for name in names {
            pipeline.add_command(Cmd::get(entry_key(name)));
            pipeline.add_command(Cmd::pttl(entry_key(name)));
            pipeline.add_command(Cmd::exists(tables_key(name)));
        }
        let answers: Vec<(Option<String>, i64, bool)> = pipeline.query_async(connection).await?;
        let (now, mut entries, mut is_away) = (Instant::now(), BTreeMap::new(), false);
        for (name, (text, left_ms, has_tables)) in names.iter().zip(answers) {
            let entry = text.and_then(|text| serde_json::from_str(&text).ok());
            let silent_ms =
                (u64::from(ALIVE_S) * 1000).saturating_sub(left_ms.max(0).unsigned_abs());
            if entry.is_none() && !has_tables {
                Cmd::srem(MEMBERS, name).query_async::<()>(connection).await?;
            } else if entry.is_none() || silent_ms > AWAY_MS {
                let away = self.away.entry(name.clone()).or_insert(Away { since: now, last: now });
                away.last = now;
                is_away |= now.duration_since(away.since) < GONE;
            }
            entries.extend(entry.map(|entry| (name.clone(), entry)));
        }
        self.away.retain(|_, away| now.duration_since(away.last) < GONE);
        if is_away {
            self.state.observed.fleet.note_away();
        }
        Ok(entries)
    }

    /// In what another member differs, a line each.
    async fn differences(
        &mut self,
        connection: &mut ConnectionManager,
        own: &Tables,
        entry: &Entry,
        name: &str,
        other: &Entry,
    ) -> Result<Vec<String>, RedisError> {
        if other.fleet_version != entry.fleet_version {
            return Ok(vec![format!(
                "version {} of the fleet's protocol, here it is {}",
                other.fleet_version, entry.fleet_version
            )]);
        }
        if other.tables == entry.tables {
            return Ok(Vec::new());
        }
        if self.others.get(name).is_none_or(|(hashes, _)| *hashes != other.tables) {
            let text: Option<String> = Cmd::get(tables_key(name)).query_async(connection).await?;
            let Some(tables) = text.and_then(|text| serde_json::from_str(&text).ok()) else {
                return Ok(vec!["its tables are not in the store yet".to_owned()]);
            };
            self.others.insert(name.to_owned(), (other.tables.clone(), tables));
        }
        Ok(self.others.get(name).map(|(_, theirs)| compare(own, theirs)).unwrap_or_default())
    }
}

fn own_entry(config: &Config, tables: &Tables) -> Entry {
    let file = KeyFile::read(&config.handover_key).ok();
    let hash = |lines: &BTreeSet<String>| {
        let mut hasher = SipHasher24::new();
        for line in lines {
            std::hash::Hash::hash(line, &mut hasher);
        }
        format!("{:032x}", hasher.finish128().as_u128())
    };
    Entry {
        fleet_version: FLEET_VERSION,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        tables: tables.iter().map(|(name, lines)| (name.clone(), hash(lines))).collect(),
        keys: file.iter().flat_map(KeyFile::keys).map(Key::fingerprint).collect(),
        key_in_use: file.as_ref().map(|file| file.in_use(now()).fingerprint()),
    }
}

/// The key that another member uses and this one has not.
fn missing_key(own: &Entry, other: &Entry) -> Option<String> {
    other.key_in_use.clone().filter(|key| !own.keys.contains(key))
}

/// All that must be equal, as lines.
fn tables_of(config: &Config) -> Tables {
    let mut tables = Tables::new();
    let mut add = |table: &str, line: String| {
        tables.entry(table.to_owned()).or_default().insert(line);
    };
    if let Some(fleet) = &config.fleet {
        add("fleet", format!("ask_port {}", fleet.ask_port));
    }
    for service in &config.services {
        let of = &service.name;
        add("services", format!("{of}: {}:{}", service.addr, service.port));
        add("services", format!("{of}: binding {:?}", service.binding));
        if service.protocol == Protocol::Tls {
            let refuses = service.refuses_unknown;
            add("services", format!("{of}: protocol tls, refuses unknown names: {refuses}"));
        }
        add("services", format!("{of}: default_group {}", service.default_group));
        add("services", format!("{of}: on_misprediction {:?}", service.on_misprediction));
        add("services", format!("{of}: relay {}", service.relay.as_deref().unwrap_or("none")));
        if let Some(bytes) = service.max_packet {
            add("services", format!("{of}: max_packet {bytes}"));
        }
        for group in &service.groups {
            let of = format!("{of}, {}", group.name);
            add("groups", format!("{of}: vip {}, affinity {:?}", group.vip, group.affinity));
            for real in &group.reals {
                let vip = real.vip.map_or_else(|| "none".to_owned(), |vip| vip.to_string());
                add("reals", format!("{of}: {}, weight {}, vip {vip}", real.addr, real.weight));
            }
        }
        for route in service.routes.iter() {
            add("routes", format!("{of}: {} → {}", route.filter, route.target.name()));
        }
        for route in &service.client_routes {
            let (kind, pattern) = (route.kind.key(), route.pattern());
            add("routes", format!("{of}: {kind} {pattern} → {}", route.group));
        }
    }
    tables
}

/// Lines that are in one of the two only.
fn compare(own: &Tables, theirs: &Tables) -> Vec<String> {
    let empty = BTreeSet::new();
    let names: BTreeSet<&String> = own.keys().chain(theirs.keys()).collect();
    let mut lines = Vec::new();
    for name in names {
        let (here, there) = (own.get(name).unwrap_or(&empty), theirs.get(name).unwrap_or(&empty));
        lines.extend(there.difference(here).map(|line| format!("{name}: only there: {line}")));
        lines.extend(here.difference(there).map(|line| format!("{name}: only here: {line}")));
    }
    lines
}
