//! Letting connections of a real go, so that their clients connect again and come to another: those of one that is
//! dead, and those that are left when a drain must end.
//!
//! A flow is marked in the datapath's own terms, and ended by the segment that its client sends next: only then are
//! the numbers known that end a TCP connection for sure.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use super::reals_of_flows::Balancer;
use super::{Result, view};
use crate::config::{Config, Group, Service};
use crate::datapath::Datapath;
use crate::kernel::abi::{
    Pod, binding_parts, flow, flow_binding, flow_flags, flow4, flow6, group, parser, words_addr,
};
use crate::kernel::maps::Table;

/// How a connection is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// RST to the client: its broker does not answer any more.
    Reset,
    /// DISCONNECT and FIN to the broker in place of what the client sends, as for a misrouted PUBLISH: no will is
    /// published, and the broker closes.
    Disconnect,
}

/// A flow's key.
#[derive(Debug, Clone, Copy)]
pub enum Key {
    V4(flow4),
    V6(flow6),
}

/// The live flows of a real, of a service or of all.
pub fn flows_of(
    config: &Config,
    datapath: &Datapath,
    service: Option<&str>,
    real: IpAddr,
) -> Result<Vec<Key>> {
    let Some(balancer) = Balancer::open(config) else { return Ok(Vec::new()) };
    let groups: Vec<(u16, group)> = datapath.groups()?;
    let is_of_real = |client: SocketAddr, f: &flow| {
        if is_over(f) {
            return false;
        }
        let (id, epoch) = binding_parts(flow_binding(f));
        let bound = groups.iter().find(|(n, g)| *n == id && g.epoch == epoch);
        let Some((_, bound)) = bound else { return false };
        let vip = SocketAddr::new(words_addr(bound.vip, client.is_ipv6()), 0);
        let Some((of, _)) = group_of(config, vip.ip(), real) else { return false };
        service.is_none_or(|wanted| wanted == of.name)
            && balancer.real_of(client, SocketAddr::new(vip.ip(), of.port)) == Some(real)
    };
    let mut found = Vec::new();
    for (key, f) in datapath.flows.entries()? {
        let client = SocketAddr::new(key.addr.to_ne_bytes().into(), u16::from_be(key.port));
        if is_of_real(client, &f) {
            found.push(Key::V4(key));
        }
    }
    for (key, f) in datapath.flows6.entries()? {
        let client = SocketAddr::new(words_addr(key.addr, true), u16::from_be(key.port));
        if is_of_real(client, &f) {
            found.push(Key::V6(key));
        }
    }
    Ok(found)
}

/// The group with this VIP, of its own or of one of its reals, if the real is in it.
fn group_of(config: &Config, vip: IpAddr, real: IpAddr) -> Option<(&Service, &Group)> {
    let all = config.services.iter().flat_map(|s| s.groups.iter().map(move |g| (s, g)));
    all.into_iter().find(|(_, g)| {
        (g.vip == vip && g.reals.iter().any(|r| r.addr == real))
            || g.reals.iter().any(|r| r.addr == real && r.vip == Some(vip))
    })
}

fn is_over(f: &flow) -> bool {
    let over = flow_flags::FLOW_CLOSING.0 | flow_flags::FLOW_ENDED.0 | flow_flags::FLOW_OPAQUE.0;
    u32::from(f.flags) & over != 0
}

/// Marks flows. Returns how many of them are still there.
pub fn end(datapath: &Datapath, flows: &[Key], how: How) -> Result<usize> {
    let mut ended = 0;
    for key in flows {
        ended += usize::from(match key {
            Key::V4(key) => mark(&datapath.flows, key, how)?,
            Key::V6(key) => mark(&datapath.flows6, key, how)?,
        });
    }
    Ok(ended)
}

/// How often [`end_slowly`] does something.
const TICK: Duration = Duration::from_millis(100);

/// Ends connections, so many a second: not all clients are to connect again at once.
pub async fn end_slowly(config: Arc<Config>, flows: Vec<Key>, per_second: u32) {
    let mut clock = tokio::time::interval(TICK);
    let mut allowed = 0.0;
    let mut left = &flows[..];
    while !left.is_empty() {
        clock.tick().await;
        allowed += f64::from(per_second) * TICK.as_secs_f64();
        let (now, later) = left.split_at((allowed as usize).min(left.len()));
        allowed -= now.len() as f64;
        left = later;
        let ended = Datapath::open(&config.pins())
            .map_err(Into::into)
            .and_then(|datapath| end(&datapath, now, How::Disconnect));
        if let Err(error) = ended {
            warn!(%error, left = left.len(), "the drain's connections stay");
            return;
        }
    }
    info!(connections = flows.len(), "all of the drain's connections end as their clients send");
}

/// A packet that comes at the same moment may be framed by what was there before; the flow is ended by the next one
/// then.
fn mark<K: Pod>(flows: &Table<K, flow>, key: &K, how: How) -> Result<bool> {
    let Some(mut f) = flows.get(key)?.filter(|f| !is_over(f)) else { return Ok(false) };
    let mut flags = flow_flags::FLOW_ENDED.0;
    f.cut_seq = f.end;
    match how {
        How::Reset => {
            // A rescue that no sidecar began is answered with RST.
            flags |= flow_flags::FLOW_RESCUED.0;
            f.candidate_start = view::boot_time().as_millis() as u32;
            f.candidate_end = 0;
            f.candidates = 0;
        }
        How::Disconnect => {
            let is_between =
                f.next as u32 == f.end && parser(u32::from(f.parser)) == parser::PARSER_TYPE;
            if !is_between {
                flags |= flow_flags::FLOW_CUT_INSIDE.0;
            }
        }
    }
    f.flags |= flags as u16;
    Ok(flows.replace(key, &f)?)
}
