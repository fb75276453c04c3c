//! Carries out a [`Plan`], and reads back whether it came out as planned.
//!
//! Make before break: new groups are complete before a packet can be sent to them, services
//! and routes change in one switch, and old groups go only then. Up to the switch, a failure
//! takes back what was added to the balancer.

use std::fs::File;
use std::time::{Duration, Instant};

use nix::fcntl::Flock;
use tracing::{info, warn};

use super::Result;
use super::plan::{Call, Plan, present_vips};
use crate::balancer::client::{BalancerError, Client};
use crate::balancer::desired::{DesiredVip, desired_vips};
use crate::balancer::flags::OUR_FLAGS;
use crate::config::Config;
use crate::datapath::Datapath;
use crate::domain::vip::{Mac, mac_text};
use crate::kernel::BpfError;

/// Plans and carries out. Returns what was done.
pub async fn apply(
    config: &Config,
    gateway: Option<Mac>,
    datapath: &Datapath,
    client: &mut Client,
) -> Result<Plan> {
    let _lock = lock(config).await?;
    let plan = Plan::of(config, gateway, datapath, client).await?;
    carry_out(&plan, datapath, client).await?;
    read_back(config, gateway, client).await?;
    Ok(plan)
}

/// For another process that applies a configuration. Shorter than `run`'s watchdog.
const LOCK_TIMEOUT: Duration = Duration::from_secs(30);

/// Waits until no other process applies a configuration; as long as the value lives, none does.
pub async fn lock(config: &Config) -> Result<Flock<File>> {
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match config.pins().try_lock_apply() {
            Err(BpfError::Locked { .. }) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            result => return Ok(result?),
        }
    }
}

async fn carry_out(plan: &Plan, datapath: &Datapath, client: &mut Client) -> Result<()> {
    plan.maps.add_service_vips(datapath)?;
    let mut done = Vec::new();
    for step in &plan.before {
        if let Err(error) = call(client, step).await {
            take_back(&done, client).await;
            return Err(error.into());
        }
        done.push(step);
    }
    plan.maps.change_groups(datapath)?;
    if let Some(image) = &plan.maps.switch {
        info!(generation = image.table.generation, "switched services and routes");
    }
    for step in &plan.after {
        call(client, step).await?;
    }
    Ok(plan.maps.remove_service_vips(datapath)?)
}

async fn call(client: &mut Client, step: &Call) -> Result<(), BalancerError> {
    info!("{step}");
    match step {
        Call::AddVip(vip, flags) => client.add_vip(*vip, *flags).await,
        Call::SetFlags(vip, flags, set) => client.modify_vip(*vip, *flags, *set).await,
        Call::AddReals(vip, reals) => client.add_reals(*vip, reals).await,
        Call::DelReals(vip, reals) => client.del_reals(*vip, reals).await,
        Call::DelVip(vip) => client.del_vip(*vip).await,
        Call::ChangeMac(mac) => client.change_mac(*mac).await,
    }
}

/// New VIPs are not used by anybody yet; what was changed on others stays for the next try.
async fn take_back(done: &[&Call], client: &mut Client) {
    for step in done.iter().rev() {
        if let Call::AddVip(vip, _) = step
            && let Err(error) = client.del_vip(*vip).await
        {
            warn!(%vip, %error, "removing a VIP that was just added failed");
        }
    }
}

/// Reads from the balancer what it should hold now.
async fn read_back(config: &Config, gateway: Option<Mac>, client: &mut Client) -> Result<()> {
    if let Some(difference) = difference(config, gateway, client).await? {
        let endpoint = client.endpoint().to_owned();
        return Err(BalancerError::Disagrees { endpoint, difference }.into());
    }
    Ok(())
}

/// The first VIP that the balancer lacks.
pub async fn missing_vip(
    config: &Config,
    client: &mut Client,
) -> Result<Option<String>, BalancerError> {
    let desired = desired_vips(config);
    let present = present_vips(&desired, client).await?;
    let missing = desired.keys().find(|vip| !present.contains(vip));
    Ok(missing.map(|vip| format!("VIP {vip} is missing, as after a restart")))
}

/// The first thing that the balancer holds otherwise than the configuration says.
pub async fn difference(
    config: &Config,
    gateway: Option<Mac>,
    client: &mut Client,
) -> Result<Option<String>, BalancerError> {
    if let Some(wanted) = gateway.map(mac_text) {
        let has = client.mac().await?;
        if has != wanted {
            return Ok(Some(format!("it sends to gateway {has} instead of {wanted}")));
        }
    }
    let desired = desired_vips(config);
    let present = present_vips(&desired, client).await?;
    for (vip, DesiredVip { reals, flags, .. }) in desired {
        if !present.contains(&vip) {
            return Ok(Some(format!("VIP {vip} is missing, as after a restart")));
        }
        let has = client.vip_flags(vip).await? & OUR_FLAGS;
        if flags & !has != 0 {
            return Ok(Some(format!("VIP {vip} lacks flag {:#x}", flags & !has)));
        }
        if has != flags {
            return Ok(Some(format!("VIP {vip} has flag {:#x}", has & !flags)));
        }
        let has = client.reals(vip).await?;
        if has != reals {
            return Ok(Some(format!("VIP {vip} has reals {has:?} instead of {reals:?}")));
        }
    }
    Ok(None)
}
