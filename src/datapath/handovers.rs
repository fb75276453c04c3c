//! Connections on their way to a broker (delayed binding), and the keys of their cookies.

use std::net::SocketAddr;
use std::ops::RangeInclusive;

use super::Datapath;
use super::clients::GroupNumbers;
use super::flows::flows_from;
use super::names::{Names, address_of, boot_time, services_of};
use crate::domain::{ClientRoute, ClientRouteKind, CookieKeys};
use crate::kernel::Result;
use crate::kernel::abi::{
    Pod as _, addr_words, bound_by, flow6, handover, handover_keys, handover_state, set_decided,
    words_addr,
};
use crate::kernel::maps::Table;
use crate::kernel::pins::Pins;

/// A connection whose CONNECT was answered, and whose client has said nothing since.
#[derive(Debug)]
pub struct Silent {
    pub client: SocketAddr,
    pub service: SocketAddr,
    /// Sequence number of the client's first byte, and of the server's.
    pub start: u32,
    pub server: u32,
    /// The last timestamps of the client and of the balancer (RFC 7323 §3), if they use them.
    pub timestamps: Option<(u32, u32)>,
    pub connect: Vec<u8>,
    key: flow6,
}

impl Silent {
    /// The number of its service.
    pub(super) fn service_number(&self) -> u16 {
        self.key.service
    }

    /// One between two addresses, for tests.
    #[cfg(test)]
    pub(crate) fn between(client: SocketAddr, service: SocketAddr) -> Self {
        let connect = Vec::new();
        let key = flow6::zeroed();
        Self { client, service, start: 0, server: 0, timestamps: None, connect, key }
    }
}

/// A connection whose ClientHello the sidecar has, as the datapath knows it.
#[derive(Debug, Clone, Copy)]
pub struct Hello {
    /// Sequence numbers of the client's first byte and the server's.
    pub start: u32,
    pub server: u32,
    /// Bytes that are acknowledged.
    pub acknowledged: u32,
    /// It has its group; its broker may not have what is acknowledged.
    pub is_bound: bool,
    key: flow6,
}

/// A connection that its broker does not take over.
#[derive(Debug)]
pub struct Stuck {
    pub client: SocketAddr,
    /// Name of its service and of its group.
    pub service: String,
    pub group: String,
}

/// The keys that the balancer makes cookies with; `None`: it has none.
pub fn cookie_keys(pins: &Pins) -> Result<Option<CookieKeys>> {
    let keys: Table<u32, handover_keys> = Table::open(&pins.map("handover_keys"))?;
    let keys = keys.get(&0)?.unwrap_or_default();
    let has_some = keys.key.iter().flatten().any(|word| *word != 0);
    Ok(has_some.then_some(CookieKeys { key: keys.key, epoch: keys.epoch }))
}

impl Datapath {
    /// Connections of that age in seconds that were given to a broker again and again, TCP's way.
    pub fn stuck_handovers(&self, names: &Names, age: RangeInclusive<u64>) -> Result<Vec<Stuck>> {
        /// The first, and those repeated after 0.2, 0.4 and 0.8 s.
        const TRIES: u8 = 4;
        let now = boot_time().as_secs();
        let bound = [
            handover_state::HANDOVER_REPEAT,
            handover_state::HANDOVER_PASS,
            handover_state::HANDOVER_PREPEND,
            handover_state::HANDOVER_HELLO_REPEAT,
        ];
        let mut entries = self.handovers.entries()?;
        entries.retain(|(_, h)| {
            bound.iter().any(|state| state.0 == u32::from(h.state))
                && h.tries >= TRIES
                && age.contains(&now.saturating_sub(u64::from(h.born_s)))
        });
        let mut all = Vec::new();
        let table = self.service_table()?;
        for (key, _) in entries {
            let Some(service) = services_of(&table).iter().find(|s| s.id == key.service) else {
                continue;
            };
            let addr = words_addr(key.addr, service.v6 != 0);
            let client = SocketAddr::new(addr, u16::from_be(key.port));
            for flow in flows_from(self, names, client)? {
                all.push(Stuck { client, service: flow.service, group: flow.group });
            }
        }
        Ok(all)
    }

    /// Connections that have been silent for at least `silent_s` seconds.
    pub fn silent_handovers(&self, silent_s: u64) -> Result<Vec<Silent>> {
        let now = boot_time().as_secs();
        let is_silent = |h: &handover| {
            u32::from(h.state) <= handover_state::HANDOVER_SILENT.0
                && now.saturating_sub(u64::from(h.born_s)) >= silent_s
        };
        let mut entries = self.handovers.entries()?;
        entries.retain(|(_, h)| is_silent(h));
        let table = self.service_table()?;
        let silent = |(key, h): (flow6, handover)| {
            let service = services_of(&table).iter().find(|s| s.id == key.service)?;
            let addr = words_addr(key.addr, service.v6 != 0);
            let length = usize::from(h.connect_length).min(h.connect.len());
            Some(Silent {
                client: SocketAddr::new(addr, u16::from_be(key.port)),
                service: address_of(service),
                start: h.start,
                server: h.server,
                timestamps: (h.timestamps != 0).then_some((h.client_tsval, h.tsval)),
                connect: h.connect[..length].to_vec(),
                key,
            })
        };
        Ok(entries.into_iter().filter_map(silent).collect())
    }

    /// Marks one, so that its CONNECT, sent again, binds it; false: it is bound meanwhile, or another connection has
    /// taken its place and has just begun. Neither must be undone.
    pub fn mark_silent(&self, silent: &Silent) -> Result<bool> {
        let Some(mut h) = self.handovers.get(&silent.key)? else { return Ok(false) };
        if (h.start, h.server) != (silent.start, silent.server)
            || u32::from(h.state) > handover_state::HANDOVER_SILENT.0
        {
            return Ok(false);
        }
        h.state = handover_state::HANDOVER_SILENT.0 as u8;
        self.handovers.put(&silent.key, &h)?;
        Ok(true)
    }

    /// A connection whose ClientHello the sidecar has, or the beginning of it.
    pub fn hello(&self, client: SocketAddr, service: u16) -> Result<Option<Hello>> {
        let key = flow6 { addr: addr_words(client.ip()), port: client.port().to_be(), service };
        Ok(self.handovers.get(&key)?.and_then(|h| {
            let is_bound = match handover_state(h.state.into()) {
                handover_state::HANDOVER_HELLO => false,
                handover_state::HANDOVER_HELLO_REPEAT => true,
                _ => return None,
            };
            let acknowledged = u32::from(h.connect_length);
            Some(Hello { start: h.start, server: h.server, acknowledged, is_bound, key })
        }))
    }

    /// Has it acknowledged up to there; false: it is not what it was.
    pub fn acknowledge_hello(&self, hello: &Hello, length: u16) -> Result<bool> {
        self.change_hello(hello, |h| h.connect_length = length)
    }

    /// Says where it belongs: to a group, by its server name or a protocol (ALPN), or where all belong that name nobody;
    /// false: it is not what it was.
    pub fn decide_hello(
        &self,
        hello: &Hello,
        route: Option<&ClientRoute>,
        numbers: &mut GroupNumbers,
    ) -> Result<bool> {
        let (mut binding, mut by) = (0, bound_by::BOUND_BY_SERVER_NAME);
        if let Some(route) = route {
            binding =
                self.binding_of(numbers, hello.key.service, &route.group)?.unwrap_or_default();
            if route.kind == ClientRouteKind::Alpn {
                by = bound_by::BOUND_BY_ALPN;
            }
        }
        self.change_hello(hello, |h| set_decided(h, binding, by))
    }

    fn change_hello(&self, hello: &Hello, change: impl FnOnce(&mut handover)) -> Result<bool> {
        let Some(mut h) = self.handovers.get(&hello.key)? else { return Ok(false) };
        let state = handover_state(h.state.into());
        if (h.start, h.server) != (hello.start, hello.server)
            || state != handover_state::HANDOVER_HELLO
        {
            return Ok(false);
        }
        change(&mut h);
        self.handovers.put(&hello.key, &h)?;
        Ok(true)
    }

    /// Whether SYNs can be answered.
    pub fn has_cookie_keys(&self) -> Result<bool> {
        let keys = self.handover_keys.get(&0)?.unwrap_or_default();
        Ok(keys.key.iter().flatten().any(|word| *word != 0))
    }

    /// Brings cookie keys into the datapath; whether they differ from those there.
    pub fn put_cookie_keys(&self, keys: &CookieKeys) -> Result<bool> {
        let wanted = handover_keys::from(keys);
        let before = self.handover_keys.get(&0)?.unwrap_or_default();
        if before.bytes() == wanted.bytes() {
            return Ok(false);
        }
        self.handover_keys.put(&0, &wanted)?;
        Ok(true)
    }
}
