//! What is known of clients, outside the maps: a file that survives a reboot, and one that people write.
//!
//! A record says where a client's messages belong by the names of groups, and by its last topic. If routes were changed
//! since it was written, the topic decides.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use super::api::proto;
use super::view::{boot_time, topic_text};
use super::{Error, Result};
use crate::config::{Config, Service};
use crate::datapath::Datapath;
use crate::datapath::image::keys_of;
use crate::domain::Target;
use crate::domain::filter::most_specific;
use crate::kernel::abi::{
    Pod as _, addr_words, binding_of, binding_parts, client, client_flags, client_id, client4,
    client6, group, name_text, service_table, topic, topic_verdict, words_addr,
};
use crate::routes::hash::Keys;

/// Most records in the file that `run` writes: those learned last.
pub const SAVED_MAX: usize = 200_000;
/// Messages that a record weighs at most (`bpf/forward/learn.h`).
const WEIGHT_MAX: u8 = 64;
/// Version of the format.
const SCHEMA: u32 = 1;

/// What a client is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    Address,
    ClientId,
}

/// What is known of a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// The service's name.
    pub service: String,
    pub by: By,
    /// Address or client id.
    pub client: String,
    /// Of its last message; may be missing if there are groups.
    #[serde(default)]
    pub topic: String,
    /// The groups of its recent messages, and how many of these each had (1 to 64).
    #[serde(default)]
    pub groups: BTreeMap<String, u8>,
    /// Publishes to several groups in turn.
    #[serde(default)]
    pub multi_group: bool,
    /// Subscribes: with a relay, it belongs there.
    #[serde(default)]
    pub subscribes: bool,
    /// Its id alone is not enough to bind it.
    #[serde(default)]
    pub misjudged: bool,
    /// How often its group changed: beside a relay, one that changed is the relay's.
    #[serde(default)]
    pub group_changes: u8,
    /// Seconds since it was learned.
    #[serde(default)]
    pub age_s: u64,
}

impl From<Known> for proto::ClientRecord {
    fn from(known: Known) -> Self {
        let by = match known.by {
            By::Address => "address",
            By::ClientId => "client_id",
        };
        Self {
            service: known.service,
            by: by.to_owned(),
            client: known.client,
            topic: known.topic,
            groups: known.groups.into_iter().map(|(name, n)| (name, u32::from(n))).collect(),
            multi_group: known.multi_group,
            subscribes: known.subscribes,
            misjudged: known.misjudged,
            group_changes: u32::from(known.group_changes),
            age_s: known.age_s,
        }
    }
}

impl TryFrom<proto::ClientRecord> for Known {
    type Error = String;

    fn try_from(record: proto::ClientRecord) -> Result<Self, String> {
        let groups = record.groups.into_iter().map(|(name, n)| {
            let n = u8::try_from(n).map_err(|_| format!("{n} messages of group {name:?}"))?;
            Ok((name, n))
        });
        Ok(Self {
            by: match record.by.as_str() {
                "address" => By::Address,
                "client_id" => By::ClientId,
                other => return Err(format!("by {other:?} is neither address nor client_id")),
            },
            groups: groups.collect::<Result<_, String>>()?,
            service: record.service,
            client: record.client,
            topic: record.topic,
            multi_group: record.multi_group,
            subscribes: record.subscribes,
            misjudged: record.misjudged,
            group_changes: u8::try_from(record.group_changes).unwrap_or(u8::MAX),
            age_s: record.age_s,
        })
    }
}

/// The first line of a file; the last one is [`End`].
#[derive(Debug, Serialize, Deserialize)]
struct Begin {
    mqtt_fwd_clients: u32,
}

/// A file without it is cut short.
#[derive(Debug, Serialize, Deserialize)]
struct End {
    records: usize,
}

/// A format of files that people write and read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// service,by,client,topic: a client's group follows from the topic
    Csv,
    /// An object a line
    Json,
}

/// All clients, those learned last first, `most` at most. Client ids longer than what is kept of them are left out.
pub fn collect(config: &Config, datapath: &Datapath, most: usize) -> Result<Vec<Known>> {
    let table = datapath.service_table()?;
    let services: HashMap<u16, &Service> = table.service[..usize::from(table.count)]
        .iter()
        .filter_map(|s| {
            let addr = SocketAddr::new(words_addr(s.addr, s.v6 != 0), u16::from_be(s.port));
            let same = |c: &&Service| SocketAddr::new(c.addr, c.port) == addr;
            Some((s.id, config.services.iter().find(same)?))
        })
        .collect();
    let groups: BTreeMap<u16, group> = datapath.groups()?.into_iter().collect();
    let topics: HashMap<u64, topic> = datapath.topics.entries()?.into_iter().collect();
    let now = boot_time().as_secs();
    let mut all: Vec<(u16, By, String, client)> = Vec::new();
    for (key, c) in datapath.clients.entries()? {
        let addr = IpAddr::from(key.addr.to_ne_bytes());
        all.push((key.service, By::Address, addr.to_string(), c));
    }
    for (key, c) in datapath.clients6.entries()? {
        all.push((key.service, By::Address, words_addr(key.addr, true).to_string(), c));
    }
    for (_, id) in datapath.client_ids.entries()? {
        let text = id.text.get(..usize::from(id.length)).map(std::str::from_utf8);
        if let Some(Ok(text)) = text {
            all.push((id.service, By::ClientId, text.to_owned(), id.client));
        }
    }
    all.sort_by_key(|(.., c)| std::cmp::Reverse(c.learned_s));
    let record = |(service, by, client, c): (u16, By, String, client)| {
        let has = |flag: client_flags| u32::from(c.flags) & flag.0 != 0;
        let weights = c.group.iter().zip(c.weight).filter(|(binding, w)| **binding != 0 && *w > 0);
        let groups: BTreeMap<String, u8> = weights
            .filter_map(|(binding, weight)| {
                let (id, epoch) = binding_parts(*binding);
                let group = groups.get(&id).filter(|g| g.epoch == epoch)?;
                Some((name_text(&group.name), weight))
            })
            .collect();
        let topic = topics.get(&c.topic).filter(|t| usize::from(t.length) <= t.text.len());
        let known = Known {
            service: services.get(&service)?.name.clone(),
            by,
            client,
            topic: topic.map(|t| topic_text(&t.text, t.length)).unwrap_or_default(),
            groups,
            multi_group: has(client_flags::CLIENT_MULTI_GROUP),
            subscribes: has(client_flags::CLIENT_SUBSCRIBES),
            misjudged: has(client_flags::CLIENT_MISJUDGED),
            group_changes: c.group_changes,
            age_s: now.saturating_sub(u64::from(c.learned_s)),
        };
        (!known.groups.is_empty() || known.subscribes).then_some(known)
    };
    Ok(all.into_iter().filter_map(record).take(most).collect())
}

/// What became of records.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    pub added: usize,
    /// The datapath has learned of them itself.
    pub known_already: usize,
    /// Of a service or group that is no more.
    pub without_group: usize,
}

/// Puts records into the maps; what is there stays.
pub fn restore(config: &Config, datapath: &Datapath, records: Vec<Known>) -> Result<Restored> {
    let table = datapath.service_table()?;
    let keys = keys_of(&table);
    let groups: BTreeMap<u16, group> = datapath.groups()?.into_iter().collect();
    let mut restored = Restored::default();
    let (mut v4, mut v6, mut ids) = (Vec::new(), Vec::new(), Vec::new());
    let mut topics = HashMap::new();
    let mut seen = HashSet::new();
    let mut routed: HashMap<(String, String), Option<String>> = HashMap::new();
    let now = boot_time().as_secs();
    // Entries that are there already, by key: they know better.
    let known4: HashSet<_> = datapath.clients.keys()?.iter().map(|k| (k.service, k.addr)).collect();
    let known6: HashSet<_> =
        datapath.clients6.keys()?.iter().map(|k| (k.service, k.addr)).collect();
    let known_ids: HashSet<u64> = datapath.client_ids.keys()?.into_iter().collect();
    for record in records {
        let Some((service, id)) = service_of(config, &table, &record.service) else {
            restored.without_group += 1;
            continue;
        };
        let binding = |name: &str| {
            let is_it = |(number, g): &(&u16, &group)| {
                (g.service, g.parent) == (id, **number) && name_text(&g.name) == name
            };
            let (number, found) = groups.iter().find(is_it)?;
            Some(binding_of(*number, found.epoch))
        };
        let by_topic = (!record.topic.is_empty()).then(|| {
            let key = (record.service.clone(), record.topic.clone());
            routed.entry(key).or_insert_with(|| group_of(service, &record.topic)).clone()
        });
        let Some(mut c) = record_of(&record, by_topic.flatten().as_deref(), binding) else {
            restored.without_group += 1;
            continue;
        };
        c.learned_s = now.saturating_sub(record.age_s).max(1) as u32;
        c.generation = table.generation;
        if !record.topic.is_empty() && record.topic.len() <= topic_max() {
            c.topic = keys.topic(id, record.topic.as_bytes());
            let best = c.group[usize::from(c.best)];
            topics.insert(c.topic, topic_of(id, &record.topic, table.generation, best));
        }
        let new = match (record.by, record.client.parse::<IpAddr>()) {
            (By::Address, Ok(IpAddr::V4(addr))) => {
                let key = client4 { addr: addr_words(addr.into())[0], service: id, pad: 0 };
                let new = !known4.contains(&(id, key.addr));
                v4.extend(new.then_some((key, c)));
                new
            }
            (By::Address, Ok(IpAddr::V6(addr))) => {
                let key = client6 { addr: addr_words(addr.into()), service: id, pad: 0 };
                let new = !known6.contains(&(id, key.addr));
                v6.extend(new.then_some((key, c)));
                new
            }
            (By::Address, Err(_)) => {
                restored.without_group += 1;
                continue;
            }
            (By::ClientId, _) => {
                let hash = client_hash(&keys, id, record.client.as_bytes());
                let new = !known_ids.contains(&hash) && seen.insert(hash);
                if new && let Some(entry) = id_entry(id, &record.client, c) {
                    ids.push((hash, entry));
                }
                new
            }
        };
        *(if new { &mut restored.added } else { &mut restored.known_already }) += 1;
    }
    for (hash, entry) in topics {
        if datapath.topics.get(&hash)?.is_none() {
            datapath.topics.put(&hash, &entry)?;
        }
    }
    datapath.clients.put_all(&v4)?;
    datapath.clients6.put_all(&v6)?;
    datapath.client_ids.put_all(&ids)?;
    Ok(restored)
}

fn service_of<'a>(
    config: &'a Config,
    table: &service_table,
    name: &str,
) -> Option<(&'a Service, u16)> {
    let service = config.services.iter().find(|s| s.name == name)?;
    let entry = table.service[..usize::from(table.count)].iter().find(|s| {
        words_addr(s.addr, s.v6 != 0) == service.addr && u16::from_be(s.port) == service.port
    })?;
    Some((service, entry.id))
}

/// The group of a topic; `None`: an "any" route's.
fn group_of(service: &Service, topic: &str) -> Option<String> {
    let taken = most_specific(service.routes.iter().map(|route| &route.filter), topic);
    let route = taken.and_then(|filter| service.routes.iter().find(|r| r.filter == *filter));
    match route.map(|route| &route.target) {
        Some(Target::Group(name)) => Some(name.clone()),
        Some(Target::Any) => None,
        None => Some(service.default_group.clone()),
    }
}

/// The map's value, but for time and topic. What the topic says now goes before what was.
fn record_of(
    record: &Known,
    by_topic: Option<&str>,
    binding: impl Fn(&str) -> Option<u32>,
) -> Option<client> {
    let mut c = client::zeroed();
    let mut weights: Vec<(&str, u8)> = record
        .groups
        .iter()
        .map(|(name, weight)| (name.as_str(), (*weight).clamp(1, WEIGHT_MAX)))
        .collect();
    // The heaviest first.
    weights.sort_by_key(|(_, weight)| std::cmp::Reverse(*weight));
    if let Some(group) = by_topic
        && !weights.iter().any(|(name, _)| *name == group)
    {
        weights = vec![(group, weights.first().map_or(WEIGHT_MAX, |(_, weight)| *weight))];
    }
    let bindings: Vec<_> =
        weights.into_iter().filter_map(|(name, weight)| Some((binding(name)?, weight))).collect();
    for (i, (group, weight)) in bindings.iter().take(c.group.len()).enumerate() {
        (c.group[i], c.weight[i]) = (*group, *weight);
    }
    let flags = [
        (record.multi_group, client_flags::CLIENT_MULTI_GROUP),
        (record.subscribes, client_flags::CLIENT_SUBSCRIBES),
        (record.misjudged, client_flags::CLIENT_MISJUDGED),
    ];
    c.group_changes = record.group_changes;
    c.flags = flags.iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag.0 as u8);
    (!bindings.is_empty() || record.subscribes).then_some(c)
}

fn topic_max() -> usize {
    topic::zeroed().text.len()
}

fn topic_of(service: u16, text: &str, generation: u32, binding: u32) -> topic {
    let mut entry = topic::zeroed();
    entry.verdict[(generation & 1) as usize] = topic_verdict { generation, binding };
    (entry.service, entry.length) = (service, text.len() as u16);
    entry.text[..text.len()].copy_from_slice(text.as_bytes());
    entry
}

/// As the datapath hashes it (`bpf/forward/delayed/greet.h`).
fn client_hash(keys: &Keys, service: u16, id: &[u8]) -> u64 {
    const CLIENT_ID_DOMAIN: u64 = 0x6964_0000_0000_0000;
    let domain = Keys { topic: [keys.topic[0] ^ CLIENT_ID_DOMAIN, keys.topic[1]], ..*keys };
    domain.topic(service, id)
}

/// `None`: longer than what is kept of an id.
fn id_entry(service: u16, text: &str, client: client) -> Option<client_id> {
    let mut entry = client_id { client, service, length: text.len() as u16, ..client_id::zeroed() };
    entry.text.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
    Some(entry)
}

/// Writes records as JSON lines, between a first and a last line that say so.
fn write_lines(records: &[Known], mut out: impl Write) -> io::Result<()> {
    let mut line = |value: String| writeln!(out, "{value}");
    line(serde_json::to_string(&Begin { mqtt_fwd_clients: SCHEMA })?)?;
    for record in records {
        line(serde_json::to_string(record)?)?;
    }
    line(serde_json::to_string(&End { records: records.len() })?)
}

/// The file that `run` writes, whole or not at all.
pub fn save(path: &Path, records: &[Known]) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let beside = path.with_extension("new");
    let mut file = io::BufWriter::new(std::fs::File::create(&beside)?);
    write_lines(records, &mut file)?;
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    std::fs::rename(&beside, path)
}

/// Reads such a file; one that is cut short, or of another version, is an error.
pub fn read_saved(path: &Path) -> Result<Vec<Known>> {
    let of_file = |source| Error::Io { what: path.display().to_string(), source };
    let file = std::fs::File::open(path).map_err(of_file)?;
    read_lines(BufReader::new(file), true)
        .map_err(|why| Error::Refused(format!("{}: {why}", path.display())))
}

/// With `whole`, first and last line have to be there.
fn read_lines(reader: impl io::BufRead, whole: bool) -> Result<Vec<Known>, String> {
    let mut records = Vec::new();
    let (mut begun, mut ended) = (false, None);
    for (number, line) in reader.lines().enumerate() {
        let line = line.map_err(|e| format!("line {}: {e}", number + 1))?;
        if line.trim().is_empty() {
            continue;
        }
        if let Ok(begin) = serde_json::from_str::<Begin>(&line) {
            if begin.mqtt_fwd_clients != SCHEMA {
                return Err(format!("is of version {}, not {SCHEMA}", begin.mqtt_fwd_clients));
            }
            begun = true;
        } else if let Ok(end) = serde_json::from_str::<End>(&line) {
            ended = Some(end.records);
        } else {
            let record = serde_json::from_str(&line);
            records.push(record.map_err(|e| format!("line {}: {e}", number + 1))?);
        }
    }
    if whole && (!begun || ended != Some(records.len())) {
        return Err("is cut short".to_owned());
    }
    Ok(records)
}

#[derive(Debug, Serialize, Deserialize)]
struct Row {
    service: String,
    by: By,
    client: String,
    topic: String,
}

/// Writes records for people.
pub fn export(records: &[Known], format: Format, out: impl Write) -> io::Result<()> {
    match format {
        Format::Json => write_lines(records, out),
        Format::Csv => {
            let mut csv = csv::Writer::from_writer(out);
            for record in records.iter().filter(|r| !r.topic.is_empty()).cloned() {
                let Known { service, by, client, topic, .. } = record;
                csv.serialize(Row { service, by, client, topic })?;
            }
            csv.flush()
        }
    }
}

/// Reads what people wrote, all of it or nothing.
pub fn import(config: &Config, format: Format, file: impl Read) -> Result<Vec<Known>, String> {
    let records: Vec<Known> = match format {
        Format::Json => read_lines(BufReader::new(file), false)?,
        Format::Csv => {
            let mut csv = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(file);
            let rows = csv.deserialize().enumerate();
            rows.map(|(i, row)| {
                let row: Row = row.map_err(|e| format!("record {}: {e}", i + 1))?;
                Ok(Known {
                    service: row.service,
                    by: row.by,
                    client: row.client,
                    topic: row.topic,
                    groups: BTreeMap::new(),
                    multi_group: false,
                    subscribes: false,
                    misjudged: false,
                    group_changes: 0,
                    age_s: 0,
                })
            })
            .collect::<Result<_, String>>()?
        }
    };
    check_all(config, &records)?;
    Ok(records)
}

/// Says what is wrong with records that somebody wrote.
pub fn check_all(config: &Config, records: &[Known]) -> Result<(), String> {
    records.iter().enumerate().try_for_each(|(i, record)| {
        check(config, record).map_err(|why| format!("record {} ({}): {why}", i + 1, record.client))
    })
}

/// What a person may get wrong.
fn check(config: &Config, record: &Known) -> Result<(), String> {
    let Some(service) = config.services.iter().find(|s| s.name == record.service) else {
        let names: Vec<_> = config.services.iter().map(|s| format!("{:?}", s.name)).collect();
        return Err(format!("no service {:?}; there are {}", record.service, names.join(", ")));
    };
    if let Some(unknown) = record.groups.keys().find(|name| service.group(name).is_none()) {
        return Err(format!("service {:?} has no group {unknown:?}", service.name));
    }
    if record.topic.is_empty() && record.groups.is_empty() && !record.subscribes {
        return Err("neither a topic nor groups say where it belongs".to_owned());
    }
    if record.topic.contains(['+', '#', '\0']) || record.topic.len() > topic_max() {
        return Err(format!("{:?} is no topic name of up to {} bytes", record.topic, topic_max()));
    }
    match record.by {
        By::Address => match record.client.parse::<IpAddr>() {
            Err(_) => Err("is no IP address; for a client id, write by = client_id".to_owned()),
            Ok(addr) if addr.is_ipv4() != service.addr.is_ipv4() => {
                Err(format!("is of another IP version than service {:?}", service.name))
            }
            Ok(_) => Ok(()),
        },
        By::ClientId if service.binding == crate::config::Binding::Predicted => Err(format!(
            "service {:?} knows clients by address; client ids need binding = \"delayed\"",
            service.name
        )),
        By::ClientId if record.client.is_empty() || record.client.len() > 64 => {
            Err("a client id must be 1 to 64 bytes long".to_owned())
        }
        By::ClientId => Ok(()),
    }
}

/// For `run`: takes up what the file has if nothing is known of clients yet, as after a reboot. False: there are
/// no services in force, so it is too early.
pub fn take_up(config: &Config, datapath: &Datapath) -> bool {
    if datapath.service_table().is_ok_and(|table| table.count == 0) {
        return false;
    }
    let Some(path) = config.clients_file.as_deref().filter(|path| path.exists()) else {
        return true;
    };
    let nothing_known = || {
        Ok::<_, Error>(
            datapath.clients.keys()?.is_empty()
                && datapath.clients6.keys()?.is_empty()
                && datapath.client_ids.keys()?.is_empty(),
        )
    };
    let restored = nothing_known().and_then(|nothing| {
        if !nothing {
            return Ok(None);
        }
        restore(config, datapath, read_saved(path)?).map(Some)
    });
    match restored {
        Ok(Some(Restored { added, without_group, .. })) => {
            info!(clients = added, without_group, file = %path.display(), "clients restored");
        }
        Ok(None) => {}
        Err(error) => warn!(%error, "clients not restored"),
    }
    true
}

/// For `run`: writes the file.
pub fn keep(config: &Config, datapath: &Datapath) {
    let Some(path) = config.clients_file.as_deref() else { return };
    let saved = collect(config, datapath, SAVED_MAX).and_then(|records| {
        // Rather what was there before than nothing.
        if records.is_empty() {
            return Ok(0);
        }
        let of_file = |source| Error::Io { what: path.display().to_string(), source };
        save(path, &records).map_err(of_file).map(|()| records.len())
    });
    match saved {
        Ok(clients) => debug!(clients, file = %path.display(), "clients saved"),
        Err(error) => warn!(%error, "clients not saved"),
    }
}
