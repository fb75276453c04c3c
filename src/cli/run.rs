//! `apply`, `run` and `balancer`.

use clap::Args;

use super::error::Error;
use super::table::line;
use super::{block_on, from_run_or};
use crate::api::Run;
use crate::app;
use crate::balancer::client::Client;
use crate::chain::health;
use crate::config::Config;
use crate::datapath::Datapath;
use crate::handover::silent;
use crate::inspect::{Context, diff as difference};
use crate::instance::{self, Running};
use crate::reconcile::plan::Plan;
use crate::reconcile::{apply, gateway};

#[derive(Debug, Args)]
pub struct Apply {
    /// Only print what would be done
    #[arg(long)]
    dry_run: bool,
}

/// What differs between the file, with reals that are out of use, and what is in force.
pub fn diff(config: Config) -> Result<(), Error> {
    let difference = from_run_or(
        &config,
        async |mut run| run.difference().await,
        async || Ok(difference::read(&Context::outside(config.clone())).await?),
    )?;
    for text in &difference.steps {
        line(text);
    }
    if difference.changed && difference.steps.is_empty() {
        line(&format!(
            "{} is not what `run` works by: one of them was changed, in what is neither of the maps nor of \
             the balancer, or back",
            config.path.display()
        ));
    }
    if difference.changed || !difference.steps.is_empty() {
        return Err(Error::Differs { path: config.path });
    }
    line("all is as configured");
    Ok(())
}

impl Apply {
    pub fn run(&self, config: &Config) -> Result<(), Error> {
        let lines = block_on(self.steps(config))?;
        for text in &lines {
            line(text);
        }
        let steps = if lines.len() == 1 { "step" } else { "steps" };
        line(&match (lines.len(), self.dry_run) {
            (0, _) => "all is as configured".to_owned(),
            (n, true) => format!("{n} {steps}; nothing was changed (--dry-run)"),
            (n, false) => format!("{n} {steps} done, and read back"),
        });
        // What is configured right may still not be forwarded.
        for problem in health::problems(config) {
            tracing::warn!("{problem}");
        }
        Ok(())
    }

    async fn steps(&self, config: &Config) -> Result<Vec<String>, Error> {
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
        Ok(plan.lines())
    }
}

/// A `run` at work would undo what it does not know of: it is asked what differs, told to read the file again, and
/// waited for.
async fn by_run(running: &Running, config: &Config, dry_run: bool) -> Result<Vec<String>, Error> {
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
        run.difference().await?
    };
    if !dry_run && (difference.changed || !difference.steps.is_empty()) {
        run.reload().await?;
    }
    Ok(difference.steps)
}

pub fn run(config: Config) -> Result<(), Error> {
    let loaded = app::load(config)?;
    block_on(app::run(loaded))
}

pub fn balancer(config: &Config) -> Result<(), Error> {
    block_on(app::run_balancer(config))
}
