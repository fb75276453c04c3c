//! `apply`, `run` and `balancer`.

use std::time::{Duration, Instant};

use clap::Args;

use super::table::line;
use super::{block_on, or_here};
use crate::balancer::Mac;
use crate::balancer::client::Client;
use crate::config::{BalancerKind, Config};
use crate::control::instance::{self, Running};
use crate::control::reconcile::{apply, plan};
use crate::control::{self, Error, api, diff, gateway, handover, health};
use crate::datapath::Datapath;

/// How long a `run` may take to start.
const STARTING: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub struct Apply {
    /// Only print what would be done
    #[arg(long)]
    dry_run: bool,
}

/// What differs between the file, with reals that are out of use, and what is in force.
pub fn diff(config: &Config) -> Result<(), Error> {
    let difference = or_here(api::difference(config), || block_on(diff::read(config)))?;
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
        return Err(Error::Differs { path: config.path.clone() });
    }
    line("all is as configured");
    Ok(())
}

impl Apply {
    pub fn run(&self, config: &Config) -> Result<(), Error> {
        let datapath = Datapath::open(&config.pins())?;
        let running = instance::find(config).filter(|_| !self.dry_run);
        let plan = block_on(async {
            let mut client = Client::connect(&config.balancer_endpoint).await?;
            let gateway = gateway::wanted_or_warn(config).await;
            if let Some(running) = running {
                return hand_over(&running, config, gateway, &datapath, &mut client).await;
            }
            let config = &api::in_effect(config).await;
            if self.dry_run {
                return plan::plan(config, gateway, &datapath, &mut client).await;
            }
            handover::put_keys(config, &datapath)?;
            apply::apply(config, gateway, &datapath, &mut client).await
        })?;
        let lines = plan.lines();
        for text in &lines {
            line(text);
        }
        let steps = if lines.len() == 1 { "step" } else { "steps" };
        line(&match (lines.len(), self.dry_run) {
            (0, _) => "all is as configured".to_owned(),
            (n, true) => format!("{n} {steps}; nothing was changed (--dry-run)"),
            (n, false) => format!("{n} {steps} done, and read back"),
        });
        // What is configured right may not be forwarded all the same.
        for problem in health::problems(config) {
            tracing::warn!("{problem}");
        }
        Ok(())
    }
}

/// A `run` at work would undo what it does not know of: it is told to read the configuration
/// again, and waited for.
async fn hand_over(
    running: &Running,
    config: &Config,
    gateway: Option<Mac>,
    datapath: &Datapath,
    client: &mut Client,
) -> Result<plan::Plan, Error> {
    if !running.reads(config) {
        return Err(Error::Busy(format!(
            "`run` (pid {}) works by {} and would undo this; change that, or end it first",
            running.pid,
            running.config.display()
        )));
    }
    let plan = {
        // While `run` writes, what is read here may be half of this and half of that.
        let _lock = instance::lock_apply(config).await?;
        plan::plan(&api::in_effect(config).await, gateway, datapath, client).await?
    };
    // Not all keys are of maps or the balancer: of checks, say, only `run` knows.
    let is_read = api::in_force(config).await.is_some_and(|there| there.text == config.text);
    if plan.is_empty() && is_read {
        return Ok(plan);
    }
    // One that is just starting does not listen yet.
    let deadline = Instant::now() + STARTING;
    while api::reload(config).await?.is_none() {
        if Instant::now() > deadline {
            let pid = running.pid;
            return Err(Error::Busy(format!("`run` (pid {pid}) does not answer")));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(plan)
}

pub fn run(config: Config) -> Result<(), Error> {
    let loaded = control::run::load(config)?;
    block_on(control::run::run(loaded))
}

pub fn balancer(config: &Config) -> Result<(), Error> {
    if config.balancer != BalancerKind::Embedded {
        return Err(Error::Embedded(
            "the configuration says balancer = \"katran\"; start that instead".to_owned(),
        ));
    }
    block_on(control::run::run_balancer(config))
}
