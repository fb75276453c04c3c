//! Is everything where it should be, and what goes through it?

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;

use super::fleet::{self, FleetStatus};
use super::overview::group_traffic;
use super::{Context, Result};
use crate::balancer::client::{BalancerError, Client};
use crate::balancer::desired::desired_vips;
use crate::chain::health;
use crate::config::{Config, XdpMode};
use crate::datapath::Datapath;
use crate::datapath::clients::multi_group_count;
use crate::datapath::counts::{Counter, MapUse};
use crate::datapath::plan::MapPlan;
use crate::domain::{Problem, Vip};
use crate::kernel::chain::{self, Chain};
use crate::kernel::xdp;
use crate::reconcile::{apply, gateway};

/// All of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(clippy::struct_excessive_bools)] // each by itself
pub struct Status {
    pub interface: String,
    /// The XDP program there; none: nothing is attached.
    pub attached: Option<LoadedProgram>,
    /// native or generic.
    pub mode: Option<String>,
    /// The chain's programs, by position; none: it is empty.
    pub positions: Vec<Option<LoadedProgram>>,
    /// Of the routes in force.
    pub generation: Option<u32>,
    pub services: Vec<ServiceStatus>,
    /// None: there is no fleet, or no `run` to ask.
    pub fleet: Option<FleetStatus>,
    /// In words.
    pub balancer: String,
    pub balancer_ok: bool,
    pub maps: Vec<MapUse>,
    /// Clients that publish to several groups in turn.
    pub multi_group_clients: Option<u64>,
    /// Every service has a relay.
    pub relayed: bool,
    /// By name; [`Counter`] says what each means.
    pub counters: BTreeMap<String, u64>,
    pub problems: Vec<Problem>,
    pub healthy: bool,
    /// The configuration file says what is in force.
    pub file_in_force: bool,
}

impl Status {
    /// With one more problem.
    pub fn add(&mut self, problem: Problem) {
        self.problems.push(problem);
        self.healthy = false;
    }
}

/// A BPF program in the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LoadedProgram {
    /// As the kernel keeps it: of 15 characters at most.
    pub name: String,
    pub id: u32,
}

impl fmt::Display for LoadedProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (id {})", self.name, self.id)
    }
}

/// A real of a group, as the balancer has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GroupReal {
    pub address: String,
    pub weight: u32,
}

impl fmt::Display for GroupReal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.weight {
            1 => f.write_str(&self.address),
            weight => write!(f, "{} (weight {weight})", self.address),
        }
    }
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServiceStatus {
    pub name: String,
    /// Address and port.
    pub address: String,
    pub in_force: bool,
    /// Bytes of an IP packet that still fits once it is wrapped.
    pub max_packet: Option<u32>,
}

/// A group, with its reals and traffic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GroupRow {
    pub service: String,
    pub group: String,
    /// Address and port.
    pub vip: String,
    /// At the balancer; if that does not answer, as configured.
    pub reals: Vec<GroupReal>,
    /// None: the balancer does not answer.
    pub packets: Option<u64>,
    pub bytes: Option<u64>,
}

/// Reads all of it.
pub async fn read(context: &Context) -> Result<Status> {
    let config = context.config();
    let program = |p: &xdp::ProgramInfo| LoadedProgram { name: p.name.clone(), id: p.id };
    let pins = config.pins();
    let attached = xdp::attached(&config.interface)?.map(|root| pins.identify(root));
    let chain = Chain::open(&pins)?;
    let at = |i| chain.as_ref()?.program(i).map(|there| program(&pins.identify(there)));
    let positions = (0..chain::POSITIONS).map(at).collect();
    let datapath = context.datapath().ok();
    let (trouble, balancer) = balancer(context).await;
    let services = services(config, datapath.as_ref())?;
    let mut problems = health::problems(config);
    let balancer_ok = trouble.is_none();
    problems.extend(trouble.map(|code| Problem::new(code, balancer.clone())));
    let seen = context.seen().map(|seen| seen.problems).unwrap_or_default();
    problems.extend(seen.into_iter().filter(|problem| !problem.is_seen_from_outside()));
    for service in services.iter().filter(|s| !s.in_force) {
        problems.push(Problem::new(
            "service_not_in_force",
            format!("service {} is not in force; `mqtt-fwd apply` puts it back", service.name),
        ));
    }
    let counters = datapath.as_ref().map(counters).transpose()?.unwrap_or_default();
    Ok(Status {
        interface: config.interface.clone(),
        healthy: problems.is_empty(),
        mode: attached.as_ref().and(xdp::attached_mode(&config.interface)).map(|m| {
            match m {
                XdpMode::Native => "native",
                XdpMode::Generic => "generic",
            }
            .to_owned()
        }),
        attached: attached.as_ref().map(program),
        positions,
        generation: datapath.as_ref().map(Datapath::generation).transpose()?,
        services,
        fleet: fleet::status(context),
        balancer,
        balancer_ok,
        maps: datapath.as_ref().map(Datapath::map_uses).transpose()?.unwrap_or_default(),
        multi_group_clients: datapath.as_ref().map(multi_group_count).transpose()?,
        relayed: config.services.iter().all(|service| service.relay.is_some()),
        counters: counters.into_iter().map(|c| (c.name, c.count)).collect(),
        problems,
        file_in_force: std::fs::read_to_string(&config.path)
            .is_ok_and(|text| *text == *config.text),
    })
}

/// The problem with it, if there is one, and how it is.
async fn balancer(context: &Context) -> (Option<&'static str>, String) {
    let config = context.config();
    let kind = format!("{:?}", config.balancer).to_lowercase();
    let at = format!("{kind} at {}", config.balancer_endpoint);
    match lasting_difference(context).await {
        Ok(None) => (None, format!("{at}: as configured")),
        Ok(Some(difference)) => {
            let text = format!("{at}: {difference}; `mqtt-fwd apply` puts it back");
            (Some("balancer_differs"), text)
        }
        // The line says already whose words these are.
        Err(e) => {
            let code = match e {
                BalancerError::Unreachable { .. } => "balancer_unreachable",
                _ => "balancer_differs",
            };
            (Some(code), e.to_string().trim_start_matches("balancer ").to_owned())
        }
    }
}

/// What the balancer has and should not have, or the other way round: not what `run` is changing just now, a step of
/// `slow_start` for example.
async fn lasting_difference(context: &Context) -> Result<Option<String>, BalancerError> {
    const PAUSE: Duration = Duration::from_millis(200);
    /// The same difference so often in a row lasts.
    const LASTING: u32 = 6;
    const TRIES: u32 = 30;
    let gateway = gateway::desired_or_warn(context.config()).await;
    let (mut found, mut seen) = (None, 0);
    for _ in 0..TRIES {
        let config = &context.in_effect();
        let mut client = Client::connect(&config.balancer_endpoint).await?;
        let mut now = apply::difference(config, gateway, &mut client).await?;
        let missing = context.datapath().and_then(|d| MapPlan::missing_service_vips(config, &d));
        if let Some(vip) = missing.unwrap_or_default().first() {
            let text =
                format!("the map vip_inner_dst lacks {vip}: brokers get its packets as they are");
            now = now.or(Some(text));
        }
        seen = if now == found { seen + 1 } else { 1 };
        found = now;
        if found.is_none() || seen == LASTING {
            break;
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(found)
}

fn services(config: &Config, datapath: Option<&Datapath>) -> Result<Vec<ServiceStatus>> {
    let in_force = datapath.map(Datapath::max_packets).transpose()?.unwrap_or_default();
    let services = config.services.iter().map(|service| {
        let addr = SocketAddr::new(service.addr, service.port);
        let max_packet = in_force.get(&addr).map(|bytes| u32::from(*bytes));
        ServiceStatus {
            name: service.name.clone(),
            address: addr.to_string(),
            in_force: max_packet.is_some(),
            max_packet,
        }
    });
    Ok(services.collect())
}

/// What packets met, those that are zero, too.
pub fn counters(datapath: &Datapath) -> Result<Vec<Counter>> {
    Ok(datapath.counters()?.iter().map(Counter::from).collect())
}

/// Groups as the balancer has them; if it does not answer, as configured.
pub async fn groups(config: &Config) -> Vec<GroupRow> {
    let balancer = async {
        let mut client = Client::connect(&config.balancer_endpoint).await?;
        let mut there = BTreeMap::new();
        let desired = desired_vips(config);
        for vip in client.vips().await?.into_iter().filter(|vip| desired.contains_key(vip)) {
            there.insert(vip, client.reals(vip).await?);
        }
        let mut traffic = BTreeMap::new();
        for service in &config.services {
            for group in &service.groups {
                let vip = Vip::tcp(group.vip, service.port);
                if there.contains_key(&vip) {
                    traffic.insert(vip, group_traffic(&mut client, service, group).await?);
                }
            }
        }
        Ok::<_, BalancerError>((there, traffic))
    };
    let (there, traffic) = balancer.await.unwrap_or_else(|e| {
        tracing::warn!("{e}; showing the configuration only");
        Default::default()
    });
    let groups = config.services.iter().flat_map(|s| s.groups.iter().map(move |g| (s, g)));
    let group = |(service, group): (&crate::domain::Service, &crate::domain::Group)| {
        let vip = Vip::tcp(group.vip, service.port);
        let (there, traffic) = (there.get(&vip), traffic.get(&vip));
        GroupRow {
            service: service.name.clone(),
            group: group.name.clone(),
            vip: vip.to_string(),
            reals: match there {
                Some(reals) => reals.iter().map(|(a, w)| group_real(*a, *w)).collect(),
                None => group.reals.iter().map(|r| group_real(r.addr, r.weight)).collect(),
            },
            packets: traffic.map(|(packets, _)| *packets),
            bytes: traffic.map(|(_, bytes)| *bytes),
        }
    };
    groups.map(group).collect()
}

fn group_real(addr: std::net::IpAddr, weight: u32) -> GroupReal {
    GroupReal { address: addr.to_string(), weight }
}
