//! What of the configuration file is not in force.

use serde::Serialize;

use super::{Context, Result};
use crate::balancer::client::Client;
use crate::config::{Config, differences};
use crate::reconcile::gateway;
use crate::reconcile::plan::Plan;

/// The difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// What was changed since the file was read, by the names of routes, groups and reals.
    pub changes: Vec<String>,
    /// What `apply` would do, a step each.
    pub steps: Vec<String>,
    /// The file was changed since it was read; what of it is neither of maps nor of the balancer is in no step.
    pub changed: bool,
}

/// Reads the file again, and compares.
pub async fn read(context: &Context) -> Result<Difference> {
    let in_force = context.config();
    let file = Config::load(&in_force.path)?;
    let datapath = context.datapath()?;
    let mut client = Client::connect(&file.balancer_endpoint).await?;
    let gateway = gateway::desired_or_warn(&file).await;
    let in_effect = context.in_effect_of(&file);
    let plan = Plan::of(&in_effect, gateway, &datapath, &mut client).await?;
    // Not all keys are of maps or the balancer: of checks, say, only `run` knows.
    Ok(Difference {
        changes: differences(in_force, &file),
        steps: plan.lines(),
        changed: in_force.text != file.text,
    })
}
