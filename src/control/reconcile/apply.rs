//! Carries out a [`Plan`], and reads back whether it came out as planned.
//!
//! Make before break: new groups are complete before a packet can be sent to them, services
//! and routes change in one switch, and old groups go only then. Up to the switch, a failure
//! takes back what was added to the balancer.

use tracing::{info, warn};

use super::plan::{self, Call, Plan, Wanted};
use crate::balancer::client::{BalancerError, Client};
use crate::balancer::flags::OUR_FLAGS;
use crate::balancer::{Mac, mac_text};
use crate::config::Config;
use crate::control::{Result, instance};
use crate::datapath::Datapath;
use crate::datapath::image::{self, Image};
use crate::kernel::abi::{Pod as _, binding_of, group, limits, topic_verdict};

/// Plans and carries out. Returns what was done.
pub async fn apply(
    config: &Config,
    gateway: Option<Mac>,
    datapath: &Datapath,
    client: &mut Client,
) -> Result<Plan> {
    let _lock = instance::lock_apply(config).await?;
    let plan = plan::plan(config, gateway, datapath, client).await?;
    carry_out(&plan, datapath, client).await?;
    read_back(config, gateway, client).await?;
    Ok(plan)
}

/// Does what a plan says.
pub async fn carry_out(plan: &Plan, datapath: &Datapath, client: &mut Client) -> Result<()> {
    add_service_vips(plan, datapath)?;
    let mut done = Vec::new();
    for step in &plan.before {
        if let Err(error) = call(client, step).await {
            take_back(&done, client).await;
            return Err(error.into());
        }
        done.push(step);
    }
    change_groups(plan, datapath)?;
    for step in &plan.after {
        call(client, step).await?;
    }
    remove_service_vips(plan, datapath)
}

/// The part of a plan that is not the balancer's.
pub fn carry_out_maps(plan: &Plan, datapath: &Datapath) -> Result<()> {
    add_service_vips(plan, datapath)?;
    change_groups(plan, datapath)?;
    remove_service_vips(plan, datapath)
}

fn add_service_vips(plan: &Plan, datapath: &Datapath) -> Result<()> {
    for (group, service) in &plan.add_service_vips {
        datapath.service_vips.put(&plan::map_key(*group), &plan::map_key(*service))?;
    }
    Ok(())
}

/// Adds groups, switches to the new services and routes, and only then removes groups.
fn change_groups(plan: &Plan, datapath: &Datapath) -> Result<()> {
    for id in &plan.new_groups {
        datapath.groups.put(&u32::from(*id), &group::from(&plan.identities.entries[id]))?;
    }
    if let Some(image) = &plan.switch {
        switch(image, plan, datapath)?;
    }
    for id in plan.remove_groups.keys() {
        let key = u32::from(*id);
        if let Some(old) = datapath.groups.get(&key)? {
            let freed = group { last_epoch: old.epoch, ..group::zeroed() };
            datapath.groups.put(&key, &freed)?;
        }
    }
    Ok(())
}

fn remove_service_vips(plan: &Plan, datapath: &Datapath) -> Result<()> {
    for vip in &plan.remove_service_vips {
        datapath.service_vips.remove(&plan::map_key(*vip))?;
    }
    Ok(())
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
            warn!(%vip, %error, "could not be taken back");
        }
    }
}

/// Writes a generation beside the one in force and makes it the one in force.
fn switch(image: &Image, plan: &Plan, datapath: &Datapath) -> Result<()> {
    let generation = image.table.generation;
    // What the last generation but one left. The last one's stays: a topic that is split over
    // segments may still be walking through it.
    for edge in datapath.route_edges.keys()? {
        if image::is_of_generation(edge.state, generation) {
            datapath.route_edges.remove(&edge)?;
        }
    }
    for key in datapath.members.keys()? {
        if u32::from(key.generation) == generation & 1 {
            datapath.members.remove(&key)?;
        }
    }
    datapath.members.put_all(&image.members)?;
    for key in datapath.client_routes.keys_one_by_one() {
        if u32::from(key.generation) == generation & 1 {
            datapath.client_routes.remove(&key)?;
        }
    }
    for (key, group) in &image.client_routes {
        datapath.client_routes.put(key, group)?;
    }
    datapath.route_states.put_all(&image.state_entries())?;
    datapath.route_edges.put_all(&image.edge_entries())?;
    datapath.services.put(&(generation & 1), &image.table)?;
    judge_topics(image, plan, datapath)?;
    datapath.generation.put(&0, &generation)?;
    // Topics that were first published between the two steps.
    judge_topics(image, plan, datapath)?;
    info!(generation, "switched services and routes");
    Ok(())
}

/// Puts the new generation's group beside each known topic, so that predictions follow.
fn judge_topics(image: &Image, plan: &Plan, datapath: &Datapath) -> Result<()> {
    let generation = image.table.generation;
    let services = &image.table.service[..usize::from(image.table.count)];
    for (hash, mut topic) in datapath.topics.entries()? {
        let side = (generation & 1) as usize;
        let length = usize::from(topic.length);
        // Of a longer topic there is only the beginning: its next PUBLISH will tell.
        let Some(text) = topic.text.get(..length) else { continue };
        let Some(service) = services.iter().find(|s| s.id == topic.service) else { continue };
        if topic.verdict[side].generation == generation {
            continue;
        }
        let id = image.route(service, text);
        let binding = match plan.identities.entries.get(&id) {
            Some(entry) => binding_of(id, entry.epoch),
            None if u32::from(id) == limits::ANY_GROUP.0 => limits::ANY_GROUP.0,
            None => continue,
        };
        topic.verdict[side] = topic_verdict { generation, binding };
        datapath.topics.put(&hash, &topic)?;
    }
    Ok(())
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
    let wanted = plan::wanted_vips(config);
    let present = plan::present_vips(&wanted, client).await?;
    let missing = wanted.keys().find(|vip| !present.contains(vip));
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
    let wanted = plan::wanted_vips(config);
    let present = plan::present_vips(&wanted, client).await?;
    for (vip, Wanted { reals, flags, .. }) in wanted {
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
