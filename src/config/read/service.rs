//! `[[service]]`: its keys, listeners, routes and health checks.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::super::reader::Reader;
use super::super::{Binding, Group, OnMisprediction, Route, Service, Target};
use super::client_route::{client_route, kind_of};
use super::group::{OfService, group};
use super::values::{absolute, address, certificate, name_text, network};
use crate::domain::filter::TopicFilter;
use crate::domain::health::{CheckKind, CheckPath, HealthCheck};
use crate::domain::{
    ANY, CertificateName, ClientRoute, Protocol, RelayListener, RelayTls, TEST_TOPICS, limits,
};

#[allow(clippy::too_many_lines)] // one key after the other
pub(super) fn service(r: Reader<'_>, fleet: bool) -> Option<Service> {
    let name = r.required("name", "mqtt", name_text);
    let addr = r.required("address", "10.1.50.200", address);
    let port = r.number("port", 1..=65_535).unwrap_or(1883);
    let max_packet = r.number("max_packet", 576..=9000);
    let binding = r
        .choice("binding", &[("predicted", Binding::Predicted), ("delayed", Binding::Delayed)])
        .unwrap_or(Binding::Predicted);
    let protocol = r
        .choice("protocol", &[("mqtt", Protocol::Mqtt), ("tls", Protocol::Tls)])
        .unwrap_or(Protocol::Mqtt);
    let refuses_unknown =
        r.choice("unknown_server_name", &[("forward", false), ("refuse", true)]).unwrap_or(false);
    if protocol == Protocol::Mqtt && r.has("unknown_server_name") {
        r.problem("unknown_server_name", "is of TLS; write protocol = \"tls\"");
    }
    if refuses_unknown && binding == Binding::Predicted {
        r.problem("unknown_server_name", "needs binding = \"delayed\" to know the name at all");
    }
    let health_check = r.table("health_check").and_then(|check| health_check(check, protocol));
    let on_misprediction = r.choice(
        "on_misprediction",
        &[
            ("reset", OnMisprediction::Reset),
            ("keep", OnMisprediction::Keep),
            ("rescue", OnMisprediction::Rescue),
        ],
    );

    let group_readers = r.tables("group");
    if group_readers.is_empty() {
        r.problem("group", "there is none; describe one with [[service.group]]");
    }
    let complete = group_readers.len();
    let of_service = OfService { addr, port, binding, protocol, fleet };
    let groups: Vec<Group> =
        group_readers.into_iter().filter_map(|g| group(g, &of_service)).collect();
    // Names of groups that are wrong in themselves would only make routes look wrong, too.
    let complete = complete == groups.len();
    for (i, g) in groups.iter().enumerate() {
        if groups[..i].iter().any(|other| other.name == g.name) {
            r.problem("group", format!("two groups are named {:?}; rename one", g.name));
        }
    }
    let known = |group: &str| {
        if !complete || groups.iter().any(|g| g.name == group) {
            return Ok(group.to_owned());
        }
        let names: Vec<_> = groups.iter().map(|g| format!("{:?}", g.name)).collect();
        Err(format!("no such group in this service; there are {}", names.join(", ")))
    };

    let default_group = r.required("default_group", "default", known);
    let relay = r.parsed("relay", known);
    if relay.is_some() && relay == default_group {
        r.problem("relay", "is the default group, too; topics without a route need brokers");
    }
    if protocol == Protocol::Tls && r.has("on_misprediction") {
        r.problem("on_misprediction", "is of topics, which cannot be read within TLS; remove it");
    }
    let on_misprediction = on_misprediction.unwrap_or(match (&relay, binding, protocol) {
        (_, _, Protocol::Tls) => OnMisprediction::Keep,
        (Some(_), Binding::Delayed, _) => OnMisprediction::Rescue,
        _ => OnMisprediction::Reset,
    });
    if on_misprediction == OnMisprediction::Rescue {
        if relay.is_none() && !r.has("relay") {
            r.problem(
                "on_misprediction",
                "\"rescue\" needs a relay, where such clients go next; write relay = \"NAME\"",
            );
        }
        if binding == Binding::Predicted {
            r.problem(
                "on_misprediction",
                "\"rescue\" needs binding = \"delayed\": with \"predicted\", nothing proves that a client \
                 is at its address",
            );
        }
    }
    let listeners: Vec<RelayListener> =
        r.tables("listener").into_iter().filter_map(|l| listener(l, port, protocol)).collect();
    if relay.is_some() && protocol == Protocol::Tls {
        tls_relay(&r, port, relay.as_deref(), &listeners, &groups);
    }
    if relay.is_none() && !listeners.is_empty() && !r.has("relay") {
        r.problem("listener", "is the relay's, and there is none; write relay = \"NAME\"");
    }
    for (i, l) in listeners.iter().enumerate() {
        if listeners[..i].iter().any(|other| other.port == l.port) {
            r.problem("listener", format!("two listen on port {}; remove one", l.port));
        }
    }
    let mut routes = Vec::new();
    let mut client_routes = Vec::new();
    for route in r.tables("route") {
        if let Some(kind) = kind_of(&route) {
            client_routes.extend(client_route(&route, kind, (binding, protocol), &known));
            route.finish();
            continue;
        }
        let filter = route.required("topic", "measurements/#", |text| {
            let filter = TopicFilter::parse(text).map_err(|e| e.to_string())?;
            let most = limits::ROUTE_LEVELS;
            if filter.levels().len() > most {
                return Err(format!(
                    "has more than {most} levels, each of which may cost a look-up"
                ));
            }
            Ok(filter)
        });
        let target = route.required("group", "default", |name| {
            if Some(name) == relay.as_deref() {
                return Err("is the relay's group, which has no topics of its own".to_owned());
            }
            if name == ANY { Ok(Target::Any) } else { known(name).map(Target::Group) }
        });
        if let (Some(filter), Some(target)) = (filter, target) {
            routes.push(Route { filter, target });
        }
        route.finish();
    }
    for (i, route) in client_routes.iter().enumerate() {
        let same = |r: &ClientRoute| (r.kind, r.pattern()) == (route.kind, route.pattern());
        if client_routes[..i].iter().any(same) {
            let (kind, pattern) = (route.kind.key(), route.pattern());
            r.problem(
                "route",
                format!("{kind} {pattern:?} is routed twice; remove one of the two"),
            );
        }
    }
    for twice in duplicates(&routes) {
        r.problem("route", format!("topic {twice:?} is routed twice; remove one of the two"));
    }
    if health_check.as_ref().is_some_and(|check| check.kind != CheckKind::Tcp)
        && protocol == Protocol::Tls
        && let Some(group) = groups.iter().find(|group| group.tls.is_none())
    {
        r.problem(
            "health_check",
            format!(
                "of TLS needs to know whom to trust: write tls = {{ ca = \"/…\", server_name = \"…\" }} in group {:?}",
                group.name
            ),
        );
    }
    r.finish();
    let test_routes = match protocol {
        Protocol::Mqtt => test_routes(&groups, default_group.as_deref(), &routes),
        Protocol::Tls => Vec::new(),
    };
    Some(Service {
        name: name?,
        addr: addr?,
        port,
        protocol,
        refuses_unknown,
        default_group: default_group?,
        relay,
        listeners,
        health_check,
        max_packet,
        binding,
        on_misprediction,
        groups,
        routes: routes.into(),
        test_routes,
        client_routes,
    })
}

/// What a relay needs that ends TLS: certificates for clients, and whom to trust of the brokers.
fn tls_relay(
    r: &Reader<'_>,
    port: u16,
    relay: Option<&str>,
    listeners: &[RelayListener],
    groups: &[Group],
) {
    if listeners.iter().all(|l| l.port != port || l.tls.is_none()) {
        r.problem(
            "relay",
            format!(
                "ends TLS for those clients: write [[service.listener]] with port = {port} and tls = {{ certificate = \
                 \"/…\", key = \"/…\" }}"
            ),
        );
    }
    let plain = groups.iter().find(|g| Some(&*g.name) != relay && g.tls.is_none());
    if let Some(group) = plain {
        r.problem(
            "relay",
            format!(
                "speaks TLS with the brokers: write tls = {{ ca = \"/…\" }} in group {:?}",
                group.name
            ),
        );
    }
}

/// A topic that no client has, for each group that topics lead to: one that is for certain clients only must not be had
/// by publishing something.
fn test_routes(groups: &[Group], default: Option<&str>, routes: &[Route]) -> Vec<Route> {
    let by_topic: HashSet<&str> =
        routes.iter().map(|route| route.target.name()).chain(default).collect();
    let of_group = |group: &Group| {
        let filter = TopicFilter::parse(&format!("{TEST_TOPICS}/{}/#", group.name)).ok()?;
        let is_new = routes.iter().all(|route| route.filter != filter);
        let fits = filter.levels().len() <= limits::ROUTE_LEVELS;
        (is_new && fits).then(|| Route { filter, target: Target::Group(group.name.clone()) })
    };
    groups.iter().filter(|group| by_topic.contains(&*group.name)).filter_map(of_group).collect()
}

/// A port of the relay's beside its service's own.
fn listener(r: Reader<'_>, service_port: u16, protocol: Protocol) -> Option<RelayListener> {
    let port = r.number("port", 1..=65_535);
    if !r.has("port") {
        r.problem("port", "is missing; write port = 8883");
    }
    if port == Some(service_port) && protocol == Protocol::Mqtt {
        r.problem("port", "is the service's own, where plain MQTT is spoken; choose another");
    }
    if port == Some(service_port) && protocol == Protocol::Tls && !r.has("tls") {
        r.problem("port", "is the service's own, where TLS is spoken; write tls = { … }");
    }
    let websocket = r.flag("websocket").unwrap_or(false);
    let tls = r.table("tls").and_then(|t| {
        let first = certificate(&t);
        let others = t.tables("additional").into_iter().map(|other| {
            let pair = certificate(&other);
            other.finish();
            pair
        });
        let certificates: Option<Vec<_>> = [first].into_iter().chain(others).collect();
        let client_ca = t.parsed("client_ca", absolute);
        let username_from_certificate = t.choice(
            "username_from_certificate",
            &[
                ("common_name", CertificateName::CommonName),
                ("san_dns", CertificateName::SanDns),
                ("san_uri", CertificateName::SanUri),
                ("san_email", CertificateName::SanEmail),
            ],
        );
        if username_from_certificate.is_some() && !t.has("client_ca") {
            t.problem(
                "username_from_certificate",
                "needs client_ca: without it, clients show no certificate",
            );
        }
        t.finish();
        Some(RelayTls { certificates: certificates?, client_ca, username_from_certificate })
    });
    let accept_proxy = r.list("accept_proxy", "10.1.7.0/24", network);
    if !websocket && !r.has("tls") && !r.has("accept_proxy") {
        r.problem(
            "port",
            "differs in nothing from the service's own; write tls = { … }, websocket = true or accept_proxy = […]",
        );
    }
    r.finish();
    Some(RelayListener { port: port?, tls, websocket, accept_proxy })
}

fn health_check(r: Reader<'_>, protocol: Protocol) -> Option<HealthCheck> {
    let d = HealthCheck::tcp();
    r.required_text("type", "mqtt");
    let kind = r.choice("type", &[("tcp", 0), ("mqtt", 1), ("tls", 2)]);
    let mqtt = kind.map(|kind| kind == 1);
    if kind == Some(2) && protocol == Protocol::Mqtt {
        r.problem("type", "\"tls\" is for services with protocol = \"tls\"");
    }
    let v5 = r.choice("protocol", &[("3.1.1", false), ("5", true)]);
    let texts = ["client_id", "username", "password"].map(|key| r.text(key));
    if mqtt == Some(false) {
        for key in ["protocol", "client_id", "username", "password"] {
            if r.has(key) {
                r.problem(key, "belongs to type = \"mqtt\"");
            }
        }
    }
    if texts[2].is_some() && texts[1].is_none() {
        r.problem("password", "needs username (MQTT 3.1.1 §3.1.2.9)");
    }
    let ms = Duration::from_millis;
    let interval = r.duration("interval", ms(100)..=ms(3_600_000)).unwrap_or(d.interval);
    let timeout = r.duration("timeout", ms(10)..=ms(60_000)).unwrap_or(d.timeout);
    if timeout > interval {
        r.problem(
            "timeout",
            format!(
                "{} is longer than interval {}; shorten it, too",
                humantime::format_duration(timeout),
                humantime::format_duration(interval)
            ),
        );
    }
    let kind = if mqtt? {
        let [client_id, username, password] = texts.map(|text| text.map(str::to_owned));
        let client_id = client_id.unwrap_or_else(|| "mqtt-fwd-check".to_owned());
        CheckKind::Mqtt { v5: v5.unwrap_or(false), client_id, username, password }
    } else if kind == Some(2) {
        CheckKind::Tls
    } else {
        CheckKind::Tcp
    };
    let path = r.choice(
        "path",
        &[("direct", CheckPath::Direct), ("encapsulated", CheckPath::Encapsulated)],
    );
    let check = HealthCheck {
        kind,
        path: path.unwrap_or(d.path),
        port: r.number("port", 1..=65_535),
        interval,
        timeout,
        rise: r.number("rise", 1..=1000).unwrap_or(d.rise),
        fall: r.number("fall", 1..=1000).unwrap_or(d.fall),
        resets: r.choice("on_down", &[("keep", false), ("reset", true)]).unwrap_or(d.resets),
        slow_start: r
            .duration("slow_start", Duration::ZERO..=ms(3_600_000))
            .unwrap_or(d.slow_start),
    };
    r.finish();
    Some(check)
}

fn duplicates(routes: &[Route]) -> Vec<String> {
    let mut seen = HashMap::new();
    for route in routes {
        *seen.entry(route.filter.to_string()).or_insert(0u32) += 1;
    }
    let mut twice: Vec<_> = seen.into_iter().filter(|(_, n)| *n > 1).map(|(t, _)| t).collect();
    twice.sort();
    twice
}
