//! All at a glance, with rates: what `top` shows.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;

use serde::Serialize;

use super::{Context, Result, fleet};
use crate::balancer::client::{BalancerError, Client};
use crate::chain::health;
use crate::config::Config;
use crate::datapath::Datapath;
use crate::datapath::clients::{MultiGroupClient, multi_group};
use crate::datapath::counts::Counters;
use crate::datapath::flows::{FlowCounts, TopicUse};
use crate::datapath::names::Names;
use crate::domain::{Group, Service, Vip};
use crate::kernel::chain;
use crate::kernel::reasons::Reason;

/// As many topics, and clients, as fit a large terminal.
const ROWS: usize = 100;

/// Reading takes at most this part of the time: a million flows take a second.
pub const PART: u32 = 4;

/// What is there, and by how much it grew per second since the one before. The first one has no rates.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Overview {
    pub interface: String,
    pub problems: Vec<String>,
    pub packets_s: f64,
    pub publishes_s: f64,
    /// PUBLISHes that were not at their group's brokers.
    pub misrouted_s: f64,
    pub new_flows_s: f64,
    pub flows: u64,
    pub clients: u64,
    /// The fleet, in words.
    pub fleet: Option<String>,
    pub groups: Vec<GroupOverview>,
    pub reals: Vec<RealOverview>,
    /// Those that most connections publish, first.
    pub topics: Vec<TopicUse>,
    /// Clients that no one group fits, those with most changes first.
    pub multi_group: Vec<MultiGroupClient>,
}

/// A group.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GroupOverview {
    pub service: String,
    pub group: String,
    /// None: the balancer does not answer.
    pub packets_s: Option<f64>,
    pub bytes_s: Option<f64>,
    pub flows: u64,
}

/// A real.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RealOverview {
    pub group: String,
    pub real: String,
    pub weight: u32,
    /// In words; empty: no `run` tells.
    pub state: String,
    /// To the real, for all groups that have it. None: this process may not look.
    pub packets_s: Option<f64>,
    pub bytes_s: Option<f64>,
}

/// One sample after the other: rates are of two.
#[derive(Debug)]
pub struct Sampler {
    datapath: Datapath,
    before: Option<Sample>,
}

impl Sampler {
    /// Opens the maps.
    pub fn new(context: &Context) -> Result<Self> {
        Ok(Self { datapath: context.datapath()?, before: None })
    }

    /// What is there now; of the first sample, rates are 0.
    pub async fn next(&mut self, context: &Context) -> Result<Overview> {
        if !self.datapath.is_pinned(&context.config().pins()) {
            self.datapath = context.datapath()?;
            self.before = None;
        }
        let now = Sample::read(context.config(), &self.datapath).await?;
        let before = self.before.as_ref().unwrap_or(&now);
        let overview = read(context, &self.datapath, before, &now)?;
        self.before = Some(now);
        Ok(overview)
    }
}

/// The counters at one time.
#[derive(Debug)]
struct Sample {
    time: Instant,
    counters: Counters,
    /// Packets and bytes by service and group, as the balancer counts; empty: it does not answer.
    traffic: BTreeMap<(String, String), (u64, u64)>,
    /// Likewise by real.
    reals: BTreeMap<IpAddr, (u64, u64)>,
}

impl Sample {
    async fn read(config: &Config, datapath: &Datapath) -> Result<Self> {
        let traffic = traffic(config).await.unwrap_or_default();
        let reals = chain::real_traffic(&config.pins()).unwrap_or_default();
        Ok(Self { time: Instant::now(), counters: datapath.counters()?, traffic, reals })
    }
}

/// Packets and bytes of a group: of its VIP, and of those with one real each.
pub async fn group_traffic(
    client: &mut Client,
    service: &Service,
    group: &Group,
) -> Result<(u64, u64), BalancerError> {
    let stats = client.vip_stats(Vip::tcp(group.vip, service.port)).await?;
    let mut sum = (stats.v1, stats.v2);
    for vip in group.reals.iter().filter_map(|real| real.vip) {
        // One that the balancer does not have, or not again yet, has no traffic.
        if let Ok(stats) = client.vip_stats(Vip::tcp(vip, service.port)).await {
            sum = (sum.0 + stats.v1, sum.1 + stats.v2);
        }
    }
    Ok(sum)
}

async fn traffic(config: &Config) -> Result<BTreeMap<(String, String), (u64, u64)>, BalancerError> {
    let mut client = Client::connect(&config.balancer_endpoint).await?;
    let mut traffic = BTreeMap::new();
    for service in &config.services {
        for group in &service.groups {
            let sum = group_traffic(&mut client, service, group).await?;
            traffic.insert((service.name.clone(), group.name.clone()), sum);
        }
    }
    Ok(traffic)
}

/// Notes that begin a flow.
fn begins_flow(reason: &Reason) -> bool {
    ["flow_new", "flow_predicted", "flow_adopted"].contains(&reason.name)
        || reason.name.starts_with("bound_")
}

fn read(context: &Context, datapath: &Datapath, before: &Sample, now: &Sample) -> Result<Overview> {
    let config = context.config();
    let seconds = now.time.duration_since(before.time).as_secs_f64().max(1e-3);
    let rate = |before: u64, now: u64| now.saturating_sub(before) as f64 / seconds;
    let grown = |is_meant: &dyn Fn(&Reason) -> bool| {
        rate(before.counters.sum(is_meant), now.counters.sum(is_meant))
    };
    // The message that ended its flow counts as mispredicted, too.
    let misrouted = (grown(&|r| r.name == "mispredicted" || r.name == "publish_lost")
        - grown(&|r| r.name == "flow_ended"))
    .max(0.0);
    let problems = match context.seen() {
        Some(seen) => seen.problems,
        None => health::problems(config),
    };
    let names = Names::read(config, datapath)?;
    let flows = FlowCounts::read(datapath, &names, ROWS)?;
    let groups = config.services.iter().flat_map(|service| {
        let traffic = |name: &String| {
            let key = (service.name.clone(), name.clone());
            let (before, now) = (before.traffic.get(&key)?, now.traffic.get(&key)?);
            Some((rate(before.0, now.0), rate(before.1, now.1)))
        };
        let flows = &flows;
        service.groups.iter().map(move |group| GroupOverview {
            service: service.name.clone(),
            packets_s: traffic(&group.name).map(|(packets, _)| packets),
            bytes_s: traffic(&group.name).map(|(_, bytes)| bytes),
            flows: flows.of_group(&service.name, &group.name),
            group: group.name.clone(),
        })
    });
    let groups = groups.collect();
    let (clients, _, multi_group) = multi_group(datapath, &names, ROWS)?;
    Ok(Overview {
        interface: config.interface.clone(),
        problems: problems.into_iter().map(|problem| problem.text).collect(),
        packets_s: grown(&|reason| reason.is_verdict),
        publishes_s: grown(&|reason| reason.name == "publish") + misrouted,
        misrouted_s: misrouted,
        new_flows_s: grown(&begins_flow),
        flows: flows.all,
        clients,
        fleet: fleet::status(context).map(|fleet| {
            format!(
                "{}, {:.0} connections/s from others",
                fleet.who(),
                grown(&|reason| reason.name == "missed")
            )
        }),
        groups,
        reals: reals(context, &|real: IpAddr| {
            let (before, now) = (before.reals.get(&real)?, now.reals.get(&real)?);
            Some((rate(before.0, now.0), rate(before.1, now.1)))
        }),
        topics: flows.topics,
        multi_group,
    })
}

fn reals(context: &Context, rates: &dyn Fn(IpAddr) -> Option<(f64, f64)>) -> Vec<RealOverview> {
    if let Some(seen) = context.seen() {
        let row = |real: crate::domain::RealState| RealOverview {
            state: real.text().to_owned(),
            packets_s: rates(real.addr).map(|(packets, _)| packets),
            bytes_s: rates(real.addr).map(|(_, bytes)| bytes),
            group: real.group,
            real: real.addr.to_string(),
            weight: real.weight,
        };
        return seen.reals.into_iter().map(row).collect();
    }
    let groups = context.config().services.iter().flat_map(|service| &service.groups);
    groups
        .flat_map(|group| {
            group.reals.iter().map(|real| RealOverview {
                group: group.name.clone(),
                real: real.addr.to_string(),
                weight: real.weight,
                state: String::new(),
                packets_s: rates(real.addr).map(|(packets, _)| packets),
                bytes_s: rates(real.addr).map(|(_, bytes)| bytes),
            })
        })
        .collect()
}
