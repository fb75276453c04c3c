//! Addresses and routes of a broker host, over rtnetlink(7).

use std::net::IpAddr;

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteMetric};
use rtnetlink::{Handle, RouteMessageBuilder};
use serde::{Deserialize, Serialize};

use crate::kernel::{BpfError, Result, xdp};

/// The loopback interface, always number 1.
const LOOPBACK: u32 = 1;
/// RT_TABLE_MAIN.
const MAIN_TABLE: u8 = 254;

/// Runs a conversation with the kernel to its end.
fn talk<T, F>(what: &'static str, conversation: impl FnOnce(Handle) -> F) -> Result<T>
where
    F: Future<Output = std::result::Result<T, rtnetlink::Error>>,
{
    let io = |source| BpfError::Io { path: "rtnetlink".into(), action: what, source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(io)?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(io)?;
        tokio::spawn(connection);
        conversation(handle).await.map_err(|e| io(std::io::Error::other(e)))
    })
}

async fn loopback_entry(
    handle: &Handle,
    addr: IpAddr,
) -> std::result::Result<Option<AddressMessage>, rtnetlink::Error> {
    let all: Vec<AddressMessage> =
        handle.address().get().set_link_index_filter(LOOPBACK).execute().try_collect().await?;
    let is = |m: &AddressMessage| {
        m.header.index == LOOPBACK
            && m.attributes
                .iter()
                .any(|a| matches!(a, AddressAttribute::Address(there) if *there == addr))
    };
    Ok(all.into_iter().find(is))
}

/// Whether the loopback interface has an address.
pub fn on_loopback(addr: IpAddr) -> Result<bool> {
    talk(
        "reading addresses",
        |handle| async move { Ok(loopback_entry(&handle, addr).await?.is_some()) },
    )
}

/// Gives the loopback interface an address; whether it had to.
pub fn add_to_loopback(addr: IpAddr) -> Result<bool> {
    talk("adding an address to lo", |handle| async move {
        if loopback_entry(&handle, addr).await?.is_some() {
            return Ok(false);
        }
        let mut add = handle.address().add(LOOPBACK, addr, if addr.is_ipv4() { 32 } else { 128 });
        if addr.is_ipv6() {
            // The balancer has the address, too: duplicate address detection must not find it.
            add.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        add.execute().await?;
        Ok(true)
    })
}

/// The inverse of [`add_to_loopback`].
pub fn remove_from_loopback(addr: IpAddr) -> Result<bool> {
    talk("removing an address from lo", |handle| async move {
        match loopback_entry(&handle, addr).await? {
            Some(entry) => handle.address().del(entry).execute().await.map(|()| true),
            None => Ok(false),
        }
    })
}

/// A route whose MSS was changed, and what it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedRoute {
    /// Destination, for people and to find it again.
    pub destination: String,
    /// Its metric, likewise.
    pub priority: u32,
    /// IPv6.
    pub v6: bool,
    /// The MSS that it advertised before; `None`: none of its own.
    pub before: Option<u32>,
}

fn destination(route: &RouteMessage) -> String {
    let addr = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(addr) => Some(addr),
        _ => None,
    });
    match addr {
        Some(rtnetlink::packet_route::route::RouteAddress::Inet(a)) => {
            format!("{a}/{}", route.header.destination_prefix_length)
        }
        Some(rtnetlink::packet_route::route::RouteAddress::Inet6(a)) => {
            format!("{a}/{}", route.header.destination_prefix_length)
        }
        _ => "default".to_owned(),
    }
}

fn priority(route: &RouteMessage) -> u32 {
    let of = |a: &RouteAttribute| match a {
        RouteAttribute::Priority(n) => Some(*n),
        _ => None,
    };
    route.attributes.iter().find_map(of).unwrap_or_default()
}

fn advmss(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Metrics(metrics) => metrics.iter().find_map(|m| match m {
            RouteMetric::Advmss(mss) => Some(*mss),
            _ => None,
        }),
        _ => None,
    })
}

/// The route with another MSS, and all else as it is.
fn with_advmss(mut route: RouteMessage, mss: Option<u32>) -> RouteMessage {
    let mut metrics = Vec::new();
    route.attributes.retain(|a| match a {
        RouteAttribute::Metrics(all) => {
            metrics.extend(all.iter().filter(|m| !matches!(m, RouteMetric::Advmss(_))).cloned());
            false
        }
        // What the kernel tells, and does not take.
        RouteAttribute::CacheInfo(_) => false,
        _ => true,
    });
    metrics.extend(mss.map(RouteMetric::Advmss));
    if !metrics.is_empty() {
        route.attributes.push(RouteAttribute::Metrics(metrics));
    }
    route
}

/// Routes of the main table over an interface that clients may be reached by: link-local and
/// multicast ones carry none.
async fn routes_over(
    handle: &Handle,
    index: u32,
    v6: bool,
) -> std::result::Result<Vec<RouteMessage>, rtnetlink::Error> {
    let query = if v6 {
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build()
    } else {
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build()
    };
    let all: Vec<RouteMessage> = handle.route().get(query).execute().try_collect().await?;
    let is_ours = |r: &RouteMessage| {
        let text = destination(r);
        r.header.table == MAIN_TABLE
            && r.attributes.iter().any(|a| matches!(a, RouteAttribute::Oif(i) if *i == index))
            && !(v6 && (text.starts_with("fe80") || text.starts_with("ff")))
    };
    Ok(all.into_iter().filter(is_ours).collect())
}

/// Sets the MSS that is advertised on all routes of an interface; what was changed.
pub fn set_advmss(interface: &str, v6: bool, mss: u32) -> Result<Vec<ChangedRoute>> {
    let index = xdp::interface_index(interface)?.cast_unsigned();
    talk("changing routes", |handle| async move {
        let mut changed = Vec::new();
        for route in routes_over(&handle, index, v6).await? {
            let before = advmss(&route);
            if before == Some(mss) {
                continue;
            }
            let (destination, priority) = (destination(&route), priority(&route));
            handle.route().add(with_advmss(route, Some(mss))).replace().execute().await?;
            changed.push(ChangedRoute { destination, priority, v6, before });
        }
        Ok(changed)
    })
}

/// Gives routes back what [`set_advmss`] changed; those that are gone stay gone.
pub fn restore_advmss(interface: &str, changed: &[ChangedRoute]) -> Result<Vec<String>> {
    let index = xdp::interface_index(interface)?.cast_unsigned();
    talk("changing routes", |handle| async move {
        let mut done = Vec::new();
        for was in changed {
            let found = routes_over(&handle, index, was.v6)
                .await?
                .into_iter()
                .find(|r| destination(r) == was.destination && priority(r) == was.priority);
            let Some(route) = found else { continue };
            handle.route().add(with_advmss(route, was.before)).replace().execute().await?;
            done.push(match was.before {
                Some(mss) => format!("route {} advmss {mss}, as before", was.destination),
                None => format!("route {} without advmss, as before", was.destination),
            });
        }
        Ok(done)
    })
}
