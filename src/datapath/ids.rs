//! Numbers of services and groups. Flows and predictions name them, so they stay the same
//! from one configuration to the next, and mean nothing else soon after they are given up.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::Datapath;
use crate::config::Config;
use crate::kernel;
use crate::kernel::abi::{Pod as _, addr_words, group, name_array, name_text, words_addr};

/// Which numbers a configuration's services and groups have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identities {
    /// By address and port.
    pub services: BTreeMap<(IpAddr, u16), u16>,
    /// By service number, name and VIP: a group with another VIP is another group.
    pub groups: BTreeMap<(u16, String, IpAddr), u16>,
    /// The groups' entries, in the order of their numbers.
    pub entries: BTreeMap<u16, Entry>,
}

/// A group as the map has it, comparable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its VIP.
    pub vip: IpAddr,
    /// Its epoch, never 0.
    pub epoch: u16,
    /// Its service's number.
    pub service: u16,
    /// Its name.
    pub name: String,
    /// Its own number; of a real's own VIP: the number of the group that the real is of.
    pub parent: u16,
}

impl From<&Entry> for group {
    fn from(entry: &Entry) -> Self {
        Self {
            vip: addr_words(entry.vip),
            epoch: entry.epoch,
            service: entry.service,
            last_epoch: entry.epoch,
            parent: entry.parent,
            name: name_array(&entry.name),
            ..Self::zeroed()
        }
    }
}

impl Entry {
    /// `v6`: the family of its service.
    pub fn of(group: &group, v6: bool) -> Self {
        Self {
            vip: words_addr(group.vip, v6),
            epoch: group.epoch,
            service: group.service,
            name: name_text(&group.name),
            parent: group.parent,
        }
    }
}

impl Identities {
    /// Keeps the numbers of what there was already, and gives free ones to the rest.
    pub fn assign(config: &Config, datapath: &Datapath) -> kernel::Result<Self> {
        let table = datapath.service_table()?;
        let old_services: BTreeMap<(IpAddr, u16), u16> = table.service[..usize::from(table.count)]
            .iter()
            .map(|s| ((words_addr(s.addr, s.v6 != 0), u16::from_be(s.port)), s.id))
            .collect();
        let v6_services: Vec<u16> = table.service[..usize::from(table.count)]
            .iter()
            .filter(|s| s.v6 != 0)
            .map(|s| s.id)
            .collect();
        let mut identities = Self::default();
        for service in &config.services {
            let key = (service.addr, service.port);
            if let Some(id) = old_services.get(&key) {
                identities.services.insert(key, *id);
            }
        }
        for service in &config.services {
            let key = (service.addr, service.port);
            let free = (0..=u16::MAX).find(|id| {
                !identities.services.values().chain(old_services.values()).any(|used| used == id)
            });
            identities.services.entry(key).or_insert_with(|| free.unwrap_or_default());
        }

        let slots = datapath.groups.entries()?;
        let old_groups: BTreeMap<(u16, String, IpAddr), u16> = slots
            .iter()
            .filter(|(_, g)| g.epoch != 0)
            .map(|(id, g)| {
                let entry = Entry::of(g, v6_services.contains(&g.service));
                ((entry.service, entry.name, entry.vip), *id as u16)
            })
            .collect();
        let mut free = slots.iter().filter(|(_, g)| g.epoch == 0).map(|(id, g)| (*id as u16, g));
        for service in &config.services {
            let service_id = identities.services[&(service.addr, service.port)];
            // A real's own VIP is a group, too, of the same name, behind the group that it is of.
            let vips = service.groups.iter().flat_map(|group| {
                let reals = group.reals.iter().filter_map(|real| real.vip);
                std::iter::once(group.vip).chain(reals).map(move |vip| (group, vip))
            });
            for (group, vip) in vips {
                let key = (service_id, group.name.clone(), vip);
                let known = old_groups
                    .get(&key)
                    .and_then(|id| Some((*id, slots.iter().find(|(i, _)| i == &u32::from(*id))?)))
                    .map(|(id, (_, slot))| (id, slot.epoch));
                // Validation made sure that as many fit; those to be removed still take room.
                let Some((id, epoch)) = known.or_else(|| {
                    free.next().map(|(id, slot)| (id, slot.last_epoch.wrapping_add(1).max(1)))
                }) else {
                    return Err(kernel::BpfError::NoRoom { capacity: slots.len() });
                };
                let of = (service_id, group.name.clone(), group.vip);
                let parent = identities.groups.get(&of).copied().unwrap_or(id);
                let name = group.name.clone();
                let entry = Entry { vip, epoch, service: service_id, name, parent };
                identities.groups.insert(key, id);
                identities.entries.insert(id, entry);
            }
        }
        Ok(identities)
    }
}
