//! Types of `bpf/abi/`, as the skeletons' BTF has them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub use super::skeletons::balancer::types::{
    balancer_limits, balancer_stat, gateway, lb_stats, real_definition, vip_meta, vip_real,
};
pub use super::skeletons::decap::types::address;
pub use super::skeletons::mqtt_fwd::types::{
    affinity, binding_mode, client, client_flags, client_id, client_route, client_route_kind,
    client4, client6, event, event_kind, flow, flow_flags, flow4, flow6, group, handover,
    handover_keys, handover_limits, handover_state, limits, map_use, member, member_slot,
    misprediction_policy, parser, reason, rescue, rescue_flags, rescuer, route_edge, route_state,
    route_state_flags, service, service_table, topic, topic_verdict, tracked_map, vip_definition,
    way, why,
};
pub use super::skeletons::takeover::types::takeover_counter;
pub use super::skeletons::wrap::types::check_path;

/// Plain data that goes into and comes out of maps as bytes.
pub trait Pod: bytemuck::Pod {
    /// The value's bytes.
    fn bytes(&self) -> &[u8] {
        bytemuck::bytes_of(self)
    }

    /// The value that `bytes` are, aligned or not. Panics on another length: callers check it with the map.
    fn from_bytes(bytes: &[u8]) -> Self {
        bytemuck::pod_read_unaligned(bytes)
    }

    /// All bytes zero.
    fn zeroed() -> Self {
        bytemuck::Zeroable::zeroed()
    }
}

impl<T: bytemuck::Pod> Pod for T {}

macro_rules! pod {
    ($($type:ty),+ $(,)?) => {$(
        // SAFETY: integers, and arrays of them.
        unsafe impl bytemuck::Zeroable for $type {}
        // SAFETY: repr(C) by its BTF; bpf/abi/ declares all padding as fields, and asserts it by the size.
        unsafe impl bytemuck::Pod for $type {}
    )+};
}

pod! {
    address, check_path, client, client_id, client_route, client4, client6, event, flow, flow4, flow6, gateway, group,
    handover, handover_keys, lb_stats, map_use, member, member_slot, real_definition, rescue, rescuer, route_edge,
    route_state, service, service_table, topic, topic_verdict, vip_definition, vip_meta, vip_real,
}

/// A group's number and epoch as the maps have them; 0: no binding.
pub fn binding_of(group: u16, epoch: u16) -> u32 {
    if epoch == 0 { 0 } else { u32::from(group) | u32::from(epoch) << 16 }
}

/// The inverse of [`binding_of`].
pub fn binding_parts(binding: u32) -> (u16, u16) {
    (binding as u16, (binding >> 16) as u16)
}

/// A flow's binding, if its entry is its own (`bpf/abi/state.h`).
pub fn flow_binding(flow: &flow) -> u32 {
    flow.bound as u32
}

/// An address as the maps have it: network order, IPv4 in the first word.
pub fn addr_words(addr: IpAddr) -> [u32; 4] {
    match addr {
        IpAddr::V4(v4) => [u32::from_ne_bytes(v4.octets()), 0, 0, 0],
        IpAddr::V6(v6) => {
            let o = v6.octets();
            std::array::from_fn(|i| {
                u32::from_ne_bytes([o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]])
            })
        }
    }
}

/// The inverse of [`addr_words`].
pub fn words_addr(words: [u32; 4], v6: bool) -> IpAddr {
    if v6 {
        let mut octets = [0; 16];
        for (part, word) in octets.chunks_exact_mut(4).zip(words) {
            part.copy_from_slice(&word.to_ne_bytes());
        }
        Ipv6Addr::from(octets).into()
    } else {
        Ipv4Addr::from(words[0].to_ne_bytes()).into()
    }
}

/// `vip_definition` of a TCP service or group.
pub fn vip_key(addr: IpAddr, port: u16) -> vip_definition {
    vip_definition {
        addr: addr_words(addr),
        port: port.to_be(),
        proto: libc::IPPROTO_TCP as u8,
        pad: 0,
    }
}

/// The name in a fixed array of C characters.
pub fn name_text(name: &[i8]) -> String {
    let bytes: Vec<u8> = name.iter().take_while(|c| **c != 0).map(|c| c.cast_unsigned()).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The inverse of [`name_text`]; the last byte stays 0.
pub fn name_array<const N: usize>(name: &str) -> [i8; N] {
    let mut array = [0; N];
    for (to, from) in array.iter_mut().zip(name.bytes().take(N - 1)) {
        *to = from.cast_signed();
    }
    array
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_round_trip() {
        for text in ["10.1.50.200", "0.0.0.0", "fd00::1", "2001:db8:1:2:3:4:5:6"] {
            let addr: IpAddr = text.parse().unwrap();
            assert_eq!(words_addr(addr_words(addr), addr.is_ipv6()), addr);
        }
        assert_eq!(addr_words("1.2.3.4".parse().unwrap())[0].to_ne_bytes(), [1, 2, 3, 4]);
    }

    #[test]
    fn vip_definition_is_katrans() {
        let key = vip_key("10.1.50.1".parse().unwrap(), 1883);
        let mut expected = [0; 20];
        expected[..4].copy_from_slice(&[10, 1, 50, 1]);
        expected[16..18].copy_from_slice(&[0x07, 0x5b]);
        expected[18] = 6;
        assert_eq!(key.bytes(), expected);
    }
}
