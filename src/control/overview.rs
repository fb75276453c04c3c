//! All at a glance, with rates: what `top` shows.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use super::api::{self, proto};
use super::view::{self, FORGOTTEN, Names, topic_text};
use super::{Result, health};
use crate::balancer::Vip;
use crate::balancer::client::Client;
use crate::config::Config;
use crate::datapath::Datapath;
use crate::kernel::abi::{client, client_flags, flow, flow_binding, flow_flags};
use crate::kernel::reasons::REASONS;

/// As many topics, and clients, as fit a large terminal.
const ROWS: usize = 100;

/// Reading is at most this part of the time: a million flows take a second.
pub const PART: u32 = 4;

/// One look after the other: rates are of two.
#[derive(Debug)]
pub struct Looks {
    datapath: Datapath,
    before: Option<Sample>,
}

impl Looks {
    /// Begins.
    pub fn new(config: &Config) -> Result<Self> {
        Ok(Self { datapath: Datapath::open(&config.pins())?, before: None })
    }

    /// What is there now; of the first look, rates are 0.
    pub async fn next(&mut self, config: &Config) -> Result<proto::Overview> {
        let pins = config.pins();
        if !self.datapath.is_pinned(&pins) {
            self.datapath = Datapath::open(&pins)?;
            self.before = None;
        }
        let now = Sample::read(config, &self.datapath).await?;
        let before = self.before.as_ref().unwrap_or(&now);
        let overview = read(config, &self.datapath, before, &now).await?;
        self.before = Some(now);
        Ok(overview)
    }
}

/// What is counted, at one time.
#[derive(Debug)]
struct Sample {
    when: Instant,
    /// In the order of [`REASONS`].
    counters: Vec<u64>,
    /// Packets and bytes by service and group, as the balancer counts; empty: it does not answer.
    traffic: BTreeMap<(String, String), (u64, u64)>,
}

impl Sample {
    /// Reads what is counted.
    async fn read(config: &Config, datapath: &Datapath) -> Result<Self> {
        let traffic = traffic(config).await.unwrap_or_default();
        Ok(Self { when: Instant::now(), counters: datapath.counters()?, traffic })
    }

    fn sum(&self, is_meant: impl Fn(&str, bool) -> bool) -> u64 {
        let meant =
            REASONS.iter().zip(&self.counters).filter(|(r, _)| is_meant(r.name, r.is_verdict));
        meant.map(|(_, n)| n).sum()
    }
}

async fn traffic(
    config: &Config,
) -> Result<BTreeMap<(String, String), (u64, u64)>, crate::balancer::client::BalancerError> {
    let mut client = Client::connect(&config.balancer_endpoint).await?;
    let mut traffic = BTreeMap::new();
    for service in &config.services {
        for group in &service.groups {
            let stats = client.vip_stats(Vip::tcp(group.vip, service.port)).await?;
            traffic.insert((service.name.clone(), group.name.clone()), (stats.v1, stats.v2));
        }
    }
    Ok(traffic)
}

/// What is there at the time of `now`, and what came since `before`.
async fn read(
    config: &Config,
    datapath: &Datapath,
    before: &Sample,
    now: &Sample,
) -> Result<proto::Overview> {
    let seconds = now.when.duration_since(before.when).as_secs_f64().max(1e-3);
    let rate = |before: u64, now: u64| now.saturating_sub(before) as f64 / seconds;
    let grown =
        |is_meant: &dyn Fn(&str, bool) -> bool| rate(before.sum(is_meant), now.sum(is_meant));
    // The message that ended its flow counts as mispredicted, too.
    let misrouted = (grown(&|name, _| name == "mispredicted" || name == "publish_lost")
        - grown(&|name, _| name == "flow_ended"))
    .max(0.0);
    let problems = api::all_problems(config).await.unwrap_or_else(|| health::problems(config));
    let problems = problems.into_iter().map(|problem| problem.text).collect();
    let flows = Flows::read(config, datapath)?;
    let groups = config.services.iter().flat_map(|service| {
        let traffic = |name: &String| {
            let key = (service.name.clone(), name.clone());
            let (before, now) = (before.traffic.get(&key)?, now.traffic.get(&key)?);
            Some((rate(before.0, now.0), rate(before.1, now.1)))
        };
        let flows = &flows;
        service.groups.iter().map(move |group| proto::GroupOverview {
            service: service.name.clone(),
            packets_s: traffic(&group.name).map(|(packets, _)| packets),
            bytes_s: traffic(&group.name).map(|(_, bytes)| bytes),
            flows: flows.of_group(&service.name, &group.name) as u64,
            group: group.name.clone(),
        })
    });
    let groups = groups.collect();
    let (clients, multi_group) = clients(config, datapath)?;
    Ok(proto::Overview {
        interface: config.interface.clone(),
        problems,
        packets_s: grown(&|_, is_verdict| is_verdict),
        publishes_s: grown(&|name, _| name == "publish") + misrouted,
        misrouted_s: misrouted,
        new_flows_s: grown(&|name, _| {
            ["flow_new", "flow_predicted", "flow_adopted"].contains(&name)
                || name.starts_with("bound_")
        }),
        flows: flows.count as u64,
        clients: clients as u64,
        groups,
        reals: reals(config).await?,
        topics: flows.topics,
        multi_group,
    })
}

async fn reals(config: &Config) -> Result<Vec<proto::RealOverview>> {
    if let Some(reals) = api::reals(config).await? {
        let row = |real: proto::Real| proto::RealOverview {
            state: real.state().text().to_owned(),
            group: real.group,
            real: real.address,
            weight: real.weight,
        };
        return Ok(reals.into_iter().map(row).collect());
    }
    let groups = config.services.iter().flat_map(|service| &service.groups);
    Ok(groups
        .flat_map(|group| {
            group.reals.iter().map(|real| proto::RealOverview {
                group: group.name.clone(),
                real: real.addr.to_string(),
                weight: real.weight,
                state: String::new(),
            })
        })
        .collect())
}

/// Live flows, counted by what they are bound to and what they publish.
struct Flows {
    count: usize,
    by_group: HashMap<(String, String), usize>,
    topics: Vec<proto::TopicOverview>,
}

impl Flows {
    fn read(config: &Config, datapath: &Datapath) -> Result<Self> {
        let names = Names::read(config, datapath)?;
        let mut count = 0;
        let mut by_binding: HashMap<(u16, u32), usize> = HashMap::new();
        let mut by_topic: HashMap<u64, (u32, usize, usize)> = HashMap::new();
        let mut add = |service: u16, f: &flow| {
            let has = |flag: flow_flags| u32::from(f.flags) & flag.0 != 0;
            if has(flow_flags::FLOW_CLOSING) || has(flow_flags::FLOW_ENDED) {
                return;
            }
            count += 1;
            let binding = flow_binding(f);
            *by_binding.entry((service, binding)).or_default() += 1;
            if f.topic != 0 {
                let entry = by_topic.entry(f.topic).or_insert((binding, 0, 0));
                entry.1 += 1;
                entry.2 += usize::from(has(flow_flags::FLOW_MISROUTED));
            }
        };
        for (key, f) in datapath.flows.entries()? {
            add(key.service, &f);
        }
        for (key, f) in datapath.flows6.entries()? {
            add(key.service, &f);
        }
        let mut by_group: HashMap<_, usize> = HashMap::new();
        for ((service, binding), n) in by_binding {
            *by_group.entry((names.service(service), names.bound(binding))).or_default() += n;
        }
        let mut topics: Vec<_> = by_topic.into_iter().collect();
        topics.sort_by_key(|(hash, (_, flows, _))| (usize::MAX - flows, *hash));
        topics.truncate(ROWS);
        let topics = topics
            .into_iter()
            .map(|(hash, (binding, flows, misrouted))| {
                let topic = datapath.topics.get(&hash)?;
                let topic =
                    topic.map_or_else(|| FORGOTTEN.to_owned(), |t| topic_text(&t.text, t.length));
                Ok(proto::TopicOverview {
                    topic,
                    group: names.bound(binding),
                    flows: flows as u64,
                    misrouted: misrouted as u64,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { count, by_group, topics })
    }

    fn of_group(&self, service: &str, group: &str) -> usize {
        let key = (service.to_owned(), group.to_owned());
        self.by_group.get(&key).copied().unwrap_or_default()
    }
}

/// How many clients are known, and those that publish to several groups.
fn clients(config: &Config, datapath: &Datapath) -> Result<(usize, Vec<proto::ClientOverview>)> {
    let names = Names::read(config, datapath)?;
    let addresses = datapath.clients.entries()?;
    let addresses6 = datapath.clients6.entries()?;
    let ids = datapath.client_ids.entries()?;
    let count = addresses.len() + addresses6.len() + ids.len();
    let addresses = addresses
        .iter()
        .map(|(key, c)| (std::net::IpAddr::from(key.addr.to_ne_bytes()).to_string(), c));
    let addresses6 = addresses6
        .iter()
        .map(|(key, c)| (crate::kernel::abi::words_addr(key.addr, true).to_string(), c));
    let ids = ids.iter().map(|(_, id)| (topic_text(&id.text, id.length), &id.client));
    let multi = |c: &client| u32::from(c.flags) & client_flags::CLIENT_MULTI_GROUP.0 != 0;
    let mut multi: Vec<_> =
        addresses.chain(addresses6).chain(ids).filter(|(_, c)| multi(c)).collect();
    multi.sort_by(|(a, c), (b, d)| d.group_changes.cmp(&c.group_changes).then_with(|| a.cmp(b)));
    multi.truncate(ROWS);
    let rows = multi
        .into_iter()
        .map(|(client, c)| {
            let topic = datapath.topics.get(&c.topic)?;
            Ok(proto::ClientOverview {
                client,
                topic: topic.map_or_else(String::new, |t| topic_text(&t.text, t.length)),
                group: names.bound(view::best_binding(c)),
                changes: u32::from(c.group_changes),
            })
        })
        .collect::<Result<_>>()?;
    Ok((count, rows))
}
