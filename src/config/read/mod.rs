//! From a TOML table to a [`Config`]: what the keys are. Services, which are most of it, have a file of
//! their own; so has what must hold between them.

mod between;
mod client_route;
mod fleet;
mod group;
mod service;
mod values;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeTable;

use self::values::{absolute, certificate, is_of_this_host};
pub use self::values::{address, endpoint, mac};
use super::reader::{Asked, Reader, Source};
use super::{
    Api, BalancerKind, Binding, Config, ConfigError, Encapsulation, MapSizes, Rates, Service,
    XdpMode,
};
use crate::domain::{RelayLimits, limits};
use crate::run_files;

/// Linux' IFNAMSIZ, less the terminating zero.
const INTERFACE_NAME_MAX: usize = 15;

pub fn config(path: &Path, text: &str, table: &DeTable<'_>) -> Result<Config, ConfigError> {
    let source = Source::new(text);
    let read = whole(path, table, &source);
    match read {
        Some(config) if source.is_clean() => Ok(config),
        _ => Err(ConfigError::Invalid { path: path.to_owned(), problems: source.into_problems() }),
    }
}

/// What the reader asks for in a file that has everything.
pub fn asked(text: &str) -> BTreeMap<String, Asked> {
    let Ok(table) = DeTable::parse(text) else { return BTreeMap::new() };
    let source = Source::noting(text);
    let _ = whole(Path::new(""), table.get_ref(), &source);
    source.asked()
}

/// What is valid of the file; `None` if that is not enough to go on with.
#[allow(clippy::too_many_lines)] // one key after the other
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
                format!("unix:{}/balancer-{interface}.sock", run_files::DIR)
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
    let api = r.table("api").and_then(api);
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
    let clients_file = r.parsed("clients_file", absolute);
    let seconds = Duration::from_secs;
    let clients_save_interval =
        r.duration("clients_save_interval", seconds(1)..=seconds(86_400)).unwrap_or(seconds(300));
    let reconcile_interval =
        r.duration("reconcile_interval", seconds(1)..=seconds(3600)).unwrap_or(seconds(1));
    let test_interval = r.duration("test_interval", seconds(10)..=seconds(86_400));
    let d = Rates::default();
    let (fleet, fleet_rates) = fleet::fleet(r.table("fleet"));
    let rates = Rates {
        fleet: fleet_rates,
        events: r.number("events_per_second", 0..=1_000_000).unwrap_or(d.events),
        new_flows: r.number("new_flows_per_second", 1..=100_000_000).unwrap_or(d.new_flows),
        new_topics: r.number("new_topics_per_second", 0..=100_000_000).unwrap_or(d.new_topics),
        ..limits_of_clients(r.table("limits"))
    };
    let services: Vec<Service> = r
        .tables("service")
        .into_iter()
        .filter_map(|s| service::service(s, fleet_rates.is_some()))
        .collect();
    let delayed = services.iter().any(|service| service.binding == Binding::Delayed);
    let maps = map_sizes(r.table("maps"), delayed);
    let maps = if fleet_rates.is_some() { maps.with_fleet() } else { maps };
    let relay = relay_limits(r.table("relay"));
    if !r.has("service") {
        r.problem("service", "there is none; describe one with [[service]]");
    }
    between::check(&services, &maps, balancer, source);
    if fleet_rates.is_some() {
        fleet::check(&services, source);
    }
    r.finish();

    Some(Config {
        path: path.to_owned(),
        text: source.text().into(),
        interface: interface?,
        xdp_mode,
        bpffs,
        root_array,
        balancer: balancer.unwrap_or(BalancerKind::Embedded),
        balancer_endpoint,
        encapsulation,
        gateway_mac,
        metrics,
        api,
        handover_key,
        clients_file,
        clients_save_interval,
        reconcile_interval,
        test_interval,
        rates,
        maps,
        relay,
        fleet,
        services,
    })
}

/// What one client may do in a second.
fn limits_of_clients(r: Option<Reader<'_>>) -> Rates {
    let d = Rates::default();
    let Some(r) = r else { return d };
    let rates = Rates {
        connections_per_address: r.number("connections_per_address", 1..=1_000_000).unwrap_or(0),
        messages_per_client: r.number("messages_per_client", 1..=1_000_000).unwrap_or(0),
        ..d
    };
    r.finish();
    rates
}

/// With certificates on both sides: whoever reaches it can change where clients' packets go.
fn api(r: Reader<'_>) -> Option<Api> {
    let listen = r.required("listen", "10.1.2.102:9470", |text| {
        text.parse::<SocketAddr>().map_err(|_| "write it like \"10.1.2.102:9470\"".to_owned())
    });
    let certificate = certificate(&r);
    let client_ca = r.required("client_ca", "/etc/mqtt-fwd/operators-ca.crt", absolute);
    r.finish();
    Some(Api { listen: listen?, certificate: certificate?, client_ca: client_ca? })
}

fn relay_limits(r: Option<Reader<'_>>) -> RelayLimits {
    let d = RelayLimits::default();
    let Some(r) = r else { return d };
    let seconds = Duration::from_secs;
    let read = RelayLimits {
        threads: r.number("threads", 0..=1024).unwrap_or(d.threads),
        connections: r.number("connections", 1..=10_000_000).unwrap_or(d.connections),
        connections_per_address: r
            .number("connections_per_address", 1..=10_000_000)
            .unwrap_or(d.connections_per_address),
        connections_per_second: r
            .number("connections_per_second", 1..=1_000_000)
            .unwrap_or(d.connections_per_second),
        connect_timeout: r
            .duration("connect_timeout", seconds(1)..=seconds(600))
            .unwrap_or(d.connect_timeout),
        max_packet: r
            .number::<u32>("max_packet_size", 1024..=268_435_460)
            .map_or(d.max_packet, |n| n as usize),
        max_memory: r.number("max_memory", 64 << 20..=1 << 50),
        subscriptions: r.number("subscriptions", 1..=10_000_000).unwrap_or(d.subscriptions),
        return_after: match r.duration("return_after", Duration::ZERO..=seconds(86_400)) {
            Some(Duration::ZERO) => None,
            Some(after) => Some(after),
            None => d.return_after,
        },
        returns_per_second: r
            .number("returns_per_second", 1..=1000)
            .unwrap_or(d.returns_per_second),
    };
    r.finish();
    read
}

/// `delayed`: there are services with delayed binding, whose maps are next to nothing otherwise.
fn map_sizes(r: Option<Reader<'_>>, delayed: bool) -> MapSizes {
    let d = if delayed { MapSizes::default() } else { MapSizes::default().without_delayed() };
    let Some(r) = r else { return d };
    let sizes = MapSizes {
        clients: r.number("clients", 1..=100_000_000).unwrap_or(d.clients),
        flows: r.number("flows", 1..=100_000_000).unwrap_or(d.flows),
        client_ids: r.number("client_ids", 1..=100_000_000).unwrap_or(d.client_ids),
        handovers: r.number("handovers", 1..=10_000_000).unwrap_or(d.handovers),
        topics: r.number("topics", 1..=10_000_000).unwrap_or(d.topics),
        route_states: r.number("route_states", 16..=10_000_000).unwrap_or(d.route_states),
        groups: r.number("groups", 1..=limits::GROUP_VIPS.into()).unwrap_or(d.groups),
        vips: r.number("vips", 1..=512).unwrap_or(d.vips),
        fleet_reports: d.fleet_reports,
    };
    r.finish();
    sizes
}
