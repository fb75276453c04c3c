//! Why something goes where it goes: a topic, a client, a flow.

use std::net::{IpAddr, SocketAddr};

use super::api::proto;
use super::known::{self, By, Known};
use super::reals_of_flows::Balancer;
use super::replay::Trials;
use super::view::{self, Names};
use super::{Error, Result};
use crate::config::{Binding, Config, Service};
use crate::datapath::Datapath;
use crate::domain::filter::{Level, TopicFilter};

/// Of each service.
pub fn topic(config: &Config, topic: &str) -> Result<Vec<proto::TopicExplanation>> {
    // MQTT 3.1.1 §4.7.
    if topic.is_empty() || topic.contains(['+', '#', '\0']) {
        return Err(Error::Refused(format!("{topic:?} is no topic that can be published to")));
    }
    Ok(config.services.iter().map(|service| topic_of(service, topic)).collect())
}

fn topic_of(service: &Service, topic: &str) -> proto::TopicExplanation {
    let mut matching: Vec<_> =
        service.routes.iter().filter(|route| route.filter.matches(topic)).collect();
    matching.sort_by(|a, b| b.filter.specificity(&a.filter));
    let belongs_to = matching.first().map_or(&*service.default_group, |r| r.target.name());
    let group = service.group(belongs_to);
    let beaten = matching.iter().skip(1).map(|route| proto::BeatenRoute {
        route: route.filter.to_string(),
        belongs_to: route.target.name().to_owned(),
        at_level: first_difference(&matching[0].filter, &route.filter) as u32,
    });
    proto::TopicExplanation {
        service: service.name.clone(),
        topic: topic.to_owned(),
        route: matching.first().map(|route| route.filter.to_string()),
        belongs_to: belongs_to.to_owned(),
        beaten: beaten.collect(),
        reals: group
            .into_iter()
            .flat_map(|g| g.reals.iter().filter(|r| r.weight > 0).map(|r| r.addr.to_string()))
            .collect(),
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

/// By address or client id, of each service that knows it.
pub fn client(config: &Config, client: &str) -> Result<Vec<proto::ClientExplanation>> {
    let datapath = Datapath::open(&config.pins())?;
    let names = Names::read(config, &datapath)?;
    let flows: Vec<_> = view::flows(&datapath, &names)?.collect::<Result<_>>()?;
    let known = known::collect(config, &datapath, usize::MAX)?;
    let known: Vec<Known> = known.into_iter().filter(|record| record.client == client).collect();
    if known.is_empty() {
        return Err(Error::Refused(format!(
            "nothing is known of a client {client}: {}",
            flows.iter().find(|flow| is_of(flow, client)).map_or_else(
                || "it is bound as one that was never seen before (`mqtt-fwd clients` lists those \
                    that are known)"
                    .to_owned(),
                connected_unknown
            )
        )));
    }
    known
        .into_iter()
        .map(|record| {
            let is_its = |flow: &proto::Flow| flow.service == record.service && is_of(flow, client);
            Ok(proto::ClientExplanation {
                trials: trials(config, &record)?,
                flows: flows.iter().filter(|flow| is_its(flow)).cloned().collect(),
                record: Some(record.into()),
            })
        })
        .collect()
}

/// Whether a flow is a client's, which is named by its address or client id.
fn is_of(flow: &proto::Flow, client: &str) -> bool {
    let address = flow.client.parse().map(|client: SocketAddr| client.ip());
    flow.client_id == client || address.is_ok_and(|ip| ip.to_string() == client)
}

/// What to ask for where an address has a flow and no record.
fn connected_unknown(flow: &proto::Flow) -> String {
    if !flow.client_id.is_empty() && flow.client_id != view::FORGOTTEN {
        return format!(
            "{} is known by its client id (`mqtt-fwd explain client {}`)",
            flow.client, flow.client_id
        );
    }
    let why = if flow.topic.is_empty() {
        "has published nothing yet"
    } else {
        "its record has been evicted"
    };
    format!("it has a connection, but {why} (`mqtt-fwd explain flow {}`)", flow.client)
}

/// An address that no client has (RFC 5737, RFC 3849), for those that are known by their id.
fn nobody(v6: bool) -> IpAddr {
    if v6 { [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into() } else { [192, 0, 2, 1].into() }
}

/// What its connections come to: tried in the program itself, with its record and nobody else's.
fn trials(config: &Config, record: &Known) -> Result<Vec<proto::Trial>> {
    let service = config.services.iter().find(|service| service.name == record.service);
    let Some(service) = service else { return Ok(Vec::new()) };
    let (client, id) = match record.by {
        By::Address => match record.client.parse() {
            Ok(client) => (client, ""),
            Err(_) => return Ok(Vec::new()),
        },
        By::ClientId => (nobody(service.addr.is_ipv6()), record.client.as_str()),
    };
    let mut openings = vec![("CONNECT of MQTT 3.1.1, clean session, nothing else yet", 4)];
    if service.binding == Binding::Delayed {
        openings.push(("CONNECT of MQTT 5, nothing else yet", 5));
    } else {
        openings[0].0 = "SYN";
    }
    let mut trials = Trials::new(config, record)?;
    openings
        .into_iter()
        .map(|(opening, level)| {
            let (group, flow) = trials.connect(service, client, connect(level, id))?;
            Ok(proto::Trial {
                opening: opening.to_owned(),
                group,
                bound_by: flow.bound_by.to_owned(),
                why: flow.why.map(str::to_owned),
            })
        })
        .collect()
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
    crate::relay::scan::put_varint(body.len(), &mut packet);
    packet.extend(body);
    packet
}

/// By the client's address and port.
pub fn flow(config: &Config, client: SocketAddr) -> Result<Vec<proto::FlowExplanation>> {
    let datapath = Datapath::open(&config.pins())?;
    let names = Names::read(config, &datapath)?;
    let text = client.to_string();
    let is_it = |row: &Result<proto::Flow>| row.as_ref().map_or(true, |row| row.client == text);
    let found: Vec<_> = view::flows(&datapath, &names)?.filter(is_it).collect::<Result<_>>()?;
    if found.is_empty() {
        return Err(Error::Refused(format!(
            "no flow of {client} is known (`mqtt-fwd flows` lists those that are)"
        )));
    }
    let balancer = Balancer::open(config);
    let explained = found.into_iter().map(|row| {
        let service = config.services.iter().find(|service| service.name == row.service);
        let vip = row.vip.as_ref().and_then(|vip| vip.parse::<IpAddr>().ok());
        let real = service
            .zip(vip)
            .and_then(|(s, vip)| balancer.as_ref()?.real_of(client, SocketAddr::new(vip, s.port)));
        proto::FlowExplanation {
            real: real.map(|real| real.to_string()),
            topic: service.filter(|_| !row.topic.is_empty()).map(|s| topic_of(s, &row.topic)),
            flow: Some(row),
        }
    });
    Ok(explained.collect())
}
