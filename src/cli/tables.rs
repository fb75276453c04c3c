//! `flows`, `groups` and `counters`.

use std::collections::BTreeMap;

use clap::Args;

use super::error::Error;
use super::from_run_or;
use super::table::{self, Output, mark};
use crate::config::Config;
use crate::datapath::Datapath;
use crate::datapath::counts::Counter;
use crate::datapath::flows;
use crate::datapath::names::{self, Names};
use crate::inspect::status;

pub fn flows(config: &Config, output: Output) -> Result<(), Error> {
    let rows: Vec<flows::Flow> = from_run_or(
        config,
        async |mut run| run.flows().await,
        async || {
            let datapath = Datapath::open(&config.pins())?;
            let names = Names::read(config, &datapath)?;
            Ok(flows::flows(&datapath, &names)?.collect::<Result<_, _>>()?)
        },
    )?;
    if output.json {
        table::json_rows("flows", &rows);
        return Ok(());
    }
    table::print(
        &[
            "service",
            "client",
            "client id, server name",
            "group",
            "bound by",
            "state",
            "last topic",
            "misrouted",
        ],
        rows.into_iter().map(|r| {
            vec![
                r.service,
                r.client,
                r.client_id + &r.server_name,
                r.group,
                names::bound_by_words(&r.bound_by, r.fallback_reason.as_deref()),
                names::words(&r.state).into_owned(),
                r.topic,
                mark(r.misrouted, "misrouted"),
            ]
        }),
    );
    Ok(())
}

pub fn groups(config: &Config, output: Output) -> Result<(), Error> {
    let rows = from_run_or(
        config,
        async |mut run| run.groups().await,
        async || Ok(status::groups(config).await),
    )?;
    if output.json {
        table::json_rows("groups", &rows);
        return Ok(());
    }
    let number = |n: Option<u64>| n.map_or_else(|| "?".to_owned(), |n| n.to_string());
    table::print(
        &["service", "group", "group vip", "reals", ">packets", ">bytes"],
        rows.into_iter().map(|r| {
            vec![r.service, r.group, r.vip, joined(&r.reals), number(r.packets), number(r.bytes)]
        }),
    );
    Ok(())
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
        let counters = from_run_or(
            config,
            async |mut run| run.counters().await,
            async || Ok(status::counters(&Datapath::open(&config.pins())?)?),
        )?;
        if self.output.json {
            let by_name: BTreeMap<_, _> = counters.iter().map(|c| (&c.name, c.count)).collect();
            table::json_rows("counters", &by_name);
            return Ok(());
        }
        let shown = counters.into_iter().filter(|c| self.all || c.count > 0);
        table::print(
            &["reason", "kind", ">count", "meaning"],
            shown.map(|Counter { name, is_verdict, count, meaning }| {
                let kind = if is_verdict { "verdict" } else { "note" };
                vec![name, kind.to_owned(), count.to_string(), meaning]
            }),
        );
        Ok(())
    }
}

fn joined(all: &[impl ToString]) -> String {
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
