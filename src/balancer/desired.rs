//! The VIPs that a configuration wants the balancer to hold.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::flags::{BY_ADDRESS_FLAG, GROUP_FLAG};
use crate::config::{Config, Group};
use crate::domain::{Affinity, Vip};

/// A VIP as the configuration wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredVip {
    /// Reals with their weights.
    pub reals: BTreeMap<IpAddr, u32>,
    /// The service whose address the balancer puts back.
    pub service: Vip,
    /// Of [`super::flags::OUR_FLAGS`].
    pub flags: u32,
}

/// The reals of a group that get new connections.
fn shares(group: &Group) -> BTreeMap<IpAddr, u32> {
    group.reals.iter().filter(|r| r.weight > 0).map(|r| (r.addr, r.weight)).collect()
}

/// The VIPs that the configuration's groups need, with their reals and their service.
pub fn desired_vips(config: &Config) -> BTreeMap<Vip, DesiredVip> {
    let mut desired = BTreeMap::new();
    for service in &config.services {
        let relay = service.relay.as_ref().and_then(|name| service.group(name));
        for listener in service.listeners.iter().filter(|l| l.port != service.port) {
            // mqtt_fwd does not look into these: the balancer spreads clients over the relays.
            let vip = Vip::tcp(service.addr, listener.port);
            let reals = relay.map(shares).unwrap_or_default();
            desired.insert(vip, DesiredVip { reals, service: vip, flags: GROUP_FLAG });
        }
        for group in &service.groups {
            let reals = shares(group);
            let flags = match group.affinity {
                Affinity::ClientIp => GROUP_FLAG | BY_ADDRESS_FLAG,
                Affinity::None | Affinity::ClientId | Affinity::Topic => GROUP_FLAG,
            };
            let service_vip = Vip::tcp(service.addr, service.port);
            for real in &group.reals {
                if let Some(vip) = real.vip {
                    let reals = BTreeMap::from([(real.addr, 1)]);
                    let alone = DesiredVip { reals, service: service_vip, flags: GROUP_FLAG };
                    desired.insert(Vip::tcp(vip, service.port), alone);
                }
            }
            desired.insert(
                Vip::tcp(group.vip, service.port),
                DesiredVip { reals, service: service_vip, flags },
            );
        }
    }
    desired
}
