//! What has to be done so that balancer and maps hold what the configuration says. Empty if
//! they do already.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use crate::balancer::client::{BalancerError, Client};
use crate::balancer::flags::{BY_ADDRESS_FLAG, GROUP_FLAG, OUR_FLAGS};
use crate::balancer::{Mac, Vip, mac_text};
use crate::config::{BalancerKind, Config, Group};
use crate::control::{Error, Result};
use crate::datapath::Datapath;
use crate::datapath::ids::Identities;
use crate::datapath::image::{self, Image};
use crate::domain::Affinity;
use crate::kernel::abi::{
    client_route, member, member_slot, route_edge, vip_definition, vip_key, words_addr,
};
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
    /// Reals that are not wanted any more. Their connections stay.
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
    /// First, service addresses of new group VIPs, for the balancer to put back.
    pub add_service_vips: BTreeMap<Vip, Vip>,
    /// Then what new groups need of the balancer.
    pub before: Vec<Call>,
    /// Then the groups' entries (whole ones, also those that stay).
    pub identities: Identities,
    /// The groups among them that are new.
    pub new_groups: BTreeSet<u16>,
    /// Then services and routes, in one switch.
    pub switch: Option<Image>,
    /// Then what nobody needs any more.
    pub remove_groups: BTreeMap<u16, String>,
    /// What old groups had of the balancer.
    pub after: Vec<Call>,
    /// And the service addresses of old group VIPs.
    pub remove_service_vips: BTreeSet<Vip>,
}

impl Plan {
    /// Whether everything is as it should be.
    pub fn is_empty(&self) -> bool {
        self.lines().is_empty()
    }

    /// The plan for people, a line a step.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        lines.extend(
            self.add_service_vips
                .iter()
                .map(|(group, service)| format!("map mqtt_service_vips: {group} → {service}")),
        );
        lines.extend(self.before.iter().map(Call::to_string));
        lines.extend(self.new_groups.iter().map(|id| {
            let entry = &self.identities.entries[id];
            format!("map groups: add {} ({}) as {id}", entry.name, entry.vip)
        }));
        if let Some(image) = &self.switch {
            lines.push(format!(
                "maps services, mqtt_topic_to_vip, route_states: {} services, {} states, {} edges, \
                 switch to generation {}",
                image.table.count,
                image.states.len(),
                image.edges.len(),
                image.table.generation
            ));
        }
        lines.extend(
            self.remove_groups.iter().map(|(id, name)| format!("map groups: remove {name} ({id})")),
        );
        lines.extend(self.after.iter().map(Call::to_string));
        lines.extend(
            self.remove_service_vips
                .iter()
                .map(|vip| format!("map mqtt_service_vips: remove {vip}")),
        );
        lines
    }
}

/// What a group's VIP has to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Reals with their weights.
    pub reals: BTreeMap<IpAddr, u32>,
    /// The service whose address the balancer puts back.
    pub service: Vip,
    /// Of [`OUR_FLAGS`].
    pub flags: u32,
}

/// The reals of a group that get new connections.
fn shares(group: &Group) -> BTreeMap<IpAddr, u32> {
    group.reals.iter().filter(|r| r.weight > 0).map(|r| (r.addr, r.weight)).collect()
}

/// The VIPs that the configuration's groups need, with their reals and their service.
pub fn wanted_vips(config: &Config) -> BTreeMap<Vip, Wanted> {
    let mut wanted = BTreeMap::new();
    for service in &config.services {
        let relay = service.relay.as_ref().and_then(|name| service.group(name));
        for listener in &service.listeners {
            // Nothing of these is read on the way: clients' addresses are spread over the relays.
            let vip = Vip::tcp(service.addr, listener.port);
            let reals = relay.map(shares).unwrap_or_default();
            wanted.insert(vip, Wanted { reals, service: vip, flags: GROUP_FLAG });
        }
        for group in &service.groups {
            let reals = shares(group);
            let flags = match group.affinity {
                Affinity::ClientIp => GROUP_FLAG | BY_ADDRESS_FLAG,
                Affinity::None | Affinity::ClientId | Affinity::Topic => GROUP_FLAG,
            };
            let service_vip = Vip::tcp(service.addr, service.port);
            for real in &group.reals {
                if let Some(vip) = real.vip {
                    let reals = BTreeMap::from([(real.addr, 1)]);
                    let alone = Wanted { reals, service: service_vip, flags: GROUP_FLAG };
                    wanted.insert(Vip::tcp(vip, service.port), alone);
                }
            }
            wanted.insert(
                Vip::tcp(group.vip, service.port),
                Wanted { reals, service: service_vip, flags },
            );
        }
    }
    wanted
}

/// Compares configuration, maps and balancer.
pub async fn plan(
    config: &Config,
    gateway: Option<Mac>,
    datapath: &Datapath,
    client: &mut Client,
) -> Result<Plan> {
    let mut plan = plan_maps(config, datapath, xdp::interface_mtu(&config.interface)?)?;
    if let Some(mac) = gateway
        && client.mac().await? != mac_text(mac)
    {
        plan.before.push(Call::ChangeMac(mac));
    }
    plan_balancer(&mut plan, &wanted_vips(config), client).await?;
    Ok(plan)
}

/// Compares configuration and maps alone. Nothing is planned for which there is no room: while a new
/// configuration replaces the old one, both have to fit.
pub fn plan_maps(config: &Config, datapath: &Datapath, mtu: u32) -> Result<Plan> {
    let identities = Identities::assign(config, datapath)?;
    let wanted = wanted_vips(config);
    let service_vips = current_service_vips(datapath)?;
    check_room(config, datapath, &wanted, &service_vips)?;
    let current: BTreeMap<u16, _> = datapath.groups()?.into_iter().collect();

    Ok(Plan {
        add_service_vips: wanted
            .iter()
            .filter(|(vip, wanted)| service_vips.get(vip) != Some(&wanted.service))
            .map(|(vip, wanted)| (*vip, wanted.service))
            .collect(),
        before: Vec::new(),
        new_groups: identities
            .entries
            .iter()
            .filter(|(id, entry)| {
                current.get(id).is_none_or(|g| (g.epoch, g.parent) != (entry.epoch, entry.parent))
            })
            .map(|(id, _)| *id)
            .collect(),
        switch: changed_image(config, datapath, &identities, mtu)?,
        remove_groups: current
            .iter()
            .filter(|(id, _)| !identities.entries.contains_key(id))
            .map(|(id, g)| (*id, crate::kernel::abi::name_text(&g.name)))
            .collect(),
        identities,
        after: Vec::new(),
        remove_service_vips: service_vips
            .keys()
            .filter(|vip| !wanted.contains_key(vip))
            .copied()
            .collect(),
    })
}

fn check_room(
    config: &Config,
    datapath: &Datapath,
    wanted: &BTreeMap<Vip, Wanted>,
    present: &BTreeMap<Vip, Vip>,
) -> Result<()> {
    const IN_TWO: &str = "apply it in two steps, removing groups first";
    let new = wanted.keys().filter(|vip| !present.contains_key(vip)).count();
    let needed = present.len() + new;
    let (room, advice) = match config.balancer {
        BalancerKind::Embedded => {
            (config.maps.vips, format!("raise maps.vips to that, or {IN_TWO}"))
        }
        BalancerKind::Katran => (datapath.service_vips.max_entries(), IN_TWO.to_owned()),
    };
    if needed <= room as usize {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "there is room for {room} VIPs, and for a moment {needed} are needed: {} in force and {new} new \
         ones; {advice}",
        present.len()
    )))
}

/// The balancer's VIPs. Those that are wanted must be written as calls name them.
pub async fn present_vips(
    wanted: &BTreeMap<Vip, Wanted>,
    client: &mut Client,
) -> Result<BTreeSet<Vip>, BalancerError> {
    let all = client.verbatim_vips().await?;
    let odd = all.iter().find(|(vip, text)| wanted.contains_key(vip) && !text.is_canonical());
    if let Some((vip, verbatim)) = odd {
        return Err(BalancerError::NotCanonical { vip: *vip, verbatim: verbatim.clone() });
    }
    Ok(all.into_iter().map(|(vip, _)| vip).collect())
}

async fn plan_balancer(
    plan: &mut Plan,
    wanted: &BTreeMap<Vip, Wanted>,
    client: &mut Client,
) -> Result<(), BalancerError> {
    let present = present_vips(wanted, client).await?;
    for (vip, Wanted { reals, flags, .. }) in wanted {
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
    for vip in plan.remove_service_vips.iter().filter(|vip| present.contains(vip)) {
        plan.after.push(Call::DelVip(*vip));
    }
    Ok(())
}

fn current_service_vips(datapath: &Datapath) -> Result<BTreeMap<Vip, Vip>> {
    let vip = |key: &vip_definition, v6: bool| Vip {
        addr: words_addr(key.addr, v6),
        port: u16::from_be(key.port),
        protocol: key.proto,
    };
    // Group and service are of one family, and an IPv4 address fills only the first word.
    let entry = |(group, service): (vip_definition, vip_definition)| {
        let v6 = group.addr[1..].iter().chain(&service.addr[1..]).any(|w| *w != 0);
        (vip(&group, v6), vip(&service, v6))
    };
    Ok(datapath.service_vips.entries()?.into_iter().map(entry).collect())
}

/// The image of the next generation, if the one in force is another.
fn changed_image(
    config: &Config,
    datapath: &Datapath,
    identities: &Identities,
    mtu: u32,
) -> Result<Option<Image>> {
    let generation = datapath.generation()?;
    let capacity = datapath.route_states.max_entries();
    if generation == 0 {
        let first = Image::build(config, identities, image::random_keys()?, 1, capacity, mtu)?;
        return Ok(Some(first));
    }
    let table = datapath.service_table()?;
    let keys = image::keys_of(&table);
    let same = Image::build(config, identities, keys, generation, capacity, mtu)?;
    if in_force(datapath, &same)? {
        return Ok(None);
    }
    let next = generation.checked_add(1).unwrap_or(2);
    Ok(Some(Image::build(config, identities, keys, next, capacity, mtu)?))
}

/// Whether the maps hold exactly this image.
fn in_force(datapath: &Datapath, image: &Image) -> Result<bool> {
    use crate::kernel::abi::Pod as _;

    let generation = image.table.generation;
    if datapath.service_table()?.bytes() != image.table.bytes() {
        return Ok(false);
    }
    let edges: BTreeMap<(u32, u64), u32> = datapath
        .route_edges
        .entries()?
        .into_iter()
        .filter(|(edge, _): &(route_edge, u32)| image::is_of_generation(edge.state, generation))
        .map(|(edge, next)| ((edge.state, edge.level), next))
        .collect();
    if edges != image.edges {
        return Ok(false);
    }
    let members: BTreeMap<(u16, u32), u16> = datapath
        .members
        .entries()?
        .into_iter()
        .filter(|(key, _)| u32::from(key.generation) == generation & 1)
        .map(|(key, m): (member_slot, member)| ((key.group, key.slot), m.group))
        .collect();
    let wanted: BTreeMap<(u16, u32), u16> =
        image.members.iter().map(|(key, m)| ((key.group, key.slot), m.group)).collect();
    if members != wanted {
        return Ok(false);
    }
    let routes = datapath.client_routes.keys_one_by_one();
    let of_generation = |key: &client_route| u32::from(key.generation) == generation & 1;
    if routes.iter().filter(|key| of_generation(key)).count() != image.client_routes.len() {
        return Ok(false);
    }
    for (key, group) in &image.client_routes {
        if datapath.client_routes.get(key)? != Some(*group) {
            return Ok(false);
        }
    }
    for (number, state) in &image.states {
        let there = datapath.route_states.get(number)?;
        if there.is_none_or(|there| there.bytes() != state.bytes()) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The key of a VIP in the maps.
pub fn map_key(vip: Vip) -> vip_definition {
    vip_definition { proto: vip.protocol, ..vip_key(vip.addr, vip.port) }
}
