//! The pinned maps of `mqtt_fwd`.

use crate::kernel;
use crate::kernel::abi::{
    client, client_id, client_route, client4, client6, counters, flow6, group, handover,
    handover_keys, map_use, member, member_slot, rescuer, route_edge, route_state, server_name,
    service_table, topic, vip_definition,
};
use crate::kernel::flow_table::FlowTable;
use crate::kernel::maps::Table;
use crate::kernel::pins::Pins;
use crate::kernel::skeletons::mqtt_fwd::MqttFwdMaps;

/// Handles on the maps; see `bpf/maps/` for what they hold.
#[derive(Debug)]
#[allow(missing_docs)] // documented there
pub struct Datapath {
    pub generation: Table<u32, u32>,
    pub services: Table<u32, service_table>,
    pub groups: Table<u32, group>,
    pub route_edges: Table<route_edge, u32>,
    pub route_states: Table<u32, route_state>,
    pub client_routes: Table<client_route, u32>,
    pub members: Table<member_slot, member>,
    pub service_vips: Table<vip_definition, vip_definition>,
    pub topics: Table<u64, topic>,
    pub clients: Table<client4, client>,
    pub clients6: Table<client6, client>,
    pub client_ids: Table<u64, client_id>,
    pub server_names: Table<u64, server_name>,
    pub handovers: Table<flow6, handover>,
    pub handover_keys: Table<u32, handover_keys>,
    /// The sidecar, as the datapath knows it.
    pub rescuer: Table<u32, rescuer>,
    pub flows: FlowTable,
    pub counters: Table<u32, counters>,
    pub map_uses: Table<u32, map_use>,
}

impl Datapath {
    /// Opens what [`crate::kernel::load::load`] pinned.
    pub fn open(pins: &Pins) -> kernel::Result<Self> {
        Ok(Self {
            generation: Table::open(&pins.map("generation"))?,
            services: Table::open(&pins.map("services"))?,
            groups: Table::open(&pins.map("groups"))?,
            route_edges: Table::open(&pins.map("route_edges"))?,
            route_states: Table::open(&pins.map("route_states"))?,
            members: Table::open(&pins.map("members"))?,
            client_routes: Table::open(&pins.map("client_routes"))?,
            service_vips: Table::open(&pins.map("vip_inner_dst"))?,
            topics: Table::open(&pins.map("topics"))?,
            clients: Table::open(&pins.map("clients"))?,
            clients6: Table::open(&pins.map("clients6"))?,
            client_ids: Table::open(&pins.map("client_ids"))?,
            server_names: Table::open(&pins.map("server_names"))?,
            handovers: Table::open(&pins.map("handovers"))?,
            handover_keys: Table::open(&pins.map("handover_keys"))?,
            rescuer: Table::open(&pins.map("rescuer"))?,
            flows: FlowTable::open(&pins.map("flows"))?,
            counters: Table::open(&pins.map("counters"))?,
            map_uses: Table::open(&pins.map("map_uses"))?,
        })
    }

    /// The maps of an object that is loaded but not pinned.
    pub fn of(maps: &MqttFwdMaps<'_>) -> kernel::Result<Self> {
        Ok(Self {
            generation: Table::of(&maps.generation)?,
            services: Table::of(&maps.services)?,
            groups: Table::of(&maps.groups)?,
            route_edges: Table::of(&maps.route_edges)?,
            route_states: Table::of(&maps.route_states)?,
            members: Table::of(&maps.members)?,
            client_routes: Table::of(&maps.client_routes)?,
            service_vips: Table::of(&maps.vip_inner_dst)?,
            topics: Table::of(&maps.topics)?,
            clients: Table::of(&maps.clients)?,
            clients6: Table::of(&maps.clients6)?,
            client_ids: Table::of(&maps.client_ids)?,
            server_names: Table::of(&maps.server_names)?,
            handovers: Table::of(&maps.handovers)?,
            handover_keys: Table::of(&maps.handover_keys)?,
            rescuer: Table::of(&maps.rescuer)?,
            flows: FlowTable::of(&maps.flows)?,
            counters: Table::of(&maps.counters)?,
            map_uses: Table::of(&maps.map_uses)?,
        })
    }

    /// Whether these are the maps that are pinned.
    pub fn is_pinned(&self, pins: &Pins) -> bool {
        let pinned: kernel::Result<Table<u32, service_table>> = Table::open(&pins.map("services"));
        pinned.is_ok_and(|pinned| pinned.id() == self.services.id())
    }

    /// The current generation; 0: nothing was applied yet.
    pub fn generation(&self) -> kernel::Result<u32> {
        Ok(self.generation.get(&0)?.unwrap_or_default())
    }

    /// The current generation's services.
    pub fn service_table(&self) -> kernel::Result<service_table> {
        let side = self.generation()? & 1;
        Ok(self.services.get(&side)?.unwrap_or_default())
    }

    /// All groups that are alive, with their numbers.
    pub fn groups(&self) -> kernel::Result<Vec<(u16, group)>> {
        let all = self.groups.entries()?;
        Ok(all.into_iter().filter(|(_, g)| g.epoch != 0).map(|(id, g)| (id as u16, g)).collect())
    }
}
