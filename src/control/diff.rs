//! What of the configuration file is not in force.

use super::api::{self, proto};
use super::reconcile::plan;
use super::{Result, gateway};
use crate::balancer::client::Client;
use crate::config::Config;
use crate::datapath::Datapath;

/// What differs between a file that was just read, with reals that are out of use, and what is in force.
pub async fn read(file: &Config) -> Result<proto::GetDifferenceResponse> {
    let datapath = Datapath::open(&file.pins())?;
    let mut client = Client::connect(&file.balancer_endpoint).await?;
    let gateway = gateway::wanted_or_warn(file).await;
    let in_effect = api::in_effect(file).await;
    let plan = plan::plan(&in_effect, gateway, &datapath, &mut client).await?;
    let in_force = api::in_force(file).await;
    Ok(proto::GetDifferenceResponse {
        steps: plan.lines(),
        // Not all keys are of maps or the balancer: of checks, say, only `run` knows.
        changed: in_force.is_some_and(|in_force| in_force.text != file.text),
    })
}
