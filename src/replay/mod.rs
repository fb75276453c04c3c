//! What would become of captured traffic: it goes through the program that is shipped, loaded for this alone,
//! with a configuration's services and routes.

mod capture;
mod connection;
mod stream;

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use etherparse::TcpHeader;
use serde::Serialize;

use self::capture::{CaptureError, Segment};
use self::connection::{Connection, Fate};
use crate::config::{Config, Service};
use crate::datapath::Datapath;
use crate::datapath::clients::{GroupNumbers, restore};
use crate::datapath::flows::{Followed, follow};
use crate::datapath::plan::{MapPlan, PlanError};
use crate::domain::client_record::ClientRecord;
use crate::domain::{ANY, CookieKeys, MapSizes, Protocol};
use crate::handover::hello::Asked;
use crate::handover::keys::KeyError;
use crate::kernel::sandbox::{Sandbox, Storage};
use crate::kernel::{self, BpfError};

/// For services that leave out `max_packet`.
const MTU: u32 = 1500;

/// Why a capture is not replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("{path}: {source}")]
    Capture { path: PathBuf, source: CaptureError },
    #[error("no service is of the IP version of {0}; leave out --server, or name another address")]
    IpVersion(SocketAddr),
}

type Result<T, E = ReplayError> = std::result::Result<T, E>;

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
    pub fallback_reason: Option<&'static str>,
}

/// A connection to a service that speaks TLS, whose messages nobody can read.
#[derive(Debug, Clone, Serialize)]
pub struct TlsConnection {
    /// Seconds since 1970-01-01T00:00:00Z.
    pub time: f64,
    pub service: String,
    pub client: SocketAddr,
    /// That its ClientHello asked for.
    pub server_name: Option<String>,
    /// None: it was refused, or not bound in the capture's time.
    pub went_to: Option<String>,
    pub bound_by: &'static str,
    pub fallback_reason: Option<&'static str>,
}

/// All that a capture shows.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// In the order of their times.
    pub messages: Vec<Message>,
    /// In the order of their times.
    pub tls: Vec<TlsConnection>,
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
        return Err(ReplayError::IpVersion(server));
    }
    let mut storage = MaybeUninit::uninit();
    let mut replay = Replay::new(config, &config.maps, server, &mut storage)?;
    let mut failed = None;
    let read = capture::read(path, |segment| {
        if failed.is_none() {
            failed = replay.take(&segment).err();
        }
    });
    read.map_err(|source| ReplayError::Capture { path: path.to_owned(), source })?;
    match failed {
        Some(error) => Err(error),
        None => Ok(replay.finish()),
    }
}

struct Replay<'a> {
    sandbox: Sandbox<'a>,
    datapath: Datapath,
    /// A captured address, and the service that it stands for.
    targets: HashMap<SocketAddr, (&'a Service, u16)>,
    connections: HashMap<(SocketAddr, SocketAddr), Connection>,
    rescues: bool,
    report: Report,
}

impl<'a> Replay<'a> {
    fn new(
        config: &'a Config,
        sizes: &MapSizes,
        server: Option<SocketAddr>,
        storage: &'a mut Storage,
    ) -> Result<Self> {
        let sandbox = Sandbox::load(sizes, storage)?;
        let datapath = Datapath::of(sandbox.maps())?;
        MapPlan::of(config, &datapath, MTU)?.carry_out(&datapath)?;
        // Any key will do: SYN-ACKs are checked by who made them.
        datapath.put_cookie_keys(&CookieKeys::random()?)?;
        let rescues = config.services.iter().any(Service::rescues);
        if rescues {
            datapath.put_rescuer(Duration::MAX, 1, false)?;
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
        if service.protocol == Protocol::Tls {
            connection.keep_hello(segment);
            // What the sidecar does (`handover::hellos`).
            if let Some(hello) = self.datapath.hello(segment.from, number)?
                && let Asked::For { name, protocols } = connection.asked()
            {
                let protocols: Vec<&str> = protocols.iter().map(String::as_str).collect();
                let route = service.group_of_hello(name.as_deref().unwrap_or(""), &protocols);
                self.datapath.decide_hello(&hello, route, &mut GroupNumbers::default())?;
                connection.say_hello_again(&self.sandbox, segment)?;
            }
        }
        if !segment.payload.is_empty()
            && let Some(flow) = follow(&self.datapath, segment.from, number)?
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
        if service.protocol == Protocol::Tls {
            self.report.tls.push(tls_connection(service, &connection));
            return;
        }
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
            .tls
            .sort_by(|a, b| a.time.total_cmp(&b.time).then_with(|| a.client.cmp(&b.client)));
        self.report
    }
}

/// Entries of most maps: a trial is of one client and a few connections.
const TRIAL_ENTRIES: u32 = 256;

/// Connections that are tried, with one client's record and nobody else's.
pub struct Trials<'a> {
    replay: Replay<'a>,
    /// Of the next one.
    port: u16,
}

impl<'a> Trials<'a> {
    /// With this record.
    pub fn new(
        config: &'a Config,
        record: &ClientRecord,
        storage: &'a mut Storage,
    ) -> Result<Self> {
        let sizes = MapSizes {
            clients: TRIAL_ENTRIES,
            flows: TRIAL_ENTRIES,
            client_ids: TRIAL_ENTRIES,
            handovers: TRIAL_ENTRIES,
            topics: TRIAL_ENTRIES,
            route_states: TRIAL_ENTRIES.min(config.maps.route_states),
            groups: config.maps.groups,
            vips: config.maps.vips,
            fleet_reports: config.maps.fleet_reports,
        };
        let replay = Replay::new(config, &sizes, None, storage)?;
        restore(config, &replay.datapath, vec![record.clone()])?;
        Ok(Self { replay, port: 40_000 })
    }

    /// SYN, and a first segment with CONNECT. Returns the group that the connection is bound to by then, if any.
    pub fn connect(
        &mut self,
        service: &Service,
        client: IpAddr,
        connect: Vec<u8>,
    ) -> Result<(Option<String>, Followed)> {
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
        let group = connection.as_ref().and_then(|c| service.group_at(c.vip()?));
        Ok((group.map(|g| g.name.clone()), connection.map_or_else(Followed::default, |c| c.flow)))
    }
}

/// The services by their addresses, with their numbers in the datapath.
fn targets<'a>(
    config: &'a Config,
    datapath: &Datapath,
    server: Option<SocketAddr>,
) -> kernel::Result<HashMap<SocketAddr, (&'a Service, u16)>> {
    let numbers = datapath.service_numbers()?;
    let mut targets = HashMap::new();
    for service in &config.services {
        let addr = SocketAddr::new(service.addr, service.port);
        let Some(number) = numbers.get(&addr) else { continue };
        targets.insert(addr, (service, *number));
        if let Some(server) = server.filter(|s| s.is_ipv4() == service.addr.is_ipv4()) {
            targets.entry(server).or_insert((service, *number));
        }
    }
    Ok(targets)
}

fn tls_connection(service: &Service, connection: &Connection) -> TlsConnection {
    let group = connection.vip().and_then(|vip| service.group_at(vip));
    TlsConnection {
        time: Duration::as_secs_f64(&connection.began),
        service: service.name.clone(),
        client: connection.client,
        server_name: match connection.asked() {
            Asked::For { name, .. } => name,
            Asked::More | Asked::Nothing => None,
        },
        went_to: group.map(|group| group.name.clone()),
        bound_by: connection.flow.bound_by,
        fallback_reason: connection.flow.fallback_reason,
    }
}

fn judge(service: &Service, connection: &Connection, fate: Fate) -> Message {
    let Fate { time, publish, vip, behind_end } = fate;
    let belongs_to = publish.topic.as_deref().map_or("?", |topic| service.group_name_of(topic));
    let group = vip.and_then(|vip| service.group_at(vip));
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
                || belongs_to == ANY =>
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
        fallback_reason: connection.flow.fallback_reason,
    }
}
