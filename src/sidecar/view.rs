//! What the maps hold, in rows for tables and JSON.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::Serialize;

use super::datapath::Datapath;
use super::identity::Entry;
use super::{Result, apply};
use crate::bpf::types::{
    self, Pod, client, client4, client6, flow, flow_flags, flow4, flow6, limits, words_addr,
};
use crate::config::Config;

/// Names for the numbers in maps.
#[derive(Debug)]
pub struct Names {
    services: BTreeMap<u16, String>,
    groups: BTreeMap<u16, Entry>,
}

impl Names {
    /// Reads them. Services are named by the configuration, groups by the map.
    pub fn read(config: &Config, datapath: &Datapath) -> Result<Self> {
        let table = datapath.service_table()?;
        let mut services = BTreeMap::new();
        let mut v6 = BTreeMap::new();
        for service in &table.service[..usize::from(table.count)] {
            let addr = words_addr(service.addr, service.v6 != 0);
            let port = u16::from_be(service.port);
            let name = config
                .services
                .iter()
                .find(|s| (s.addr, s.port) == (addr, port))
                .map_or_else(|| SocketAddr::new(addr, port).to_string(), |s| s.name.clone());
            services.insert(service.id, name);
            v6.insert(service.id, service.v6 != 0);
        }
        let groups = datapath
            .groups()?
            .into_iter()
            .map(|(id, g)| (id, Entry::of(&g, v6.get(&g.service).copied().unwrap_or(false))))
            .collect();
        Ok(Self { services, groups })
    }

    /// A service's name.
    pub fn service(&self, id: u16) -> String {
        self.services.get(&id).cloned().unwrap_or_else(|| format!("(removed {id})"))
    }

    /// A group's name, unless it is another one by now.
    pub fn group(&self, id: u16, epoch: u16) -> String {
        match self.groups.get(&id) {
            Some(entry) if entry.epoch == epoch => entry.name.clone(),
            _ => "(removed)".to_owned(),
        }
    }

    /// The name of whatever group has this number now.
    pub fn group_now(&self, id: u16) -> Option<&str> {
        self.groups.get(&id).map(|entry| entry.name.as_str())
    }
}

/// A client and its prediction.
#[derive(Debug, Serialize)]
pub struct ClientRow {
    pub service: String,
    pub client: IpAddr,
    pub topic: String,
    pub group: String,
    /// Since it was learned.
    pub age_s: u64,
    pub hits: u32,
    pub misses: u32,
    pub group_changes: u16,
    pub mixed: bool,
}

/// A flow and its binding.
#[derive(Debug, Serialize)]
pub struct FlowRow {
    pub service: String,
    pub client: SocketAddr,
    pub group: String,
    pub topic: String,
    pub state: &'static str,
    pub predicted: bool,
    pub astray: bool,
}

/// Seconds of the clock that the datapath stamps with.
pub fn boot_time() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes a valid timespec; CLOCK_BOOTTIME is there since Linux 2.6.39.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

/// A topic's text, with a mark if only its beginning is kept.
pub fn topic_text(text: &[u8], length: u16) -> String {
    let shown = &text[..usize::from(length).min(text.len())];
    let mut topic = String::from_utf8_lossy(shown).into_owned();
    if usize::from(length) > text.len() {
        topic.push('…');
    }
    topic
}

struct Topics<'a> {
    datapath: &'a Datapath,
    seen: BTreeMap<u64, String>,
}

impl Topics<'_> {
    fn text(&mut self, hash: u64) -> Result<String> {
        if let Some(text) = self.seen.get(&hash) {
            return Ok(text.clone());
        }
        let text = match self.datapath.topics.get(&hash)? {
            Some(topic) => topic_text(&topic.text, topic.length),
            None if hash == 0 => String::new(),
            None => "(forgotten)".to_owned(),
        };
        self.seen.insert(hash, text.clone());
        Ok(text)
    }
}

/// All clients, by service and address.
pub fn clients(datapath: &Datapath, names: &Names) -> Result<Vec<ClientRow>> {
    let mut topics = Topics { datapath, seen: BTreeMap::new() };
    let now = boot_time().as_secs();
    let v4 =
        datapath.clients.entries()?.into_iter().map(|(key, c): (client4, client)| {
            (key.service, IpAddr::from(key.addr.to_ne_bytes()), c)
        });
    let v6 = datapath
        .clients6
        .entries()?
        .into_iter()
        .map(|(key, c): (client6, client)| (key.service, words_addr(key.addr, true), c));
    let mut all: Vec<_> = v4.chain(v6).collect();
    all.sort_by_key(|(service, addr, _)| (*service, *addr));
    all.into_iter()
        .map(|(service, addr, c)| {
            Ok(ClientRow {
                service: names.service(service),
                client: addr,
                topic: topics.text(c.topic)?,
                group: names.group(c.group, c.epoch),
                age_s: now.saturating_sub(u64::from(c.learned_s)),
                hits: c.hits,
                misses: c.misses,
                group_changes: c.group_changes,
                mixed: apply::is_mixed(c.flags),
            })
        })
        .collect()
}

/// All flows, by service and address.
pub fn flows(datapath: &Datapath, names: &Names) -> Result<Vec<FlowRow>> {
    let mut topics = Topics { datapath, seen: BTreeMap::new() };
    let mut all = Vec::new();
    for (key, f) in datapath.flows.entries()?.into_iter().chain(datapath.flows_closing.entries()?) {
        let key: flow4 = key;
        all.push((key.service, IpAddr::from(key.addr.to_ne_bytes()), key.port, f));
    }
    for (key, f) in datapath.flows6.entries()?.into_iter().chain(datapath.flows6_closing.entries()?)
    {
        let key: flow6 = key;
        all.push((key.service, words_addr(key.addr, true), key.port, f));
    }
    all.sort_by_key(|(service, addr, port, _)| (*service, *addr, u16::from_be(*port)));
    all.into_iter()
        .map(|(service, addr, port, f): (u16, IpAddr, u16, flow)| {
            let has = |flag: flow_flags| u32::from(f.flags) & flag.0 != 0;
            Ok(FlowRow {
                service: names.service(service),
                client: SocketAddr::new(addr, u16::from_be(port)),
                group: names.group(f.group, f.epoch),
                topic: topics.text(f.topic)?,
                state: if has(flow_flags::FLOW_CLOSING) {
                    "closing"
                } else if has(flow_flags::FLOW_RESET) {
                    "reset"
                } else if has(flow_flags::FLOW_OPAQUE) {
                    "not MQTT"
                } else if has(flow_flags::FLOW_UNSYNCED) {
                    "unframed"
                } else if has(flow_flags::FLOW_CONNECTED) || f.topic != 0 {
                    "connected"
                } else {
                    "opening"
                },
                predicted: has(flow_flags::FLOW_PREDICTED),
                astray: has(flow_flags::FLOW_ASTRAY),
            })
        })
        .collect()
}

/// How many entries a map has.
pub fn count<K: Pod, V: Pod>(table: &crate::bpf::maps::Table<K, V>) -> usize {
    table.keys().count()
}

/// The group number that means none.
pub fn no_group(id: u16) -> bool {
    u32::from(id) == limits::NO_GROUP.0
}

/// The client of an event.
pub fn event_client(event: &types::event) -> SocketAddr {
    SocketAddr::new(words_addr(event.client, event.v6 != 0), u16::from_be(event.client_port))
}
