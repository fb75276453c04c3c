//! Why something goes where it goes: a topic, a client, a flow.

use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use super::{Context, Result};
use crate::config::{Binding, Config, Group, Service};
use crate::datapath::clients::records_of;
use crate::datapath::flows::{Flow, flows_from, flows_of_client};
use crate::datapath::names::{EVICTED, Names};
use crate::datapath::real_of_flow::RealOfFlow;
use crate::domain::client_record::{ClientRecord, IdentifiedBy};
use crate::domain::filter::{Level, TopicFilter};
use crate::domain::{ClientRoute, ClientRouteKind, Protocol};
use crate::mqtt::wire::put_varint;
use crate::replay::Trials;

/// What there is nothing to say of.
#[derive(Debug, thiserror::Error)]
pub enum Unknown {
    #[error("{0:?} is no topic that can be published to")]
    Topic(String),
    #[error("nothing is known of a client {client}: {reason}")]
    Client { client: String, reason: String },
    #[error("no flow of {0} is known (`mqtt-fwd flows` lists those that are)")]
    Flow(SocketAddr),
}

/// The route that a topic takes, and those that it does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TopicExplanation {
    pub service: String,
    pub topic: String,
    /// None: no route matches.
    pub route: Option<String>,
    /// A group, or "any".
    pub belongs_to: String,
    /// Routes that match, too, the most specific first.
    pub beaten: Vec<BeatenRoute>,
    /// Addresses of the group's reals that get connections.
    pub reals: Vec<String>,
}

/// A route that matches a topic, and is not the most specific.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BeatenRoute {
    pub route: String,
    pub belongs_to: String,
    /// The first level, counted from 1, where the other one is more specific.
    pub at_level: u32,
}

/// The route that a ClientHello takes, and those that it does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServerNameExplanation {
    pub service: String,
    pub server_name: String,
    /// None: no route matches.
    pub route: Option<String>,
    /// None: refused with the alert unrecognized_name.
    pub belongs_to: Option<String>,
    /// Routes that match, too, with their groups.
    pub beaten: Vec<String>,
    /// Addresses of the group's reals that get connections.
    pub reals: Vec<String>,
}

/// A client's record, and the outcome of its next connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ClientExplanation {
    pub record: ClientRecord,
    pub trials: Vec<Trial>,
    pub flows: Vec<Flow>,
}

/// A connection that was tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Trial {
    /// What it begins with.
    pub opening: String,
    /// None: it is answered, and what comes next decides.
    pub group: Option<String>,
    pub bound_by: String,
    pub fallback_reason: Option<String>,
}

/// A flow, and which of its group's reals has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FlowExplanation {
    #[serde(flatten)]
    pub flow: Flow,
    /// As the balancer says now; none: it does not.
    pub real: Option<String>,
    /// Of its last PUBLISH.
    pub route: Option<TopicExplanation>,
}

/// Of each service.
pub fn topic(config: &Config, topic: &str) -> Result<Vec<TopicExplanation>, Unknown> {
    // MQTT 3.1.1 §4.7.
    if topic.is_empty() || topic.contains(['+', '#', '\0']) {
        return Err(Unknown::Topic(topic.to_owned()));
    }
    Ok(config.services.iter().map(|service| topic_of(service, topic)).collect())
}

/// Of each service that speaks TLS. Of a client without a route, what was imported of its address may decide.
pub fn server_name(
    config: &Config,
    name: &str,
    protocols: &[String],
) -> Vec<ServerNameExplanation> {
    let protocols: Vec<&str> = protocols.iter().map(String::as_str).collect();
    let tls = config.services.iter().filter(|service| service.protocol == Protocol::Tls);
    tls.map(|service| server_name_of(service, name, &protocols)).collect()
}

fn server_name_of(service: &Service, name: &str, protocols: &[&str]) -> ServerNameExplanation {
    let text = |route: &ClientRoute| format!("{} {}", route.kind.key(), route.pattern());
    let route = service.group_of_hello(name, protocols);
    let last_resort = service.relay.as_ref().unwrap_or(&service.default_group);
    let belongs_to = match route {
        Some(route) => Some(&route.group),
        None => Some(last_resort).filter(|_| !service.refuses_unknown),
    };
    let matches = |other: &&ClientRoute| match other.kind {
        ClientRouteKind::Sni => !name.is_empty() && other.matches(name),
        _ => protocols.iter().any(|protocol| other.matches(protocol)),
    };
    let beaten = service.client_routes.iter().filter(|other| Some(*other) != route);
    let reals = belongs_to.and_then(|name| service.group(name));
    ServerNameExplanation {
        service: service.name.clone(),
        server_name: name.to_owned(),
        route: route.map(text),
        belongs_to: belongs_to.cloned(),
        beaten: beaten.filter(matches).map(|r| format!("{} (to {})", text(r), r.group)).collect(),
        reals: reals.map_or_else(Vec::new, addresses),
    }
}

/// Of the reals that get connections.
fn addresses(group: &Group) -> Vec<String> {
    group.reals.iter().filter(|real| real.weight > 0).map(|real| real.addr.to_string()).collect()
}

fn topic_of(service: &Service, topic: &str) -> TopicExplanation {
    let mut matching: Vec<_> =
        service.all_routes().filter(|route| route.filter.matches(topic)).collect();
    matching.sort_by(|a, b| b.filter.specificity(&a.filter));
    let belongs_to = matching.first().map_or(&*service.default_group, |r| r.target.name());
    let group = service.group(belongs_to);
    let beaten = matching.iter().skip(1).map(|route| BeatenRoute {
        route: route.filter.to_string(),
        belongs_to: route.target.name().to_owned(),
        at_level: first_difference(&matching[0].filter, &route.filter) as u32,
    });
    TopicExplanation {
        service: service.name.clone(),
        topic: topic.to_owned(),
        route: matching.first().map(|route| route.filter.to_string()),
        belongs_to: belongs_to.to_owned(),
        beaten: beaten.collect(),
        reals: group.map_or_else(Vec::new, addresses),
    }
}

/// Both match the same topic, so levels differ in kind.
fn first_difference(a: &TopicFilter, b: &TopicFilter) -> usize {
    let kind = |level: Option<&Level>| match level {
        Some(Level::Literal(_)) | None => 2,
        Some(Level::One) => 1,
        Some(Level::Rest) => 0,
    };
    let longest = a.levels().len().max(b.levels().len());
    let differs = |i: &usize| kind(a.levels().get(*i)) != kind(b.levels().get(*i));
    (0..longest).find(differs).map_or(longest, |i| i + 1)
}

/// By address or client id, of each service that has a record of it.
pub fn client(context: &Context, client: &str) -> Result<Vec<ClientExplanation>> {
    let config = context.config();
    let datapath = context.datapath()?;
    let names = Names::read(config, &datapath)?;
    let records = records_of(config, &datapath, client)?;
    let its_flows = flows_of_client(&datapath, &names, client)?;
    if records.is_empty() {
        let reason = its_flows.first().map_or_else(
            || {
                "it is bound as one that was never seen before (`mqtt-fwd clients` lists those \
                 that have a record)"
                    .to_owned()
            },
            connected_without_record,
        );
        return Err(Unknown::Client { client: client.to_owned(), reason }.into());
    }
    let explain = |record: ClientRecord| {
        let of_service = its_flows.iter().filter(|flow| flow.service == record.service);
        let flows = of_service.cloned().collect();
        Ok(ClientExplanation { trials: trials(config, &record)?, flows, record })
    };
    records.into_iter().map(explain).collect()
}

/// What to ask for where an address has a flow and no record.
fn connected_without_record(flow: &Flow) -> String {
    if !flow.client_id.is_empty() && flow.client_id != EVICTED {
        return format!(
            "{} is identified by its client id (`mqtt-fwd explain client {}`)",
            flow.client, flow.client_id
        );
    }
    let why = if flow.topic.is_empty() {
        "has published nothing yet"
    } else {
        "nothing was learned from it yet, or its record has been evicted"
    };
    format!("it has a connection, but {why} (`mqtt-fwd explain flow {}`)", flow.client)
}

/// An address that no client has (RFC 5737, RFC 3849), for those that are identified by their id.
fn nobody(v6: bool) -> IpAddr {
    if v6 { [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into() } else { [192, 0, 2, 1].into() }
}

/// What its connections come to: tried in the program itself, with its record and nobody else's.
fn trials(config: &Config, record: &ClientRecord) -> Result<Vec<Trial>> {
    let service = config.services.iter().find(|service| service.name == record.service);
    let Some(service) = service else { return Ok(Vec::new()) };
    let (client, id) = match record.by {
        IdentifiedBy::Address => match record.client.parse() {
            Ok(client) => (client, ""),
            Err(_) => return Ok(Vec::new()),
        },
        IdentifiedBy::ClientId => (nobody(service.addr.is_ipv6()), record.client.as_str()),
    };
    let mut openings = vec![("CONNECT of MQTT 3.1.1, clean session, nothing else yet", 4)];
    if service.binding == Binding::Delayed {
        openings.push(("CONNECT of MQTT 5, nothing else yet", 5));
    } else {
        openings[0].0 = "SYN";
    }
    let config = trial_config(config, service, record);
    let mut storage = MaybeUninit::uninit();
    let mut trials = Trials::new(&config, record, &mut storage)?;
    openings
        .into_iter()
        .map(|(opening, level)| {
            let (group, flow) = trials.connect(service, client, connect(level, id))?;
            Ok(Trial {
                opening: opening.to_owned(),
                group,
                bound_by: flow.bound_by.to_owned(),
                fallback_reason: flow.fallback_reason.map(str::to_owned),
            })
        })
        .collect()
}

/// The configuration with one service, and of its routes those that the record's topic takes.
fn trial_config(config: &Config, service: &Service, record: &ClientRecord) -> Config {
    let matching = service.routes.iter().filter(|route| route.filter.matches(&record.topic));
    let service = Service { routes: matching.cloned().collect(), ..service.clone() };
    Config { services: vec![service], ..config.clone() }
}

/// CONNECT (MQTT 3.1.1 §3.1, MQTT 5 §3.1): clean, without will and credentials.
fn connect(level: u8, id: &str) -> Vec<u8> {
    let mut body = b"\x00\x04MQTT".to_vec();
    body.extend([level, 2, 0, 60]);
    if level == 5 {
        body.push(0);
    }
    body.extend((id.len() as u16).to_be_bytes());
    body.extend(id.as_bytes());
    let mut packet = vec![0x10];
    put_varint(body.len(), &mut packet);
    packet.extend(body);
    packet
}

/// By the client's address and port.
pub fn flow(context: &Context, client: SocketAddr) -> Result<Vec<FlowExplanation>> {
    let config = context.config();
    let datapath = context.datapath()?;
    let names = Names::read(config, &datapath)?;
    let found = flows_from(&datapath, &names, client)?;
    if found.is_empty() {
        return Err(Unknown::Flow(client).into());
    }
    let balancer = RealOfFlow::open(config);
    let explained = found.into_iter().map(|flow| {
        let service = config.services.iter().find(|service| service.name == flow.service);
        let vip = flow.vip.as_ref().and_then(|vip| vip.parse::<IpAddr>().ok());
        let real = service
            .zip(vip)
            .and_then(|(s, vip)| balancer.as_ref()?.real_of(client, SocketAddr::new(vip, s.port)));
        FlowExplanation {
            real: real.map(|real| real.to_string()),
            route: service.filter(|_| !flow.topic.is_empty()).map(|s| topic_of(s, &flow.topic)),
            flow,
        }
    });
    Ok(explained.collect())
}
