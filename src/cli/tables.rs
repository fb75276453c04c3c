//! `flows`, `groups` and `counters`.

use std::collections::BTreeMap;

use clap::Args;

use super::table::{self, Output, mark};
use super::{block_on, or_here};
use crate::config::Config;
use crate::control::api::{self, proto};
use crate::control::view::{self, Names};
use crate::control::{Error, status};
use crate::datapath::Datapath;

pub fn flows(config: &Config, output: Output) -> Result<(), Error> {
    let rows = or_here(api::flows(config), || {
        let datapath = Datapath::open(&config.pins())?;
        view::flows(&datapath, &Names::read(config, &datapath)?)?.collect()
    })?;
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
                r.client,
                r.client_id,
                r.group,
                match r.why {
                    Some(why) => format!("{} ({why})", r.bound_by),
                    None => r.bound_by,
                },
                r.state,
                r.topic,
                mark(r.misrouted, "misrouted"),
            ]
        }),
    );
    Ok(())
}

pub fn groups(config: &Config, output: Output) -> Result<(), Error> {
    let rows =
        or_here(api::groups(config), || block_on(async { Ok(status::groups(config).await) }))?;
    if output.json {
        table::json(&rows);
        return Ok(());
    }
    let number = |n: Option<u64>| n.map_or_else(|| "?".to_owned(), |n| n.to_string());
    table::print(
        &["service", "group", "group vip", "reals", ">packets", ">bytes"],
        rows.into_iter().map(|r| {
            vec![r.service, r.group, r.vip, r.reals.join(", "), number(r.packets), number(r.bytes)]
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
        let counters =
            or_here(api::counters(config), || status::counters(&Datapath::open(&config.pins())?))?;
        if self.output.json {
            let by_name: BTreeMap<_, _> = counters.iter().map(|c| (&c.name, c.count)).collect();
            table::json(&by_name);
            return Ok(());
        }
        let shown = counters.into_iter().filter(|c| self.all || c.count > 0);
        table::print(
            &["reason", "kind", ">count", "meaning"],
            shown.map(|proto::Counter { name, is_verdict, count, meaning }| {
                let kind = if is_verdict { "verdict" } else { "note" };
                vec![name, kind.to_owned(), count.to_string(), meaning]
            }),
        );
        Ok(())
    }
}
