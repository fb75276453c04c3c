//! What would become of captured traffic: it goes through the program that is shipped, loaded for this alone,
//! with a configuration's services and routes.

mod capture;
mod connection;
mod stream;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use etherparse::TcpHeader;
use serde::Serialize;

use self::capture::Segment;
use self::connection::{Connection, Fate, Flow};
use super::known::{self, Known};
use super::reconcile::{apply, plan};
use super::{Error, Result, view};
use crate::config::{Config, Group, OnMisprediction, Real, Service};
use crate::datapath::Datapath;
use crate::domain::Target;
use crate::domain::filter::most_specific;
use crate::kernel::abi::{Pod as _, addr_words, flow_flags, flow4, flow6, handover_keys, rescuer};
use crate::kernel::sandbox::Sandbox;

/// For services that leave out `max_packet`.
const MTU: u32 = 1500;

/// What became of a PUBLISH.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// At a broker of its group, or at the relay, which knows where it belongs.
    Right,
    /// Published by the sidecar, behind the end of its flow.
    Rescued,
    /// At a broker of another group.
    Misrouted,
    /// Nowhere: behind the end of a flow that was bound to another group. Its client sends it again if it is one
    /// that does.
    Lost,
    /// Not forwarded: its connection was not bound in the capture's time.
    Waiting,
}

/// A PUBLISH.
#[derive(Debug, Clone, Serialize)]
pub struct Message {
    /// Seconds since 1970-01-01T00:00:00Z.
    pub time: f64,
    pub service: String,
    pub client: SocketAddr,
    pub client_id: String,
    pub topic: String,
    pub qos: u8,
    /// The group of its topic, or "any".
    pub belongs_to: String,
    /// The group that its flow is bound to.
    pub went_to: Option<String>,
    pub outcome: Outcome,
    pub bound_by: &'static str,
    pub why: Option<&'static str>,
}

/// All that a capture shows.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// In the order of their times.
    pub messages: Vec<Message>,
    /// Those that began in the capture.
    pub connections: usize,
    /// Of these, those that were bound to another group than a message's, and ended for that. Their clients
    /// would have connected again, and lost fewer messages than the capture has behind that point.
    pub ended_connections: usize,
    /// Of these, those of which not all could be read: something is missing in the capture, or it is no MQTT.
    pub unread_connections: usize,
    /// Those that did not: nothing can be said of their messages.
    pub unjudged_connections: usize,
    /// TCP segments for other addresses than services'.
    pub other_segments: usize,
}

/// Replays a capture. `server`: the address in the capture that stands for the first service of its IP version,
/// if it was taken elsewhere than in front of the balancer.
pub fn replay(config: &Config, path: &Path, server: Option<SocketAddr>) -> Result<Report> {
    let fits = |server: SocketAddr| {
        config.services.iter().any(|service| service.addr.is_ipv4() == server.is_ipv4())
    };
    if let Some(server) = server.filter(|server| !fits(*server)) {
        return Err(Error::Refused(format!("no service is of the IP version of {server}")));
    }
    let mut replay = Replay::new(config, server)?;
    let mut failed = None;
    let read = capture::read(path, |segment| {
        if failed.is_none() {
            failed = replay.take(&segment).err();
        }
    });
    read.map_err(|e| Error::Refused(format!("{}: {e}", path.display())))?;
    match failed {
        Some(error) => Err(error),
        None => Ok(replay.finish()),
    }
}

struct Replay<'a> {
    sandbox: Sandbox,
    datapath: Datapath,
    /// A captured address, and the service that it stands for.
    targets: HashMap<SocketAddr, (&'a Service, u16)>,
    connections: HashMap<(SocketAddr, SocketAddr), Connection>,
    rescues: bool,
    report: Report,
}

impl<'a> Replay<'a> {
    fn new(config: &'a Config, server: Option<SocketAddr>) -> Result<Self> {
        let sandbox = Sandbox::load(&config.maps)?;
        let datapath = Datapath::of(sandbox.maps())?;
        let plan = plan::plan_maps(config, &datapath, MTU)?;
        // What is in force here is nobody's to hear of.
        let silent = tracing::subscriber::NoSubscriber::default();
        tracing::subscriber::with_default(silent, || apply::carry_out_maps(&plan, &datapath))?;
        // Any key will do: SYN-ACKs are checked by who made them.
        let mut keys = handover_keys::zeroed();
        for word in keys.key.iter_mut().flatten() {
            *word =
                getrandom::u64().map_err(|e| Error::Embedded(format!("random numbers: {e}")))?;
        }
        datapath.handover_keys.put(&0, &keys)?;
        let rescues = config.services.iter().any(|s| s.on_misprediction == OnMisprediction::Rescue);
        if rescues {
            datapath.rescuer.put(&0, &rescuer { until: u64::MAX, instance: 1, full: 0 })?;
        }
        let targets = targets(config, &datapath, server)?;
        Ok(Self {
            sandbox,
            datapath,
            targets,
            connections: HashMap::new(),
            rescues,
            report: Report::default(),
        })
    }

    fn take(&mut self, segment: &Segment) -> Result<()> {
        let Some((service, number)) = self.targets.get(&segment.to).copied() else {
            self.report.other_segments += 1;
            return Ok(());
        };
        let key = (segment.from, segment.to);
        if self.connections.get(&key).is_some_and(|there| there.is_over(segment))
            && let Some(over) = self.connections.remove(&key)
        {
            self.end(service, over);
        }
        let address = SocketAddr::new(service.addr, service.port);
        let connection =
            self.connections.entry(key).or_insert_with(|| Connection::new(segment, address));
        connection.take(&self.sandbox, segment)?;
        if !segment.payload.is_empty()
            && let Some(flow) = flow(&self.datapath, segment.from, number)?
        {
            connection.flow = flow;
        }
        if self.rescues {
            self.sandbox.discard_rescues()?;
        }
        Ok(())
    }

    fn end(&mut self, service: &Service, mut connection: Connection) {
        if !connection.is_whole {
            self.report.unjudged_connections += 1;
            return;
        }
        self.report.connections += 1;
        self.report.unread_connections += usize::from(!connection.stream.is_read());
        self.report.ended_connections += usize::from(connection.flow.ended.is_some());
        let fates = connection.fates();
        let judged = fates.into_iter().map(|fate| judge(service, &connection, fate));
        self.report.messages.extend(judged);
    }

    fn finish(mut self) -> Report {
        for ((_, to), connection) in std::mem::take(&mut self.connections) {
            if let Some((service, _)) = self.targets.get(&to).copied() {
                self.end(service, connection);
            }
        }
        self.report
            .messages
            .sort_by(|a, b| a.time.total_cmp(&b.time).then_with(|| a.client.cmp(&b.client)));
        self.report
    }
}

/// Connections that are tried, with what is known of one client and of nobody else.
pub struct Trials<'a> {
    replay: Replay<'a>,
    /// Of the next one.
    port: u16,
}

impl<'a> Trials<'a> {
    /// With this record.
    pub fn new(config: &'a Config, record: &Known) -> Result<Self> {
        let replay = Replay::new(config, None)?;
        known::restore(config, &replay.datapath, vec![record.clone()])?;
        Ok(Self { replay, port: 40_000 })
    }

    /// SYN, and a first segment with CONNECT. Returns the group that the connection is bound to by then, if any.
    pub fn connect(
        &mut self,
        service: &Service,
        client: IpAddr,
        connect: Vec<u8>,
    ) -> Result<(Option<String>, Flow)> {
        let from = SocketAddr::new(client, self.port);
        let to = SocketAddr::new(service.addr, service.port);
        self.port += 1;
        let segment = |seq, ack, payload| {
            let mut tcp = TcpHeader::new(from.port(), to.port(), seq, 65_000);
            (tcp.syn, tcp.ack, tcp.acknowledgment_number) = (ack == 0, ack != 0, ack);
            Segment { time: Duration::ZERO, from, to, tcp, payload }
        };
        self.replay.take(&segment(1000, 0, Vec::new()))?;
        self.replay.take(&segment(1001, 1, connect))?;
        let connection = self.replay.connections.remove(&(from, to));
        let group = connection.as_ref().and_then(|c| group_at(service, c.vip()?));
        Ok((group.map(|g| g.name.clone()), connection.map_or_else(Flow::default, |c| c.flow)))
    }
}

/// The group with a VIP: of its own, or of one of its reals.
fn group_at(service: &Service, vip: IpAddr) -> Option<&Group> {
    let is_vip = |real: &Real| real.vip == Some(vip);
    service.groups.iter().find(|group| group.vip == vip || group.reals.iter().any(is_vip))
}

/// The services by their addresses, with their numbers in the datapath.
fn targets<'a>(
    config: &'a Config,
    datapath: &Datapath,
    server: Option<SocketAddr>,
) -> Result<HashMap<SocketAddr, (&'a Service, u16)>> {
    let table = datapath.service_table()?;
    let in_force = &table.service[..usize::from(table.count)];
    let mut targets = HashMap::new();
    for service in &config.services {
        let there = in_force
            .iter()
            .find(|s| s.addr == addr_words(service.addr) && u16::from_be(s.port) == service.port);
        let Some(there) = there else { continue };
        targets.insert(SocketAddr::new(service.addr, service.port), (service, there.id));
        if let Some(server) = server.filter(|s| s.is_ipv4() == service.addr.is_ipv4()) {
            targets.entry(server).or_insert((service, there.id));
        }
    }
    Ok(targets)
}

/// What the datapath knows of a client's flow.
fn flow(datapath: &Datapath, client: SocketAddr, service: u16) -> Result<Option<Flow>> {
    let port = client.port().to_be();
    let found = match client.ip() {
        IpAddr::V4(addr) => {
            let key = flow4 { addr: u32::from_ne_bytes(addr.octets()), port, service };
            datapath.flows.get(&key)?.or(datapath.flows_weak.get(&key)?)
        }
        IpAddr::V6(_) => {
            let key = flow6 { addr: addr_words(client.ip()), port, service };
            datapath.flows6.get(&key)?.or(datapath.flows6_weak.get(&key)?)
        }
    };
    Ok(found.map(|f| {
        let has = |flag: flow_flags| u32::from(f.flags) & flag.0 != 0;
        let (bound_by, why) = view::way_text(f.way, f.why, has(flow_flags::FLOW_PREDICTED));
        Flow {
            bound_by,
            why,
            routed: has(flow_flags::FLOW_ROUTED),
            ended: has(flow_flags::FLOW_ENDED)
                .then_some((f.cut_seq, has(flow_flags::FLOW_RESCUED))),
        }
    }))
}

fn judge(service: &Service, connection: &Connection, fate: Fate) -> Message {
    let Fate { time, publish, vip, behind_end } = fate;
    let belongs_to = publish.topic.as_deref().map_or("?", |topic| {
        let filter = most_specific(service.routes.iter().map(|r| &r.filter), topic);
        let route = filter.and_then(|f| service.routes.iter().find(|r| r.filter == *f));
        route.map_or(service.default_group.as_str(), |route| route.target.name())
    });
    let group = vip.and_then(|vip| group_at(service, vip));
    let is_relay = |name: &str| service.relay.as_deref() == Some(name);
    let outcome = match (&group, behind_end) {
        (_, Some(true)) => Outcome::Rescued,
        (_, Some(false)) => Outcome::Lost,
        (None, None) => Outcome::Waiting,
        (Some(group), None)
            if group.name == belongs_to
                || is_relay(&group.name)
                || connection.flow.routed
                || publish.topic.is_none()
                || belongs_to == Target::Any.name() =>
        {
            Outcome::Right
        }
        _ => Outcome::Misrouted,
    };
    Message {
        time: Duration::as_secs_f64(&time),
        service: service.name.clone(),
        client: connection.client,
        client_id: connection.stream.client_id().unwrap_or_default().to_owned(),
        topic: publish.topic.clone().unwrap_or_else(|| "(alias of before)".to_owned()),
        qos: publish.qos,
        belongs_to: belongs_to.to_owned(),
        went_to: group.map(|g| g.name.clone()),
        outcome,
        bound_by: connection.flow.bound_by,
        why: connection.flow.why,
    }
}
