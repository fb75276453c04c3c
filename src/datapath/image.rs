//! What the maps of one generation hold for a configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::ids::Identities;
use crate::config::{Binding, Config, OnMisprediction, Service, Target};
use crate::domain::filter::{Level, TopicFilter};
use crate::domain::rendezvous;
use crate::domain::{Affinity, ClientRoute, ClientRouteKind, Protocol, Route};
use crate::kernel::abi::{
    Pod as _, addr_words, affinity, binding_mode, client_route, client_route_kind, limits, member,
    member_slot, misprediction_policy, route_edge, route_state, route_state_flags, service,
    service_protocol, service_table, special_group,
};
use crate::routes::compile::{Automaton, DEAD, TooManyStates};
use crate::routes::hash::Keys;
use crate::routes::walk;

/// The services and routes of one generation.
#[derive(Debug)]
pub struct Image {
    /// For the map `services`.
    pub table: service_table,
    /// For the map `route_states`.
    pub states: BTreeMap<u32, route_state>,
    /// For the map `members`: slot → group of one real.
    pub members: Vec<(member_slot, member)>,
    /// For the map `client_routes`: key → group.
    pub client_routes: Vec<(client_route, u32)>,
    /// For the map `route_edges`: (state, level's hash) → state.
    pub edges: BTreeMap<(u32, u64), u32>,
}

/// Why a configuration cannot be put into the maps.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Of its routes.
    #[error("service {service}: {source}")]
    Routes {
        /// Which.
        service: String,
        /// Why.
        source: TooManyStates,
    },
    /// 2^-64 a pair of levels; another secret would cure it, at the price of all predictions.
    #[error(
        "service {service}: the hash of topic level {level:?} is another's; `unload`, then `load` \
         choose other keys"
    )]
    Collision {
        /// Whose.
        service: String,
        /// Which.
        level: String,
    },
    /// Packets larger than the interface takes.
    #[error(
        "service {service}: max_packet = {limit} is more than the MTU of {interface} ({mtu}); lower \
         it, or remove it to have {room}"
    )]
    MaxPacket {
        /// Whose.
        service: String,
        /// As configured.
        limit: u16,
        /// Which interface.
        interface: String,
        /// Its MTU.
        mtu: u32,
        /// What would fit.
        room: u32,
    },
    /// No random numbers.
    #[error("random numbers for keys: {0}")]
    Random(getrandom::Error),
}

type Result<T, E = ImageError> = std::result::Result<T, E>;

/// Fresh secrets, from the kernel.
pub fn random_keys() -> Result<Keys> {
    let next = || getrandom::u64().map_err(ImageError::Random);
    Ok(Keys { route: [next()?, next()?], topic: [next()?, next()?] })
}

/// The keys that a table's hashes were made with.
pub fn keys_of(table: &service_table) -> Keys {
    Keys { route: table.route_key, topic: table.topic_key }
}

/// Whether a state is of a generation: 0 is none's, and the others take turns, so that two
/// generations never share a number, whatever the capacity was when they were made.
pub fn is_of_generation(state: u32, generation: u32) -> bool {
    state != DEAD && state & 1 == generation & 1
}

/// The number of a generation's state.
fn state_number(index: u32, generation: u32) -> u32 {
    2 * index + if generation & 1 == 0 { 2 } else { 1 }
}

impl Image {
    /// Makes the image for `generation`. `capacity`: how many states the map has in all; `mtu`:
    /// of the interface, from which services have their largest packet.
    pub fn build(
        config: &Config,
        identities: &Identities,
        keys: Keys,
        generation: u32,
        capacity: u32,
        mtu: u32,
    ) -> Result<Self> {
        let mut image = Self {
            table: service_table {
                route_key: keys.route,
                topic_key: keys.topic,
                generation,
                ..service_table::default()
            },
            states: BTreeMap::new(),
            client_routes: Vec::new(),
            members: Vec::new(),
            edges: BTreeMap::new(),
        };
        // Numbers are taken in turns, and 0 is not given away.
        let (mut next_state, end) = (0, capacity.saturating_sub(1) / 2);

        // The datapath compares IPv4 services first, by one word each.
        let (v4, v6): (Vec<&Service>, Vec<&Service>) =
            config.services.iter().partition(|s| s.addr.is_ipv4());
        image.table.v4 = v4.len() as u16;
        image.table.count = config.services.len() as u16;
        for (slot, svc) in v4.into_iter().chain(v6).enumerate() {
            let id = identities.services[&(svc.addr, svc.port)];
            let group_id = |name: &str| {
                let vip = svc.group(name).map(|g| g.vip)?;
                identities.groups.get(&(id, name.to_owned(), vip)).copied()
            };
            let has_members = image.add_members(svc, id, identities);
            let kinds = image.add_client_routes(svc, id, &group_id);
            let automaton = image.add_routes(svc, keys, &mut next_state, end, &group_id)?;
            if let IpAddr::V4(addr) = svc.addr {
                image.table.v4_key[slot] = u64::from(u32::from_ne_bytes(addr.octets()))
                    | u64::from(svc.port.to_be()) << 32;
            }
            image.table.service[slot] = service {
                addr: addr_words(svc.addr),
                port: svc.port.to_be(),
                id,
                default_group: group_id(&svc.default_group)
                    .unwrap_or(special_group::NO_GROUP.0 as u16),
                max_packet: max_packet(config, svc, mtu)?,
                start: automaton.0,
                start_dollar: automaton.1,
                longest_level: longest_level(svc),
                v6: svc.addr.is_ipv6().into(),
                on_misprediction: match svc.on_misprediction {
                    OnMisprediction::Reset => misprediction_policy::MISPREDICTION_RESET.0 as u8,
                    OnMisprediction::Keep => misprediction_policy::MISPREDICTION_KEEP.0 as u8,
                    OnMisprediction::Rescue => misprediction_policy::MISPREDICTION_RESCUE.0 as u8,
                },
                binding: match svc.binding {
                    Binding::Predicted => binding_mode::BINDING_PREDICTED.0 as u8,
                    Binding::Delayed => binding_mode::BINDING_DELAYED.0 as u8,
                },
                client_routes: kinds,
                has_members: has_members.into(),
                slot: slot as u16,
                protocol: match svc.protocol {
                    Protocol::Mqtt => service_protocol::PROTOCOL_MQTT.0 as u8,
                    Protocol::Tls => service_protocol::PROTOCOL_TLS.0 as u8,
                },
                refuses_unknown: svc.refuses_unknown.into(),
                relay: svc
                    .relay
                    .as_ref()
                    .and_then(|name| group_id(name))
                    .unwrap_or(special_group::NO_GROUP.0 as u16),
                pad: [0; 19],
            };
        }
        Ok(image)
    }

    /// Adds the tables of groups whose reals are chosen here; whether there are any.
    fn add_members(&mut self, svc: &Service, service: u16, identities: &Identities) -> bool {
        let mut some = false;
        for group in &svc.groups {
            let kind = match group.affinity {
                Affinity::ClientId => affinity::AFFINITY_CLIENT_ID,
                Affinity::Topic => affinity::AFFINITY_TOPIC,
                Affinity::None | Affinity::ClientIp => continue,
            };
            let number =
                |vip: IpAddr| identities.groups.get(&(service, group.name.clone(), vip)).copied();
            let Some(own) = number(group.vip) else { continue };
            let reals: Vec<(u16, IpAddr, u32)> = group
                .reals
                .iter()
                .filter_map(|r| Some((number(r.vip?)?, r.addr, r.weight)))
                .collect();
            for (slot, chosen) in
                rendezvous::fill(&reals, limits::MEMBER_SLOTS.0).into_iter().enumerate()
            {
                let generation = (self.table.generation & 1) as u8;
                let key = member_slot { group: own, generation, pad: 0, slot: slot as u32 };
                let value = member { group: chosen, affinity: kind.0 as u8, pad: 0 };
                self.members.push((key, value));
                some = true;
            }
        }
        some
    }

    /// Adds a service's routes by what clients say first; returns which kinds there are.
    fn add_client_routes(
        &mut self,
        svc: &Service,
        id: u16,
        group_id: &dyn Fn(&str) -> Option<u16>,
    ) -> u8 {
        let mut kinds = 0;
        for route in &svc.client_routes {
            let Some(group) = group_id(&route.group) else { continue };
            let kind = match route.kind {
                ClientRouteKind::ClientId => client_route_kind::CLIENT_ROUTE_ID,
                ClientRouteKind::Username => client_route_kind::CLIENT_ROUTE_USER,
                ClientRouteKind::Sni => client_route_kind::CLIENT_ROUTE_SNI,
                ClientRouteKind::Alpn => client_route_kind::CLIENT_ROUTE_ALPN,
            };
            let mut key = client_route {
                service: id,
                kind: kind.0 as u8,
                generation: (self.table.generation & 1) as u8,
                ..client_route::zeroed()
            };
            let text = text_in_map(route);
            key.text[..text.len()].copy_from_slice(&text);
            let length = text.len() + usize::from(!route.is_open);
            const IN_FRONT: u32 = 32; // service, kind and generation
            key.prefix = IN_FRONT + 8 * length as u32;
            self.client_routes.push((key, group.into()));
            kinds |= 1 << kind.0;
        }
        kinds
    }

    /// Adds a service's routes; returns the two states that a topic may start in.
    fn add_routes(
        &mut self,
        svc: &Service,
        keys: Keys,
        next_state: &mut u32,
        end: u32,
        group_id: &dyn Fn(&str) -> Option<u16>,
    ) -> Result<(u32, u32)> {
        let routes: Vec<&Route> = svc.all_routes().collect();
        let filters: Vec<&TopicFilter> = routes.iter().map(|r| &r.filter).collect();
        let automaton = Automaton::compile(&filters, end - *next_state)
            .map_err(|source| ImageError::Routes { service: svc.name.clone(), source })?;
        let base = *next_state;
        // The dead state is shared, the others follow each other.
        let generation = self.table.generation;
        let place = |state: u32| {
            if state == DEAD { DEAD } else { state_number(base + state - 1, generation) }
        };
        let with_edges: BTreeSet<u32> = automaton.edges.iter().map(|e| e.state).collect();
        for (number, state) in automaton.states.iter().enumerate().skip(1) {
            let number = number as u32;
            let group = match state.accepts.map(|filter| &routes[filter].target) {
                Some(Target::Group(name)) => group_id(name),
                Some(Target::Any) => Some(special_group::ANY_GROUP.0 as u16),
                None => None,
            };
            let mut flags = 0;
            if with_edges.contains(&number) {
                flags |= route_state_flags::ROUTE_HAS_EDGES.0;
            } else if state.other == number {
                flags |= route_state_flags::ROUTE_FINAL.0;
            }
            let entry = route_state {
                other: place(state.other),
                group: group.unwrap_or(special_group::NO_GROUP.0 as u16),
                flags: flags as u16,
            };
            self.states.insert(place(number), entry);
        }
        for edge in &automaton.edges {
            let key = (place(edge.state), keys.level(edge.level.as_bytes()));
            if self.edges.insert(key, place(edge.next)).is_some() {
                let (service, level) = (svc.name.clone(), edge.level.clone());
                return Err(ImageError::Collision { service, level });
            }
        }
        *next_state += automaton.states.len() as u32 - 1;
        Ok((place(automaton.start), place(automaton.start_dollar)))
    }

    /// For [`crate::kernel::maps::Table::put_all`].
    pub fn state_entries(&self) -> Vec<(u32, route_state)> {
        self.states.iter().map(|(number, state)| (*number, *state)).collect()
    }

    /// For [`crate::kernel::maps::Table::put_all`].
    pub fn edge_entries(&self) -> Vec<(route_edge, u32)> {
        let entry = |((state, level), next): (&(u32, u64), &u32)| {
            (route_edge { level: *level, state: *state, pad: 0 }, *next)
        };
        self.edges.iter().map(entry).collect()
    }

    /// The group of a topic, or `ANY_GROUP`, as the datapath finds it.
    pub fn route(&self, service: &service, topic: &[u8]) -> u16 {
        let keys = keys_of(&self.table);
        let next = |state, level: &[u8]| {
            let edge = self.edges.get(&(state, keys.level(level))).copied();
            edge.unwrap_or_else(|| self.states.get(&state).map_or(DEAD, |s| s.other))
        };
        let state = walk(service.start, service.start_dollar, topic, next);
        match self.states.get(&state) {
            Some(s) if s.group != special_group::NO_GROUP.0 as u16 => s.group,
            _ => service.default_group,
        }
    }
}

/// As the datapath looks it up (`bpf/abi/config.h`): server names backwards, since it finds the longest prefix.
fn text_in_map(route: &ClientRoute) -> Vec<u8> {
    match route.kind {
        ClientRouteKind::Sni => route.text.bytes().rev().collect(),
        _ => route.text.clone().into_bytes(),
    }
}

/// Bytes of the largest IP packet of a service's clients.
pub fn max_packet(config: &Config, svc: &Service, mtu: u32) -> Result<u16> {
    let room = mtu.saturating_sub(u32::from(config.encapsulation.bytes(svc.has_v6_real())));
    if let Some(limit) = svc.max_packet {
        if u32::from(limit) > mtu {
            let (service, interface) = (svc.name.clone(), config.interface.clone());
            return Err(ImageError::MaxPacket { service, limit, interface, mtu, room });
        }
        return Ok(limit);
    }
    Ok(room.min(u32::from(u16::MAX)) as u16)
}

/// Bytes of the longest literal level; hashing more of a topic's level is of no use.
fn longest_level(svc: &Service) -> u16 {
    let literals = svc.all_routes().flat_map(|r| r.filter.levels()).map(|level| match level {
        Level::Literal(text) => text.len(),
        Level::One | Level::Rest => 0,
    });
    // A topic filter is no longer than that.
    literals.max().unwrap_or(0) as u16
}
