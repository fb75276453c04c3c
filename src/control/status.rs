//! Is everything where it should be, and what goes through it?

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use super::api::{self, proto};
use super::problem::Problem;
use super::reconcile::{apply, plan};
use super::{Result, gateway, health, view};
use crate::balancer::Vip;
use crate::balancer::client::{BalancerError, Client};
use crate::config::{Config, XdpMode};
use crate::datapath::Datapath;
use crate::kernel::abi::addr_words;
use crate::kernel::chain::{self, Chain};
use crate::kernel::reasons::REASONS;
use crate::kernel::xdp;

/// All of it.
pub async fn read(config: &Config) -> Result<proto::GetStatusResponse> {
    let program = |p: &xdp::ProgramInfo| format!("{} (id {})", p.name, p.id);
    let pins = config.pins();
    let attached = xdp::attached(&config.interface)?.map(|root| pins.identify(root));
    let chain = Chain::open(&pins)?;
    let at = |i| chain.as_ref()?.program(i).map(|there| program(&pins.identify(there)));
    let positions = (0..chain::POSITIONS).map(|i| proto::Position { program: at(i) }).collect();
    let datapath = Datapath::open(&pins).ok();
    let (trouble, balancer) = balancer(config).await;
    let services = services(config, datapath.as_ref())?;
    let maps = datapath.as_ref().map(view::map_uses).transpose()?.unwrap_or_default();
    let multi_group_clients = datapath.as_ref().map(view::multi_group_clients).transpose()?;
    let mut problems = health::problems(config);
    let balancer_ok = trouble.is_none();
    problems.extend(trouble.map(|code| Problem::new(code, balancer.clone())));
    problems.extend(api::problems(config).await);
    for service in services.iter().filter(|s| !s.in_force) {
        problems.push(Problem::new(
            "service_not_in_force",
            format!("service {} is not in force; `mqtt-fwd apply` puts it back", service.name),
        ));
    }
    Ok(proto::GetStatusResponse {
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
        balancer,
        balancer_ok,
        maps,
        multi_group_clients: multi_group_clients.map(|n| n as u64),
        relayed: config.services.iter().all(|service| service.relay.is_some()),
        counters: match &datapath {
            Some(datapath) => counters(datapath)?.into_iter().map(|c| (c.name, c.count)).collect(),
            None => BTreeMap::default(),
        },
        problems: problems.into_iter().map(Into::into).collect(),
        file_in_force: std::fs::read_to_string(&config.path)
            .is_ok_and(|text| *text == *config.text),
    })
}

/// The problem with it, if there is one, and how it is.
async fn balancer(config: &Config) -> (Option<&'static str>, String) {
    let kind = format!("{:?}", config.balancer).to_lowercase();
    let at = format!("{kind} at {}", config.balancer_endpoint);
    match lasting_difference(config).await {
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
/// `slow_start_s` for example.
async fn lasting_difference(config: &Config) -> Result<Option<String>, BalancerError> {
    const PAUSE: Duration = Duration::from_millis(100);
    const TRIES: u32 = 5;
    let gateway = gateway::wanted_or_warn(&api::in_effect(config).await).await;
    let mut found = None;
    for again in 0..TRIES {
        if again > 0 {
            tokio::time::sleep(PAUSE).await;
        }
        let config = &api::in_effect(config).await;
        let mut client = Client::connect(&config.balancer_endpoint).await?;
        found = apply::difference(config, gateway, &mut client).await?;
        if found.is_none() {
            break;
        }
    }
    Ok(found)
}

fn services(config: &Config, datapath: Option<&Datapath>) -> Result<Vec<proto::ServiceStatus>> {
    let table = datapath.map(Datapath::service_table).transpose()?.unwrap_or_default();
    let in_force = &table.service[..usize::from(table.count)];
    let services = config.services.iter().map(|service| {
        let there = in_force
            .iter()
            .find(|s| s.addr == addr_words(service.addr) && u16::from_be(s.port) == service.port);
        proto::ServiceStatus {
            name: service.name.clone(),
            address: SocketAddr::new(service.addr, service.port).to_string(),
            in_force: there.is_some(),
            max_packet: there.map(|s| u32::from(s.max_packet)),
        }
    });
    Ok(services.collect())
}

/// What packets met, those that are zero, too.
pub fn counters(datapath: &Datapath) -> Result<Vec<proto::Counter>> {
    let counter = |(reason, count): (&crate::kernel::reasons::Reason, u64)| proto::Counter {
        name: reason.name.to_owned(),
        is_verdict: reason.is_verdict,
        count,
        meaning: reason.text.to_owned(),
    };
    Ok(REASONS.iter().zip(datapath.counters()?).map(counter).collect())
}

/// Groups as the balancer has them; if it does not answer, as configured.
pub async fn groups(config: &Config) -> Vec<proto::Group> {
    let balancer = async {
        let mut client = Client::connect(&config.balancer_endpoint).await?;
        let mut there = BTreeMap::new();
        for vip in client.vips().await? {
            if plan::wanted_vips(config).contains_key(&vip) {
                there.insert(vip, (client.reals(vip).await?, client.vip_stats(vip).await?));
            }
        }
        Ok::<_, BalancerError>(there)
    };
    let there = balancer.await.unwrap_or_else(|e| {
        tracing::warn!("{e}; showing the configuration only");
        BTreeMap::default()
    });
    let groups = config.services.iter().flat_map(|s| s.groups.iter().map(move |g| (s, g)));
    let group = |(service, group): (&crate::domain::Service, &crate::domain::Group)| {
        let vip = Vip::tcp(group.vip, service.port);
        let there = there.get(&vip);
        proto::Group {
            service: service.name.clone(),
            group: group.name.clone(),
            vip: vip.to_string(),
            reals: match there {
                Some((reals, _)) => reals.iter().map(|(a, w)| real_text(*a, *w)).collect(),
                None => group.reals.iter().map(|r| real_text(r.addr, r.weight)).collect(),
            },
            packets: there.map(|(_, s)| s.v1),
            bytes: there.map(|(_, s)| s.v2),
        }
    };
    groups.map(group).collect()
}

fn real_text(addr: std::net::IpAddr, weight: u32) -> String {
    if weight == 1 { addr.to_string() } else { format!("{addr} (weight {weight})") }
}
