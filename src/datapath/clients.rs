//! Clients: as rows, and as records that outlive the maps.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use super::Datapath;
use super::image::keys_of;
use super::names::{Names, Topics, address_of, boot_time, services_of, text_of};
use crate::config::{Config, Service};
use crate::domain::client_record::{ClientRecord, IdentifiedBy, Restored};
use crate::domain::{Target, limits, rendezvous};
use crate::kernel::Result;
use crate::kernel::abi::{
    Pod, addr_words, binding_of, binding_parts, client, client_flags, client_id, client4, client6,
    group, name_text, service_table, topic, topic_verdict, words_addr,
};
use crate::kernel::catalog::Tracked;
use crate::kernel::maps::Table;
use crate::routes::hash::Keys;

/// A client and its prediction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Client {
    pub service: String,
    /// Address, or client id where clients are identified by that.
    pub client: String,
    /// address or client id.
    pub by: String,
    pub topic: String,
    pub group: String,
    /// Seconds since it was learned.
    pub age_s: u64,
    /// Connections whose first PUBLISH went where the prediction said, and those where it did not.
    pub hits: u32,
    pub misses: u32,
    pub group_changes: u32,
    /// Publishes to several groups in turn.
    pub multi_group: bool,
    /// Its client id alone decides no longer, since that was wrong once.
    pub misjudged: bool,
}

/// A client of several groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MultiGroupClient {
    pub client: String,
    pub topic: String,
    pub group: String,
    pub changes: u32,
}

fn has(c: &client, flag: client_flags) -> bool {
    u32::from(c.flags) & flag.0 != 0
}

/// The binding that a client's record predicts; 0: none.
fn best_binding(c: &client) -> u32 {
    c.group[usize::from(c.best).min(c.group.len() - 1)]
}

/// A client of the maps.
struct Entry {
    service: u16,
    by: IdentifiedBy,
    name: String,
    /// The whole name is there: of long client ids, only the beginning is kept.
    is_whole: bool,
    client: client,
}

fn by_address(service: u16, addr: IpAddr, client: client) -> Entry {
    let name = addr.to_string();
    Entry { service, by: IdentifiedBy::Address, name, is_whole: true, client }
}

fn by_id(id: &client_id) -> Entry {
    let whole = id.text.get(..usize::from(id.length)).and_then(|t| std::str::from_utf8(t).ok());
    Entry {
        service: id.service,
        by: IdentifiedBy::ClientId,
        name: text_of(&id.text, id.length),
        is_whole: whole.is_some(),
        client: id.client,
    }
}

impl Datapath {
    fn client_entries(&self) -> Result<Vec<Entry>> {
        let v4 = self.clients.entries()?.into_iter();
        let v6 = self.clients6.entries()?.into_iter();
        let ids = self.client_ids.entries()?.into_iter();
        let v4 = v4.map(|(key, c): (client4, client)| {
            by_address(key.service, IpAddr::from(key.addr.to_ne_bytes()), c)
        });
        let v6 = v6.map(|(key, c): (client6, client)| {
            by_address(key.service, words_addr(key.addr, true), c)
        });
        Ok(v4.chain(v6).chain(ids.map(|(_, id)| by_id(&id))).collect())
    }

    /// Those of one name, of all services: looked up by key.
    fn client_entries_of(&self, name: &str) -> Result<Vec<Entry>> {
        let table = self.service_table()?;
        let keys = keys_of(&table);
        let addr = name.parse::<IpAddr>().ok();
        let mut found = Vec::new();
        for service in services_of(&table).iter().map(|s| s.id) {
            let record = match addr {
                Some(IpAddr::V4(v4)) => self.clients.get(&key4(service, v4.into()))?,
                Some(v6) => self.clients6.get(&key6(service, v6))?,
                None => None,
            };
            found.extend(addr.zip(record).map(|(addr, c)| by_address(service, addr, c)));
            let id = self.client_ids.get(&client_hash(&keys, service, name.as_bytes()))?;
            found.extend(id.map(|id| by_id(&id)).filter(|entry| entry.name == name));
        }
        Ok(found)
    }

    /// The keys of a client id, one for each service.
    pub(super) fn client_id_keys(&self, id: &str) -> Result<Vec<u64>> {
        let table = self.service_table()?;
        let keys = keys_of(&table);
        let of_service = |s: &crate::kernel::abi::service| client_hash(&keys, s.id, id.as_bytes());
        Ok(services_of(&table).iter().map(of_service).collect())
    }

    /// Whether nothing was learned of any client.
    pub fn has_no_clients(&self) -> Result<bool> {
        Ok(self.clients.keys()?.is_empty()
            && self.clients6.keys()?.is_empty()
            && self.client_ids.keys()?.is_empty())
    }
}

/// All clients, by service, and address or client id.
pub fn clients<'a>(
    datapath: &'a Datapath,
    names: &'a Names,
) -> Result<impl Iterator<Item = Result<Client>> + 'a> {
    let mut topics = Topics::of(datapath);
    let now = boot_time().as_secs();
    let mut all = datapath.client_entries()?;
    all.sort_by_cached_key(|entry| {
        let addr: Option<IpAddr> = entry.name.parse().ok();
        (entry.by, entry.service, addr, entry.name.clone())
    });
    Ok(all.into_iter().map(move |Entry { service, by, name, client: c, .. }| {
        Ok(Client {
            service: names.service(service),
            client: name,
            by: by.key().replace('_', " "),
            topic: topics.text(c.topic)?,
            group: match best_binding(&c) {
                0 => String::new(),
                binding => names.bound(binding),
            },
            age_s: now.saturating_sub(u64::from(c.learned_s)),
            hits: u32::from(c.hits),
            misses: u32::from(c.misses),
            group_changes: u32::from(c.group_changes),
            multi_group: has(&c, client_flags::CLIENT_MULTI_GROUP),
            misjudged: has(&c, client_flags::CLIENT_MISJUDGED),
        })
    }))
}

/// The number of clients, and of those that publish to several groups in turn: devices behind one address, or a
/// device with several topics. Of these the first `most`, those with most changes first.
pub fn multi_group(
    datapath: &Datapath,
    names: &Names,
    most: usize,
) -> Result<(u64, u64, Vec<MultiGroupClient>)> {
    let all = datapath.client_entries()?;
    let count = all.len() as u64;
    let mut multi: Vec<Entry> = all
        .into_iter()
        .filter(|entry| has(&entry.client, client_flags::CLIENT_MULTI_GROUP))
        .collect();
    let multi_count = multi.len() as u64;
    multi.sort_by(|a, b| {
        let changes = b.client.group_changes.cmp(&a.client.group_changes);
        changes.then_with(|| a.name.cmp(&b.name))
    });
    multi.truncate(most);
    let mut topics = Topics::of(datapath);
    let row = |Entry { name, client: c, .. }: Entry| {
        Ok(MultiGroupClient {
            client: name,
            topic: topics.text(c.topic)?,
            group: names.bound(best_binding(&c)),
            changes: u32::from(c.group_changes),
        })
    };
    Ok((count, multi_count, multi.into_iter().map(row).collect::<Result<_>>()?))
}

/// How many clients publish to several groups in turn.
pub fn multi_group_count(datapath: &Datapath) -> Result<u64> {
    let is_multi = |c: &client| has(c, client_flags::CLIENT_MULTI_GROUP);
    let v4 = datapath.clients.entries()?.iter().filter(|(_, c)| is_multi(c)).count();
    let v6 = datapath.clients6.entries()?.iter().filter(|(_, c)| is_multi(c)).count();
    let ids = datapath.client_ids.entries()?.iter().filter(|(_, id)| is_multi(&id.client)).count();
    Ok((v4 + v6 + ids) as u64)
}

/// Turns the maps' clients into records.
struct Recorder<'a> {
    services: HashMap<u16, &'a Service>,
    groups: BTreeMap<u16, group>,
    now_s: u64,
}

impl<'a> Recorder<'a> {
    fn of(config: &'a Config, datapath: &Datapath) -> Result<Self> {
        let table = datapath.service_table()?;
        let named = |s: &crate::kernel::abi::service| {
            let addr = address_of(s);
            let same = |c: &&Service| SocketAddr::new(c.addr, c.port) == addr;
            Some((s.id, config.services.iter().find(same)?))
        };
        Ok(Self {
            services: services_of(&table).iter().filter_map(named).collect(),
            groups: datapath.groups()?.into_iter().collect(),
            now_s: boot_time().as_secs(),
        })
    }

    /// `None`: it says nothing that another load could use.
    fn record(&self, entry: Entry, topic: Option<&topic>) -> Option<ClientRecord> {
        let Entry { service, by, name, is_whole, client: c } = entry;
        let weights = c.group.iter().zip(c.weight).filter(|(binding, w)| **binding != 0 && *w > 0);
        let groups: BTreeMap<String, u8> = weights
            .filter_map(|(binding, weight)| {
                let (id, epoch) = binding_parts(*binding);
                let group = self.groups.get(&id).filter(|g| g.epoch == epoch)?;
                Some((name_text(&group.name), weight))
            })
            .collect();
        let whole_topic = topic.filter(|t| usize::from(t.length) <= t.text.len());
        let record = ClientRecord {
            service: self.services.get(&service)?.name.clone(),
            by,
            client: name,
            topic: whole_topic.map(|t| text_of(&t.text, t.length)).unwrap_or_default(),
            groups,
            multi_group: has(&c, client_flags::CLIENT_MULTI_GROUP),
            for_relay: has(&c, client_flags::CLIENT_FOR_RELAY),
            misjudged: has(&c, client_flags::CLIENT_MISJUDGED),
            group_changes: c.group_changes,
            age_s: self.now_s.saturating_sub(u64::from(c.learned_s)),
        };
        (is_whole && (!record.groups.is_empty() || record.for_relay)).then_some(record)
    }
}

impl Datapath {
    /// Puts the record of an address in place of what is known of it.
    pub fn put_client(&self, config: &Config, record: &ClientRecord) -> Result<()> {
        let table = self.service_table()?;
        let groups: BTreeMap<u16, group> = self.groups()?.into_iter().collect();
        let Some((_, id)) = service_of(config, &table, &record.service) else { return Ok(()) };
        let Some(mut c) = entry_of(record, None, |name| binding_to(&groups, id, name)) else {
            return Ok(());
        };
        c.learned_s = boot_time().as_secs() as u32;
        c.generation = table.generation;
        match record.client.parse::<IpAddr>() {
            Ok(addr @ IpAddr::V4(_)) => self.clients.put(&key4(id, addr), &c),
            Ok(addr @ IpAddr::V6(_)) => self.clients6.put(&key6(id, addr), &c),
            Err(_) => Ok(()),
        }
    }

    /// The binding to a group of a service, by its name.
    pub fn binding_of(
        &self,
        numbers: &mut GroupNumbers,
        service: u16,
        name: &str,
    ) -> Result<Option<u32>> {
        let key = (service, name.to_owned());
        if let Some(number) = numbers.0.get(&key)
            && let Some(found) = self.groups.get(&u32::from(*number))?
            && found.epoch != 0
            && is_group((*number, &found), service, name)
        {
            return Ok(Some(binding_of(*number, found.epoch)));
        }
        let groups: BTreeMap<u16, group> = self.groups()?.into_iter().collect();
        let whole = groups.iter().filter(|(number, g)| g.parent == **number);
        numbers.0 = whole.map(|(number, g)| ((g.service, name_text(&g.name)), *number)).collect();
        Ok(binding_to(&groups, service, name))
    }

    /// Removes what is known of an address or a client id, of all services.
    pub fn forget_client(&self, client: &str) -> Result<()> {
        for service in self.service_numbers()?.into_values() {
            let (was_there, tracked) = match client.parse() {
                Ok(addr @ IpAddr::V4(_)) => {
                    (self.clients.remove(&key4(service, addr))?, Tracked::Clients)
                }
                Ok(addr @ IpAddr::V6(_)) => {
                    (self.clients6.remove(&key6(service, addr))?, Tracked::Clients6)
                }
                Err(_) => continue,
            };
            self.count_own(tracked, 0, was_there.into())?;
        }
        for key in self.client_id_keys(client)? {
            let was_there = self.client_ids.remove(&key)?;
            self.count_own(Tracked::ClientIds, 0, was_there.into())?;
        }
        Ok(())
    }
}

/// The binding to a group of a service, by its name.
fn binding_to(groups: &BTreeMap<u16, group>, service: u16, name: &str) -> Option<u32> {
    let (number, found) =
        groups.iter().find(|(number, g)| is_group((**number, g), service, name))?;
    Some(binding_of(*number, found.epoch))
}

fn is_group((number, g): (u16, &group), service: u16, name: &str) -> bool {
    (g.service, g.parent) == (service, number) && name_text(&g.name) == name
}

/// Where services' groups were found last: to look through all of them takes a quarter of a millisecond.
#[derive(Debug, Default)]
pub struct GroupNumbers(HashMap<(u16, String), u16>);

/// All clients' records, those learned last first, `most` at most. Client ids longer than what is kept of them are
/// left out.
pub fn snapshot(config: &Config, datapath: &Datapath, most: usize) -> Result<Vec<ClientRecord>> {
    let recorder = Recorder::of(config, datapath)?;
    let topics: HashMap<u64, topic> = datapath.topics.entries()?.into_iter().collect();
    let mut all = datapath.client_entries()?;
    all.sort_by_key(|entry| std::cmp::Reverse(entry.client.learned_s));
    let records = all.into_iter().filter_map(|entry| {
        let topic = topics.get(&entry.client.topic);
        recorder.record(entry, topic)
    });
    Ok(records.take(most).collect())
}

/// The records of one address or client id, of all services.
pub fn records_of(config: &Config, datapath: &Datapath, name: &str) -> Result<Vec<ClientRecord>> {
    let recorder = Recorder::of(config, datapath)?;
    let mut records = Vec::new();
    for entry in datapath.client_entries_of(name)? {
        let topic = datapath.topics.get(&entry.client.topic)?;
        records.extend(recorder.record(entry, topic.as_ref()));
    }
    Ok(records)
}

/// What one restore collects before it writes.
#[derive(Default)]
struct NewEntries {
    v4: Vec<(client4, client)>,
    v6: Vec<(client6, client)>,
    ids: Vec<(u64, client_id)>,
    topics: HashMap<u64, topic>,
}

/// Puts records into the maps; what is there stays.
pub fn restore(
    config: &Config,
    datapath: &Datapath,
    records: Vec<ClientRecord>,
) -> Result<Restored> {
    // The datapath's own entries are newer.
    let there = There {
        v4: datapath.clients.keys()?.iter().map(|k| (k.service, k.addr)).collect(),
        v6: datapath.clients6.keys()?.iter().map(|k| (k.service, k.addr)).collect(),
        ids: datapath.client_ids.keys()?.into_iter().collect(),
    };
    put_records(config, datapath, records, Some(there))
}

/// The same of what another balancer has learned: whoever learned last is right.
pub fn merge(config: &Config, datapath: &Datapath, records: Vec<ClientRecord>) -> Result<Restored> {
    put_records(config, datapath, records, None)
}

/// Whose records stay.
struct There {
    v4: HashSet<(u16, u32)>,
    v6: HashSet<(u16, [u32; 4])>,
    ids: HashSet<u64>,
}

/// Without `there`, those stay that were learned no earlier.
fn put_records(
    config: &Config,
    datapath: &Datapath,
    records: Vec<ClientRecord>,
    mut there: Option<There>,
) -> Result<Restored> {
    let is_older =
        |known: Option<client>, c: &client| known.is_none_or(|known| known.learned_s < c.learned_s);
    let table = datapath.service_table()?;
    let keys = keys_of(&table);
    let groups: BTreeMap<u16, group> = datapath.groups()?.into_iter().collect();
    let mut restored = Restored::default();
    let mut new = NewEntries::default();
    let mut routed: HashMap<(String, String), Option<String>> = HashMap::new();
    let now = boot_time().as_secs();
    for record in records {
        let Some((service, id)) = service_of(config, &table, &record.service) else {
            restored.without_group += 1;
            continue;
        };
        let by_topic = (!record.topic.is_empty()).then(|| {
            let key = (record.service.clone(), record.topic.clone());
            routed.entry(key).or_insert_with(|| group_of(service, &record.topic)).clone()
        });
        let Some(mut c) =
            entry_of(&record, by_topic.flatten().as_deref(), |name| binding_to(&groups, id, name))
        else {
            restored.without_group += 1;
            continue;
        };
        c.learned_s = now.saturating_sub(record.age_s).max(1) as u32;
        c.generation = table.generation;
        if !record.topic.is_empty() && record.topic.len() <= limits::TOPIC_TEXT {
            c.topic = keys.topic(id, record.topic.as_bytes());
            let best = c.group[usize::from(c.best)];
            new.topics.insert(c.topic, topic_of(id, &record.topic, table.generation, best));
        }
        let is_new = match (record.by, record.client.parse::<IpAddr>()) {
            (IdentifiedBy::Address, Ok(addr @ IpAddr::V4(_))) => {
                let key = key4(id, addr);
                let is_new = match &mut there {
                    Some(there) => there.v4.insert((id, key.addr)),
                    None => is_older(datapath.clients.get(&key)?, &c),
                };
                new.v4.extend(is_new.then_some((key, c)));
                is_new
            }
            (IdentifiedBy::Address, Ok(addr @ IpAddr::V6(_))) => {
                let key = key6(id, addr);
                let is_new = match &mut there {
                    Some(there) => there.v6.insert((id, key.addr)),
                    None => is_older(datapath.clients6.get(&key)?, &c),
                };
                new.v6.extend(is_new.then_some((key, c)));
                is_new
            }
            (IdentifiedBy::Address, Err(_)) => {
                restored.without_group += 1;
                continue;
            }
            (IdentifiedBy::ClientId, _) => {
                let hash = client_hash(&keys, id, record.client.as_bytes());
                let is_new = match &mut there {
                    Some(there) => there.ids.insert(hash),
                    None => is_older(datapath.client_ids.get(&hash)?.map(|known| known.client), &c),
                };
                if is_new && let Some(entry) = id_entry(id, &record.client, c) {
                    new.ids.push((hash, entry));
                }
                is_new
            }
        };
        *(if is_new { &mut restored.added } else { &mut restored.already_learned }) += 1;
    }
    for (hash, entry) in new.topics {
        if datapath.topics.get(&hash)?.is_none() {
            datapath.topics.put(&hash, &entry)?;
            datapath.count_own(Tracked::Topics, 1, 0)?;
        }
    }
    put_and_count(datapath, Tracked::Clients, &datapath.clients, &new.v4)?;
    put_and_count(datapath, Tracked::Clients6, &datapath.clients6, &new.v6)?;
    put_and_count(datapath, Tracked::ClientIds, &datapath.client_ids, &new.ids)?;
    if there.is_none() {
        return Ok(restored);
    }
    restored.did_not_fit = gone(&datapath.clients, new.v4.iter().map(|(key, _)| key))?
        + gone(&datapath.clients6, new.v6.iter().map(|(key, _)| key))?
        + gone(&datapath.client_ids, new.ids.iter().map(|(key, _)| key))?;
    Ok(restored)
}

/// Puts entries into a map, some of which may be there.
fn put_and_count<K: Pod, V: Pod>(
    datapath: &Datapath,
    tracked: Tracked,
    map: &Table<K, V>,
    entries: &[(K, V)],
) -> Result<()> {
    let mut added = 0;
    for (key, _) in entries {
        added += u64::from(map.get(key)?.is_none());
    }
    map.put_all(entries)?;
    datapath.count_own(tracked, added, 0)
}

/// How many of these keys are in a map no more.
fn gone<'a, K: Pod + 'a, V: Pod>(
    map: &Table<K, V>,
    keys: impl Iterator<Item = &'a K>,
) -> Result<usize> {
    let there: HashSet<Vec<u8>> = map.keys()?.iter().map(|key| key.bytes().to_vec()).collect();
    Ok(keys.filter(|key| !there.contains(key.bytes())).count())
}

fn service_of<'a>(
    config: &'a Config,
    table: &service_table,
    name: &str,
) -> Option<(&'a Service, u16)> {
    let service = config.services.iter().find(|s| s.name == name)?;
    let addr = SocketAddr::new(service.addr, service.port);
    let entry = services_of(table).iter().find(|s| address_of(s) == addr)?;
    Some((service, entry.id))
}

/// The group of a topic; `None`: an "any" route's.
fn group_of(service: &Service, topic: &str) -> Option<String> {
    match service.route_of(topic).map(|route| &route.target) {
        Some(Target::Group(name)) => Some(name.clone()),
        Some(Target::Any) => None,
        None => Some(service.default_group.clone()),
    }
}

/// The map's value, without time and topic. The topic's group now goes before the groups of then.
fn entry_of(
    record: &ClientRecord,
    by_topic: Option<&str>,
    binding: impl Fn(&str) -> Option<u32>,
) -> Option<client> {
    let mut c = client::zeroed();
    let mut weights: Vec<(&str, u8)> = record
        .groups
        .iter()
        .map(|(name, weight)| (name.as_str(), (*weight).clamp(1, limits::WEIGHT)))
        .collect();
    // The heaviest first.
    weights.sort_by_key(|(_, weight)| std::cmp::Reverse(*weight));
    if let Some(group) = by_topic
        && !weights.iter().any(|(name, _)| *name == group)
    {
        weights = vec![(group, weights.first().map_or(limits::WEIGHT, |(_, weight)| *weight))];
    }
    let bindings: Vec<_> =
        weights.into_iter().filter_map(|(name, weight)| Some((binding(name)?, weight))).collect();
    for (i, (group, weight)) in bindings.iter().take(c.group.len()).enumerate() {
        (c.group[i], c.weight[i]) = (*group, *weight);
    }
    let flags = [
        (record.multi_group, client_flags::CLIENT_MULTI_GROUP),
        (record.for_relay, client_flags::CLIENT_FOR_RELAY),
        (record.misjudged, client_flags::CLIENT_MISJUDGED),
    ];
    c.group_changes = record.group_changes;
    c.flags = flags.iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag.0 as u8);
    (!bindings.is_empty() || record.for_relay).then_some(c)
}

fn key4(service: u16, addr: IpAddr) -> client4 {
    client4 { addr: addr_words(addr)[0], service, pad: 0 }
}

fn key6(service: u16, addr: IpAddr) -> client6 {
    client6 { addr: addr_words(addr), service, pad: 0 }
}

fn topic_of(service: u16, text: &str, generation: u32, binding: u32) -> topic {
    let mut entry = topic::zeroed();
    entry.verdict[(generation & 1) as usize] = topic_verdict { generation, binding };
    (entry.service, entry.length) = (service, text.len() as u16);
    entry.place = rendezvous::place(text.as_bytes());
    entry.text[..text.len()].copy_from_slice(text.as_bytes());
    entry
}

/// As the datapath hashes it (`bpf/forward/handshake/connect.h`).
pub(super) fn client_hash(keys: &Keys, service: u16, id: &[u8]) -> u64 {
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
