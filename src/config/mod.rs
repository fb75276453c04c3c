//! The configuration: one TOML file, read and checked as a whole before anything is touched.

mod error;
mod read;
mod reader;

use std::net::IpAddr;
use std::path::{Path, PathBuf};

pub use error::{ConfigError, Problem};
pub use read::{address, endpoint, mac, parse_mac};

use crate::bpf::pins::Pins;
use crate::routes::filter::TopicFilter;

/// How XDP programs run on the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XdpMode {
    /// In the driver.
    Native,
    /// In the stack: any interface, slower.
    Generic,
}

/// Which balancer stands behind `mqtt_fwd`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BalancerKind {
    /// The one in this binary.
    Embedded,
    /// A Katran server.
    Katran,
}

/// What a balancer puts around packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encapsulation {
    /// An IP header.
    Ipip,
    /// An IP and a UDP header (GUE variant 1).
    Gue,
}

impl Encapsulation {
    /// Bytes that it adds towards a real.
    pub fn bytes(self, real_v6: bool) -> u16 {
        let ip = if real_v6 { 40 } else { 20 };
        match self {
            Self::Ipip => ip,
            Self::Gue => ip + 8,
        }
    }
}

/// What happens to a flow whose PUBLISH belongs to another group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnMisprediction {
    /// It is reset, so that the client reconnects to the right group.
    Reset,
    /// It stays where it is.
    Keep,
}

/// Capacities of maps, fixed at load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapSizes {
    /// Clients with a prediction, of each IP version.
    pub clients: u32,
    /// Flows, of each IP version.
    pub flows: u32,
    /// Flows after FIN or RST, of each IP version.
    pub closing_flows: u32,
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
            closing_flows: 65_536,
            topics: 65_536,
            route_states: 500_000,
            groups: 1024,
            vips: 64,
        }
    }
}

/// A validated configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where it was read from.
    pub path: PathBuf,
    /// The interface that clients' packets come in on.
    pub interface: String,
    /// Native or generic XDP.
    pub xdp_mode: XdpMode,
    /// Mount point of bpffs.
    pub bpffs: PathBuf,
    /// Path of the chain's program array, if not Katran's convention.
    pub root_array: Option<PathBuf>,
    /// Which balancer.
    pub balancer: BalancerKind,
    /// Where its gRPC service listens: `host:port` or `unix:/path`.
    pub balancer_endpoint: String,
    /// What it puts around packets.
    pub encapsulation: Encapsulation,
    /// MAC address of the gateway towards the reals (embedded balancer).
    pub gateway_mac: Option<[u8; 6]>,
    /// Seconds between two looks at the balancer.
    pub watch_interval_s: u64,
    /// Most events a second that the datapath reports.
    pub events_per_second: u32,
    /// Map capacities.
    pub maps: MapSizes,
    /// The services, at least one.
    pub services: Vec<Service>,
}

/// An address that clients use.
#[derive(Debug, Clone)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Address of MQTT_VIP.
    pub addr: IpAddr,
    /// TCP port.
    pub port: u16,
    /// Name of the group for all topics without a route.
    pub default_group: String,
    /// Largest IP packet that may be encapsulated; `None`: the interface's MTU less the header.
    pub max_packet: Option<u16>,
    /// What to do about mispredictions.
    pub on_misprediction: OnMisprediction,
    /// Its groups.
    pub groups: Vec<Group>,
    /// Its routes.
    pub routes: Vec<Route>,
}

/// Brokers for some topics.
#[derive(Debug, Clone)]
pub struct Group {
    /// Its name, unique in the service.
    pub name: String,
    /// The group VIP: an address that only the balancer knows.
    pub vip: IpAddr,
    /// The brokers' addresses, at least one.
    pub reals: Vec<Real>,
}

/// A broker host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Real {
    /// Its address.
    pub addr: IpAddr,
    /// Its share of new flows, in relation to the others'.
    pub weight: u32,
}

/// Topic filter → group.
#[derive(Debug, Clone)]
pub struct Route {
    /// What topics.
    pub filter: TopicFilter,
    /// Name of the group.
    pub group: String,
}

impl Config {
    /// Reads and checks a file. Every problem of it is reported, not only the first.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let bytes = std::fs::read(path)
            .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
        let text = String::from_utf8(bytes).map_err(|e| ConfigError::NotText {
            path: path.to_owned(),
            line: e.as_bytes()[..e.utf8_error().valid_up_to()].split(|b| *b == b'\n').count(),
        })?;
        Self::parse(path, &text)
    }

    /// Checks the text of a file named `path`.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let table: toml::Table = text.parse().map_err(|source: toml::de::Error| {
            ConfigError::Syntax { path: path.to_owned(), source: Box::new(source) }
        })?;
        read::config(path, &table)
    }

    /// Where this interface's things are pinned.
    pub fn pins(&self) -> Pins {
        Pins::new(&self.bpffs, &self.interface, self.root_array.as_deref())
    }
}

impl Service {
    /// The group of a name; the configuration is valid, so routes and default always have one.
    pub fn group(&self, name: &str) -> Option<&Group> {
        self.groups.iter().find(|g| g.name == name)
    }

    /// Has it an IPv6 real? Towards those, more is put around packets.
    pub fn has_v6_real(&self) -> bool {
        self.groups.iter().flat_map(|g| &g.reals).any(|r| r.addr.is_ipv6())
    }
}
