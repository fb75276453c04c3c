//! `status`: is everything where it should be, and what goes through it?

use std::collections::BTreeMap;

use clap::Args;
use serde::Serialize;

use super::block_on;
use super::table::{self, Output, line};
use crate::balancer::client::Client;
use crate::config::{Config, XdpMode};
use crate::control::problem::Problem;
use crate::control::reconcile::apply;
use crate::control::{Error, health, view};
use crate::control::{api, gateway};
use crate::datapath::Datapath;
use crate::kernel::chain::{self, Chain};
use crate::kernel::reasons::REASONS;
use crate::kernel::xdp;

/// Of the JSON: it changes when a field goes or means something else.
const SCHEMA: u32 = 1;

#[derive(Serialize)]
#[allow(clippy::struct_excessive_bools)] // what is true of it, side by side
struct Status {
    schema: u32,
    interface: String,
    attached: Option<String>,
    mode: Option<&'static str>,
    positions: Vec<Option<String>>,
    generation: Option<u32>,
    services: Vec<ServiceStatus>,
    balancer: String,
    balancer_ok: bool,
    maps: Vec<view::MapUse>,
    multi_group_clients: Option<usize>,
    /// Every service has a relay.
    relayed: bool,
    counters: BTreeMap<&'static str, u64>,
    problems: Vec<Problem>,
    healthy: bool,
    /// The file says what is in force.
    file_in_force: bool,
}

#[derive(Serialize)]
struct ServiceStatus {
    name: String,
    address: String,
    in_force: bool,
    max_packet: Option<u16>,
}

/// Counters by name.
pub fn counters_json(counters: &[u64]) -> BTreeMap<&'static str, u64> {
    REASONS.iter().map(|r| r.name).zip(counters.iter().copied()).collect()
}

#[derive(Debug, Args)]
pub struct Show {
    /// Print nothing, and end with 1 unless everything is healthy
    #[arg(long)]
    check: bool,

    #[command(flatten)]
    output: Output,
}

impl Show {
    pub fn run(&self, config: &Config) -> Result<(), Error> {
        let status = read(config)?;
        if self.check && !status.healthy {
            let mut problems: Vec<_> = status.problems.iter().map(Problem::to_string).collect();
            if !status.balancer_ok {
                problems.push(status.balancer);
            }
            let (interface, problems) = (config.interface.clone(), problems.join("; "));
            return Err(Error::Unhealthy { interface, problems });
        }
        if self.output.json {
            table::json(&status);
        } else if !self.check {
            print(&status);
        }
        Ok(())
    }
}

fn read(config: &Config) -> Result<Status, Error> {
    let program = |p: &xdp::ProgramInfo| format!("{} (id {})", p.name, p.id);
    let pins = config.pins();
    let attached = xdp::attached(&config.interface)?.map(|root| pins.identify(root));
    let chain = Chain::open(&pins)?;
    let positions: Vec<_> = (0..chain::POSITIONS)
        .map(|i| chain.as_ref()?.program(i).map(|there| program(&pins.identify(there))))
        .collect();
    let datapath = Datapath::open(&config.pins()).ok();
    let (balancer_ok, balancer) = balancer(config);
    let services = services(config, datapath.as_ref())?;
    let counters = datapath.as_ref().map(Datapath::counters).transpose()?.unwrap_or_default();
    let maps = datapath.as_ref().map(view::map_uses).transpose()?.unwrap_or_default();
    let multi_group_clients = datapath.as_ref().map(view::multi_group_clients).transpose()?;
    let mut problems = health::problems(config);
    problems.extend(block_on(async { Ok(api::problems(config).await) })?);
    for service in services.iter().filter(|s| !s.in_force) {
        problems.push(Problem::new(
            "service_not_in_force",
            format!("service {} is not in force; `mqtt-fwd apply` puts it back", service.name),
        ));
    }
    Ok(Status {
        schema: SCHEMA,
        interface: config.interface.clone(),
        healthy: balancer_ok && problems.is_empty(),
        mode: attached.as_ref().and(xdp::attached_mode(&config.interface)).map(|m| match m {
            XdpMode::Native => "native",
            XdpMode::Generic => "generic",
        }),
        attached: attached.as_ref().map(program),
        positions,
        generation: datapath.as_ref().map(Datapath::generation).transpose()?,
        services,
        balancer,
        balancer_ok,
        maps,
        multi_group_clients,
        relayed: config.services.iter().all(|service| service.relay.is_some()),
        counters: counters_json(&counters),
        problems,
        file_in_force: std::fs::read_to_string(&config.path)
            .is_ok_and(|text| *text == *config.text),
    })
}

fn balancer(config: &Config) -> (bool, String) {
    let kind = format!("{:?}", config.balancer).to_lowercase();
    let at = format!("{kind} at {}", config.balancer_endpoint);
    let difference = block_on(async {
        let config = &api::in_effect(config).await;
        let mut client = Client::connect(&config.balancer_endpoint).await?;
        Ok(apply::difference(config, gateway::wanted_or_warn(config).await, &mut client).await?)
    });
    match difference {
        Ok(None) => (true, format!("{at}: as configured")),
        Ok(Some(difference)) => {
            (false, format!("{at}: {difference}; `mqtt-fwd apply` puts it back"))
        }
        // The line says already whose words these are.
        Err(e) => (false, e.to_string().trim_start_matches("balancer ").to_owned()),
    }
}

fn services(config: &Config, datapath: Option<&Datapath>) -> Result<Vec<ServiceStatus>, Error> {
    let table = datapath.map(Datapath::service_table).transpose()?.unwrap_or_default();
    let in_force = &table.service[..usize::from(table.count)];
    Ok(config
        .services
        .iter()
        .map(|service| {
            let there = in_force.iter().find(|s| {
                s.addr == crate::kernel::abi::addr_words(service.addr)
                    && u16::from_be(s.port) == service.port
            });
            ServiceStatus {
                name: service.name.clone(),
                address: std::net::SocketAddr::new(service.addr, service.port).to_string(),
                in_force: there.is_some(),
                max_packet: there.map(|s| s.max_packet),
            }
        })
        .collect())
}

fn print(status: &Status) {
    let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    line(&format!(
        "{}: {}",
        status.interface,
        if status.healthy { "healthy" } else { "NOT HEALTHY" }
    ));
    for problem in &status.problems {
        line(&format!("problem    {problem}"));
    }
    line(&format!(
        "root       {}{}",
        or_none(&status.attached),
        status.mode.map(|m| format!(", {m} XDP")).unwrap_or_default()
    ));
    for (position, program) in status.positions.iter().enumerate() {
        line(&format!("  [{position}]      {}", or_none(program)));
    }
    line(&format!("balancer   {}", status.balancer));
    for service in &status.services {
        line(&match (service.in_force, service.max_packet) {
            (true, Some(max)) => {
                format!("service    {} at {}, packets up to {max} B", service.name, service.address)
            }
            _ => format!("service    {} at {}: NOT IN FORCE", service.name, service.address),
        });
    }
    line(&format!(
        "routes     generation {}",
        status.generation.map_or_else(|| "-".to_owned(), |n| n.to_string())
    ));
    if !status.file_in_force {
        line(
            "note       the configuration file is not what is in force; `mqtt-fwd diff` shows the \
             difference",
        );
    }
    if let Some(count @ 1..) = status.multi_group_clients {
        let clients = if count == 1 { "client publishes" } else { "clients publish" };
        line(&format!(
            "note       {count} {clients} to several groups, which no prediction fits; \
             `mqtt-fwd clients` marks them"
        ));
    }
    let count = |name| status.counters.get(name).copied().unwrap_or(0);
    // The message that ended its flow counts as mispredicted, too.
    let lost = count("publish_lost");
    let misrouted = count("mispredicted").saturating_sub(count("flow_ended"));
    if lost + misrouted > 0 && !status.relayed {
        line(&format!(
            "note       of {} messages, {misrouted} were at a broker of another group and {lost} at none; \
             a relay would have routed them: docs/relay.md",
            count("publish") + misrouted + lost
        ));
    }
    line("");
    table::print(
        &["map", ">capacity", ">used", ">evicted"],
        status.maps.iter().map(|m| {
            let numbers = [u64::from(m.capacity), m.used, m.evicted].map(|n| n.to_string());
            [&[m.map.to_owned()][..], &numbers].concat()
        }),
    );
    line("");
    let seen = REASONS.iter().filter(|r| status.counters.get(r.name).is_some_and(|n| *n > 0));
    table::print(
        &["reason", ">count", "meaning"],
        seen.map(|r| {
            vec![r.name.to_owned(), status.counters[r.name].to_string(), r.text.to_owned()]
        }),
    );
}
