//! `[fleet]`: several balancers as one.

use super::super::Service;
use super::super::reader::{Reader, Source};
use super::values::{absolute, name_text};
use crate::domain::fleet::{Fleet, Store};
use crate::domain::{Affinity, FleetRates};

/// Connections that are asked for in a second, unless it is configured.
const MISSES: u32 = 50_000;

/// Its keys, and how many connections are asked for in a second.
pub(super) fn fleet(r: Option<Reader<'_>>) -> (Option<Fleet>, Option<FleetRates>) {
    let Some(r) = r else { return (None, None) };
    let name = r.required("name", "lb1", name_text);
    let ask_port = r.number("ask_port", 1..=65_535).unwrap_or(18_830);
    let misses = r.number("misses_per_second", 1..=10_000_000).unwrap_or(MISSES);
    let url = r.parsed("store", |text| {
        let host = text.strip_prefix("redis://").or_else(|| text.strip_prefix("rediss://"));
        match host {
            Some(host) if !host.is_empty() => Ok(text.to_owned()),
            _ => Err("write it like \"redis://10.1.12.9:6379\", or rediss:// for TLS".to_owned()),
        }
    });
    let ca = r.parsed("store_ca", absolute);
    if ca.is_some() && url.as_ref().is_none_or(|url| !url.starts_with("rediss:")) {
        r.problem("store_ca", "is for TLS; write store = \"rediss://…\"");
    }
    r.finish();
    let store = url.map(|url| Store { url, ca });
    let rates = FleetRates { misses, store: store.is_some() };
    (name.map(|name| Fleet { name, ask_port, store }), Some(rates))
}

/// A connection is bound to the broker host that has it, so each has a VIP of its own.
pub(super) fn check(services: &[Service], source: &Source<'_>) {
    for (i, service) in services.iter().enumerate() {
        for (j, group) in service.groups.iter().enumerate() {
            let missing = group.reals.iter().enumerate().filter(|(_, real)| real.vip.is_none());
            for (k, real) in missing {
                source.report(
                    format!("service[{i}].group[{j}].reals[{k}].vip"),
                    String::new(),
                    format!(
                        "is missing; in a fleet each real has a group VIP of its own, by which connections stay at {} \
                         whatever balancer has them",
                        real.addr
                    ),
                );
            }
        }
    }
}

/// Whether reals may have VIPs of their own.
pub(super) fn reals_have_vips(fleet: bool, affinity: Affinity) -> bool {
    fleet || affinity.chooses_real()
}
