//! `load` and `unload`.

use clap::Args;
use tracing::debug;

use super::error::Error;
use super::executor;
use super::table::line;
use crate::config::{BalancerKind, Config};
use crate::fleet::{self, LeaveError};
use crate::instance;
use crate::kernel::{adopt, load, unload};

#[derive(Debug, Args)]
pub struct Load {
    /// Take over a chain whose pins were removed or belong to another network namespace
    #[arg(long)]
    adopt: bool,
}

pub fn load(args: &Load, config: &Config) -> Result<(), Error> {
    if args.adopt {
        for what in adopt::adopt(&config.load_spec())? {
            line(&format!("adopted {what}"));
        }
    }
    let loaded = load::load(&config.load_spec())?;
    let root = if loaded.root_reused { "the root that was there" } else { "its own xdp_root" };
    line(&format!(
        "mqtt_fwd (id {}) is at position 1 of {}, on {} with {root}",
        loaded.program.id,
        config.pins().root_array().display(),
        config.interface
    ));
    if let Some(moved) = loaded.moved {
        let entries: Vec<_> = moved
            .entries
            .iter()
            .filter(|(_, count)| **count > 0)
            .map(|(map, count)| format!("{count} {map}"))
            .collect();
        line(&format!("moved to maps of other layout or sizes: {}", entries.join(", ")));
    } else if !loaded.adopted.is_empty() {
        line(&format!("taken over: {}", loaded.adopted.join(", ")));
    }
    Ok(())
}

#[derive(Debug, Args)]
pub struct Unload {
    /// Only take mqtt_fwd out of the chain; `load` puts it back with flows and clients
    #[arg(long)]
    keep_state: bool,
    /// Stop the `run` that manages the interface, which would put everything back
    #[arg(long)]
    force: bool,
}

impl Unload {
    pub fn run(&self, config: &Config) -> Result<(), Error> {
        match instance::find(config) {
            Some(running) if self.force => running.end(config)?,
            Some(running) => {
                return Err(Error::Failed(format!(
                    "`run` (pid {}) manages {} and would put back what is removed; stop it \
                     first, or use --force, which does that",
                    running.pid, config.interface
                )));
            }
            None => {}
        }
        let mut left = Ok(0);
        let report = if self.keep_state {
            unload::take_out(&config.load_spec())?
        } else {
            let executor = executor()?;
            unload::unload(&config.load_spec(), || left = executor.block_on(fleet::leave(config)))?
        };
        print(&report, config);
        match left {
            Ok(0) => {}
            Ok(count) => line(&format!(
                "left to the fleet's other balancers: {count} connections that no broker has yet"
            )),
            // There was nothing to read them from.
            Err(LeaveError::Bpf(error)) => debug!(%error, "nothing is left to other balancers"),
            Err(error) => line(&format!("lost: {error}")),
        }
        if config.balancer == BalancerKind::Katran && !self.keep_state {
            line(
                "Katran keeps the groups' VIPs, which get no more packets: `mqtt-fwd katran list`",
            );
        }
        Ok(())
    }
}

fn print(report: &unload::Unloaded, config: &Config) {
    for what in &report.removed {
        line(&format!("removed {what}"));
    }
    for what in &report.kept {
        line(&format!("kept {what}"));
    }
    if report.removed.is_empty() && report.kept.is_empty() {
        line(&format!("nothing of mqtt-fwd is on {}", config.interface));
    }
}
