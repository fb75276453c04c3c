//! From a TOML table to a [`Config`]: what the keys are, and what has to hold between them.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeTable;

use super::reader::{Reader, Source};
use super::{
    BalancerKind, Binding, Config, ConfigError, Encapsulation, Group, MapSizes, OnMisprediction,
    Rates, Real, Route, Service, Target, XdpMode,
};
use crate::domain::filter::TopicFilter;
use crate::domain::health::{self, CheckKind, HealthCheck};
use crate::domain::{
    ANY, Affinity, ClientRoute, ClientRouteKind, RelayLimits, RelayListener, RelayTls,
};
use crate::kernel::abi::limits;
use crate::routes::compile;

/// Linux' IFNAMSIZ, less the terminating zero.
const INTERFACE_NAME_MAX: usize = 15;
const NAME_MAX: usize = limits::GROUP_NAME_MAX.0 as usize - 1;

pub fn config(path: &Path, text: &str, table: &DeTable<'_>) -> Result<Config, ConfigError> {
    let source = Source::new(text);
    let read = whole(path, table, &source);
    match read {
        Some(config) if source.is_clean() => Ok(config),
        _ => Err(ConfigError::Invalid { path: path.to_owned(), problems: source.into_problems() }),
    }
}

/// What is valid of the file; `None` if that is not enough to go on with.
fn whole<'a>(path: &Path, table: &'a DeTable<'a>, source: &'a Source<'a>) -> Option<Config> {
    let r = Reader::new(table, source);

    let interface = r.required("interface", "eth0", |text| {
        if text.is_empty() || text.len() > INTERFACE_NAME_MAX || text.contains(['/', ' ']) {
            return Err("not an interface name; `ip link` lists them".to_owned());
        }
        Ok(text.to_owned())
    });
    let xdp_mode = r
        .choice("xdp_mode", &[("native", XdpMode::Native), ("generic", XdpMode::Generic)])
        .unwrap_or(XdpMode::Native);
    let bpffs = r.parsed("bpffs", absolute).unwrap_or_else(|| PathBuf::from("/sys/fs/bpf"));
    let root_array = r.parsed("root_array", absolute);
    r.required_text("balancer", "embedded");
    let balancer = r.choice(
        "balancer",
        &[("embedded", BalancerKind::Embedded), ("katran", BalancerKind::Katran)],
    );
    let balancer_endpoint =
        r.parsed("balancer_endpoint", endpoint).unwrap_or_else(|| match (balancer, &interface) {
            (Some(BalancerKind::Embedded), Some(interface)) => {
                format!("unix:/run/mqtt-fwd/balancer-{interface}.sock")
            }
            _ => "127.0.0.1:50051".to_owned(),
        });
    let metrics = r.parsed("metrics", |text| {
        text.parse::<SocketAddr>().map_err(|_| "write it like \"127.0.0.1:9469\"".to_owned())
    });
    let allow_remote = r.flag("allow_remote_control").unwrap_or(false);
    if balancer == Some(BalancerKind::Embedded)
        && !allow_remote
        && !is_of_this_host(&balancer_endpoint)
    {
        r.problem(
            "balancer_endpoint",
            "can be reached by other hosts, who could change the balancer; use a unix: path or \
             127.0.0.1, or set allow_remote_control = true",
        );
    }
    let encapsulation = r
        .choice("encapsulation", &[("ipip", Encapsulation::Ipip), ("gue", Encapsulation::Gue)])
        .unwrap_or(Encapsulation::Ipip);
    if balancer == Some(BalancerKind::Embedded) && encapsulation != Encapsulation::Ipip {
        r.problem("encapsulation", "= \"gue\": the embedded balancer has only \"ipip\"");
    }
    let gateway_mac = r.parsed("gateway_mac", mac);
    let handover_key = r
        .parsed("handover_key", absolute)
        .unwrap_or_else(|| PathBuf::from("/etc/mqtt-fwd/handover.key"));
    let watch_interval_s = r.number("watch_interval_s", 1..=3600).unwrap_or(1);
    let d = Rates::default();
    let rates = Rates {
        events: r.number("events_per_second", 0..=1_000_000).unwrap_or(d.events),
        new_flows: r.number("new_flows_per_second", 1..=100_000_000).unwrap_or(d.new_flows),
        new_topics: r.number("new_topics_per_second", 0..=100_000_000).unwrap_or(d.new_topics),
    };
    let services: Vec<Service> = r.tables("service").into_iter().filter_map(service).collect();
    let late = services.iter().any(|service| service.binding == Binding::Delayed);
    let maps = map_sizes(r.table("maps"), late);
    let relay = relay_limits(r.table("relay"));
    if !r.has("service") {
        r.problem("service", "there is none; describe one with [[service]]");
    }
    across_services(&services, &maps, balancer, source);
    r.finish();

    Some(Config {
        path: path.to_owned(),
        interface: interface?,
        xdp_mode,
        bpffs,
        root_array,
        balancer: balancer.unwrap_or(BalancerKind::Embedded),
        balancer_endpoint,
        encapsulation,
        gateway_mac,
        metrics,
        handover_key,
        watch_interval_s,
        rates,
        maps,
        relay,
        services,
    })
}

fn relay_limits(r: Option<Reader<'_>>) -> RelayLimits {
    let d = RelayLimits::default();
    let Some(r) = r else { return d };
    let read = RelayLimits {
        threads: r.number("threads", 0..=1024).unwrap_or(d.threads),
        connections: r.number("connections", 1..=10_000_000).unwrap_or(d.connections),
        connections_per_address: r
            .number("connections_per_address", 1..=10_000_000)
            .unwrap_or(d.connections_per_address),
        connections_per_second: r
            .number("connections_per_second", 1..=1_000_000)
            .unwrap_or(d.connections_per_second),
        connect_timeout_s: r.number("connect_timeout_s", 1..=600).unwrap_or(d.connect_timeout_s),
        max_packet: r
            .number::<u32>("max_packet_size", 1024..=268_435_460)
            .map_or(d.max_packet, |n| n as usize),
        subscriptions: r.number("subscriptions", 1..=10_000_000).unwrap_or(d.subscriptions),
        return_after: match r.number::<u32>("return_after_s", 0..=86_400) {
            Some(0) => None,
            Some(s) => Some(std::time::Duration::from_secs(s.into())),
            None => d.return_after,
        },
        returns_per_second: r
            .number("returns_per_second", 1..=1000)
            .unwrap_or(d.returns_per_second),
    };
    r.finish();
    read
}

/// A port of the relay's beside its service's own.
fn listener(r: Reader<'_>, service_port: u16) -> Option<RelayListener> {
    let port = r.number("port", 1..=65_535);
    if !r.has("port") {
        r.problem("port", "is missing; write port = 8883");
    }
    if port == Some(service_port) {
        r.problem("port", "is the service's own, where plain MQTT is spoken; choose another");
    }
    let websocket = r.flag("websocket").unwrap_or(false);
    let tls = r.table("tls").and_then(|t| {
        let certificate = t.required("certificate", "/etc/mqtt-fwd/relay.crt", absolute);
        let key = t.required("key", "/etc/mqtt-fwd/relay.key", absolute);
        let client_ca = t.parsed("client_ca", absolute);
        let username_from_certificate = t.flag("username_from_certificate").unwrap_or(false);
        if username_from_certificate && !t.has("client_ca") {
            t.problem(
                "username_from_certificate",
                "needs client_ca: without it, clients show no certificate",
            );
        }
        t.finish();
        let (certificate, key) = (certificate?, key?);
        Some(RelayTls { certificate, key, client_ca, username_from_certificate })
    });
    if !websocket && !r.has("tls") {
        r.problem(
            "port",
            "speaks neither TLS nor WebSocket; write tls = { … } or websocket = true",
        );
    }
    r.finish();
    Some(RelayListener { port: port?, tls, websocket })
}

/// `late`: there are services that bind late, whose maps are next to nothing otherwise.
fn map_sizes(r: Option<Reader<'_>>, late: bool) -> MapSizes {
    let d = if late { MapSizes::default() } else { MapSizes::default().without_delayed() };
    let Some(r) = r else { return d };
    let sizes = MapSizes {
        clients: r.number("clients", 1..=100_000_000).unwrap_or(d.clients),
        flows: r.number("flows", 1..=100_000_000).unwrap_or(d.flows),
        weak_flows: r.number("weak_flows", 1..=100_000_000).unwrap_or(d.weak_flows),
        client_ids: r.number("client_ids", 1..=100_000_000).unwrap_or(d.client_ids),
        handovers: r.number("handovers", 1..=10_000_000).unwrap_or(d.handovers),
        topics: r.number("topics", 1..=10_000_000).unwrap_or(d.topics),
        route_states: r.number("route_states", 16..=10_000_000).unwrap_or(d.route_states),
        groups: r.number("groups", 1..=limits::MAX_GROUP_VIPS.0.into()).unwrap_or(d.groups),
        vips: r.number("vips", 1..=512).unwrap_or(d.vips),
    };
    r.finish();
    sizes
}

#[allow(clippy::too_many_lines)] // one key after the other
fn service(r: Reader<'_>) -> Option<Service> {
    let name = r.required("name", "mqtt", name_text);
    let addr = r.required("address", "10.1.50.200", address);
    let port = r.number("port", 1..=65_535).unwrap_or(1883);
    let max_packet = r.number("max_packet", 576..=9000);
    let binding = r
        .choice("binding", &[("predicted", Binding::Predicted), ("delayed", Binding::Delayed)])
        .unwrap_or(Binding::Predicted);
    let health_check = r.table("health_check").and_then(health_check);
    let on_misprediction = r
        .choice(
            "on_misprediction",
            &[("reset", OnMisprediction::Reset), ("keep", OnMisprediction::Keep)],
        )
        .unwrap_or(OnMisprediction::Reset);

    let group_readers = r.tables("group");
    if group_readers.is_empty() {
        r.problem("group", "there is none; describe one with [[service.group]]");
    }
    let complete = group_readers.len();
    let groups: Vec<Group> =
        group_readers.into_iter().filter_map(|g| group(g, addr, binding)).collect();
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
    let listeners: Vec<RelayListener> =
        r.tables("listener").into_iter().filter_map(|l| listener(l, port)).collect();
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
        if route.has("client_id") || route.has("username") {
            client_routes.extend(client_route(&route, binding, &known));
            route.finish();
            continue;
        }
        let filter = route.required("topic", "measurements/#", |text| {
            let filter = TopicFilter::parse(text).map_err(|e| e.to_string())?;
            let most = limits::MAX_ROUTE_LEVELS.0 as usize;
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
    r.finish();
    Some(Service {
        name: name?,
        addr: addr?,
        port,
        default_group: default_group?,
        relay,
        listeners,
        health_check,
        max_packet,
        binding,
        on_misprediction,
        groups,
        routes,
        client_routes,
    })
}

/// A route by what CONNECT says.
fn client_route(
    r: &Reader<'_>,
    binding: Binding,
    known: &dyn Fn(&str) -> Result<String, String>,
) -> Option<ClientRoute> {
    let kind =
        if r.has("client_id") { ClientRouteKind::ClientId } else { ClientRouteKind::Username };
    for other in ["topic", "username"] {
        if r.has(other) && other != kind.key() {
            r.problem(
                other,
                format!("a route looks at one thing, and this one has {} already", kind.key()),
            );
        }
    }
    if binding == Binding::Predicted {
        r.problem(
            kind.key(),
            "needs binding = \"delayed\": with \"predicted\", the group is chosen before CONNECT",
        );
    }
    let text = r.required(kind.key(), "plant7-*", |text| {
        let (text, prefix) = match text.strip_suffix('*') {
            Some(text) => (text, true),
            None => (text, false),
        };
        // An exact text has a byte more in the datapath.
        let most = limits::CLIENT_ROUTE_TEXT_MAX.0 as usize - 1;
        if text.len() > most || (text.is_empty() && !prefix) {
            return Err(format!("must be 1 to {most} bytes long"));
        }
        if text.contains(['*', '\0']) {
            return Err("a * stands for the rest, so only at the end".to_owned());
        }
        Ok((text.to_owned(), prefix))
    });
    let group = r.required("group", "default", |name| {
        if name == ANY {
            return Err("a client has to belong somewhere; name a group".to_owned());
        }
        known(name)
    });
    let ((text, prefix), group) = (text?, group?);
    Some(ClientRoute { kind, text, prefix, group })
}

fn health_check(r: Reader<'_>) -> Option<HealthCheck> {
    let d = HealthCheck::tcp();
    r.required_text("type", "mqtt");
    let mqtt = r.choice("type", &[("tcp", false), ("mqtt", true)]);
    let level = r.choice("protocol", &[("3.1.1", 4), ("5", 5)]);
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
    let milliseconds = |key, d: Duration, range| {
        r.number::<u32>(key, range).map_or(d, |n| Duration::from_millis(n.into()))
    };
    let interval = milliseconds("interval_ms", d.interval, 100..=3_600_000);
    let timeout = milliseconds("timeout_ms", d.timeout, 10..=60_000);
    if timeout > interval {
        r.problem("timeout_ms", "is longer than interval_ms");
    }
    let kind = if mqtt? {
        let id = texts[0].unwrap_or("mqtt-fwd-check");
        let connect = health::connect(level.unwrap_or(4), id, texts[1], texts[2]);
        CheckKind::Mqtt { connect }
    } else {
        CheckKind::Tcp
    };
    let check = HealthCheck {
        kind,
        port: r.number("port", 1..=65_535),
        interval,
        timeout,
        rise: r.number("rise", 1..=1000).unwrap_or(d.rise),
        fall: r.number("fall", 1..=1000).unwrap_or(d.fall),
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

fn group(r: Reader<'_>, service: Option<IpAddr>, binding: Binding) -> Option<Group> {
    let name = r.required("name", "temperature", |text| {
        if text == ANY {
            return Err("means \"whatever group the flow is bound to\" in routes; choose another"
                .to_owned());
        }
        name_text(text)
    });
    let vip = r.required("vip", "10.1.50.1", address);
    if let (Some(vip), Some(service)) = (vip, service)
        && vip.is_ipv4() != service.is_ipv4()
    {
        r.problem(
            "vip",
            "is of another IP version than its service; the datapath rewrites one into the other, \
             so give the group an address of the service's version",
        );
    }

    let affinity = r
        .choice(
            "affinity",
            &[
                ("none", Affinity::None),
                ("client_ip", Affinity::ClientIp),
                ("client_id", Affinity::ClientId),
                ("topic", Affinity::Topic),
            ],
        )
        .unwrap_or(Affinity::None);
    if affinity.chooses_real() && binding == Binding::Predicted {
        r.problem(
            "affinity",
            "needs binding = \"delayed\": with \"predicted\", neither client id nor topic are known \
             when the real is chosen; \"client_ip\" works with both",
        );
    }
    let proxy_protocol = r.flag("proxy_protocol").unwrap_or(false);
    let mut reals: Vec<Real> = Vec::new();
    let mut complete = true;
    let readers = r.tables("reals");
    if readers.is_empty() {
        r.problem("reals", "there is none; write reals = [{ address = \"10.1.3.201\" }]");
    }
    for real in readers {
        let addr = real.required("address", "10.1.3.201", address);
        // Katran's ring weighs by repetition; larger numbers only slow its building.
        let weight = real.number("weight", 0..=1000).unwrap_or(1);
        let own_vip = real.parsed("vip", address);
        match (affinity.chooses_real(), own_vip) {
            (true, None) if !real.has("vip") => real.problem(
                "vip",
                "is missing; with this affinity each real has a group VIP of its own, an address \
                 that only the balancer knows",
            ),
            (false, Some(_)) => {
                real.problem(
                    "vip",
                    "only affinity = \"client_id\" or \"topic\" needs it; remove it",
                );
            }
            (true, Some(own)) if vip.is_some_and(|v| v.is_ipv4() != own.is_ipv4()) => {
                real.problem("vip", "is of another IP version than its group's");
            }
            _ => {}
        }
        match addr {
            Some(addr) if reals.iter().any(|known| known.addr == addr) => {
                real.problem("address", "is in this group twice; raise its weight instead");
            }
            Some(addr) if addr.is_ipv4() && vip.is_some_and(|v| v.is_ipv6()) => {
                real.problem(
                    "address",
                    "an IPv4 real cannot get packets of an IPv6 VIP; give its IPv6 address",
                );
            }
            Some(addr) => reals.push(Real { addr, weight, vip: own_vip }),
            None => complete = false,
        }
        real.finish();
    }
    if !reals.is_empty() && reals.iter().all(|real| real.weight == 0) {
        r.problem("reals", "all have weight 0, so none gets connections");
    }
    r.finish();
    complete.then_some(())?;
    Some(Group { name: name?, vip: vip?, affinity, proxy_protocol, reals })
}

/// What has to hold between services.
fn across_services(
    services: &[Service],
    maps: &MapSizes,
    balancer: Option<BalancerKind>,
    source: &Source<'_>,
) {
    let report = |key: String, value: String, text: String| source.report(key, value, text);
    let max_services = limits::MAX_SERVICES.0 as usize;
    if services.len() > max_services {
        report(
            "service".to_owned(),
            format!("{} of them", services.len()),
            format!("the datapath compares services one by one; at most {max_services}"),
        );
    }

    let vips: Vec<IpAddr> = services
        .iter()
        .flat_map(|s| s.groups.iter().map(|group| group.vip).chain([s.addr]))
        .collect();
    let mut names: HashMap<&str, usize> = HashMap::new();
    // Service addresses and group VIPs share one space: the balancer knows only VIPs.
    let mut owners: HashMap<(IpAddr, u16), String> = HashMap::new();
    for (i, service) in services.iter().enumerate() {
        if let Some(first) = names.insert(&service.name, i) {
            report(
                format!("service[{i}].name"),
                format!("{:?}", service.name),
                format!("service[{first}] has this name already"),
            );
        }
        let mut claim = |key: String, addr: IpAddr, port: u16| {
            if let Some(owner) = owners.insert((addr, port), key.clone()) {
                report(
                    key,
                    format!("{addr}:{port}"),
                    format!(
                        "{owner} has this address already; every service and every group needs its own"
                    ),
                );
            }
        };
        claim(format!("service[{i}].address"), service.addr, service.port);
        for (j, listener) in service.listeners.iter().enumerate() {
            claim(format!("service[{i}].listener[{j}].port"), service.addr, listener.port);
        }
        for (j, group) in service.groups.iter().enumerate() {
            claim(format!("service[{i}].group[{j}].vip"), group.vip, service.port);
            for (k, vip) in group.reals.iter().enumerate().filter_map(|(k, r)| Some((k, r.vip?))) {
                claim(format!("service[{i}].group[{j}].reals[{k}].vip"), vip, service.port);
            }
        }
        for (j, group) in service.groups.iter().enumerate() {
            for (k, real) in group.reals.iter().enumerate().filter(|(_, r)| vips.contains(&r.addr))
            {
                report(
                    format!("service[{i}].group[{j}].reals[{k}].address"),
                    format!("\"{}\"", real.addr),
                    "is an address of the balancer's, which would send to itself".to_owned(),
                );
            }
        }
        for problem in compile::problems(service, maps.route_states) {
            report(format!("service[{i}].route"), String::new(), problem);
        }
    }
    // A group, and one for each real that has a VIP of its own.
    let groups: usize = services
        .iter()
        .flat_map(|s| &s.groups)
        .map(|g| 1 + g.reals.iter().filter(|r| r.vip.is_some()).count())
        .sum();
    if groups > maps.groups as usize {
        report(
            "maps.groups".to_owned(),
            maps.groups.to_string(),
            format!("there are {groups} groups; raise it to at least that"),
        );
    }
    let vips = groups + services.iter().map(|s| s.listeners.len()).sum::<usize>();
    if balancer == Some(BalancerKind::Embedded) && vips > maps.vips as usize {
        report(
            "maps.vips".to_owned(),
            maps.vips.to_string(),
            format!("groups and listeners need {vips} VIPs of the embedded balancer; raise it"),
        );
    }
}

fn name_text(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > NAME_MAX {
        return Err(format!("must be 1 to {NAME_MAX} bytes long"));
    }
    if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err("must not have spaces or control characters".to_owned());
    }
    Ok(text.to_owned())
}

/// An address of a host on a network, in its plain form.
pub fn address(text: &str) -> Result<IpAddr, String> {
    let addr: IpAddr = text
        .parse()
        .map_err(|_| "not an IP address; write it like \"10.1.50.1\" or \"fd00::1\"".to_owned())?;
    let unusable = match addr {
        IpAddr::V4(v4) => v4.is_broadcast() || v4.octets()[0] == 0 || v4.octets()[0] >= 240,
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if unusable || addr.is_unspecified() || addr.is_multicast() || addr.is_loopback() {
        return Err("not an address that a host can have on a network".to_owned());
    }
    if let IpAddr::V6(v6) = addr
        && v6.to_ipv4_mapped().is_some()
    {
        return Err("write a mapped IPv4 address as plain IPv4".to_owned());
    }
    Ok(addr)
}

fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err("must be an absolute path".to_owned()) }
}

/// Where a gRPC service listens.
pub fn endpoint(text: &str) -> Result<String, String> {
    let problem = || "write it like \"127.0.0.1:50051\" or \"unix:/run/katran.sock\"".to_owned();
    if let Some(path) = text.strip_prefix("unix:") {
        return if path.starts_with('/') { Ok(text.to_owned()) } else { Err(problem()) };
    }
    let (host, port) = text.rsplit_once(':').ok_or_else(problem)?;
    let port: u16 = port.parse().map_err(|_| problem())?;
    // An IPv6 address is in brackets, or it is not clear where it ends.
    let bare_v6 = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
    if host.is_empty() || host.contains('/') || bare_v6 || port == 0 {
        return Err(problem());
    }
    Ok(text.to_owned())
}

/// Whether only this host's processes can connect there.
fn is_of_this_host(endpoint: &str) -> bool {
    endpoint.starts_with("unix:")
        || endpoint.starts_with("localhost:")
        || endpoint.parse::<std::net::SocketAddr>().is_ok_and(|addr| addr.ip().is_loopback())
}

/// A MAC address.
pub fn mac(text: &str) -> Result<[u8; 6], String> {
    parse_mac(text)
        .ok_or_else(|| "not a MAC address; write it like \"02:00:5e:10:00:01\"".to_owned())
}

/// Six pairs of hexadecimal digits with colons; all zero is what Katran makes of nonsense, so not that.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mac: macaddr::MacAddr6 = text.parse().ok().filter(|_| {
        let mut pairs = text.split(':');
        pairs.clone().count() == 6
            && pairs.all(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))
    })?;
    // Nor one of many stations (the lowest bit of the first byte, IEEE 802).
    (!mac.is_nil() && mac.is_unicast()).then(|| mac.into_array())
}
