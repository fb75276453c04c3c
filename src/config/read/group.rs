//! `[[service.group]]`: its VIP and its reals.

use std::net::IpAddr;

use tokio_rustls::rustls::pki_types::ServerName;

use super::super::reader::Reader;
use super::super::{Binding, Group, Real};
use super::fleet::reals_have_vips;
use super::values::{absolute, address, certificate, name_text};
use crate::domain::{ANY, Affinity, BrokerTls, Protocol};

/// What a group has to know of its service.
pub(super) struct OfService {
    pub addr: Option<IpAddr>,
    pub port: u16,
    pub binding: Binding,
    pub protocol: Protocol,
    pub fleet: bool,
}

pub(super) fn group(r: Reader<'_>, service: &OfService) -> Option<Group> {
    let OfService { addr: service_addr, port, protocol, fleet, .. } = *service;
    let name = r.required("name", "temperature", |text| {
        if text == ANY {
            return Err("means \"whatever group the flow is bound to\" in routes; choose another"
                .to_owned());
        }
        name_text(text)
    });
    let vip = r.required("vip", "10.1.50.1", address);
    if let (Some(vip), Some(service)) = (vip, service_addr)
        && vip.is_ipv4() != service.is_ipv4()
    {
        r.problem(
            "vip",
            "is of another IP version than its service; the datapath rewrites one into the other, \
             so give the group an address of the service's version",
        );
    }

    let readers = r.tables("reals");
    let affinity = affinity(&r, &readers, service);
    let proxy_protocol = r.flag("proxy_protocol").unwrap_or(false);
    let tls_port = if protocol == Protocol::Tls { port } else { 8883 };
    let tls = r.table("tls").and_then(|tls| broker_tls(tls, tls_port));
    let mut reals: Vec<Real> = Vec::new();
    let mut complete = true;
    if readers.is_empty() {
        r.problem("reals", "there is none; write reals = [{ address = \"10.1.3.201\" }]");
    }
    for real in readers {
        let addr = real.required("address", "10.1.3.201", address);
        // Katran's ring weighs by repetition; larger numbers only slow its building.
        let weight = real.number("weight", 0..=1000).unwrap_or(1);
        let own_vip = real.parsed("vip", address);
        match (reals_have_vips(fleet, affinity), own_vip) {
            (true, None) if !fleet && !real.has("vip") => real.problem(
                "vip",
                "is missing; with this affinity each real has a group VIP of its own, an address \
                 that only the balancer knows",
            ),
            (false, Some(_)) => {
                real.problem(
                    "vip",
                    "only affinity = \"client_id\" or \"topic\", or a [fleet], needs it; remove it",
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
    Some(Group { name: name?, vip: vip?, affinity, proxy_protocol, tls, reals })
}

/// How its clients are spread over its reals.
fn affinity(r: &Reader<'_>, reals: &[Reader<'_>], service: &OfService) -> Affinity {
    let OfService { binding, protocol, .. } = *service;
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
        // Where it can be, a client finds its session again.
        .unwrap_or(
            if binding == Binding::Delayed
                && protocol == Protocol::Mqtt
                && reals.iter().any(|real| real.has("vip"))
            {
                Affinity::ClientId
            } else {
                Affinity::None
            },
        );
    if affinity.chooses_real() && binding == Binding::Predicted {
        r.problem(
            "affinity",
            "needs binding = \"delayed\": with \"predicted\", neither client id nor topic are known \
             when the real is chosen; \"client_ip\" works with both",
        );
    }
    if affinity.chooses_real() && protocol == Protocol::Tls {
        r.problem(
            "affinity",
            "is of what cannot be read within TLS; \"client_ip\" brings a client back to the broker that knows its \
             session ticket",
        );
    }
    affinity
}

/// TLS from relay and sidecar to a group's brokers.
fn broker_tls(r: Reader<'_>, port: u16) -> Option<BrokerTls> {
    let port = r.number("port", 1..=65_535).unwrap_or(port);
    let ca = r.required("ca", "/etc/mqtt-fwd/brokers-ca.crt", absolute);
    let server_name = r.parsed("server_name", |text| {
        ServerName::try_from(text.to_owned())
            .map_err(|_| "is neither a DNS name nor an address".to_owned())
    });
    let certificate = if r.has("certificate") || r.has("key") { certificate(&r) } else { None };
    r.finish();
    Some(BrokerTls { port, ca: ca?, server_name, certificate })
}
