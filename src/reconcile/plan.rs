//! What has to change so that balancer and maps hold what the configuration says. Empty if they do already.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use super::Result;
use crate::balancer::client::{BalancerError, Client};
use crate::balancer::desired::{DesiredVip, desired_vips};
use crate::balancer::flags::{BY_ADDRESS_FLAG, GROUP_FLAG, OUR_FLAGS};
use crate::config::Config;
use crate::datapath::Datapath;
use crate::datapath::plan::MapPlan;
use crate::domain::vip::{Mac, Vip, mac_text};
use crate::kernel::xdp;

/// A call to the balancer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// A VIP, with its flags.
    AddVip(Vip, u32),
    /// Sets or clears flags of a VIP that is there.
    SetFlags(Vip, u32, bool),
    /// New reals, or new weights.
    AddReals(Vip, BTreeMap<IpAddr, u32>),
    /// Reals that are no longer desired. Their connections stay.
    DelReals(Vip, BTreeMap<IpAddr, u32>),
    /// A VIP of a group that is gone.
    DelVip(Vip),
    /// The gateway's MAC address.
    ChangeMac(Mac),
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |reals: &BTreeMap<IpAddr, u32>| {
            let texts: Vec<_> = reals.iter().map(|(a, w)| format!("{a} weight {w}")).collect();
            texts.join(", ")
        };
        match self {
            Self::AddVip(vip, _) => write!(f, "balancer: add VIP {vip}"),
            Self::SetFlags(vip, flags, set) => {
                let mut what = Vec::new();
                if flags & GROUP_FLAG != 0 {
                    what.push(format!("mark VIP {vip} as an MQTT group"));
                }
                if flags & BY_ADDRESS_FLAG != 0 {
                    let by = if *set { "address" } else { "address and port" };
                    what.push(format!("spread clients of VIP {vip} by {by}"));
                }
                write!(f, "balancer: {}", what.join(", "))
            }
            Self::AddReals(vip, reals) => write!(f, "balancer: {vip}: add {}", list(reals)),
            Self::DelReals(vip, reals) => write!(f, "balancer: {vip}: remove {}", list(reals)),
            Self::DelVip(vip) => write!(f, "balancer: remove VIP {vip}"),
            Self::ChangeMac(mac) => {
                write!(f, "balancer: send to gateway {}", mac_text(*mac))
            }
        }
    }
}

/// All that differs, in the order in which it is done.
#[derive(Debug)]
pub struct Plan {
    /// First, what new groups need of the balancer; but service addresses before.
    pub before: Vec<Call>,
    /// Then the maps.
    pub maps: MapPlan,
    /// Then what old groups had of the balancer.
    pub after: Vec<Call>,
}

impl Plan {
    /// Compares configuration, maps and balancer.
    pub async fn of(
        config: &Config,
        gateway: Option<Mac>,
        datapath: &Datapath,
        client: &mut Client,
    ) -> Result<Self> {
        let maps = MapPlan::of(config, datapath, xdp::interface_mtu(&config.interface)?)?;
        let mut plan = Self { before: Vec::new(), maps, after: Vec::new() };
        if let Some(mac) = gateway
            && client.mac().await? != mac_text(mac)
        {
            plan.before.push(Call::ChangeMac(mac));
        }
        plan_balancer(&mut plan, &desired_vips(config), client).await?;
        Ok(plan)
    }

    /// Whether nothing has to be done.
    pub fn is_empty(&self) -> bool {
        self.lines().is_empty()
    }

    /// The plan for people, a line per step.
    pub fn lines(&self) -> Vec<String> {
        let maps = &self.maps;
        let mut lines = Vec::new();
        lines.extend(
            maps.add_service_vips
                .iter()
                .map(|(group, service)| format!("map vip_inner_dst: {group} → {service}")),
        );
        lines.extend(self.before.iter().map(Call::to_string));
        lines.extend(maps.new_groups.iter().map(|id| {
            let entry = &maps.identities.entries[id];
            format!("map groups: add {} ({}) as {id}", entry.name, entry.vip)
        }));
        if let Some(image) = &maps.switch {
            lines.push(format!(
                "services and routes: switch to generation {} ({} services; {} states and {} edges of routes)",
                image.table.generation,
                image.table.count,
                image.states.len(),
                image.edges.len()
            ));
        }
        lines.extend(
            maps.remove_groups.iter().map(|(id, name)| format!("map groups: remove {name} ({id})")),
        );
        lines.extend(self.after.iter().map(Call::to_string));
        lines.extend(
            maps.remove_service_vips.iter().map(|vip| format!("map vip_inner_dst: remove {vip}")),
        );
        lines
    }
}

/// The balancer's VIPs. Desired ones must be in canonical text.
pub async fn present_vips(
    desired: &BTreeMap<Vip, DesiredVip>,
    client: &mut Client,
) -> Result<BTreeSet<Vip>, BalancerError> {
    let all = client.verbatim_vips().await?;
    let odd = all.iter().find(|(vip, text)| desired.contains_key(vip) && !text.is_canonical());
    if let Some((vip, verbatim)) = odd {
        return Err(BalancerError::NotCanonical { vip: *vip, verbatim: verbatim.clone() });
    }
    Ok(all.into_iter().map(|(vip, _)| vip).collect())
}

async fn plan_balancer(
    plan: &mut Plan,
    desired: &BTreeMap<Vip, DesiredVip>,
    client: &mut Client,
) -> Result<(), BalancerError> {
    let present = present_vips(desired, client).await?;
    for (vip, DesiredVip { reals, flags, .. }) in desired {
        if !present.contains(vip) {
            plan.before.push(Call::AddVip(*vip, *flags));
            plan.before.push(Call::AddReals(*vip, reals.clone()));
            continue;
        }
        let has = client.vip_flags(*vip).await?;
        if flags & !has != 0 {
            plan.before.push(Call::SetFlags(*vip, flags & !has, true));
        }
        if has & !flags & OUR_FLAGS != 0 {
            plan.before.push(Call::SetFlags(*vip, has & !flags & OUR_FLAGS, false));
        }
        let has = client.reals(*vip).await?;
        let add: BTreeMap<_, _> = reals
            .iter()
            .filter(|(addr, weight)| has.get(addr) != Some(weight))
            .map(|(addr, weight)| (*addr, *weight))
            .collect();
        let remove: BTreeMap<_, _> =
            has.into_iter().filter(|(addr, _)| !reals.contains_key(addr)).collect();
        if !add.is_empty() {
            plan.before.push(Call::AddReals(*vip, add));
        }
        if !remove.is_empty() {
            plan.after.push(Call::DelReals(*vip, remove));
        }
    }
    // The balancer may have other VIPs: these are those that a group had.
    for vip in plan.maps.remove_service_vips.iter().filter(|vip| present.contains(vip)) {
        plan.after.push(Call::DelVip(*vip));
    }
    Ok(())
}
