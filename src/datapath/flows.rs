//! Flows: as rows, by client, and marked to be ended.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use super::Datapath;
use super::names::{
    EVICTED, Names, Topics, address_of, binding_codes, boot_time, server_name_of, services_of,
    text_of,
};
use super::real_of_flow::RealOfFlow;
use crate::config::Config;
use crate::kernel::Result;
use crate::kernel::abi::{
    addr_words, binding_parts, flow, flow_binding, flow_client, flow_end_seq, flow_flags,
    flow_next, flow6, group, parser, set_end_seq, set_rescue, words_addr,
};
use crate::kernel::flow_table::{Mapped, flow_id};

/// A flow and its binding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Flow {
    pub service: String,
    /// Address and port.
    pub client: String,
    pub group: String,
    /// The group's, or that of the one real that was chosen for it; none: the group is gone.
    pub vip: Option<String>,
    /// Its last PUBLISH's.
    pub topic: String,
    /// `opening`, `connected`, `encrypted`, `unframed`, `not_mqtt`, `ended` or `closing`.
    pub state: String,
    /// What it was bound by, and why not by its first message: codes, as in `mqtt_fwd.proto`.
    pub bound_by: String,
    pub fallback_reason: Option<String>,
    /// Empty where clients are identified by address.
    pub client_id: String,
    /// TLS: that its ClientHello asked for; empty: none.
    pub server_name: String,
    pub predicted: bool,
    pub misrouted: bool,
}

/// A flow that was found: its place in the table, and whose that was.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    place: u32,
    id: u64,
    client: SocketAddr,
    service: u16,
}

impl Key {
    fn of(place: u32, f: &flow) -> Self {
        let client = SocketAddr::new(words_addr(f.key.addr, f.v6 != 0), u16::from_be(f.key.port));
        Self { place, id: f.id, client, service: f.key.service }
    }
}

fn has(f: &flow, flag: flow_flags) -> bool {
    u32::from(f.flags) & flag.0 != 0
}

fn is_over(f: &flow) -> bool {
    has(f, flow_flags::FLOW_CLOSING) || has(f, flow_flags::FLOW_ENDED)
}

fn state_of(f: &flow, is_tls: bool) -> &'static str {
    if has(f, flow_flags::FLOW_CLOSING) {
        "closing"
    } else if has(f, flow_flags::FLOW_ENDED) {
        "ended"
    } else if is_tls {
        "encrypted"
    } else if has(f, flow_flags::FLOW_OPAQUE) {
        "not_mqtt"
    } else if has(f, flow_flags::FLOW_UNSYNCED) {
        "unframed"
    } else if has(f, flow_flags::FLOW_CONNECTED) || f.topic != 0 {
        "connected"
    } else {
        "opening"
    }
}

impl Datapath {
    /// Gives each flow to `handle`.
    fn for_each_flow(&self, mut handle: impl FnMut(Key, flow)) -> Result<()> {
        for (place, f) in self.flows.mapped()?.entries() {
            handle(Key::of(place, &f), f);
        }
        Ok(())
    }

    /// Likewise, each that is neither closing nor first seen in its middle.
    pub fn for_each_standing(&self, mut handle: impl FnMut(Key, flow)) -> Result<()> {
        self.for_each_flow(|key, f| {
            if !has(&f, flow_flags::FLOW_CLOSING) && !has(&f, flow_flags::FLOW_PROBATION) {
                handle(key, f);
            }
        })
    }

    /// The flow of a client to a service's number.
    pub fn flow(&self, client: SocketAddr, service: u16) -> Result<Option<(Key, flow)>> {
        let key = flow6 { addr: addr_words(client.ip()), port: client.port().to_be(), service };
        let secret = self.service_table()?.topic_key;
        let found = self.flows.find(flow_id(&key, client.is_ipv6(), secret))?;
        Ok(found.map(|(place, f)| (Key::of(place, &f), f)))
    }

    /// The numbers of services by address and port.
    pub fn service_numbers(&self) -> Result<HashMap<SocketAddr, u16>> {
        let table = self.service_table()?;
        Ok(services_of(&table).iter().map(|s| (address_of(s), s.id)).collect())
    }

    /// The largest packet that each service in force forwards, in bytes of IP.
    pub fn max_packets(&self) -> Result<HashMap<SocketAddr, u16>> {
        let table = self.service_table()?;
        Ok(services_of(&table).iter().map(|s| (address_of(s), s.max_packet)).collect())
    }
}

/// Makes rows of flows.
struct Rows<'a> {
    datapath: &'a Datapath,
    names: &'a Names,
    topics: Topics<'a>,
}

impl<'a> Rows<'a> {
    fn of(datapath: &'a Datapath, names: &'a Names) -> Self {
        Self { datapath, names, topics: Topics::of(datapath) }
    }

    fn client_id(&self, f: &flow) -> Result<String> {
        let Some(id) = flow_client(f) else { return Ok(String::new()) };
        let record = self.datapath.client_ids.get(&id)?;
        Ok(record.map_or_else(|| EVICTED.to_owned(), |id| text_of(&id.text, id.length)))
    }

    fn server_name(&self, f: &flow) -> Result<String> {
        let Some(name) = flow_client(f) else { return Ok(String::new()) };
        let found = self.datapath.server_names.get(&name)?;
        Ok(found.map_or_else(|| EVICTED.to_owned(), |name| server_name_of(&name)))
    }

    fn row(&mut self, key: Key, f: &flow) -> Result<Flow> {
        let predicted = has(f, flow_flags::FLOW_PREDICTED);
        let (bound_by, reason) = binding_codes(f.bound_by, f.fallback_reason, predicted);
        let is_tls = self.names.is_tls(key.service);
        Ok(Flow {
            service: self.names.service(key.service),
            client: key.client.to_string(),
            group: self.names.bound(flow_binding(f)),
            vip: self.names.vip(flow_binding(f)).map(|vip| vip.to_string()),
            topic: self.topics.text(f.topic)?,
            state: state_of(f, is_tls).to_owned(),
            bound_by: bound_by.to_owned(),
            fallback_reason: reason.map(str::to_owned),
            client_id: if is_tls { String::new() } else { self.client_id(f)? },
            server_name: if is_tls { self.server_name(f)? } else { String::new() },
            predicted,
            misrouted: has(f, flow_flags::FLOW_MISROUTED),
        })
    }
}

/// All flows that stand, and those that closed in the last minute, by service and address.
pub fn flows<'a>(
    datapath: &'a Datapath,
    names: &'a Names,
) -> Result<impl Iterator<Item = Result<Flow>> + 'a> {
    let mut rows = Rows::of(datapath, names);
    let mut all: Vec<(Key, flow)> = Vec::new();
    let now = boot_time().as_secs() as u32;
    datapath.for_each_flow(|key, f| {
        let closed = has(&f, flow_flags::FLOW_CLOSING);
        if !has(&f, flow_flags::FLOW_PROBATION) && (!closed || now.wrapping_sub(f.closed_s) < 60) {
            all.push((key, f));
        }
    })?;
    all.sort_by_key(|(key, _)| (key.service, key.client));
    Ok(all.into_iter().map(move |(key, f)| rows.row(key, &f)))
}

/// The flows of one client, which is named by its address or client id, closing ones too.
pub fn flows_of_client(datapath: &Datapath, names: &Names, name: &str) -> Result<Vec<Flow>> {
    let addr = name.parse::<IpAddr>().ok();
    let ids = datapath.client_id_keys(name)?;
    let is_its = |key: Key, f: &flow| {
        Some(key.client.ip()) == addr || flow_client(f).is_some_and(|id| ids.contains(&id))
    };
    let mut found: Vec<(Key, flow)> = Vec::new();
    datapath.for_each_flow(|key, f| found.extend(is_its(key, &f).then_some((key, f))))?;
    found.sort_by_key(|(key, _)| (key.service, key.client));
    let mut rows = Rows::of(datapath, names);
    found.into_iter().map(|(key, f)| rows.row(key, &f)).collect()
}

/// The flows from one address and port, of all services.
pub fn flows_from(datapath: &Datapath, names: &Names, client: SocketAddr) -> Result<Vec<Flow>> {
    let mut rows = Rows::of(datapath, names);
    let mut found = Vec::new();
    for service in datapath.service_numbers()?.into_values().collect::<BTreeSet<_>>() {
        if let Some((key, f)) = datapath.flow(client, service)? {
            found.push(rows.row(key, &f)?);
        }
    }
    Ok(found)
}

/// What is known of one flow while a capture is replayed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Followed {
    pub bound_by: &'static str,
    pub fallback_reason: Option<&'static str>,
    /// Bound by a route that names the client.
    pub routed: bool,
    /// Where it was ended, and whether the rest was handed to the sidecar.
    pub ended: Option<(u32, bool)>,
}

/// The flow of a client to a service's number.
pub fn follow(datapath: &Datapath, client: SocketAddr, service: u16) -> Result<Option<Followed>> {
    Ok(datapath.flow(client, service)?.map(|(_, f)| {
        let predicted = has(&f, flow_flags::FLOW_PREDICTED);
        let (bound_by, fallback_reason) = binding_codes(f.bound_by, f.fallback_reason, predicted);
        Followed {
            bound_by,
            fallback_reason,
            routed: has(&f, flow_flags::FLOW_ROUTED),
            ended: has(&f, flow_flags::FLOW_ENDED)
                .then_some((flow_end_seq(&f), has(&f, flow_flags::FLOW_RESCUED))),
        }
    }))
}

/// A topic, and the flows that publish it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TopicUse {
    pub topic: String,
    pub group: String,
    pub flows: u64,
    pub misrouted: u64,
}

/// Live flows, counted by group and topic.
#[derive(Debug)]
pub struct FlowCounts {
    pub all: u64,
    by_group: HashMap<(String, String), u64>,
    /// The topics that most flows publish, first.
    pub topics: Vec<TopicUse>,
}

impl FlowCounts {
    /// Counts, and names the first `most` topics.
    pub fn read(datapath: &Datapath, names: &Names, most: usize) -> Result<Self> {
        let mut all = 0;
        let mut by_binding: HashMap<(u16, u32), u64> = HashMap::new();
        let mut by_topic: HashMap<u64, (u32, u64, u64)> = HashMap::new();
        datapath.for_each_standing(|key, f| {
            if is_over(&f) {
                return;
            }
            all += 1;
            let binding = flow_binding(&f);
            *by_binding.entry((key.service, binding)).or_default() += 1;
            if f.topic != 0 {
                let entry = by_topic.entry(f.topic).or_insert((binding, 0, 0));
                entry.1 += 1;
                entry.2 += u64::from(has(&f, flow_flags::FLOW_MISROUTED));
            }
        })?;
        let mut by_group: HashMap<_, u64> = HashMap::new();
        for ((service, binding), n) in by_binding {
            *by_group.entry((names.service(service), names.bound(binding))).or_default() += n;
        }
        let mut topics: Vec<_> = by_topic.into_iter().collect();
        topics.sort_by_key(|(hash, (_, flows, _))| (std::cmp::Reverse(*flows), *hash));
        topics.truncate(most);
        let mut texts = Topics::of(datapath);
        let topics = topics
            .into_iter()
            .map(|(hash, (binding, flows, misrouted))| {
                let topic = texts.text(hash)?;
                Ok(TopicUse { topic, group: names.bound(binding), flows, misrouted })
            })
            .collect::<Result<_>>()?;
        Ok(Self { all, by_group, topics })
    }

    /// Those of a service's group.
    pub fn of_group(&self, service: &str, group: &str) -> u64 {
        let key = (service.to_owned(), group.to_owned());
        self.by_group.get(&key).copied().unwrap_or_default()
    }
}

/// How a connection is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Termination {
    /// RST to the client: its broker does not answer any more.
    Reset,
    /// DISCONNECT and FIN to the broker in place of what the client sends, as for a misrouted PUBLISH: no will is
    /// published, and the broker closes.
    Disconnect,
}

/// Tells whether a flow is a real's: its groups have that real still, so the balancer's choice tells.
pub struct FlowsOfReal<'a> {
    config: &'a Config,
    datapath: &'a Datapath,
    balancer: Option<RealOfFlow>,
    groups: BTreeMap<u16, group>,
}

impl<'a> FlowsOfReal<'a> {
    /// Reads groups, and opens the balancer's program.
    pub fn open(config: &'a Config, datapath: &'a Datapath) -> Result<Self> {
        let groups = datapath.groups()?.into_iter().collect();
        Ok(Self { config, datapath, balancer: RealOfFlow::open(config), groups })
    }

    /// The live flows of a real, of a service or of all.
    pub fn list(&self, service: Option<&str>, real: IpAddr) -> Result<Vec<Key>> {
        let mut found = Vec::new();
        self.datapath.for_each_standing(|key, f| {
            found.extend(self.is_of(key.client, &f, service, real).then_some(key));
        })?;
        Ok(found)
    }

    /// Whether a flow that was the real's still is: its client may have opened another connection from the same
    /// port since, which is at another real.
    pub fn has(&self, key: Key, real: IpAddr) -> bool {
        let found = self.datapath.flows.get(key.place).ok().flatten();
        found.filter(|f| f.id == key.id).is_some_and(|f| self.is_of(key.client, &f, None, real))
    }

    fn is_of(&self, client: SocketAddr, f: &flow, service: Option<&str>, real: IpAddr) -> bool {
        let (id, epoch) = binding_parts(flow_binding(f));
        let bound = self.groups.get(&id).filter(|g| g.epoch == epoch && !is_over(f));
        let (Some(bound), Some(balancer)) = (bound, &self.balancer) else { return false };
        let vip = words_addr(bound.vip, client.is_ipv6());
        let has_real = |service: &&crate::config::Service| {
            let group = service.group_at(vip);
            group.is_some_and(|group| group.reals.iter().any(|r| r.addr == real))
        };
        let Some(of) = self.config.services.iter().find(has_real) else { return false };
        service.is_none_or(|wanted| wanted == of.name)
            && balancer.real_of(client, SocketAddr::new(vip, of.port)) == Some(real)
    }
}

/// Marks flows: each is ended by the segment that its client sends next, as only then the numbers are known that end
/// a TCP connection for sure. Returns how many of them are still there.
pub fn terminate(datapath: &Datapath, flows: &[Key], how: Termination) -> Result<usize> {
    let mapped = datapath.flows.mapped()?;
    let mut marked = 0;
    for key in flows {
        let found = datapath.flows.get(key.place)?.filter(|f| f.id == key.id && !is_over(f));
        marked += usize::from(found.is_some_and(|f| mark(&mapped, key, f, how)));
    }
    Ok(marked)
}

/// A packet that comes at the same moment may be framed by what was there before; the flow is ended by the next one
/// then.
fn mark(flows: &Mapped, key: &Key, mut f: flow, how: Termination) -> bool {
    // DISCONNECT means nothing in what is not MQTT.
    let how = if has(&f, flow_flags::FLOW_OPAQUE) { Termination::Reset } else { how };
    let mut flags = flow_flags::FLOW_ENDED.0;
    let end = f.end;
    set_end_seq(&mut f, end);
    match how {
        Termination::Reset => {
            // A rescue that no sidecar began is answered with RST.
            flags |= flow_flags::FLOW_RESCUED.0;
            set_rescue(&mut f, boot_time().as_millis() as u32, 0);
        }
        Termination::Disconnect => {
            let is_between =
                flow_next(&f) == f.end && parser(u32::from(f.parser)) == parser::PARSER_TYPE;
            if !is_between {
                flags |= flow_flags::FLOW_END_INSIDE.0;
            }
        }
    }
    flows.mark(key.place, &f, flags as u16)
}
