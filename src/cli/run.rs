//! `apply`, `run` and `balancer`.

use clap::Args;
use serde::Serialize;

use super::error::Error;
use super::table::{self, Output, line};
use super::{block_on, from_run_or};
use crate::api::Run;
use crate::app;
use crate::balancer::client::Client;
use crate::chain::health;
use crate::config::Config;
use crate::datapath::Datapath;
use crate::handover::silent;
use crate::inspect::Context;
use crate::inspect::diff as difference;
use crate::instance::{self, Running};
use crate::reconcile::plan::Plan;
use crate::reconcile::{apply, gateway};

#[derive(Debug, Args)]
pub struct Apply {
    /// Only print what would be done
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Applied<'a> {
    dry_run: bool,
    changes: &'a [String],
    steps: &'a [String],
}

/// What differs between the file, with reals that are out of use, and what is in force.
pub fn diff(config: Config, output: Output) -> Result<(), Error> {
    let difference = from_run_or(
        &config,
        async |mut run| run.difference().await,
        async || Ok(difference::read(&Context::outside(config.clone())).await?),
    )?;
    let differs = difference.changed || !difference.steps.is_empty();
    if output.json {
        table::json(&difference);
    } else {
        print(&difference.changes, &difference.steps);
        if !differs {
            line("all is as configured");
        } else if difference.changes.is_empty() && difference.steps.is_empty() {
            line(&format!("{} was changed in comments or spaces only", config.path.display()));
        }
    }
    if differs { Err(Error::Differs { path: config.path }) } else { Ok(()) }
}

/// First what was changed, by names, then what is done for it.
fn print(changes: &[String], steps: &[String]) {
    for text in changes {
        line(text);
    }
    if !changes.is_empty() && !steps.is_empty() {
        line("");
    }
    for text in steps {
        line(text);
    }
}

impl Apply {
    pub fn is_dry_run(&self) -> bool {
        self.dry_run
    }

    pub fn run(&self, config: &Config) -> Result<(), Error> {
        let (changes, steps) = block_on(self.steps(config))?;
        if self.output.json {
            let (changes, steps) = (&changes[..], &steps[..]);
            table::json(&Applied { dry_run: self.dry_run, changes, steps });
        } else {
            print(&changes, &steps);
            let noun = if steps.len() == 1 { "step" } else { "steps" };
            line(&match (steps.len(), self.dry_run) {
                (0, false) if !changes.is_empty() => "in force".to_owned(),
                (0, _) if changes.is_empty() => "all is as configured".to_owned(),
                (n, true) => format!("{n} {noun}; nothing was changed (--dry-run)"),
                (n, false) => format!("{n} {noun} done, and read back"),
            });
        }
        // What is configured right may still not be forwarded.
        for problem in health::problems(config) {
            tracing::warn!("{problem}");
        }
        Ok(())
    }

    /// What was changed, as far as a `run` knows, and what is done for it.
    async fn steps(&self, config: &Config) -> Result<(Vec<String>, Vec<String>), Error> {
        if let Some(running) = instance::find(config) {
            return by_run(&running, config, self.dry_run).await;
        }
        let datapath = Datapath::open(&config.pins())?;
        let mut client = Client::connect(&config.balancer_endpoint).await?;
        let gateway = gateway::desired_or_warn(config).await;
        let plan = if self.dry_run {
            Plan::of(config, gateway, &datapath, &mut client).await?
        } else {
            silent::put_keys(config, &datapath)?;
            apply::apply(config, gateway, &datapath, &mut client).await?
        };
        Ok((Vec::new(), plan.lines()))
    }
}

/// A `run` at work would undo what it does not know of: it is asked what differs, told to read the file again, and
/// waited for.
async fn by_run(
    running: &Running,
    config: &Config,
    dry_run: bool,
) -> Result<(Vec<String>, Vec<String>), Error> {
    let no_run = || Error::Failed("`run` has just ended; try again".to_owned());
    if !running.reads(config) {
        return Err(Error::Failed(format!(
            "`run` (pid {}) works by {} and would undo this; change that, or end it first",
            running.pid,
            running.config.display()
        )));
    }
    let mut run = Run::find(config).await?.ok_or_else(no_run)?;
    let difference = {
        // While `run` writes, what is read here may be half of this and half of that.
        let _lock = apply::lock(config).await?;
        run.difference().await
    };
    // Also if the file is the same: certificates and keys that it names need not be.
    if !dry_run {
        run.reload().await?;
    }
    let difference = difference?;
    Ok((difference.changes, difference.steps))
}

pub fn run(config: Config) -> Result<(), Error> {
    let loaded = app::load(config)?;
    block_on(app::run(loaded))
}

pub fn balancer(config: &Config) -> Result<(), Error> {
    block_on(app::run_balancer(config))
}
