//! Values that are written as text: names, addresses, endpoints.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;

use super::super::reader::Reader;
use crate::domain::vip::{Mac, parse_mac};
use crate::domain::{Certificate, limits};

const NAME_MAX: usize = limits::NAME;

pub(super) fn name_text(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > NAME_MAX {
        return Err(format!("must be 1 to {NAME_MAX} bytes long"));
    }
    if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err("must not have spaces or control characters".to_owned());
    }
    Ok(text.to_owned())
}

/// An address of a host on a network, in its plain form.
pub fn address(text: &str) -> Result<IpAddr, String> {
    let addr: IpAddr = text
        .parse()
        .map_err(|_| "not an IP address; write it like \"10.1.50.1\" or \"fd00::1\"".to_owned())?;
    let unusable = match addr {
        IpAddr::V4(v4) => v4.is_broadcast() || v4.octets()[0] == 0 || v4.octets()[0] >= 240,
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if unusable || addr.is_unspecified() || addr.is_multicast() || addr.is_loopback() {
        return Err("not an address that a host can have on a network".to_owned());
    }
    if let IpAddr::V6(v6) = addr
        && v6.to_ipv4_mapped().is_some()
    {
        return Err("write a mapped IPv4 address as plain IPv4".to_owned());
    }
    Ok(addr)
}

/// A network, or a single address.
pub fn network(text: &str) -> Result<IpNet, String> {
    let single = || text.parse::<IpAddr>().map(IpNet::from);
    text.parse::<IpNet>()
        .or_else(|_| single())
        .map(|network| network.trunc())
        .map_err(|_| "not a network; write it like \"10.1.7.0/24\" or \"fd00:7::/64\"".to_owned())
}

pub(super) fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err("must be an absolute path".to_owned()) }
}

/// Where a gRPC service listens.
pub fn endpoint(text: &str) -> Result<String, String> {
    let problem = || "write it like \"127.0.0.1:50051\" or \"unix:/run/katran.sock\"".to_owned();
    if let Some(path) = text.strip_prefix("unix:") {
        return if path.starts_with('/') { Ok(text.to_owned()) } else { Err(problem()) };
    }
    let (host, port) = text.rsplit_once(':').ok_or_else(problem)?;
    let port: u16 = port.parse().map_err(|_| problem())?;
    // An IPv6 address is in brackets, or it is not clear where it ends.
    let bare_v6 = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
    if host.is_empty() || host.contains('/') || bare_v6 || port == 0 {
        return Err(problem());
    }
    Ok(text.to_owned())
}

/// Whether only this host's processes can connect there.
pub(super) fn is_of_this_host(endpoint: &str) -> bool {
    endpoint.starts_with("unix:")
        || endpoint.starts_with("localhost:")
        || endpoint.parse::<std::net::SocketAddr>().is_ok_and(|addr| addr.ip().is_loopback())
}

/// A MAC address.
pub fn mac(text: &str) -> Result<Mac, String> {
    parse_mac(text)
        .ok_or_else(|| "not a MAC address; write it like \"02:00:5e:10:00:01\"".to_owned())
}

/// A certificate and its key, in the table that names them.
pub(super) fn certificate(r: &Reader<'_>) -> Option<Certificate> {
    let certificate = r.required("certificate", "/etc/mqtt-fwd/relay.crt", absolute);
    let key = r.required("key", "/etc/mqtt-fwd/relay.key", absolute);
    Some(Certificate { certificate: certificate?, key: key? })
}
