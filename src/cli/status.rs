//! `status`: is everything where it should be, and what goes through it?

use clap::Args;
use std::pin::pin;

use super::block_on;
use super::error::Error;
use super::find::{Found, find_or};
use super::table::{self, Output, line};
use crate::config::Config;
use crate::domain::Problem;
use crate::inspect::Context;
use crate::inspect::status::{self, LoadedProgram, Status};
use crate::kernel::reasons::REASONS;

#[derive(Debug, Args)]
pub struct Show {
    /// Print nothing, and end with 1 unless everything is healthy
    #[arg(long)]
    check: bool,

    #[command(flatten)]
    output: Output,
}

/// As `run` has it, and where it does not answer or there is none, as it is seen from here.
async fn read(config: Config) -> Result<Status, Error> {
    let context = Context::outside(config.clone());
    let here = pin!(status::read(&context));
    let (silent, here) = match find_or(&config, here).await? {
        Found::Run(mut run) => return Ok(run.status().await?),
        Found::Here(silent, here) => (silent, here),
    };
    let mut status = here?;
    if let Some(error) = silent {
        status.add(Problem::new("run_not_answering", error.to_string()));
    }
    Ok(status)
}

impl Show {
    pub fn run(&self, config: Config) -> Result<(), Error> {
        let status = block_on(read(config))?;
        if self.check && !status.healthy {
            let problems: Vec<_> =
                status.problems.into_iter().map(|problem| problem.text).collect();
            let (interface, problems) = (status.interface, problems.join("; "));
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

fn print(status: &Status) {
    let or_none = |program: &Option<LoadedProgram>| {
        program.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string)
    };
    line(&format!(
        "{}: {}",
        status.interface,
        if status.healthy { "healthy" } else { "NOT HEALTHY" }
    ));
    // The balancer has a line of its own.
    for problem in status.problems.iter().filter(|problem| problem.text != status.balancer) {
        line(&format!("problem    {}", problem.text));
    }
    line(&format!(
        "root       {}{}",
        or_none(&status.attached),
        status.mode.as_ref().map(|m| format!(", {m} XDP")).unwrap_or_default()
    ));
    for (i, position) in status.positions.iter().enumerate() {
        line(&format!("  [{i}]      {}", or_none(position)));
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
    if let Some(fleet) = &status.fleet {
        line(&format!("fleet      {}", fleet.summary()));
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
            [&[m.map.clone()][..], &numbers].concat()
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
