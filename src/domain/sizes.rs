//! How large maps are, and how much of a thing the datapath does in a second.

/// Capacities of maps, fixed at load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapSizes {
    /// Clients with a prediction, of each IP version.
    pub clients: u32,
    /// Flows.
    pub flows: u32,
    /// Clients that are learned by their client id.
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
    /// Bytes of the ring buffer that a fleet's sidecar reads segments from; a power of two.
    pub fleet_reports: u32,
}

/// Without a fleet, nobody reads it: as small as it can be.
const NO_REPORTS: u32 = 4096;

impl Default for MapSizes {
    fn default() -> Self {
        Self {
            // A power of two: the kernel makes as many hash buckets, so nothing is wasted.
            clients: 1 << 20,
            flows: 1 << 20,
            client_ids: 1 << 18,
            handovers: 65_536,
            topics: 65_536,
            route_states: 500_000,
            groups: 1024,
            vips: 64,
            fleet_reports: NO_REPORTS,
        }
    }
}

impl MapSizes {
    /// The same, where no service uses delayed binding.
    #[must_use]
    pub fn without_delayed(self) -> Self {
        Self { client_ids: 1024, handovers: 1024, ..self }
    }

    /// The same, of a balancer in a fleet.
    #[must_use]
    pub fn with_fleet(self) -> Self {
        Self { fleet_reports: 1 << 22, ..self }
    }
}

/// Rates per second, of all CPUs together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// Events of each kind that are reported.
    pub events: u32,
    /// New flows that are stored.
    pub new_flows: u32,
    /// New topics whose text and verdict are stored.
    pub new_topics: u32,
    /// New connections of one address; 0: as many as it likes.
    pub connections_per_address: u32,
    /// PUBLISHes of one client; 0: as many as it likes.
    pub messages_per_client: u32,
    /// Of a fleet; `None`: there is none.
    pub fleet: Option<FleetRates>,
}

/// What the datapath tells the sidecar of a fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FleetRates {
    /// Connections of other balancers that are asked for, a second.
    pub misses: u32,
    /// Each CONNECT that is answered, for the store.
    pub store: bool,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            events: 2000,
            new_flows: 100_000,
            new_topics: 5000,
            connections_per_address: 0,
            messages_per_client: 0,
            fleet: None,
        }
    }
}
