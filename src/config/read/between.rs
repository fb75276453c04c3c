//! What has to hold between services.

use std::collections::HashMap;
use std::net::IpAddr;

use super::super::reader::Source;
use super::super::{BalancerKind, MapSizes, Service};
use crate::domain::limits;
use crate::routes::compile;

/// Reports what does not fit together.
pub(super) fn check(
    services: &[Service],
    maps: &MapSizes,
    balancer: Option<BalancerKind>,
    source: &Source<'_>,
) {
    let report = |key: String, value: String, text: String| source.report(key, value, text);
    let max_services = limits::SERVICES;
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
        // Of a service that speaks TLS, the relay may have its own port.
        let others = service.listeners.iter().enumerate().filter(|(_, l)| l.port != service.port);
        for (j, listener) in others {
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
