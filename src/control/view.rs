//! What the maps hold, in rows for tables and JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::Result;
use super::api::proto;
use crate::config::Config;
use crate::datapath::Datapath;
use crate::datapath::ids::Entry;
use crate::kernel::abi::{
    self as types, Pod, binding_parts, client, client_flags, client4, client6, flow, flow_binding,
    flow_flags, flow4, flow6, limits, tracked_map, words_addr,
};
use crate::kernel::maps::Table;

/// In place of a topic or client id whose record has been evicted.
pub const FORGOTTEN: &str = "(forgotten)";

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

    /// The name of a binding's group, unless that number is another's by now.
    pub fn bound(&self, binding: u32) -> String {
        let (id, epoch) = binding_parts(binding);
        match self.groups.get(&id) {
            Some(entry) if entry.epoch == epoch => entry.name.clone(),
            _ => "(removed)".to_owned(),
        }
    }

    /// The VIP that a binding's packets are forwarded to.
    pub fn vip(&self, binding: u32) -> Option<IpAddr> {
        let (id, epoch) = binding_parts(binding);
        self.groups.get(&id).filter(|entry| entry.epoch == epoch).map(|entry| entry.vip)
    }

    /// The name of whatever group has this number now.
    pub fn group_now(&self, id: u16) -> Option<&str> {
        self.groups.get(&id).map(|entry| entry.name.as_str())
    }
}

/// What a client's record predicts; 0: nothing.
pub fn best_binding(c: &client) -> u32 {
    c.group[usize::from(c.best).min(c.group.len() - 1)]
}

/// How a flow came to its group, for people; and what stood in the way of a better one.
pub fn way_text(way: u8, why: u8, predicted: bool) -> (&'static str, Option<&'static str>) {
    let text = match types::way(u32::from(way)) {
        types::way::WAY_MESSAGE => "message",
        types::way::WAY_CLIENT_ID => "client id",
        types::way::WAY_ANSWERED if why == 0 => "message (answered)",
        types::way::WAY_ROUTE => "route",
        _ if predicted => "prediction",
        _ => "no prediction",
    };
    let why = match types::why(u32::from(why)) {
        types::why::WHY_NOT_CONNECT => Some("no CONNECT that all brokers take"),
        types::why::WHY_CUT => Some("CONNECT in several segments"),
        types::why::WHY_TOO_LONG => Some("CONNECT too long"),
        types::why::WHY_MQTT5 => Some("MQTT 5"),
        types::why::WHY_PERSISTENT => Some("persistent session"),
        types::why::WHY_CREDENTIALS => Some("credentials"),
        types::why::WHY_SILENT => Some("silent"),
        types::why::WHY_NO_TOPIC => Some("no topic decides"),
        _ => None,
    };
    (text, why)
}

/// The clock that the datapath stamps with.
pub fn boot_time() -> Duration {
    // It is there since Linux 2.6.39.
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map_or(Duration::ZERO, Duration::from)
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
            None => FORGOTTEN.to_owned(),
        };
        self.seen.insert(hash, text.clone());
        Ok(text)
    }
}

/// Texts of client ids.
struct ClientIds<'a> {
    datapath: &'a Datapath,
    /// Services that know clients by their ids: elsewhere `flow.own` means something else.
    late: BTreeSet<u16>,
}

impl<'a> ClientIds<'a> {
    fn read(datapath: &'a Datapath) -> Result<Self> {
        let table = datapath.service_table()?;
        let late = table.service[..usize::from(table.count)]
            .iter()
            .filter(|s| u32::from(s.binding) == types::binding_mode::BINDING_DELAYED.0)
            .map(|s| s.id)
            .collect();
        Ok(Self { datapath, late })
    }

    fn text(&mut self, service: u16, flow: &flow) -> Result<String> {
        if flow.own == 0 || !self.late.contains(&service) {
            return Ok(String::new());
        }
        let known = self.datapath.client_ids.get(&flow.own)?;
        Ok(known.map_or_else(|| FORGOTTEN.to_owned(), |id| topic_text(&id.text, id.length)))
    }
}

/// All clients, by service, and address or client id.
pub fn clients<'a>(
    datapath: &'a Datapath,
    names: &'a Names,
) -> Result<impl Iterator<Item = Result<proto::Client>> + 'a> {
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
    let mut addresses: Vec<_> = v4.chain(v6).collect();
    addresses.sort_by_key(|(service, addr, _)| (*service, *addr));
    let mut ids: Vec<_> = datapath.client_ids.entries()?;
    ids.sort_by_key(|(_, id)| (id.service, id.text));
    let addresses =
        addresses.into_iter().map(|(service, addr, c)| (service, addr.to_string(), "address", c));
    let ids = ids
        .into_iter()
        .map(|(_, id)| (id.service, topic_text(&id.text, id.length), "client id", id.client));
    Ok(addresses.chain(ids).map(move |(service, client, by, c)| {
        Ok(proto::Client {
            service: names.service(service),
            client,
            by: by.to_owned(),
            topic: topics.text(c.topic)?,
            group: match best_binding(&c) {
                0 => String::new(),
                binding => names.bound(binding),
            },
            age_s: now.saturating_sub(u64::from(c.learned_s)),
            hits: u32::from(c.hits),
            misses: u32::from(c.misses),
            group_changes: u32::from(c.group_changes),
            multi_group: u32::from(c.flags) & client_flags::CLIENT_MULTI_GROUP.0 != 0,
            misjudged: u32::from(c.flags) & client_flags::CLIENT_MISJUDGED.0 != 0,
        })
    }))
}

/// All flows, by service and address.
pub fn flows<'a>(
    datapath: &'a Datapath,
    names: &'a Names,
) -> Result<impl Iterator<Item = Result<proto::Flow>> + 'a> {
    let mut topics = Topics { datapath, seen: BTreeMap::new() };
    let mut ids = ClientIds::read(datapath)?;
    let mut all = Vec::new();
    for (key, f) in datapath.flows.entries()?.into_iter().chain(datapath.flows_weak.entries()?) {
        let key: flow4 = key;
        all.push((key.service, IpAddr::from(key.addr.to_ne_bytes()), key.port, f));
    }
    for (key, f) in datapath.flows6.entries()?.into_iter().chain(datapath.flows6_weak.entries()?) {
        let key: flow6 = key;
        all.push((key.service, words_addr(key.addr, true), key.port, f));
    }
    all.sort_by_key(|(service, addr, port, _)| (*service, *addr, u16::from_be(*port)));
    Ok(all.into_iter().map(move |(service, addr, port, f): (u16, IpAddr, u16, flow)| {
        let has = |flag: flow_flags| u32::from(f.flags) & flag.0 != 0;
        let (bound_by, why) = way_text(f.way, f.why, has(flow_flags::FLOW_PREDICTED));
        let state = if has(flow_flags::FLOW_CLOSING) {
            "closing"
        } else if has(flow_flags::FLOW_ENDED) {
            "ended"
        } else if has(flow_flags::FLOW_OPAQUE) {
            "not MQTT"
        } else if has(flow_flags::FLOW_UNSYNCED) {
            "unframed"
        } else if has(flow_flags::FLOW_CONNECTED) || f.topic != 0 {
            "connected"
        } else {
            "opening"
        };
        Ok(proto::Flow {
            service: names.service(service),
            client: SocketAddr::new(addr, u16::from_be(port)).to_string(),
            group: names.bound(flow_binding(&f)),
            vip: names.vip(flow_binding(&f)).map(|vip| vip.to_string()),
            topic: topics.text(f.topic)?,
            state: state.to_owned(),
            bound_by: bound_by.to_owned(),
            why: why.map(str::to_owned),
            client_id: ids.text(service, &f)?,
            predicted: has(flow_flags::FLOW_PREDICTED),
            misrouted: has(flow_flags::FLOW_MISROUTED),
        })
    }))
}

/// The maps that the datapath fills, as they matter: flows, clients, topics.
pub fn map_uses(datapath: &Datapath) -> Result<Vec<proto::MapUse>> {
    let d = datapath;
    Ok(vec![
        map_use(d, "flows", tracked_map::TRACKED_FLOWS, &d.flows)?,
        map_use(d, "flows6", tracked_map::TRACKED_FLOWS6, &d.flows6)?,
        map_use(d, "flows_weak", tracked_map::TRACKED_FLOWS_WEAK, &d.flows_weak)?,
        map_use(d, "flows6_weak", tracked_map::TRACKED_FLOWS6_WEAK, &d.flows6_weak)?,
        map_use(d, "clients", tracked_map::TRACKED_CLIENTS, &d.clients)?,
        map_use(d, "clients6", tracked_map::TRACKED_CLIENTS6, &d.clients6)?,
        map_use(d, "topics", tracked_map::TRACKED_TOPICS, &d.topics)?,
        map_use(d, "client_ids", tracked_map::TRACKED_CLIENT_IDS, &d.client_ids)?,
        map_use(d, "handovers", tracked_map::TRACKED_HANDOVERS, &d.handovers)?,
    ])
}

fn map_use<K: Pod, V: Pod>(
    datapath: &Datapath,
    name: &str,
    tracked: tracked_map,
    map: &Table<K, V>,
) -> Result<proto::MapUse> {
    // Packets go on adding and removing: what was added is read first and what was removed last, so that no entry
    // seems evicted that was not.
    let uses = || datapath.map_uses.get_per_cpu(&tracked.0);
    let added: u64 = uses()?.iter().map(|u| u.added).sum();
    let used = count(map)? as u64;
    let removed: u64 = uses()?.iter().map(|u| u.removed).sum();
    Ok(proto::MapUse {
        map: name.to_owned(),
        capacity: map.max_entries(),
        used,
        evicted: added.saturating_sub(removed).saturating_sub(used),
    })
}

/// How many clients, by address or client id, publish to several groups in turn: devices behind one address, or a
/// device with several topics.
pub fn multi_group_clients(datapath: &Datapath) -> Result<usize> {
    let multi = |c: &client| u32::from(c.flags) & client_flags::CLIENT_MULTI_GROUP.0 != 0;
    let v4 = datapath.clients.entries()?.iter().filter(|(_, c)| multi(c)).count();
    let v6 = datapath.clients6.entries()?.iter().filter(|(_, c)| multi(c)).count();
    let ids = datapath.client_ids.entries()?.iter().filter(|(_, id)| multi(&id.client)).count();
    Ok(v4 + v6 + ids)
}

/// How many entries a map has.
fn count<K: Pod, V: Pod>(table: &Table<K, V>) -> Result<usize> {
    Ok(table.keys()?.len())
}

/// The group number that means none.
pub fn no_group(id: u16) -> bool {
    u32::from(id) == limits::NO_GROUP.0
}

/// The client of an event.
pub fn event_client(event: &types::event) -> SocketAddr {
    SocketAddr::new(words_addr(event.client, event.v6 != 0), u16::from_be(event.client_port))
}
