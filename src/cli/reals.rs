//! `reals`, `drain` and `undrain`.

use std::net::IpAddr;

use clap::Args;
use serde::Serialize;

use super::block_on;
use super::table::{self, Output, line};
use crate::config::{Config, address};
use crate::control::Error;
use crate::control::api;

#[derive(Serialize)]
struct Row {
    service: String,
    group: String,
    real: String,
    weight: u32,
    state: &'static str,
    since_s: u64,
    error: String,
}

pub fn reals(config: &Config, output: Output) -> Result<(), Error> {
    let reals = block_on(api::reals(config))?.ok_or_else(|| {
        Error::Busy(format!("no `run` is at work on {}; it is what checks", config.interface))
    })?;
    let rows: Vec<Row> = reals
        .into_iter()
        .map(|real| Row {
            state: real.state().text(),
            service: real.service,
            group: real.group,
            real: real.address,
            weight: real.weight,
            since_s: real.since_s,
            error: real.error,
        })
        .collect();
    if output.json {
        table::json(&rows);
        return Ok(());
    }
    table::print(
        &["service", "group", "real", ">weight", "state", ">since", "last failure"],
        rows.into_iter().map(|r| {
            let since = table::age(r.since_s);
            let weight = r.weight.to_string();
            vec![r.service, r.group, r.real, weight, r.state.to_owned(), since, r.error]
        }),
    );
    Ok(())
}

#[derive(Debug, Args)]
pub struct Drain {
    /// Address of the real
    #[arg(value_parser = address)]
    real: IpAddr,
}

impl Drain {
    pub fn run(&self, config: &Config, drained: bool) -> Result<(), Error> {
        let groups = block_on(api::set_drain(config, self.real, drained))?;
        let of = if groups == 1 { "1 group".to_owned() } else { format!("{groups} groups") };
        line(&if drained {
            format!(
                "{}: no new connections in {of}; established ones stay until they end \
                 (`mqtt-fwd undrain {0}` takes it back)",
                self.real
            )
        } else {
            format!("{}: gets new connections in {of} again", self.real)
        });
        Ok(())
    }
}
