//! The gateway towards the reals, as this host's routes and its neighbour table have it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::Duration;

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute};
use rtnetlink::{Handle, RouteMessageBuilder};

use crate::config::{BalancerKind, Config};
use crate::domain::vip::{Mac, mac_text};

/// Why no gateway was found.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    #[error("asking the kernel for the gateway: {0}")]
    Netlink(std::io::Error),
    #[error("no gateway towards the reals was found: there is no route to real {0}; {REMEDY}")]
    NoRoute(IpAddr),
    #[error(
        "no gateway towards the reals was found: {0} does not answer ARP or neighbour discovery; {REMEDY}"
    )]
    NoAnswer(IpAddr),
    #[error(
        "no gateway towards the reals was found: they are behind several: {} ({}) and {} ({}); {REMEDY}",
        .one.0, mac_text(.one.1), .other.0, mac_text(.other.1)
    )]
    Several { one: (IpAddr, Mac), other: (IpAddr, Mac) },
    #[error("no gateway towards the reals was found: there are no reals; {REMEDY}")]
    NoReals,
}

const REMEDY: &str = "`gateway_mac` in the configuration names it";

type Result<T, E = GatewayError> = std::result::Result<T, E>;

/// The MAC address that the embedded balancer must send to; `None`: this is not its balancer.
pub async fn desired(config: &Config) -> Result<Option<Mac>> {
    match (config.balancer, config.gateway_mac) {
        (BalancerKind::Katran, mac) => Ok(mac),
        (BalancerKind::Embedded, Some(mac)) => Ok(Some(mac)),
        (BalancerKind::Embedded, None) => learn(config).await.map(Some),
    }
}

/// The MAC address by this host's neighbour table, whatever is configured.
pub async fn learned(config: &Config) -> Option<Mac> {
    learn(config).await.ok()
}

/// [`desired`], with errors logged instead of returned.
pub async fn desired_or_warn(config: &Config) -> Option<Mac> {
    desired(config).await.unwrap_or_else(|error| {
        tracing::warn!("{error}");
        None
    })
}

/// All reals have to be behind one neighbour: the balancer has one MAC address to send to.
async fn learn(config: &Config) -> Result<Mac> {
    let other = |e: rtnetlink::Error| GatewayError::Netlink(std::io::Error::other(e));
    let (connection, handle, _) = rtnetlink::new_connection().map_err(GatewayError::Netlink)?;
    // It ends with the handle.
    tokio::spawn(connection);
    let mut found: Option<(IpAddr, Mac)> = None;
    let reals = config.services.iter().flat_map(|s| &s.groups).flat_map(|g| &g.reals);
    let mut hops: Vec<(IpAddr, u32)> = Vec::new();
    for real in reals {
        let (hop, interface) =
            next_hop(&handle, real.addr).await.map_err(|_| GatewayError::NoRoute(real.addr))?;
        if !hops.contains(&(hop, interface)) {
            hops.push((hop, interface));
        }
    }
    for (hop, interface) in hops {
        let Some(mac) = resolve(&handle, hop, interface).await.map_err(other)? else {
            return Err(GatewayError::NoAnswer(hop));
        };
        match found {
            Some(one) if one.1 != mac => {
                return Err(GatewayError::Several { one, other: (hop, mac) });
            }
            _ => found = Some((hop, mac)),
        }
    }
    found.map(|(_, mac)| mac).ok_or(GatewayError::NoReals)
}

/// The neighbour that packets to an address are sent to, and over which interface.
async fn next_hop(handle: &Handle, addr: IpAddr) -> Result<(IpAddr, u32), rtnetlink::Error> {
    let query = match addr {
        IpAddr::V4(a) => RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(a, 32).build(),
        IpAddr::V6(a) => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(a, 128).build(),
    };
    // To its end: the library warns of answers that nobody takes.
    let routes: Vec<_> = handle.route().get(query).execute().try_collect().await?;
    let route = routes.into_iter().next();
    let mut hop = addr;
    let mut interface = 0;
    for attribute in route.into_iter().flat_map(|route| route.attributes) {
        match attribute {
            RouteAttribute::Gateway(RouteAddress::Inet(a)) => hop = a.into(),
            RouteAttribute::Gateway(RouteAddress::Inet6(a)) => hop = a.into(),
            RouteAttribute::Oif(index) => interface = index,
            _ => {}
        }
    }
    Ok((hop, interface))
}

/// A neighbour's MAC address, asked for if the kernel has none or did not confirm it lately.
async fn resolve(
    handle: &Handle,
    hop: IpAddr,
    interface: u32,
) -> Result<Option<Mac>, rtnetlink::Error> {
    for attempt in 0..10 {
        match neighbour(handle, hop, interface).await? {
            Some((mac, confirmed)) => {
                if !confirmed {
                    ask(hop);
                }
                return Ok(Some(mac));
            }
            None if attempt == 0 => ask(hop),
            None => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    Ok(None)
}

/// The kernel resolves what it has to send to: an empty datagram to the discard port (RFC 863).
fn ask(hop: IpAddr) {
    let any: IpAddr = match hop {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let _ = UdpSocket::bind((any, 0)).and_then(|socket| socket.send_to(&[], (hop, 9)));
}

/// Its MAC address, and whether that was confirmed lately.
async fn neighbour(
    handle: &Handle,
    addr: IpAddr,
    interface: u32,
) -> Result<Option<(Mac, bool)>, rtnetlink::Error> {
    let family = if addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let all = handle.neighbours().get().set_address_family(family).execute();
    let all: Vec<_> = all.try_collect().await?;
    for entry in all {
        let usable = !matches!(
            entry.header.state,
            NeighbourState::Incomplete | NeighbourState::Failed | NeighbourState::None
        );
        let is = entry.attributes.iter().any(|a| match a {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => addr == IpAddr::V4(*a),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => addr == IpAddr::V6(*a),
            _ => false,
        });
        if usable && is && entry.header.ifindex == interface {
            let mac = entry.attributes.iter().find_map(|a| match a {
                NeighbourAttribute::LinkLayerAddress(bytes) => bytes.as_slice().try_into().ok(),
                _ => None,
            });
            let confirmed = entry.header.state != NeighbourState::Stale;
            return Ok(mac.map(|mac| (mac, confirmed)));
        }
    }
    Ok(None)
}
