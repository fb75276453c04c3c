//! Types of `bpf/abi/`, as the skeletons' BTF has them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub use super::skeletons::balancer::types::{
    balancer_limits, balancer_stat, gateway, lb_stats, real_definition, vip_meta, vip_real,
};
pub use super::skeletons::decap::types::{
    address, ask, ask_keys, ask_kind, ask_limits, asked, asked_state, decap_counter, source,
};
use super::skeletons::mqtt_fwd::types::__anon_flow_7;
pub use super::skeletons::mqtt_fwd::types::{
    adoption, adoption_kind, affinity, binding_mode, bound_by, chain_position, client,
    client_flags, client_id, client_route, client_route_kind, client4, client6, counters, event,
    event_kind, fallback_reason, fleet_mode, flow, flow_flags, flow6, group, handover,
    handover_keys, handover_limits, handover_state, limits, map_use, member, member_slot,
    misprediction_policy, parser, reason, report_kind, rescue, rescue_flags, rescue_limits,
    rescuer, route_edge, route_state, route_state_flags, segment_report, server_name, service,
    service_protocol, service_table, special_group, topic, topic_verdict, tracked_map,
    vip_definition, vip_flags,
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
        // SAFETY: integers, arrays of them, and unions of integers of one size.
        unsafe impl bytemuck::Zeroable for $type {}
        // SAFETY: repr(C) by its BTF; bpf/abi/ declares all padding as fields, and asserts it by the size.
        unsafe impl bytemuck::Pod for $type {}
    )+};
}

pod! {
    address, adoption, ask, ask_keys, asked, segment_report, check_path, client, client_id, client_route, client4, client6, event, flow, flow6, gateway, group,
    counters, handover, handover_keys, lb_stats, map_use, member, member_slot, real_definition, rescue, rescuer, route_edge,
    route_state, server_name, service, service_table, source, topic, topic_verdict, vip_definition, vip_meta, vip_real,
}

impl From<&crate::domain::CookieKeys> for handover_keys {
    fn from(keys: &crate::domain::CookieKeys) -> Self {
        Self { key: keys.key, epoch: keys.epoch, pad: 0 }
    }
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

/// The key in `client_ids` of a flow's client, by the same rule as `flow_client()` of `bpf/forward/flow/flow.h`;
/// `None`: the client is identified by its address.
pub fn flow_client(flow: &flow) -> Option<u64> {
    let by_prediction = u32::from(flow.bound_by) == bound_by::BOUND_BY_PREDICTION.0;
    // SAFETY: both members are numbers of the same size; `bound_by` says which of them it is.
    let id = unsafe { flow.__anon_flow_5.client_id };
    (!by_prediction && id != 0).then_some(id)
}

/// The key in `client_ids` of a connection on its way to a broker; 0: none.
pub fn handover_id(handover: &handover) -> u64 {
    // SAFETY: both members are numbers of the same size; who asks knows that it is not decided.
    unsafe { handover.__anon_handover_1.id }
}

/// Sets it.
pub fn set_handover_id(handover: &mut handover, id: u64) {
    handover.__anon_handover_1.id = id;
}

/// Where it belongs, which the sidecar has found out: a binding (0: none), and by what.
pub fn set_decided(handover: &mut handover, binding: u32, by: bound_by) {
    handover.state = handover_state::HANDOVER_DECIDED.0 as u8;
    handover.__anon_handover_1.decided = u64::from(binding) | u64::from(by.0) << 32;
}

/// Begins a flow's rescue by a sidecar's instance (0: none), at a time in ms of CLOCK_BOOTTIME.
pub fn set_rescue(flow: &mut flow, began_ms: u32, instance: u32) {
    flow.candidates = 0;
    flow.__anon_flow_4.__anon_flow_7 =
        __anon_flow_7 { rescue_began_ms: began_ms, rescue_instance: instance };
}

/// Where a flow was ended; of one with FLOW_ENDED.
pub fn flow_end_seq(flow: &flow) -> u32 {
    // SAFETY: both members are numbers of the same size.
    unsafe { flow.__anon_flow_3.end_seq }
}

/// Ends a flow at a sequence number; FLOW_ENDED goes with it.
pub fn set_end_seq(flow: &mut flow, seq: u32) {
    flow.__anon_flow_3.end_seq = seq;
}

/// The sequence number that the parser wants next; of a flow that is not rescued.
pub fn flow_next(flow: &flow) -> u32 {
    // SAFETY: both members are numbers of the same size, and any bytes are one.
    unsafe { flow.__anon_flow_1.next as u32 }
}

// What a configuration may be, and Katran's flags, are written down where no BPF is known.
const _: () = {
    use crate::balancer::flags::{BY_ADDRESS_FLAG, GROUP_FLAG};
    use crate::domain::limits as l;

    assert!(limits::MAX_SERVICES.0 as usize == l::SERVICES);
    assert!(limits::GROUP_NAME_MAX.0 as usize == l::NAME + 1);
    assert!(limits::MAX_GROUP_VIPS.0 == l::GROUP_VIPS);
    assert!(limits::MAX_ROUTE_LEVELS.0 as usize == l::ROUTE_LEVELS);
    assert!(limits::CLIENT_ROUTE_TEXT_MAX.0 as usize == l::CLIENT_ROUTE_TEXT + 1);
    assert!(limits::TOPIC_TEXT_MAX.0 as usize == l::TOPIC_TEXT);
    assert!(limits::CLIENT_ID_TEXT_MAX.0 as usize == l::CLIENT_ID_TEXT);
    assert!(vip_flags::VIP_FLAG_INNER_DST.0 == GROUP_FLAG);
    assert!(vip_flags::VIP_FLAG_BY_ADDRESS.0 == BY_ADDRESS_FLAG);
};

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
