//! `check` and `routes`: what the configuration means.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use serde::Serialize;

use super::error::Error;
use super::table::{self, Output, counted, line};
use crate::config::{Binding, Config, Group, Service};
use crate::datapath::Datapath;
use crate::datapath::plan::MapPlan;
use crate::domain::Affinity;
use crate::domain::health::CheckPath;
use crate::handover::keys::{KeyFile, now};
use crate::kernel::xdp;

#[derive(Serialize)]
struct Checked<'a> {
    path: &'a std::path::Path,
    services: Vec<CheckedService<'a>>,
}

#[derive(Serialize)]
struct CheckedService<'a> {
    name: &'a str,
    address: SocketAddr,
    routes: usize,
    groups: usize,
    reals: usize,
    default_group: &'a str,
    /// What it takes besides, or what follows from it, a sentence each.
    notes: Vec<String>,
}

pub fn check(config: &Config, output: Output) -> Result<(), Error> {
    // Where another configuration is in force, both have to fit for a moment.
    if let Ok(datapath) = Datapath::open(&config.pins())
        && let Ok(mtu) = xdp::interface_mtu(&config.interface)
    {
        MapPlan::of(config, &datapath, mtu)?;
    }
    let services: Vec<CheckedService<'_>> =
        config.services.iter().map(|service| summary(config, service)).collect();
    if output.json {
        table::json(&Checked { path: &config.path, services });
        return Ok(());
    }
    line(&format!("{}: valid", config.path.display()));
    for service in services {
        line(&format!(
            "service {} at {}: {} to {} with {}, default group {}",
            service.name,
            service.address,
            counted(service.routes, "route"),
            counted(service.groups, "group"),
            counted(service.reals, "real"),
            service.default_group
        ));
        service.notes.iter().for_each(|note| line(&format!("  {note}")));
    }
    Ok(())
}

fn summary<'a>(config: &Config, service: &'a Service) -> CheckedService<'a> {
    let mut notes = Vec::new();
    if service.binding == Binding::Delayed {
        notes.extend(handover(config, service));
    }
    if let Some(relay) = service.relay.as_ref().and_then(|name| service.group(name)) {
        notes.push(relayed(service, relay));
    }
    notes.extend(unchecked(service));
    notes.extend(scattered(service));
    CheckedService {
        name: &service.name,
        address: SocketAddr::new(service.addr, service.port),
        routes: service.routes.len() + service.client_routes.len(),
        groups: service.groups.len(),
        reals: service.groups.iter().map(|g| g.reals.len()).sum(),
        default_group: &service.default_group,
        notes,
    }
}

/// Faults of brokers, or of the way to them, that `status` will not see.
fn unchecked(service: &Service) -> Option<String> {
    let cure =
        "health_check = { type = \"mqtt\", path = \"encapsulated\" } sends what clients send";
    match service.health_check.as_ref().map(|check| check.path) {
        None => Some(format!(
            "its brokers are not checked, so `status` is healthy whatever they are: {cure}"
        )),
        Some(CheckPath::Direct) => Some(format!(
            "its brokers are checked at their own addresses, which says nothing of the way that clients' packets \
             take: {cure}"
        )),
        Some(CheckPath::Encapsulated) => None,
    }
}

/// Groups in which what brokers keep lies now at one, now at another.
fn scattered(service: &Service) -> Option<String> {
    let groups = service.groups.iter().filter(|g| Some(&g.name) != service.relay.as_ref());
    let of_several = groups.filter(|g| g.affinity == Affinity::None && g.reals.len() > 1);
    let names: Vec<_> = of_several.map(|g| g.name.as_str()).collect();
    if names.is_empty() {
        return None;
    }
    let cure = match service.binding {
        Binding::Delayed => "give each real a vip, and affinity = \"client_id\" or \"topic\"",
        Binding::Predicted => "affinity = \"client_ip\", or binding = \"delayed\"",
    };
    Some(format!(
        "without affinity ({}): each connection of a client may find another broker of its group, so persistent \
         sessions and QoS 2 start over, and the will of a connection that was lost may come after the next one's \
         birth message{}; {cure}",
        names.join(", "),
        if service.relay.is_some() {
            "; a topic's retained message lies where the last publisher was, with the relay or past it"
        } else {
            ""
        }
    ))
}

/// What the relay needs that the configuration cannot give.
fn relayed(service: &Service, relay: &Group) -> String {
    let hosts: Vec<_> = relay.reals.iter().map(|r| r.addr.to_string()).collect();
    let ports: Vec<_> = std::iter::once(service.port)
        .chain(service.listeners.iter().map(|l| l.port))
        .map(|port| port.to_string())
        .collect();
    format!(
        "relay: `mqtt-fwd relay` on {}, with this file, listens on port {} of {}",
        hosts.join(", "),
        ports.join(", "),
        service.addr
    )
}

/// What delayed binding needs that the configuration cannot give.
fn handover(config: &Config, service: &Service) -> [String; 2] {
    let hosts: BTreeSet<_> =
        service.groups.iter().flat_map(|g| &g.reals).map(|r| r.addr.to_string()).collect();
    let list: Vec<_> = hosts.into_iter().collect();
    let hosts = format!(
        "binding = \"delayed\": each broker host ({}) needs Linux 6.9 or later and \
         `mqtt-fwd host up --handover-key FILE`; `mqtt-fwd host status` there says what is missing",
        list.join(", ")
    );
    let key = match KeyFile::read(&config.handover_key) {
        Ok(file) => format!(
            "handover key {}: fingerprint {} in use; the hosts' `mqtt-fwd keys show` must say the same",
            config.handover_key.display(),
            file.in_use(now()).fingerprint()
        ),
        Err(e) => format!("not ready: {e}"),
    };
    [hosts, key]
}

#[derive(Serialize)]
struct Row {
    service: String,
    topic: String,
    group: String,
    vip: String,
}

pub fn routes(config: &Config, output: Output) {
    let rows: Vec<Row> = config.services.iter().flat_map(all).collect();
    if output.json {
        table::json_rows("routes", &rows);
        return;
    }
    table::print(
        &["service", "topic", "group", "group vip"],
        rows.into_iter().map(|r| vec![r.service, r.topic, r.group, r.vip]),
    );
}

fn row(service: &Service, topic: String, group: &str) -> Row {
    Row {
        service: service.name.clone(),
        topic,
        group: group.to_owned(),
        vip: service.group(group).map(|g| g.vip.to_string()).unwrap_or_default(),
    }
}

fn all(service: &Service) -> Vec<Row> {
    let mut rows: Vec<Row> = service
        .routes
        .iter()
        .map(|route| row(service, route.filter.to_string(), route.target.name()))
        .collect();
    rows.extend(service.client_routes.iter().map(|route| {
        row(service, format!("{} {}", route.kind.key(), route.pattern()), &route.group)
    }));
    rows.push(row(service, "(all else)".to_owned(), &service.default_group));
    rows
}
