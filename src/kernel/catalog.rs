//! Every map of `mqtt_fwd` and of the embedded balancer, a row each: how large it is, what an upgrade does with it,
//! and whether its evictions are counted. Nothing else lists maps by name.

use super::abi::{balancer_limits, limits, tracked_map};
use super::pins::Object;
use crate::domain::{MapSizes, Rates};

/// What an upgrade does with a map's entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Written by user space, read by packets: moved before the new program works.
    Configuration,
    /// Learned from packets, and of use to new flows: moved before, and what changed then, after.
    Knowledge,
    /// Of flows: moved after.
    Flows,
    /// Made again.
    Scratch,
    /// Others' as well: neither part of the layout's hash nor in the directory of the object's maps.
    Shared,
}

/// Maps whose evictions are counted (`enum tracked_map`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracked {
    Flows,
    Clients,
    Clients6,
    Topics,
    ClientIds,
    Handovers,
}

impl Tracked {
    /// Its index in the map `map_uses`.
    pub fn index(self) -> u32 {
        let map = match self {
            Self::Flows => tracked_map::TRACKED_FLOWS,
            Self::Clients => tracked_map::TRACKED_CLIENTS,
            Self::Clients6 => tracked_map::TRACKED_CLIENTS6,
            Self::Topics => tracked_map::TRACKED_TOPICS,
            Self::ClientIds => tracked_map::TRACKED_CLIENT_IDS,
            Self::Handovers => tracked_map::TRACKED_HANDOVERS,
        };
        map.0
    }

    /// The index of what user space adds and removes.
    pub fn index_of_ours(self) -> u32 {
        tracked_map::TRACKED_MAPS.0 + self.index()
    }
}

/// A map.
#[derive(Debug, Clone, Copy)]
pub struct Map {
    pub object: Object,
    pub name: &'static str,
    pub role: Role,
    /// Its entries; `None`: as many as `bpf/` says.
    pub size: Option<fn(&MapSizes) -> u32>,
    pub tracked: Option<Tracked>,
}

const fn map(
    object: Object,
    name: &'static str,
    role: Role,
    size: Option<fn(&MapSizes) -> u32>,
    tracked: Option<Tracked>,
) -> Map {
    Map { object, name, role, size, tracked }
}

use Object::{Balancer as B, MqttFwd as M};
use Role::{Configuration, Flows, Knowledge, Scratch, Shared};

/// All of them.
#[rustfmt::skip] // a table
pub const MAPS: [Map; 44] = [
    map(M, "root_array",        Shared,        None, None),
    map(M, "vip_inner_dst", Shared,        None, None),
    map(M, "generation",        Configuration, None, None),
    map(M, "services",          Configuration, None, None),
    map(M, "groups",            Configuration, Some(|s| s.groups), None),
    // Two generations at a time.
    map(M, "route_edges",       Configuration, Some(|s| 2 * s.route_states), None),
    map(M, "route_states",      Configuration, Some(|s| 2 * s.route_states), None),
    map(M, "client_routes",     Configuration, None, None),
    map(M, "members",           Configuration, None, None),
    map(M, "handover_keys",     Configuration, None, None),
    map(M, "clients",           Knowledge,     Some(|s| s.clients), Some(Tracked::Clients)),
    map(M, "clients6",          Knowledge,     Some(|s| s.clients), Some(Tracked::Clients6)),
    map(M, "client_ids",        Knowledge,     Some(|s| s.client_ids), Some(Tracked::ClientIds)),
    map(M, "topics",            Knowledge,     Some(|s| s.topics), Some(Tracked::Topics)),
    map(M, "server_names",      Knowledge,     None, None),
    map(M, "flows",             Flows,         Some(MapSizes::flow_places), Some(Tracked::Flows)),
    map(M, "handovers",         Flows,         Some(|s| s.handovers), Some(Tracked::Handovers)),
    map(M, "topic_streams",     Flows,         None, None),
    map(M, "binding_cache",     Scratch,       Some(MapSizes::cache_sets), None),
    map(M, "untracked",         Scratch,       Some(MapSizes::untracked), None),
    map(M, "budgets",           Scratch,       None, None),
    map(M, "counters",          Scratch,       None, None),
    map(M, "map_uses",          Scratch,       None, None),
    map(M, "events",            Scratch,       None, None),
    map(M, "rescues",           Scratch,       None, None),
    map(M, "hellos",            Scratch,       None, None),
    map(M, "fleet_reports",     Scratch,       Some(|s| s.fleet_reports), None),
    map(M, "client_shares",     Scratch,       None, None),
    map(M, "client_rates",      Scratch,       None, None),
    map(M, "rescuer",           Scratch,       None, None),
    map(M, "predecessor",       Scratch,       None, None),
    map(M, "stages",            Scratch,       None, None),
    map(M, "scratch_area",      Scratch,       None, None),
    map(B, "vip_map",           Configuration, Some(|s| s.vips), None),
    map(B, "ch_rings",          Configuration, Some(|s| s.vips * balancer_limits::RING_SIZE.0), None),
    map(B, "reals",             Configuration, None, None),
    map(B, "vip_reals",         Configuration, None, None),
    map(B, "ctl_array",         Configuration, None, None),
    map(B, "connections",       Flows,         Some(|s| s.flows), None),
    map(B, "connections6",      Flows,         Some(|s| s.flows), None),
    map(B, "vip_stats",         Scratch,       Some(|s| s.vips), None),
    map(B, "reals_stats",       Scratch,       None, None),
    map(B, "balancer_stats",    Scratch,       None, None),
    map(B, "inner_dst_misses",       Scratch,       None, None),
];

/// A map by its name; `None`: libbpf's own (.rodata, .bss), which go with the program.
pub fn find(name: &str) -> Option<&'static Map> {
    MAPS.iter().find(|map| map.name == name)
}

/// What an upgrade does with a map's entries.
pub fn role(name: &str) -> Role {
    find(name).map_or(Role::Scratch, |map| map.role)
}

/// Whether a map is pinned. libbpf's own (.rodata, .bss) belong to the program and go with it.
pub fn is_pinned(name: &str) -> bool {
    !name.contains('.')
}

/// Maps whose evictions are counted.
pub fn tracked() -> impl Iterator<Item = (&'static str, Tracked)> {
    MAPS.iter().filter_map(|map| Some((map.name, map.tracked?)))
}

impl MapSizes {
    /// Places for flows, of both IP versions: twice as many, so that each finds a free one (`bpf/forward/flow/table.h`).
    pub fn flow_places(&self) -> u32 {
        (2 * self.flows).next_multiple_of(limits::FLOW_WAYS.0).max(2 * limits::FLOW_WAYS.0)
    }

    /// Sets of the cache of bindings: a slot per flow, and as many sets as its keys need
    /// (`bpf/forward/flow/cache.h`).
    pub fn cache_sets(&self) -> u32 {
        (self.flows.next_power_of_two() / limits::CACHE_WAYS.0).max(1 << 16)
    }

    /// Places for flows whose state was lost: as many as there can be, a word each.
    pub fn untracked(&self) -> u32 {
        self.flows.next_power_of_two().max(1 << 12)
    }

    /// Connections that begin their way to a broker a second: so many that none is evicted within five.
    pub fn handovers_per_second(&self) -> u32 {
        (self.handovers / 5).max(2000)
    }

    /// Clients that become known a second: so many that whoever was known before is, for ten minutes.
    pub fn clients_per_second(&self) -> u32 {
        (self.clients.min(self.client_ids) / 600).max(1000)
    }

    /// How many entries a map has; `None`: as many as `bpf/` says.
    pub fn of(&self, name: &str) -> Option<u32> {
        find(name)?.size.map(|size| size(self))
    }
}

impl Rates {
    /// A rate's share of each CPU in a window of 0.1 s.
    pub fn per_window(rate: u32) -> u32 {
        let cpus = libbpf_rs::num_possible_cpus().map_or(1, |n| n.max(1)) as u32;
        rate.div_ceil(10 * cpus)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::mem::MaybeUninit;

    use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};

    use super::*;
    use crate::kernel::skeletons::balancer::BalancerSkelBuilder;
    use crate::kernel::skeletons::mqtt_fwd::MqttFwdSkelBuilder;

    fn of_object(open: &libbpf_rs::OpenObject) -> BTreeSet<String> {
        let names = open.maps().map(|map| map.name().to_string_lossy().into_owned());
        names.filter(|name| !name.contains('.')).collect()
    }

    #[test]
    fn the_catalogue_has_each_map_of_the_objects() {
        let mut storage = MaybeUninit::uninit();
        let mut found =
            of_object(MqttFwdSkelBuilder::default().open(&mut storage).unwrap().open_object());
        let mut storage = MaybeUninit::uninit();
        let balancer = BalancerSkelBuilder::default().open(&mut storage).unwrap();
        found.extend(of_object(balancer.open_object()));
        let listed: BTreeSet<String> = MAPS.iter().map(|map| map.name.to_owned()).collect();
        assert_eq!(listed, found);
        assert_eq!(listed.len(), MAPS.len(), "each once");
        assert_eq!(tracked().count(), tracked_map::TRACKED_MAPS.0 as usize);
    }
}
