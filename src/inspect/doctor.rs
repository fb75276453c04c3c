//! Walks the way that packets take and looks for what stands in it: this host, the interface, the chain, the
//! balancer, the brokers, and what the counters tell of clients.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use rtnetlink::packet_route::address::AddressAttribute;
use serde::Serialize;
use tokio::net::TcpStream;

use super::told::TOLD;
use super::{Context, fleet};
use crate::balancer::client::Client;
use crate::chain::health;
use crate::config::{BalancerKind, Config, XdpMode};
use crate::datapath::Datapath;
use crate::datapath::clients::multi_group_count;
use crate::domain::Health;
use crate::domain::vip::mac_text;
use crate::handover::keys::{KeyFile, now};
use crate::instance;
use crate::kernel::chain::remembered_connections;
use crate::kernel::{driver, privileges, xdp};
use crate::reconcile::plan::Plan;
use crate::reconcile::{ReconcileError, gateway};

/// The oldest kernel that loads the programs.
const KERNEL: (u32, u32) = (6, 1);
/// For a broker to accept a connection.
const PATIENCE: Duration = Duration::from_secs(1);

/// Of Katran's look-ups, one in so many may be in its fallback table.
const FALLBACK_SHARE: u64 = 100;

/// Brokers that are asked at a time.
const AT_ONCE: usize = 64;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Severity {
    /// As it should be.
    Ok,
    /// Packets are forwarded, and something is lost or missing nevertheless.
    Warning,
    /// Packets are not forwarded as configured.
    Fault,
}

impl Severity {
    fn text(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Fault => "fault",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub about: String,
    /// ok; warning: packets are forwarded, and something is lost or missing nevertheless; fault: they are not forwarded
    /// as configured.
    pub severity: String,
    /// What is there, or what is wrong.
    pub text: String,
    pub remedy: Option<String>,
}

impl Finding {
    /// As it should be.
    pub fn ok(about: &str, text: String) -> Self {
        let mut found = Findings::default();
        found.add(Severity::Ok, about, text, None);
        found.0.remove(0)
    }

    /// Something is lost or missing.
    pub fn warning(about: &str, text: String) -> Self {
        let mut found = Findings::default();
        found.add(Severity::Warning, about, text, None);
        found.0.remove(0)
    }

    /// Packets are not forwarded as configured.
    pub fn fault(about: &str, text: String, remedy: &str) -> Self {
        let mut found = Findings::default();
        found.add(Severity::Fault, about, text, Some(remedy.to_owned()).filter(|r| !r.is_empty()));
        found.0.remove(0)
    }
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn has_fault(&self, about: &str) -> bool {
        self.0.iter().any(|found| found.about == about && found.severity == Severity::Fault.text())
    }

    fn ok(&mut self, about: &'static str, text: impl Into<String>) {
        self.add(Severity::Ok, about, text.into(), None);
    }

    fn add(&mut self, severity: Severity, about: &str, text: String, remedy: Option<String>) {
        let (about, severity) = (about.to_owned(), severity.text().to_owned());
        self.0.push(Finding { about, severity, text, remedy });
    }

    fn bad(
        &mut self,
        severity: Severity,
        about: &'static str,
        text: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        let remedy = Some(remedy.into()).filter(|remedy| !remedy.is_empty());
        self.add(severity, about, text.into(), remedy);
    }

    fn warning(&mut self, about: &'static str, text: impl Into<String>, remedy: impl Into<String>) {
        self.bad(Severity::Warning, about, text, remedy);
    }

    fn fault(&mut self, about: &'static str, text: impl Into<String>, remedy: impl Into<String>) {
        self.bad(Severity::Fault, about, text, remedy);
    }
}

/// Looks at everything, in the order of the way.
pub async fn examine(context: &Context) -> Vec<Finding> {
    let config = context.config();
    let mut found = Findings::default();
    host(&mut found, config);
    interface(&mut found, config);
    addresses(&mut found, config).await;
    chain(&mut found, config);
    let datapath = context.datapath().ok();
    in_force(&mut found, context, datapath.as_ref()).await;
    // Not twice, if it does not answer.
    let balancer = if found.has_fault("balancer") {
        None
    } else {
        Client::connect(&config.balancer_endpoint).await.ok()
    };
    path_to_reals(&mut found, config, balancer.clone()).await;
    tracking(&mut found, config, balancer).await;
    if let Some(datapath) = &datapath {
        remembering(&mut found, config, datapath);
    }
    brokers(&mut found, config).await;
    checks(&mut found, context);
    of_fleet(&mut found, context);
    delayed(&mut found, config);
    if let Some(datapath) = &datapath {
        traffic(&mut found, context, datapath);
    }
    found.0
}

fn host(found: &mut Findings, config: &Config) {
    match nix::sys::utsname::uname() {
        Ok(name) => {
            let release = name.release().to_string_lossy().into_owned();
            let mut numbers = release.split(['.', '-']).map_while(|part| part.parse().ok());
            let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
            if version < KERNEL {
                let remedy = format!("boot Linux {}.{} or later", KERNEL.0, KERNEL.1);
                found.fault("kernel", format!("Linux {release} is too old"), remedy);
            } else if !Path::new("/sys/kernel/btf/vmlinux").exists() {
                let remedy = "boot one that was built with CONFIG_DEBUG_INFO_BTF";
                found.fault("kernel", format!("Linux {release} has no BTF"), remedy);
            } else {
                found.ok("kernel", format!("Linux {release}, with BTF"));
            }
        }
        Err(e) => found.warning("kernel", format!("its version cannot be read: {e}"), ""),
    }
    let missing = privileges::missing();
    if missing.is_empty() {
        found.ok("privileges", "this process may load and change BPF programs");
    } else {
        let text = format!("this process lacks {}", missing.join(", "));
        found.warning("privileges", text, "run it as root");
    }
    if let Err(e) = config.pins().check() {
        found.fault("bpffs", e.to_string(), "");
    }
}

fn interface(found: &mut Findings, config: &Config) {
    let name = &config.interface;
    let mtu = match xdp::interface_mtu(name) {
        Ok(mtu) => mtu,
        Err(e) => {
            found.fault("interface", e.to_string(), "correct `interface` in the configuration");
            return;
        }
    };
    let of_interface =
        |file: &str| std::fs::read_to_string(format!("/sys/class/net/{name}/{file}"));
    let state = of_interface("operstate").unwrap_or_default();
    if state.trim() == "down" {
        found.fault("interface", format!("{name} is down"), format!("ip link set {name} up"));
    } else {
        found.ok("interface", format!("{name} is there, MTU {mtu}"));
    }
    match xdp::attached_mode(name) {
        Some(XdpMode::Generic) if config.xdp_mode == XdpMode::Native => found.warning(
            "interface",
            format!(
                "XDP runs in generic mode on {name}, though native is configured: it is slower"
            ),
            format!("ip link set {name} xdpgeneric off; `mqtt-fwd load`"),
        ),
        Some(XdpMode::Generic) => found.warning(
            "interface",
            "XDP runs in generic mode, which costs several times as much a packet",
            "xdp_mode = \"native\", if the driver has it",
        ),
        _ => {}
    }
    let errors: u64 = driver::xdp_counters(name)
        .unwrap_or_default()
        .iter()
        // What a program dropped on purpose is counted as drops, too.
        .filter(|(counter, _)| {
            ["err", "full", "abort", "invalid", "tx_drop"].iter().any(|part| counter.contains(part))
        })
        .map(|(_, n)| n)
        .sum();
    if errors > 0 {
        found.warning(
            "interface",
            format!("the driver lost {errors} packets of XDP programs since it was loaded"),
            "on veth, the other end needs an XDP program: `mqtt-fwd veth-peer`; else more or longer \
             queues (`ethtool -l`, `ethtool -g`)",
        );
    }
}

/// The services' addresses are nobody's here: their packets never reach this host's stack.
async fn addresses(found: &mut Findings, config: &Config) {
    let own = match own_addresses().await {
        Ok(own) => own,
        Err(e) => {
            found.warning("addresses", format!("this host's cannot be read: {e}"), "");
            return;
        }
    };
    for service in &config.services {
        let vips = service.groups.iter().map(|group| group.vip);
        for addr in std::iter::once(service.addr).chain(vips).filter(|addr| own.contains(addr)) {
            found.warning(
                "addresses",
                format!("{addr}, of service {}, is an address of this host", service.name),
                format!("ip addr del {addr}/… dev …: only broker hosts have it, on lo"),
            );
        }
    }
}

async fn own_addresses() -> std::io::Result<BTreeSet<IpAddr>> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    // It ends with the handle.
    tokio::spawn(connection);
    let asking = handle.address().get().execute();
    let all: Vec<_> = asking.try_collect().await.map_err(std::io::Error::other)?;
    let attributes = all.into_iter().flat_map(|message| message.attributes);
    Ok(attributes
        .filter_map(|attribute| match attribute {
            AddressAttribute::Address(addr) => Some(addr),
            _ => None,
        })
        .collect())
}

fn chain(found: &mut Findings, config: &Config) {
    let problems = health::problems(config);
    if problems.is_empty() {
        found.ok("chain", "root, mqtt_fwd and balancer are in their places");
    }
    for problem in problems {
        found.fault("chain", problem.text, "");
    }
    match instance::find(config) {
        Some(run) => found.ok("run", format!("running, pid {}", run.pid)),
        None => found.warning(
            "run",
            "`mqtt-fwd run` is not running: nothing is checked, and nothing put back",
            "systemctl start mqtt-fwd, or `mqtt-fwd run`",
        ),
    }
}

async fn in_force(found: &mut Findings, context: &Context, datapath: Option<&Datapath>) {
    let Some(datapath) = datapath else { return };
    let config = context.config();
    let differs = async {
        let mut client = Client::connect(&config.balancer_endpoint).await?;
        let gateway = gateway::desired(config).await.ok().flatten();
        Plan::of(&context.in_effect(), gateway, datapath, &mut client).await
    };
    match differs.await {
        Ok(plan) if plan.is_empty() => {
            found.ok("configuration", format!("{} is in force", config.path.display()));
        }
        Ok(plan) => {
            let lines = plan.lines();
            let text = format!(
                "{} is not in force: {}{}",
                config.path.display(),
                lines[0],
                if lines.len() == 1 { "" } else { ", …" }
            );
            found.fault(
                "configuration",
                text,
                "`mqtt-fwd diff` lists it, `mqtt-fwd apply` repairs it",
            );
        }
        Err(e @ ReconcileError::Balancer(_)) => found.fault("balancer", e.to_string(), ""),
        Err(e) => found.fault("configuration", e.to_string(), ""),
    }
    if std::fs::read_to_string(&config.path).is_ok_and(|file| *file != *config.text) {
        found.warning(
            "configuration",
            format!("what is in force is not what {} says", config.path.display()),
            "`mqtt-fwd diff` shows the difference, `mqtt-fwd apply` brings the file into force",
        );
    }
}

/// A wrong gateway loses all packets behind it, unseen: what the balancer has is compared with this host's own routes.
async fn path_to_reals(found: &mut Findings, config: &Config, balancer: Option<Client>) {
    let has = match (gateway::desired(config).await, balancer) {
        (Err(e), _) => return found.fault("gateway", e.to_string(), ""),
        (Ok(Some(mac)), _) => mac_text(mac),
        (Ok(None), Some(mut balancer)) => match balancer.mac().await {
            Ok(mac) => mac,
            Err(_) => return,
        },
        (Ok(None), None) => return,
    };
    let remedy = |mac: &str| match config.balancer {
        BalancerKind::Katran if config.gateway_mac.is_none() => {
            format!(
                "`mqtt-fwd katran mac {mac}`, or gateway_mac in the configuration: `run` compares that"
            )
        }
        _ => "correct gateway_mac in the configuration, or remove it".to_owned(),
    };
    match gateway::learned(config).await.map(mac_text) {
        Some(mac) if mac == has => {
            found.ok("gateway", format!("packets to brokers go to {has}, the next hop to them"));
        }
        Some(mac) => found.warning(
            "gateway",
            format!("packets to brokers go to {has}, but the next hop to them is {mac} from here"),
            remedy(&mac),
        ),
        None => found
            .ok("gateway", format!("packets to brokers go to {has}; no next hop is known here")),
    }
}

/// A Katran that is not told which processors forward has one table for all, of 1,000 connections.
async fn tracking(found: &mut Findings, config: &Config, balancer: Option<Client>) {
    let Some(mut balancer) = balancer.filter(|_| config.balancer == BalancerKind::Katran) else {
        return;
    };
    let (Ok(fallback), Ok(all)) = (balancer.lru_fallback_stats().await, balancer.lru_stats().await)
    else {
        return;
    };
    let packets = fallback.v1;
    // A few are what this host itself asked the balancer's program, on any processor.
    if packets * FALLBACK_SHARE > all.v1 {
        found.warning(
            "balancer",
            format!(
                "Katran looked {packets} packets up in its fallback table, which has room for 1,000 connections: a \
                 drain, or a changed weight, resets those that it has forgotten (lru_fallback)"
            ),
            "start it with -forwarding_cores and -numa_nodes, a number for each processor: docs/katran.md",
        );
    }
}

/// Katran forgets the connections that were silent for the longest time, and counts none of them.
fn remembering(found: &mut Findings, config: &Config, datapath: &Datapath) {
    // What it forgets goes to the same real again where a VIP has no other.
    let mut groups = config.services.iter().flat_map(|service| &service.groups);
    let chooses = groups.any(|g| g.reals.len() > 1 && g.reals.iter().any(|r| r.vip.is_none()));
    if config.balancer != BalancerKind::Katran || !chooses {
        return;
    }
    let (Some(room), Ok(maps)) = (remembered_connections(&config.pins()), datapath.map_uses())
    else {
        return;
    };
    let standing: u64 = maps.iter().filter(|map| map.map == "flows").map(|map| map.used).sum();
    if standing > room {
        found.warning(
            "balancer",
            format!(
                "Katran has room for {room} connections, and {standing} stand: a drain, or a changed weight, resets those \
                 that it has forgotten"
            ),
            "start it with a -lru_size of twice the connections that you expect: docs/katran.md",
        );
    }
}

/// What keeps connections from moving between balancers.
fn of_fleet(found: &mut Findings, context: &Context) {
    const CODES: [&str; 4] =
        ["real_not_answering", "store_unreachable", "fleet_differs", "fleet_key_missing"];
    let (Some(fleet), Some(seen)) = (fleet::status(context), context.seen()) else { return };
    let mut some = false;
    for problem in seen.problems.iter().filter(|problem| CODES.contains(&&*problem.code)) {
        found.warning("fleet", problem.text.clone(), "`mqtt-fwd fleet` shows all of it");
        some = true;
    }
    if !some {
        found.ok("fleet", fleet.summary());
    }
}

/// Reals by their checks, relays too.
fn checks(found: &mut Findings, context: &Context) {
    let Some(seen) = context.seen() else { return };
    for real in seen.reals.iter().filter(|real| matches!(real.health, Health::Down(_))) {
        found.warning(
            "health checks",
            format!("{} of group {} is {}: {}", real.addr, real.group, real.text(), real.error()),
            "`mqtt-fwd reals` lists all; on that host, `mqtt-fwd host status`",
        );
    }
    for problem in seen.problems.iter().filter(|p| p.code == "not_checked") {
        found.warning("health checks", problem.text.clone(), "");
    }
}

async fn brokers(found: &mut Findings, config: &Config) {
    let mut asked = BTreeSet::new();
    for service in &config.services {
        if service.health_check.is_none() {
            found.warning(
                "health checks",
                format!(
                    "service {}: a broker that is dead goes on getting connections",
                    service.name
                ),
                "health_check = { type = \"mqtt\" } in the service",
            );
        }
        for group in &service.groups {
            // Relays listen at the service's address only.
            let is_relay = Some(&group.name) == service.relay.as_ref();
            for real in group.reals.iter().filter(|real| !is_relay && real.weight > 0) {
                let port = service.health_check.as_ref().and_then(|check| check.port);
                asked.insert(SocketAddr::new(real.addr, port.unwrap_or(service.port)));
            }
        }
    }
    let asking = asked.into_iter().map(|to| async move {
        let connected = tokio::time::timeout(PATIENCE, TcpStream::connect(to)).await;
        (to, connected.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())))
    });
    let answers: Vec<_> = stream::iter(asking).buffered(AT_ONCE).collect().await;
    let (up, down): (Vec<_>, Vec<_>) =
        answers.into_iter().partition(|(_, connected)| connected.is_ok());
    if !up.is_empty() {
        let addresses: Vec<_> = up.iter().map(|(to, _)| to.to_string()).collect();
        let text = format!("{} accept connections at their own addresses", addresses.join(", "));
        found.ok("brokers", text);
    }
    for (to, connected) in down {
        let why = connected.err().map(|e| e.to_string()).unwrap_or_default();
        found.warning(
            "brokers",
            format!("{to} does not accept connections at its own address: {why}"),
            "is it up, and does it listen on all addresses? `mqtt-fwd host status` there has the rest",
        );
    }
}

fn delayed(found: &mut Findings, config: &Config) {
    if !config.uses_delayed_binding() {
        return;
    }
    match KeyFile::read(&config.handover_key) {
        Ok(file) => found.ok(
            "handover key",
            format!(
                "fingerprint {}; `mqtt-fwd keys show` on broker hosts must say the same",
                file.in_use(now()).fingerprint()
            ),
        ),
        Err(e) => found.fault("handover key", e.to_string(), "`mqtt-fwd keys new` makes one"),
    }
}

fn traffic(found: &mut Findings, context: &Context, datapath: &Datapath) {
    let config = context.config();
    let Ok(counters) = datapath.counters() else { return };
    // What is over need not be repeated for ever, where somebody knows when it was.
    let ever = |name: &&str| counters.get(name) > 0;
    let ours = ["flow_new", "flow_predicted", "syn_answered", "flow_adopted", "data", "no_data"];
    let nothing_came = !ours.iter().any(ever);
    let (counters, period) = match context.counters_before() {
        Some((age, before)) => {
            let minutes = age.as_secs().div_ceil(60);
            (counters.since(&before), format!(", in the last {minutes} min"))
        }
        None => (counters, String::new()),
    };
    let count = |name: &str| counters.get(name);
    let has_flows = datapath.map_uses().unwrap_or_default();
    let has_flows = has_flows.iter().any(|map| map.map.starts_with("flows") && map.used > 0);
    // Counters of a new version begin at zero, and flows stay.
    if nothing_came && !has_flows {
        let addresses: Vec<_> = config.services.iter().map(|s| s.addr.to_string()).collect();
        found.warning(
            "traffic",
            "no packet for a service has come so far",
            format!("do routers send {} to this host?", addresses.join(", ")),
        );
    }
    for (name, text, remedy) in TOLD {
        // What is over, or meant.
        let is_over = match name {
            "no_balancer" => {
                !health::problems(config).iter().any(|p| p.code.starts_with("balancer_missing"))
            }
            // A drain ends connections, too.
            "publish_lost" => count("flow_ended") == 0,
            _ => false,
        };
        if count(name) > 0 && !is_over {
            found.warning("traffic", format!("{} {text} ({name}{period})", count(name)), remedy);
        }
    }
    for map in datapath.map_uses().unwrap_or_default().iter().filter(|map| map.evicted > 0) {
        found.warning(
            "maps",
            format!("{}: {} entries were evicted, of {}", map.map, map.evicted, map.capacity),
            "raise it in [maps] if they were in use; restart `run`",
        );
    }
    match multi_group_count(datapath) {
        Ok(n @ 1..) if config.services.iter().any(|service| service.relay.is_none()) => {
            found.warning(
                "clients",
                format!("{n} publish to several groups, which no binding fits"),
                "a relay: docs/relay.md; `mqtt-fwd clients` marks them",
            );
        }
        _ => {}
    }
}
