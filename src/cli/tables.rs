//! `flows`, `groups` and `counters`.

use clap::Args;
use serde::Serialize;

use super::table::{self, Output, mark};
use super::{block_on, status};
use crate::balancer::client::Client;
use crate::config::Config;
use crate::control::Error;
use crate::control::reconcile::plan;
use crate::control::view::{self, Names};
use crate::datapath::Datapath;
use crate::kernel::reasons::REASONS;

pub fn flows(config: &Config, output: Output) -> Result<(), Error> {
    let datapath = Datapath::open(&config.pins())?;
    let rows = view::flows(&datapath, &Names::read(config, &datapath)?)?;
    if output.json {
        table::json(&rows);
        return Ok(());
    }
    table::print(
        &[
            "service",
            "client",
            "client id",
            "group",
            "bound by",
            "state",
            "last topic",
            "misrouted",
        ],
        rows.into_iter().map(|r| {
            vec![
                r.service,
                r.client.to_string(),
                r.client_id,
                r.group,
                r.why
                    .map_or_else(|| r.bound_by.to_owned(), |why| format!("{} ({why})", r.bound_by)),
                r.state.to_owned(),
                r.topic,
                mark(r.misrouted, "misrouted"),
            ]
        }),
    );
    Ok(())
}

#[derive(Serialize)]
struct GroupRow {
    service: String,
    group: String,
    vip: String,
    reals: Vec<String>,
    packets: Option<u64>,
    bytes: Option<u64>,
}

pub fn groups(config: &Config, output: Output) {
    let mut rows = Vec::new();
    let balancer = block_on(async {
        let mut client = Client::connect(&config.balancer_endpoint).await?;
        let mut there = std::collections::BTreeMap::new();
        for vip in client.vips().await? {
            if plan::wanted_vips(config).contains_key(&vip) {
                there.insert(vip, (client.reals(vip).await?, client.vip_stats(vip).await?));
            }
        }
        Ok(there)
    });
    if let Err(e) = &balancer {
        tracing::warn!("{e}; showing the configuration only");
    }
    for service in &config.services {
        for group in &service.groups {
            let vip = crate::balancer::Vip::tcp(group.vip, service.port);
            let there = balancer.as_ref().ok().and_then(|b| b.get(&vip));
            let reals = match there {
                Some((reals, _)) => reals.iter().map(|(a, w)| real_text(*a, *w)).collect(),
                None => group.reals.iter().map(|r| real_text(r.addr, r.weight)).collect(),
            };
            rows.push(GroupRow {
                service: service.name.clone(),
                group: group.name.clone(),
                vip: vip.to_string(),
                reals,
                packets: there.map(|(_, s)| s.v1),
                bytes: there.map(|(_, s)| s.v2),
            });
        }
    }
    if output.json {
        table::json(&rows);
        return;
    }
    let number = |n: Option<u64>| n.map_or_else(|| "?".to_owned(), |n| n.to_string());
    table::print(
        &["service", "group", "group vip", "reals", ">packets", ">bytes"],
        rows.into_iter().map(|r| {
            vec![r.service, r.group, r.vip, r.reals.join(", "), number(r.packets), number(r.bytes)]
        }),
    );
}

fn real_text(addr: std::net::IpAddr, weight: u32) -> String {
    if weight == 1 { addr.to_string() } else { format!("{addr} (weight {weight})") }
}

#[derive(Debug, Args)]
pub struct Counters {
    /// Show those that are zero, too
    #[arg(long)]
    all: bool,

    #[command(flatten)]
    output: Output,
}

impl Counters {
    pub fn run(&self, config: &Config) -> Result<(), Error> {
        let datapath = Datapath::open(&config.pins())?;
        let counters = datapath.counters()?;
        if self.output.json {
            table::json(&status::counters_json(&counters));
            return Ok(());
        }
        let rows = REASONS.iter().zip(counters).filter(|(_, n)| self.all || *n > 0);
        table::print(
            &["reason", "kind", ">count", "meaning"],
            rows.map(|(reason, n)| {
                vec![
                    reason.name.to_owned(),
                    if reason.is_verdict { "verdict" } else { "note" }.to_owned(),
                    n.to_string(),
                    reason.text.to_owned(),
                ]
            }),
        );
        Ok(())
    }
}
