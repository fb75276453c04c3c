//! A balancer.bpf.o of Katran's, loaded without its server, with its maps filled by hand.

use std::net::IpAddr;
use std::path::Path;

use libbpf_rs::{MapCore as _, MapFlags, Object, ObjectBuilder};
use mqtt_fwd::kernel::abi::{Pod as _, addr_words, vip_key};

/// Katran's (balancer_consts.h).
pub const RING_SIZE: u32 = 65_537;
pub const LOCAL_VIP: u32 = 1 << 5;
const REAL_IPV6: u8 = 1 << 0;
const REAL_LOCAL: u8 = 1 << 1;

pub struct KatranObject {
    object: Object,
}

impl KatranObject {
    pub fn load(path: &Path) -> Self {
        libbpf_rs::set_print(None);
        let open = ObjectBuilder::default().open_file(path).unwrap();
        let object = open.load().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let katran = Self { object };
        katran.put("ctl_array", &0u32.to_ne_bytes(), &[2, 0, 0, 0, 0, 9, 0, 0]);
        // GUE's source addresses.
        let source = |addr: &str| {
            let words = addr_words(addr.parse().unwrap());
            [&words.map(u32::to_ne_bytes).concat()[..], &[0; 4]].concat()
        };
        if katran.has("pckt_srcs") {
            katran.put("pckt_srcs", &0u32.to_ne_bytes(), &source("10.1.2.102"));
            katran.put("pckt_srcs", &1u32.to_ne_bytes(), &source("fd01:2::102"));
        }
        katran
    }

    pub fn program(&self) -> libbpf_rs::ProgramImpl<'_> {
        self.object.progs().find(|p| p.name() == "balancer_ingress").expect("balancer_ingress")
    }

    pub fn has(&self, map: &str) -> bool {
        self.object.maps().any(|m| m.name() == map)
    }

    fn put(&self, map: &str, key: &[u8], value: &[u8]) {
        let map = self.object.maps().find(|m| m.name() == map).unwrap_or_else(|| panic!("{map}"));
        map.update(key, value, MapFlags::ANY).unwrap();
    }

    /// A VIP with one real.
    pub fn add_vip(&self, number: u32, vip: IpAddr, port: u16, flags: u32, real: IpAddr) {
        let meta = [flags.to_ne_bytes(), number.to_ne_bytes()].concat();
        self.put("vip_map", vip_key(vip, port).bytes(), &meta);
        let real_number = number + 1;
        let mut definition = addr_words(real).map(u32::to_ne_bytes).concat();
        let local = if flags & LOCAL_VIP == 0 { 0 } else { REAL_LOCAL };
        definition.extend([if real.is_ipv6() { REAL_IPV6 } else { 0 } | local, 0, 0, 0]);
        self.put("reals", &real_number.to_ne_bytes(), &definition);
        let rings = self.object.maps().find(|m| m.name() == "ch_rings").unwrap();
        let slots = number * RING_SIZE..(number + 1) * RING_SIZE;
        let keys: Vec<u8> = slots.clone().flat_map(u32::to_ne_bytes).collect();
        let values: Vec<u8> = slots.flat_map(|_| real_number.to_ne_bytes()).collect();
        rings.update_batch(&keys, &values, RING_SIZE, MapFlags::ANY, MapFlags::ANY).unwrap();
    }

    pub fn set_service(&self, group: IpAddr, service: IpAddr, port: u16) {
        self.put("vip_inner_dst", vip_key(group, port).bytes(), vip_key(service, port).bytes());
    }
}
