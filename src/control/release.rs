//! Letting connections of a real go, so that their clients connect again and come to another: those of one that is
//! dead, and those that are left when a drain must end.
//!
//! A flow is marked in the datapath's own terms, and ended by the segment that its client sends next: only then are
//! the numbers known that end a TCP connection for sure.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use super::checks::Reals;
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

/// What tells whose a flow is.
struct Lookup<'a> {
    config: &'a Config,
    balancer: Option<Balancer>,
    groups: BTreeMap<u16, group>,
}

impl<'a> Lookup<'a> {
    fn open(config: &'a Config, datapath: &Datapath) -> Result<Self> {
        let groups = datapath.groups()?.into_iter().collect();
        Ok(Self { config, balancer: Balancer::open(config), groups })
    }

    /// Whether a live flow is a real's, of a service or of any.
    fn is_of_real(
        &self,
        client: SocketAddr,
        f: &flow,
        service: Option<&str>,
        real: IpAddr,
    ) -> bool {
        let (id, epoch) = binding_parts(flow_binding(f));
        let bound = self.groups.get(&id).filter(|g| g.epoch == epoch && !is_over(f));
        let (Some(bound), Some(balancer)) = (bound, &self.balancer) else { return false };
        let vip = words_addr(bound.vip, client.is_ipv6());
        let Some((of, _)) = group_of(self.config, vip, real) else { return false };
        service.is_none_or(|wanted| wanted == of.name)
            && balancer.real_of(client, SocketAddr::new(vip, of.port)) == Some(real)
    }

    fn is_of(&self, datapath: &Datapath, key: Key, service: Option<&str>, real: IpAddr) -> bool {
        let found = match key {
            Key::V4(key) => datapath.flows.get(&key),
            Key::V6(key) => datapath.flows6.get(&key),
        };
        let found = found.ok().flatten();
        found.is_some_and(|f| self.is_of_real(key.client(), &f, service, real))
    }
}

impl Key {
    fn client(self) -> SocketAddr {
        match self {
            Self::V4(key) => SocketAddr::new(key.addr.to_ne_bytes().into(), u16::from_be(key.port)),
            Self::V6(key) => SocketAddr::new(words_addr(key.addr, true), u16::from_be(key.port)),
        }
    }
}

/// The live flows of a real, of a service or of all.
pub fn flows_of(
    config: &Config,
    datapath: &Datapath,
    service: Option<&str>,
    real: IpAddr,
) -> Result<Vec<Key>> {
    let lookup = Lookup::open(config, datapath)?;
    let v4 = datapath.flows.entries()?.into_iter().map(|(key, f)| (Key::V4(key), f));
    let v6 = datapath.flows6.entries()?.into_iter().map(|(key, f)| (Key::V6(key), f));
    Ok(v4
        .chain(v6)
        .filter(|(key, f)| lookup.is_of_real(key.client(), f, service, real))
        .map(|(key, _)| key)
        .collect())
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
    u32::from(f.flags) & (flow_flags::FLOW_CLOSING.0 | flow_flags::FLOW_ENDED.0) != 0
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
/// Connections that were opened while the balancer did not know yet: until then.
const SETTLED: Duration = Duration::from_secs(3);

/// Ends a drained real's connections, so many a second, as long as it is drained: not all clients are to connect again
/// at once. `listed`: those that were its when it was drained.
pub async fn end_slowly(
    config: Arc<Config>,
    reals: Arc<Reals>,
    real: IpAddr,
    listed: Vec<Key>,
    per_second: u32,
) {
    let (mut listed, mut ended) = (listed, 0);
    loop {
        match end_listed(&config, &reals, real, &listed, per_second).await {
            Ok(n) => ended += n,
            Err(error) => {
                warn!(%real, %error, "the drain's connections stay");
                return;
            }
        }
        tokio::time::sleep(SETTLED).await;
        if !reals.is_drained(real) {
            info!(%real, connections = ended, "undrained: its connections are ended no longer");
            return;
        }
        let config = Arc::clone(&config);
        let list = move || flows_of(&config, &Datapath::open(&config.pins())?, None, real);
        match tokio::task::spawn_blocking(list).await {
            Ok(Ok(more)) if !more.is_empty() => listed = more,
            _ => break,
        }
    }
    info!(%real, connections = ended, "drained: its connections end as their clients send");
}

async fn end_listed(
    config: &Arc<Config>,
    reals: &Reals,
    real: IpAddr,
    listed: &[Key],
    per_second: u32,
) -> Result<usize> {
    let mut clock = tokio::time::interval(TICK);
    let (mut allowed, mut ended) = (0.0, 0);
    let mut left = listed;
    while !left.is_empty() && reals.is_drained(real) {
        clock.tick().await;
        allowed += f64::from(per_second) * TICK.as_secs_f64();
        let (now, later) = left.split_at((allowed as usize).min(left.len()));
        allowed -= now.len() as f64;
        left = later;
        if now.is_empty() {
            continue;
        }
        let datapath = Datapath::open(&config.pins())?;
        // A client may have opened another connection from the same port since, which is at another real.
        let still = Lookup::open(config, &datapath)?;
        let now: Vec<Key> =
            now.iter().copied().filter(|key| still.is_of(&datapath, *key, None, real)).collect();
        ended += end(&datapath, &now, How::Disconnect)?;
    }
    Ok(ended)
}

/// A packet that comes at the same moment may be framed by what was there before; the flow is ended by the next one
/// then.
fn mark<K: Pod>(flows: &Table<K, flow>, key: &K, how: How) -> Result<bool> {
    let Some(mut f) = flows.get(key)?.filter(|f| !is_over(f)) else { return Ok(false) };
    // DISCONNECT means nothing in what is not MQTT.
    let is_opaque = u32::from(f.flags) & flow_flags::FLOW_OPAQUE.0 != 0;
    let how = if is_opaque { How::Reset } else { how };
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
