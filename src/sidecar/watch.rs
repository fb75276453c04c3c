//! Looks at balancer and chain, again and again, and puts back what was lost or changed.

use tracing::{info, warn};

use super::datapath::Datapath;
use super::{Result, apply, health};
use crate::balancer::client::{BalancerError, Client};
use crate::config::{BalancerKind, Config};

/// What was seen at the last look, so that only changes are logged.
#[derive(Default)]
pub struct Watch {
    client: Option<Client>,
    complaint: Option<String>,
    applied_once: bool,
    /// The whole configuration was applied, and has not changed since.
    in_force: bool,
}

impl Watch {
    /// The configuration was changed: the next look applies all of it.
    pub fn configuration_changed(&mut self) {
        self.in_force = false;
    }

    /// Looks once.
    pub async fn look(&mut self, config: &Config, datapath: &Datapath) {
        let complaint = match self.apply(config, datapath).await {
            Ok(()) => Some(health::complaints(config).join("; ")).filter(|text| !text.is_empty()),
            Err(e) if self.applied_once => {
                Some(format!("{e}; forwarding goes on with what is pinned"))
            }
            Err(e) => Some(format!("{e}; trying again")),
        };
        if complaint != self.complaint {
            match &complaint {
                Some(text) => warn!("{text}"),
                None => info!("all is as configured"),
            }
            self.complaint = complaint;
        }
    }

    /// Applies whatever differs: the first time everything, later what was lost or changed.
    async fn apply(&mut self, config: &Config, datapath: &Datapath) -> Result<()> {
        // An error drops the connection, and the next look makes a new one.
        let mut client = match self.client.take() {
            Some(client) => client,
            None => Client::connect(&config.balancer_endpoint).await?,
        };
        if self.in_force {
            // The maps are ours; only the balancer can have changed.
            let (to_mend, difference) = look_at_balancer(config, client).await?;
            let Some(difference) = difference else {
                self.client = Some(to_mend);
                return Ok(());
            };
            warn!("balancer: {difference}");
            client = to_mend;
        }
        let plan = apply::apply(config, datapath, &mut client).await?;
        self.client = Some(client);
        if !plan.is_empty() {
            if self.applied_once {
                warn!(steps = plan.lines().len(), "put back what was missing");
            } else {
                info!(steps = plan.lines().len(), "applied the configuration");
            }
        }
        self.applied_once = true;
        self.in_force = true;
        Ok(())
    }
}

/// What the balancer lacks, if anything, and the connection on which to mend it.
async fn look_at_balancer(
    config: &Config,
    mut client: Client,
) -> Result<(Client, Option<String>), BalancerError> {
    if let Some(difference) = apply::difference(config, &mut client).await? {
        return Ok((client, Some(format!("{difference} (was it restarted?)"))));
    }
    if config.balancer == BalancerKind::Embedded {
        return Ok((client, None));
    }
    // A second server at this address: the connection at hand stays with the first, while the
    // position in the chain is the second's. A new connection may come to either.
    let mut other = Client::connect(&config.balancer_endpoint).await?;
    match apply::difference(config, &mut other).await? {
        None => Ok((client, None)),
        Some(difference) => {
            Ok((other, Some(format!("{difference} on a second server at the same address"))))
        }
    }
}
