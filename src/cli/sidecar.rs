//! `apply`, `run` and `balancer`.

use clap::Args;

use super::block_on;
use super::table::line;
use crate::balancer::client::Client;
use crate::config::{BalancerKind, Config};
use crate::sidecar::datapath::Datapath;
use crate::sidecar::run::Manners;
use crate::sidecar::{self, Error, apply, plan};

#[derive(Debug, Args)]
pub struct Apply {
    /// Only print what would be done
    #[arg(long)]
    dry_run: bool,
}

impl Apply {
    pub fn run(&self, config: &Config) -> Result<(), Error> {
        let datapath = Datapath::open(&config.pins())?;
        let plan = block_on(async {
            let mut client = Client::connect(&config.balancer_endpoint).await?;
            if self.dry_run {
                plan::plan(config, &datapath, &mut client).await
            } else {
                apply::apply(config, &datapath, &mut client).await
            }
        })?;
        let lines = plan.lines();
        for text in &lines {
            line(text);
        }
        line(&match (lines.len(), self.dry_run) {
            (0, _) => "all is as configured".to_owned(),
            (n, true) => format!("{n} steps; nothing was changed (--dry-run)"),
            (n, false) => format!("{n} steps done, and read back"),
        });
        Ok(())
    }
}

pub fn run(config: Config) -> Result<(), Error> {
    block_on(sidecar::run::run(config))
}

#[derive(Debug, Args)]
pub struct Balancer {
    /// For tests: answer as silently as Katran does, and forget everything at the end
    #[arg(long, hide = true)]
    imitate_katran: bool,
}

impl Balancer {
    pub fn run(&self, config: &Config) -> Result<(), Error> {
        if self.imitate_katran {
            return block_on(sidecar::run::run_balancer(config, Manners::Katrans));
        }
        embedded_balancer(config)
    }
}

fn embedded_balancer(config: &Config) -> Result<(), Error> {
    if config.balancer != BalancerKind::Embedded {
        return Err(Error::Service {
            service: "embedded balancer".to_owned(),
            problem: "the configuration says balancer = \"katran\"; start that instead".to_owned(),
        });
    }
    block_on(sidecar::run::run_balancer(config, Manners::Ours))
}
