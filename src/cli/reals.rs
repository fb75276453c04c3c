//! `reals`, `drain` and `undrain`.

use std::net::IpAddr;

use clap::Args;
use serde::Serialize;

use super::block_on;
use super::error::Error;
use super::table::{self, Output, counted, line};
use crate::api::{Drained, Run};
use crate::config::{BalancerKind, Config, address};

#[derive(Serialize)]
struct Row {
    service: String,
    group: String,
    real: String,
    weight: u32,
    state: String,
    since_s: u64,
    error: String,
    /// Seconds since 1970, where it shows one (TLS).
    certificate_expires: Option<u64>,
}

pub fn reals(config: &Config, output: Output) -> Result<(), Error> {
    let reals = block_on(async { Run::require(config, "this table").await?.reals().await })?;
    let rows: Vec<Row> = reals
        .into_iter()
        .map(|real| Row {
            state: real.state().text().to_owned(),
            service: real.service,
            group: real.group,
            real: real.address,
            weight: real.weight,
            since_s: real.since_s,
            error: real.error,
            certificate_expires: real.certificate_expires,
        })
        .collect();
    if output.json {
        // A word, not what people read.
        let word = |row: Row| Row { state: row.state.replace(", ", "_").replace(' ', "_"), ..row };
        table::json_rows("reals", &rows.into_iter().map(word).collect::<Vec<_>>());
        return Ok(());
    }
    table::print(
        &["service", "group", "real", ">weight", "state", ">since", "last failure"],
        rows.into_iter().map(|r| {
            let since = table::age(r.since_s);
            let weight = r.weight.to_string();
            vec![r.service, r.group, r.real, weight, r.state, since, r.error]
        }),
    );
    Ok(())
}

#[derive(Debug, Args)]
pub struct Drain {
    /// Address of the real
    #[arg(value_parser = address)]
    real: IpAddr,

    /// Also end its connections, this many per second, each with DISCONNECT when its client sends next
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    end_per_second: Option<u32>,

    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Printed {
    real: IpAddr,
    drained: bool,
    groups: usize,
    ending: usize,
}

#[derive(Debug, Args)]
pub struct Undrain {
    /// Address of the real
    #[arg(value_parser = address)]
    real: IpAddr,

    #[command(flatten)]
    output: Output,
}

fn json(real: IpAddr, drained: bool, done: Drained) {
    let Drained { groups, ending } = done;
    table::json(&Printed { real, drained, groups, ending });
}

impl Drain {
    /// Whether its connections are of a VIP with others, among which Katran chooses for what it has forgotten.
    fn is_remembered_by_katran(&self, config: &Config) -> bool {
        let groups = config.services.iter().flat_map(|service| &service.groups);
        let mut reals = groups.flat_map(|group| &group.reals);
        let shares_a_vip = reals.any(|real| real.addr == self.real && real.vip.is_none());
        config.balancer == BalancerKind::Katran && shares_a_vip
    }

    pub fn run(&self, config: &Config) -> Result<(), Error> {
        let per_second = self.end_per_second.unwrap_or_default();
        let done = block_on(async {
            Run::require(config, "a drain").await?.drain(self.real, per_second).await
        })?;
        if self.output.json {
            json(self.real, true, done);
            return Ok(());
        }
        let established = match self.end_per_second {
            Some(n) => format!(
                "{} of it end as their clients send, {n} per second",
                counted(done.ending, "connection")
            ),
            None if self.is_remembered_by_katran(config) => {
                "established ones stay as long as Katran remembers them".to_owned()
            }
            None => "established ones stay until they end".to_owned(),
        };
        line(&format!(
            "{}: no new connections in {}; {established} (`mqtt-fwd undrain {0}` takes it back)",
            self.real,
            counted(done.groups, "group")
        ));
        Ok(())
    }
}

impl Undrain {
    pub fn run(&self, config: &Config) -> Result<(), Error> {
        let done =
            block_on(async { Run::require(config, "a drain").await?.undrain(self.real).await })?;
        if self.output.json {
            json(self.real, false, done);
            return Ok(());
        }
        line(&format!(
            "{}: gets new connections in {} again",
            self.real,
            counted(done.groups, "group")
        ));
        Ok(())
    }
}
