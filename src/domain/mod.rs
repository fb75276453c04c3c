//! What the product is about, in plain types: services, groups, reals, routes. No I/O, and nothing
//! of how they are configured or carried out.

mod api;
pub mod client_record;
mod cookie_keys;
pub mod filter;
pub mod fleet;
pub mod health;
pub mod limits;
pub mod problem;
mod real_state;
mod relay;
pub mod rendezvous;
mod sizes;
pub mod vip;
pub mod waiting;

use std::net::IpAddr;
use std::sync::Arc;

pub use api::Api;
pub use cookie_keys::CookieKeys;
use filter::TopicFilter;
pub use problem::Problem;
pub use real_state::{Health, RealState};
pub use relay::{BrokerTls, Certificate, CertificateName, RelayLimits, RelayListener, RelayTls};
pub use sizes::{FleetRates, MapSizes, Rates};
pub use vip::{Mac, Vip};

/// How XDP programs run on an interface.
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
    /// It is ended, so that the client reconnects to the right group.
    Reset,
    /// It stays where it is.
    Keep,
    /// It is ended, and the sidecar publishes what its client sent from there on.
    Rescue,
}

/// When a connection gets its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binding {
    /// At its SYN, by what its client's address published before.
    Predicted,
    /// When CONNECT and what follows it were read; the broker's kernel takes the connection over.
    Delayed,
}

impl Binding {
    /// Whether what a client says first can decide.
    pub fn is_delayed(self) -> bool {
        self == Self::Delayed
    }
}

/// What a service's clients speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// MQTT.
    Mqtt,
    /// TLS, with their brokers: of their connections, only ClientHello can be read.
    Tls,
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
    /// What is spoken there.
    pub protocol: Protocol,
    /// Of TLS: whether who names no server that has a route is refused.
    pub refuses_unknown: bool,
    /// Name of the group for all topics without a route.
    pub default_group: String,
    /// Name of the group of relays, for clients that cannot be bound to one broker.
    pub relay: Option<String>,
    /// Where those listen beside the service's own port.
    pub listeners: Vec<RelayListener>,
    /// How its brokers are checked; `None`: not at all.
    pub health_check: Option<health::HealthCheck>,
    /// Largest IP packet that may be encapsulated; `None`: the interface's MTU less the header.
    pub max_packet: Option<u16>,
    /// When its connections are bound.
    pub binding: Binding,
    /// What to do about mispredictions.
    pub on_misprediction: OnMisprediction,
    /// Its groups.
    pub groups: Vec<Group>,
    /// Its routes by topic: there may be 100,000.
    pub routes: Arc<[Route]>,
    /// Those that `mqtt-fwd test` publishes by: a topic of its own for each group.
    pub test_routes: Vec<Route>,
    /// Its routes by what a client says first, CONNECT or ClientHello, which come before those.
    pub client_routes: Vec<ClientRoute>,
}

/// What topics of tests begin with.
pub const TEST_TOPICS: &str = "mqtt-fwd/test";

impl Service {
    /// Whether the sidecar publishes for clients that were at the wrong group.
    pub fn rescues(&self) -> bool {
        self.on_misprediction == OnMisprediction::Rescue
    }

    /// The group of a client, if a route names it: by client id before user name.
    pub fn group_of_client(&self, client_id: &str, username: &str) -> Option<&ClientRoute> {
        self.client_route(ClientRouteKind::ClientId, client_id)
            .or_else(|| self.client_route(ClientRouteKind::Username, username))
    }

    /// The group of a TLS client, if a route names the server that it asks for, or a protocol that it offers: by server
    /// name before protocol, of which the first that has a route counts.
    pub fn group_of_hello(&self, server_name: &str, protocols: &[&str]) -> Option<&ClientRoute> {
        self.client_route(ClientRouteKind::Sni, server_name).or_else(|| {
            protocols.iter().find_map(|text| self.client_route(ClientRouteKind::Alpn, text))
        })
    }

    /// The longest match.
    fn client_route(&self, kind: ClientRouteKind, text: &str) -> Option<&ClientRoute> {
        let matches = |r: &&ClientRoute| !text.is_empty() && r.kind == kind && r.matches(text);
        self.client_routes.iter().filter(matches).max_by_key(|r| (r.text.len(), !r.is_open))
    }
}

/// What makes a client find the same broker of its group again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Affinity {
    /// Nothing: connections are spread.
    None,
    /// Its address: the balancer's hash leaves the port out.
    ClientIp,
    /// Its client id: the real is chosen here.
    ClientId,
    /// The topic: all who publish it in the group share a broker. The real is chosen here.
    Topic,
}

impl Affinity {
    /// Whether the real is chosen here, so that each has a VIP with itself alone.
    pub fn chooses_real(self) -> bool {
        matches!(self, Self::ClientId | Self::Topic)
    }
}

/// Brokers for some topics.
#[derive(Debug, Clone)]
pub struct Group {
    /// Its name, unique in the service.
    pub name: String,
    /// The group VIP: an address that only the balancer knows.
    pub vip: IpAddr,
    /// How its clients are spread over its brokers.
    pub affinity: Affinity,
    /// Whether its brokers want the client's address from the relay (PROXY protocol).
    pub proxy_protocol: bool,
    /// TLS from relay and sidecar to its brokers; `None`: TCP.
    pub tls: Option<BrokerTls>,
    /// The brokers' addresses, at least one.
    pub reals: Vec<Real>,
}

/// A broker host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Real {
    /// Its address.
    pub addr: IpAddr,
    /// Its share of new flows, in relation to the others'; 0: none.
    pub weight: u32,
    /// The VIP with this real alone, where its group's affinity needs one.
    pub vip: Option<IpAddr>,
}

/// Topic filter → target.
#[derive(Debug, Clone)]
pub struct Route {
    /// What topics.
    pub filter: TopicFilter,
    /// Where they belong.
    pub target: Target,
}

/// A route by what a client says first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientRoute {
    /// By what.
    pub kind: ClientRouteKind,
    /// The text; if it `is_open`, only its beginning, or, of a server name, its end.
    pub text: String,
    /// Whether all that begins so is meant, or ends so.
    pub is_open: bool,
    /// The group's name.
    pub group: String,
}

/// What a [`ClientRoute`] looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ClientRouteKind {
    /// The client id: asked first.
    ClientId,
    /// The user name.
    Username,
    /// TLS: the server name (RFC 6066 §3), in lower case.
    Sni,
    /// TLS: an application protocol (RFC 7301).
    Alpn,
}

impl ClientRouteKind {
    /// As the configuration names it.
    pub fn key(self) -> &'static str {
        match self {
            Self::ClientId => "client_id",
            Self::Username => "username",
            Self::Sni => "sni",
            Self::Alpn => "alpn",
        }
    }

    /// What says it.
    pub fn protocol(self) -> Protocol {
        match self {
            Self::ClientId | Self::Username => Protocol::Mqtt,
            Self::Sni | Self::Alpn => Protocol::Tls,
        }
    }
}

impl ClientRoute {
    /// As it is configured.
    pub fn pattern(&self) -> String {
        match (self.is_open, self.kind) {
            (false, _) => self.text.clone(),
            (true, ClientRouteKind::Sni) => format!("*{}", self.text),
            (true, _) => format!("{}*", self.text),
        }
    }

    /// Whether it names a client.
    pub fn matches(&self, text: &str) -> bool {
        match (self.is_open, self.kind) {
            (true, ClientRouteKind::Sni) => text.to_ascii_lowercase().ends_with(&self.text),
            (false, ClientRouteKind::Sni) => text.eq_ignore_ascii_case(&self.text),
            (true, _) => text.starts_with(&self.text),
            (false, _) => text == self.text,
        }
    }
}

/// Where a route's topics belong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A group, by name.
    Group(String),
    /// Wherever their flow is bound: birth, status and will messages of devices.
    Any,
}

/// How [`Target::Any`] is written. No group can have this name.
pub const ANY: &str = "any";

impl Target {
    /// The group's name, or [`ANY`].
    pub fn name(&self) -> &str {
        match self {
            Self::Group(name) => name,
            Self::Any => ANY,
        }
    }
}

impl Service {
    /// Its routes by topic, those of tests behind the others.
    pub fn all_routes(&self) -> impl Iterator<Item = &Route> {
        self.routes.iter().chain(&self.test_routes)
    }

    /// The most specific route of a topic; `None`: the default group's.
    pub fn route_of(&self, topic: &str) -> Option<&Route> {
        let matching = self.all_routes().filter(|route| route.filter.matches(topic));
        matching.max_by(|a, b| a.filter.specificity(&b.filter))
    }

    /// Where a topic belongs: the name of a group, or [`ANY`].
    pub fn group_name_of(&self, topic: &str) -> &str {
        self.route_of(topic).map_or(&self.default_group, |route| route.target.name())
    }

    /// The group with this VIP, its own or that of one of its reals.
    pub fn group_at(&self, vip: IpAddr) -> Option<&Group> {
        let has = |group: &&Group| {
            group.vip == vip || group.reals.iter().any(|real| real.vip == Some(vip))
        };
        self.groups.iter().find(has)
    }

    /// The group of a name; routes and default of a valid configuration always have one.
    pub fn group(&self, name: &str) -> Option<&Group> {
        self.groups.iter().find(|g| g.name == name)
    }

    /// Whether a real is IPv6: towards those, more is put around packets.
    pub fn has_v6_real(&self) -> bool {
        self.groups.iter().flat_map(|g| &g.reals).any(|r| r.addr.is_ipv6())
    }
}
