//! What has to change in the maps so that they hold what a configuration says, and carrying it out.
//!
//! New groups are complete before a packet can be sent to them, services and routes change in one switch, and old
//! groups go only then.

use std::collections::{BTreeMap, BTreeSet};

use super::Datapath;
use super::ids::Identities;
use super::image::{self, Image, ImageError};
use super::names::services_of;
use crate::balancer::desired::{DesiredVip, desired_vips};
use crate::config::{BalancerKind, Config};
use crate::domain::Vip;
use crate::kernel::abi::{
    Pod as _, binding_of, client_route, group, member, member_slot, name_text, route_edge,
    special_group, topic_verdict, vip_definition, vip_key, words_addr,
};
use crate::kernel::{self, BpfError};

/// Why a configuration cannot be put into the maps.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(
        "there is room for {room} VIPs, and for a moment {needed} are needed: {present} applied and {new} \
         new ones; {}apply it in two steps, removing groups first",
        if *.can_grow { "raise maps.vips to that, or " } else { "" }
    )]
    NoRoom { room: u32, needed: usize, present: usize, new: usize, can_grow: bool },
}

/// All that differs in the maps, in the order in which it is done.
#[derive(Debug)]
pub struct MapPlan {
    /// First, service addresses of new group VIPs, for the balancer to put back.
    pub add_service_vips: BTreeMap<Vip, Vip>,
    /// The groups that are new.
    pub new_groups: BTreeSet<u16>,
    /// All groups, those that stay included.
    pub identities: Identities,
    /// Then services and routes, in one switch.
    pub switch: Option<Image>,
    /// Then groups that nobody needs any more.
    pub remove_groups: BTreeMap<u16, String>,
    /// And the service addresses of old group VIPs.
    pub remove_service_vips: BTreeSet<Vip>,
}

impl MapPlan {
    /// Compares configuration and maps. Nothing is planned for which there is no room: while a new configuration
    /// replaces the old one, both have to fit.
    pub fn of(config: &Config, datapath: &Datapath, mtu: u32) -> Result<Self, PlanError> {
        let identities = Identities::assign(config, datapath)?;
        let desired = desired_vips(config);
        let service_vips = current_service_vips(datapath)?;
        check_room(config, datapath, &desired, &service_vips)?;
        let current: BTreeMap<u16, _> = datapath.groups()?.into_iter().collect();
        // The map may serve others of this chain, too: their VIPs are left alone.
        let own: BTreeSet<[u32; 4]> = current.values().map(|g| g.vip).collect();
        let differs = |id: &u16, entry: &super::ids::Entry| {
            current.get(id).is_none_or(|g| (g.epoch, g.parent) != (entry.epoch, entry.parent))
        };
        Ok(Self {
            add_service_vips: desired
                .iter()
                .filter(|(vip, desired)| service_vips.get(vip) != Some(&desired.service))
                .map(|(vip, desired)| (*vip, desired.service))
                .collect(),
            new_groups: identities
                .entries
                .iter()
                .filter(|(id, entry)| differs(id, entry))
                .map(|(id, _)| *id)
                .collect(),
            switch: changed_image(config, datapath, &identities, mtu)?,
            remove_groups: current
                .iter()
                .filter(|(id, _)| !identities.entries.contains_key(id))
                .map(|(id, g)| (*id, name_text(&g.name)))
                .collect(),
            identities,
            remove_service_vips: service_vips
                .keys()
                .filter(|vip| !desired.contains_key(vip) && own.contains(&map_key(**vip).addr))
                .copied()
                .collect(),
        })
    }

    /// Group VIPs that the map is without, for which the balancer would not put the service's address back: another
    /// program with the same pin has removed them.
    pub fn missing_service_vips(config: &Config, datapath: &Datapath) -> kernel::Result<Vec<Vip>> {
        let present = current_service_vips(datapath)?;
        let desired = desired_vips(config).into_iter();
        Ok(desired
            .filter(|(vip, desired)| present.get(vip) != Some(&desired.service))
            .map(|(vip, _)| vip)
            .collect())
    }

    /// Does all of it.
    pub fn carry_out(&self, datapath: &Datapath) -> kernel::Result<()> {
        self.add_service_vips(datapath)?;
        self.change_groups(datapath)?;
        self.remove_service_vips(datapath)
    }

    /// The first step.
    pub fn add_service_vips(&self, datapath: &Datapath) -> kernel::Result<()> {
        for (group, service) in &self.add_service_vips {
            datapath.service_vips.put(&map_key(*group), &map_key(*service))?;
        }
        Ok(())
    }

    /// Adds groups, switches to the new services and routes, and only then removes groups.
    pub fn change_groups(&self, datapath: &Datapath) -> kernel::Result<()> {
        for id in &self.new_groups {
            datapath.groups.put(&u32::from(*id), &group::from(&self.identities.entries[id]))?;
        }
        if let Some(image) = &self.switch {
            self.switch(image, datapath)?;
        }
        for id in self.remove_groups.keys() {
            let key = u32::from(*id);
            if let Some(old) = datapath.groups.get(&key)? {
                let freed = group { last_epoch: old.epoch, ..group::zeroed() };
                datapath.groups.put(&key, &freed)?;
            }
        }
        Ok(())
    }

    /// The last step.
    pub fn remove_service_vips(&self, datapath: &Datapath) -> kernel::Result<()> {
        for vip in &self.remove_service_vips {
            datapath.service_vips.remove(&map_key(*vip))?;
        }
        Ok(())
    }

    /// Writes a generation beside the current one and makes it the current one.
    fn switch(&self, image: &Image, datapath: &Datapath) -> kernel::Result<()> {
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
        self.judge_topics(image, datapath)?;
        datapath.generation.put(&0, &generation)?;
        // Topics that were first published between the two steps.
        self.judge_topics(image, datapath)?;
        Ok(())
    }

    /// Puts the new generation's group beside each stored topic, so that predictions follow.
    fn judge_topics(&self, image: &Image, datapath: &Datapath) -> kernel::Result<()> {
        let generation = image.table.generation;
        let services = services_of(&image.table);
        for (hash, mut topic) in datapath.topics.entries()? {
            let side = (generation & 1) as usize;
            let length = usize::from(topic.length);
            // Of a longer topic only the beginning is stored: its next PUBLISH will tell.
            let Some(text) = topic.text.get(..length) else { continue };
            let Some(service) = services.iter().find(|s| s.id == topic.service) else { continue };
            if topic.verdict[side].generation == generation {
                continue;
            }
            let id = image.route(service, text);
            let binding = match self.identities.entries.get(&id) {
                Some(entry) => binding_of(id, entry.epoch),
                None if u32::from(id) == special_group::ANY_GROUP.0 => special_group::ANY_GROUP.0,
                None => continue,
            };
            topic.verdict[side] = topic_verdict { generation, binding };
            datapath.topics.put(&hash, &topic)?;
        }
        Ok(())
    }
}

fn check_room(
    config: &Config,
    datapath: &Datapath,
    desired: &BTreeMap<Vip, DesiredVip>,
    present: &BTreeMap<Vip, Vip>,
) -> Result<(), PlanError> {
    let new = desired.keys().filter(|vip| !present.contains_key(vip)).count();
    let (present, needed) = (present.len(), present.len() + new);
    let can_grow = config.balancer == BalancerKind::Embedded;
    let room = if can_grow { config.maps.vips } else { datapath.service_vips.max_entries() };
    if needed <= room as usize {
        return Ok(());
    }
    Err(PlanError::NoRoom { room, needed, present, new, can_grow })
}

fn current_service_vips(datapath: &Datapath) -> kernel::Result<BTreeMap<Vip, Vip>> {
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

/// The image of the next generation, if the maps hold another one.
fn changed_image(
    config: &Config,
    datapath: &Datapath,
    identities: &Identities,
    mtu: u32,
) -> Result<Option<Image>, PlanError> {
    let generation = datapath.generation()?;
    let capacity = datapath.route_states.max_entries();
    if generation == 0 {
        let first = Image::build(config, identities, image::random_keys()?, 1, capacity, mtu)?;
        return Ok(Some(first));
    }
    let table = datapath.service_table()?;
    let keys = image::keys_of(&table);
    let same = Image::build(config, identities, keys, generation, capacity, mtu)?;
    if holds(datapath, &same)? {
        return Ok(None);
    }
    let next = generation.checked_add(1).unwrap_or(2);
    Ok(Some(Image::build(config, identities, keys, next, capacity, mtu)?))
}

/// Whether the maps hold exactly this image.
fn holds(datapath: &Datapath, image: &Image) -> kernel::Result<bool> {
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
    let desired: BTreeMap<(u16, u32), u16> =
        image.members.iter().map(|(key, m)| ((key.group, key.slot), m.group)).collect();
    if members != desired {
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
fn map_key(vip: Vip) -> vip_definition {
    vip_definition { proto: vip.protocol, ..vip_key(vip.addr, vip.port) }
}
