//! How large maps are, and how much of a thing the datapath does in a second.

use super::abi::{balancer_limits, limits};

/// Capacities of maps, fixed at load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapSizes {
    /// Clients with a prediction, of each IP version.
    pub clients: u32,
    /// Flows, of each IP version.
    pub flows: u32,
    /// Flows that are closing, or were first seen in their middle, of each IP version.
    pub weak_flows: u32,
    /// Clients that are known by their client id.
    pub client_ids: u32,
    /// Connections on their way to a broker (delayed binding).
    pub handovers: u32,
    /// Topics whose text is kept.
    pub topics: u32,
    /// States of the compiled routes.
    pub route_states: u32,
    /// Groups of all services.
    pub groups: u32,
    /// VIPs of the embedded balancer.
    pub vips: u32,
}

impl Default for MapSizes {
    fn default() -> Self {
        Self {
            // A power of two: the kernel makes as many hash buckets, so nothing is wasted.
            clients: 1 << 20,
            flows: 1 << 20,
            weak_flows: 65_536,
            client_ids: 1 << 18,
            handovers: 65_536,
            topics: 65_536,
            route_states: 500_000,
            groups: 1024,
            vips: 64,
        }
    }
}

impl MapSizes {
    /// The same, where no service binds late.
    #[must_use]
    pub fn without_delayed(self) -> Self {
        Self { client_ids: 1024, handovers: 1024, ..self }
    }

    /// Sets of the cache of bindings: a slot a flow, and as many sets as its keys need
    /// (`forward/cache.h`).
    pub fn cache_sets(&self) -> u32 {
        (self.flows.next_power_of_two() / limits::CACHE_WAYS.0).max(1 << 16)
    }

    /// How many entries a map of `mqtt_fwd` has; `None`: as many as `bpf/` says.
    pub fn of_mqtt_fwd(&self, name: &str) -> Option<u32> {
        Some(match name {
            "mqtt_client_ip_to_topic" | "mqtt_client6_to_topic" => self.clients,
            "flows" | "flows6" => self.flows,
            "binding_cache" => self.cache_sets(),
            "flows_weak" | "flows6_weak" => self.weak_flows,
            "client_ids" => self.client_ids,
            "handovers" => self.handovers,
            "topics" => self.topics,
            // Two generations at a time.
            "mqtt_topic_to_vip" | "route_states" => 2 * self.route_states,
            "groups" => self.groups,
            _ => return None,
        })
    }

    /// The same for the embedded balancer.
    pub fn of_balancer(&self, name: &str) -> Option<u32> {
        Some(match name {
            "vip_map" | "vip_stats" => self.vips,
            "ch_rings" => self.vips * balancer_limits::RING_SIZE.0,
            "connections" | "connections6" => self.flows,
            _ => return None,
        })
    }
}

/// Rates, a second and all CPUs together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// Events of each kind that are reported.
    pub events: u32,
    /// New flows that are stored.
    pub new_flows: u32,
    /// New topics whose text and verdict are stored.
    pub new_topics: u32,
}

impl Default for Rates {
    fn default() -> Self {
        Self { events: 2000, new_flows: 100_000, new_topics: 5000 }
    }
}

impl Rates {
    /// Of a rate, what each CPU may do in a window of 0.1 s.
    pub fn per_window(rate: u32) -> u32 {
        let cpus = libbpf_rs::num_possible_cpus().map_or(1, |n| n.max(1)) as u32;
        rate.div_ceil(10 * cpus)
    }
}
