//! Addresses and routes of a broker host, by iproute2's `ip`.

use std::net::IpAddr;
use std::process::Command;

use serde::Deserialize;

use crate::kernel::{BpfError, Result};

/// Runs `ip`; its output, or its own words in the error.
fn ip(args: &[&str]) -> Result<String> {
    let failed = |source| BpfError::Io {
        path: format!("ip {}", args.join(" ")).into(),
        action: "running iproute2",
        source,
    };
    let output = Command::new("ip").args(args).output().map_err(failed)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(failed(std::io::Error::other(words)))
}

fn host_prefix(addr: IpAddr) -> String {
    format!("{addr}/{}", if addr.is_ipv4() { 32 } else { 128 })
}

/// Whether the loopback interface has an address.
pub fn on_loopback(addr: IpAddr) -> Result<bool> {
    Ok(!ip(&["-o", "addr", "show", "dev", "lo", "to", &host_prefix(addr)])?.trim().is_empty())
}

/// Gives the loopback interface an address; whether it had to.
pub fn add_to_loopback(addr: IpAddr) -> Result<bool> {
    if on_loopback(addr)? {
        return Ok(false);
    }
    let prefix = host_prefix(addr);
    let mut args = vec!["addr", "add", prefix.as_str(), "dev", "lo"];
    if addr.is_ipv6() {
        // The balancer has the address, too: duplicate address detection must not find it.
        args.push("nodad");
    }
    ip(&args)?;
    Ok(true)
}

/// The inverse of [`add_to_loopback`].
pub fn remove_from_loopback(addr: IpAddr) -> Result<bool> {
    if !on_loopback(addr)? {
        return Ok(false);
    }
    ip(&["addr", "del", &host_prefix(addr), "dev", "lo"])?;
    Ok(true)
}

/// A route as `ip -json route` prints it, as far as it is needed to write it again.
#[derive(Debug, Deserialize)]
struct Route {
    dst: String,
    gateway: Option<String>,
    protocol: Option<String>,
    scope: Option<String>,
    prefsrc: Option<String>,
    metric: Option<u32>,
    #[serde(default)]
    flags: Vec<String>,
    #[serde(default)]
    metrics: Vec<Metrics>,
}

#[derive(Debug, Deserialize)]
struct Metrics {
    advmss: Option<u32>,
}

/// Sets the MSS that is advertised on all routes of an interface, or takes it away. Link-local
/// and multicast routes carry no clients.
pub fn set_advmss(interface: &str, v6: bool, advmss: Option<u32>) -> Result<Vec<String>> {
    let family = if v6 { "-6" } else { "-4" };
    let json = ip(&[family, "-json", "route", "show", "dev", interface])?;
    let routes: Vec<Route> = serde_json::from_str(json.trim()).map_err(|e| BpfError::Io {
        path: format!("ip {family} -json route show dev {interface}").into(),
        action: "reading its output",
        source: e.into(),
    })?;
    let mut done = Vec::new();
    for route in routes {
        let has = route.metrics.iter().find_map(|m| m.advmss);
        if has == advmss || route.dst.starts_with("fe80") || route.dst.starts_with("ff") {
            continue;
        }
        let (metric, mss) = (route.metric.map(|m| m.to_string()), advmss.map(|m| m.to_string()));
        let mut args = vec![family, "route", "replace", route.dst.as_str()];
        let dev = Some(interface.to_owned());
        let options = [
            ("via", &route.gateway),
            ("dev", &dev),
            ("proto", &route.protocol),
            ("scope", &route.scope),
            ("src", &route.prefsrc),
            ("metric", &metric),
            ("advmss", &mss),
        ];
        for (key, value) in options {
            if let Some(value) = value {
                args.extend([key, value.as_str()]);
            }
        }
        if route.flags.iter().any(|f| f == "onlink") {
            args.push("onlink");
        }
        ip(&args)?;
        done.push(match advmss {
            Some(mss) => format!("route {} advmss {mss}", route.dst),
            None => format!("route {} without advmss", route.dst),
        });
    }
    Ok(done)
}
