//! Looks at balancer and chain, again and again, and puts back what was lost or changed.

use tracing::{info, warn};

use super::apply;
use super::plan::GROUP_FLAG;
use crate::balancer::Vip;
use crate::balancer::client::{BalancerError, Client};
use crate::config::{BalancerKind, Config};
use crate::control::{Error, Result, health};
use crate::datapath::Datapath;

/// What was seen at the last look, so that only changes are logged.
#[derive(Default)]
pub struct Watch {
    client: Option<Client>,
    complaint: Option<String>,
    applied_once: bool,
    /// The whole configuration was applied, and has not changed since.
    in_force: bool,
    /// A group that the balancer had under another spelling at the last look.
    misspelt: Option<Vip>,
}

impl Watch {
    /// The configuration was changed: the next look applies all of it.
    pub fn configuration_changed(&mut self) {
        self.in_force = false;
        // It may name another address.
        self.client = None;
    }

    /// Looks once.
    pub async fn look(&mut self, config: &Config, datapath: &Datapath) {
        let applied = self.apply(config, datapath).await;
        let mut complaints = health::complaints(config);
        if let Err(error) = applied {
            let unreachable = matches!(error, Error::Balancer(BalancerError::Unreachable { .. }));
            let goes_on = unreachable && self.applied_once && complaints.is_empty();
            if let Error::Balancer(BalancerError::Misspelt { vip, .. }) = error {
                self.misspelt = Some(vip);
            }
            complaints.insert(0, error.to_string());
            complaints.push(
                if goes_on { "forwarding goes on with what is pinned" } else { "trying again" }
                    .to_owned(),
            );
        }
        let complaint = Some(complaints.join("; ")).filter(|text| !text.is_empty());
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
            client = to_mend;
            self.mend_misspelt(&mut client).await?;
            let Some(difference) = difference else {
                self.client = Some(client);
                return Ok(());
            };
            warn!("balancer: {difference}");
        }
        let plan = apply::apply(config, datapath, &mut client).await?;
        self.mend_misspelt(&mut client).await?;
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

impl Watch {
    /// The other spelling is gone, and with it the entry that both had in the datapath.
    async fn mend_misspelt(&mut self, client: &mut Client) -> Result<(), BalancerError> {
        if let Some(vip) = self.misspelt {
            client.modify_vip(vip, GROUP_FLAG, true).await?;
            info!(%vip, "written anew, after another spelling of it was removed");
            self.misspelt = None;
        }
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
