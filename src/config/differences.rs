//! What differs between two configurations, in words and by names, for who is to decide whether that is meant.

use std::collections::BTreeMap;
use std::fmt::{Debug, Display};

use super::{Config, Group, Service};

/// A line for each difference of services; one for all that is not theirs.
pub fn differences(old: &Config, new: &Config) -> Vec<String> {
    let mut lines = Vec::new();
    let names =
        |config: &Config| config.services.iter().map(|s| s.name.clone()).collect::<Vec<_>>();
    let (before, after) = (names(old), names(new));
    for service in &old.services {
        match new.services.iter().find(|s| s.name == service.name) {
            Some(now) => of_service(service, now, &mut lines),
            None => lines.push(format!("service {}: removed", service.name)),
        }
    }
    lines.extend(
        after
            .iter()
            .filter(|name| !before.contains(name))
            .map(|name| format!("service {name}: added")),
    );
    let others = others(old, new);
    if !others.is_empty() {
        lines.push(format!("changed: {}", others.join(", ")));
    }
    lines
}

fn changed(what: &str, before: &impl Display, now: &impl Display) -> String {
    format!("{what}: {before} → {now}")
}

fn of_service(old: &Service, new: &Service, lines: &mut Vec<String>) {
    let of = |what: &str| format!("service {}, {what}", new.name);
    let address = |s: &Service| std::net::SocketAddr::new(s.addr, s.port);
    if address(old) != address(new) {
        lines.push(changed(&of("address"), &address(old), &address(new)));
    }
    if old.default_group != new.default_group {
        lines.push(changed(&of("default group"), &old.default_group, &new.default_group));
    }
    let relay = |s: &Service| s.relay.clone().unwrap_or_else(|| "none".to_owned());
    if old.relay != new.relay {
        lines.push(changed(&of("relay"), &relay(old), &relay(new)));
        if old.relay.is_none() {
            lines.push(of(
                "relay: clients that are connected now stay at their brokers until they connect again",
            ));
        }
    }
    let keys: [(&str, bool); 7] = [
        ("protocol", old.protocol != new.protocol),
        ("unknown_server_name", old.refuses_unknown != new.refuses_unknown),
        ("binding", old.binding != new.binding),
        ("on_misprediction", old.on_misprediction != new.on_misprediction),
        ("max_packet", old.max_packet != new.max_packet),
        ("health_check", old.health_check != new.health_check),
        ("listeners", differ(&old.listeners, &new.listeners)),
    ];
    lines.extend(
        keys.iter().filter(|(_, differs)| *differs).map(|(key, _)| of(&format!("{key}: changed"))),
    );
    for group in &old.groups {
        match new.groups.iter().find(|g| g.name == group.name) {
            Some(now) => of_group(&new.name, group, now, lines),
            None => lines.push(of(&format!("group {}: removed", group.name))),
        }
    }
    for group in new.groups.iter().filter(|g| old.groups.iter().all(|o| o.name != g.name)) {
        let reals: Vec<_> = group.reals.iter().map(|real| real.addr.to_string()).collect();
        lines.push(of(&format!(
            "group {}: added, VIP {}, reals {}",
            group.name,
            group.vip,
            reals.join(", ")
        )));
    }
    of_routes(old, new, lines);
}

fn of_group(service: &str, old: &Group, new: &Group, lines: &mut Vec<String>) {
    let of = |what: &str| format!("service {service}, group {}, {what}", new.name);
    if old.vip != new.vip {
        lines.push(changed(&of("VIP"), &old.vip, &new.vip));
    }
    let keys = [
        ("affinity", old.affinity != new.affinity),
        ("proxy_protocol", old.proxy_protocol != new.proxy_protocol),
        ("tls", differ(&old.tls, &new.tls)),
    ];
    lines.extend(
        keys.iter().filter(|(_, differs)| *differs).map(|(key, _)| of(&format!("{key}: changed"))),
    );
    for real in &old.reals {
        match new.reals.iter().find(|r| r.addr == real.addr) {
            Some(now) if now.weight != real.weight => {
                lines.push(changed(
                    &of(&format!("real {}, weight", real.addr)),
                    &real.weight,
                    &now.weight,
                ));
            }
            Some(now) if now.vip != real.vip => {
                lines.push(of(&format!("real {}, VIP: changed", real.addr)));
            }
            Some(_) => {}
            None => lines.push(of(&format!("real {}: removed", real.addr))),
        }
    }
    for real in new.reals.iter().filter(|r| old.reals.iter().all(|o| o.addr != r.addr)) {
        lines.push(of(&format!("real {}: added, weight {}", real.addr, real.weight)));
    }
}

fn of_routes(old: &Service, new: &Service, lines: &mut Vec<String>) {
    let routes = |service: &Service| -> BTreeMap<String, String> {
        let by_topic =
            service.routes.iter().map(|r| (r.filter.to_string(), r.target.name().to_owned()));
        let by_client = service
            .client_routes
            .iter()
            .map(|r| (format!("{} {}", r.kind.key(), r.pattern()), r.group.clone()));
        by_topic.chain(by_client).collect()
    };
    let (before, now) = (routes(old), routes(new));
    let of = |route: &str| format!("service {}, route {route}", new.name);
    for (route, group) in &before {
        match now.get(route) {
            None => lines.push(format!("{}: removed, was of {group}", of(route))),
            Some(other) if other != group => lines.push(changed(&of(route), group, other)),
            Some(_) => {}
        }
    }
    for (route, group) in now.iter().filter(|(route, _)| !before.contains_key(*route)) {
        lines.push(format!("{}: added, to {group}", of(route)));
    }
}

fn differ(a: &impl Debug, b: &impl Debug) -> bool {
    format!("{a:?}") != format!("{b:?}")
}

/// Keys that are no service's.
fn others(old: &Config, new: &Config) -> Vec<&'static str> {
    [
        ("interface", old.interface != new.interface),
        ("xdp_mode", old.xdp_mode != new.xdp_mode),
        ("bpffs", old.bpffs != new.bpffs),
        ("root_array", old.root_array != new.root_array),
        ("balancer", old.balancer != new.balancer),
        ("balancer_endpoint", old.balancer_endpoint != new.balancer_endpoint),
        ("encapsulation", old.encapsulation != new.encapsulation),
        ("gateway_mac", old.gateway_mac != new.gateway_mac),
        ("metrics", old.metrics != new.metrics),
        ("[api]", differ(&old.api, &new.api)),
        ("handover_key", old.handover_key != new.handover_key),
        ("clients_file", old.clients_file != new.clients_file),
        ("clients_save_interval", old.clients_save_interval != new.clients_save_interval),
        ("reconcile_interval", old.reconcile_interval != new.reconcile_interval),
        ("test_interval", old.test_interval != new.test_interval),
        ("rates or [limits]", old.rates != new.rates),
        ("[maps]", old.maps != new.maps),
        ("[relay]", differ(&old.relay, &new.relay)),
    ]
    .into_iter()
    .filter_map(|(key, changed)| changed.then_some(key))
    .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const OLD: &str = r#"
        interface = "eth0"
        balancer = "embedded"
        [[service]]
        name = "mqtt"
        address = "10.1.50.200"
        default_group = "other"
        group = [
            { name = "a", vip = "10.1.50.1", reals = [{ address = "10.1.3.1" }, { address = "10.1.3.2" }] },
            { name = "other", vip = "10.1.50.2", reals = [{ address = "10.1.3.3" }] },
        ]
        route = [{ topic = "t/1", group = "a" }, { topic = "t/2", group = "a" }]
    "#;

    #[test]
    fn each_route_group_and_real_is_named() {
        let read = |text: &str| Config::parse(Path::new("/config.toml"), text).unwrap();
        let new = OLD
            .replace("{ address = \"10.1.3.2\" }", "{ address = \"10.1.3.4\", weight = 3 }")
            .replace("{ topic = \"t/2\", group = \"a\" }", "{ topic = \"t/3\", group = \"other\" }")
            .replace("\"t/1\", group = \"a\"", "\"t/1\", group = \"other\"")
            .replace("interface = \"eth0\"", "interface = \"eth0\"\nreconcile_interval = \"5s\"");
        assert_eq!(
            differences(&read(OLD), &read(&new)),
            [
                "service mqtt, group a, real 10.1.3.2: removed",
                "service mqtt, group a, real 10.1.3.4: added, weight 3",
                "service mqtt, route t/1: a → other",
                "service mqtt, route t/2: removed, was of a",
                "service mqtt, route t/3: added, to other",
                "changed: reconcile_interval",
            ]
        );
        assert!(differences(&read(OLD), &read(OLD)).is_empty());
    }
}
