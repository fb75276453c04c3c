//! The program that takes the balancer's packets out of their encapsulation on a broker host, and the
//! one that lets a veth pair's other end take what a native XDP program sends.

use std::collections::HashSet;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd as _;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};
use libbpf_rs::{MapCore as _, MapFlags, MapHandle, OpenObject};

use super::abi::{addr_words, address, ask_keys, decap_counter, source, words_addr};
use super::maps::Table;
use super::pins::{self, Object, Pins};
use super::skeletons::decap::{DecapSkel, DecapSkelBuilder};
use super::skeletons::xdp_root::XdpRootSkelBuilder;
use super::xdp::{self, ProgramInfo};
use super::{BpfError, Result, takeover};
use crate::domain::XdpMode;

const VIPS: &str = "decap_vips";
const SOURCES: &str = "decap_sources";
const COUNTERS: &str = "decap_counters";
const ASK_KEYS: &str = "ask_keys";
const ASKED_AT: &str = "asked_at";

/// What Katran, built as it is, and the embedded balancer put into outer headers as their source: 172.16.0.0/16 and
/// 100::/64 (RFC 6666), whatever the address of the host is. Not of Katran with GUE, which is told its sources.
pub const USUAL_SOURCES: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 16)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0), 64)),
];

/// An outer source towards a real, as both balancers have them.
pub fn usual_source(real: IpAddr) -> IpAddr {
    USUAL_SOURCES[usize::from(real.is_ipv6())].addr()
}

/// What it needs to know.
#[derive(Debug, Clone, Copy)]
pub struct Decap<'a> {
    pub interface: &'a str,
    /// The services' addresses.
    pub vips: &'a [IpAddr],
    /// Where the outer headers come from.
    pub sources: &'a [IpNet],
    pub mode: XdpMode,
    /// UDP port of GUE (Katran's `GUE_DPORT`).
    pub gue_port: u16,
    /// UDP port of a fleet's questions, and what those are authenticated with; no keys: none are answered.
    pub ask_port: u16,
    pub ask_keys: AskKeys,
}

/// Keys of questions, by the parity of their epoch; zero: none.
pub type AskKeys = [[u64; 2]; 2];

impl Decap<'_> {
    /// Attaches it, or adds addresses to the one that is attached and gives it these sources: what changed. Calls
    /// `stale` first if pins are left of one that is gone.
    pub fn attach(&self, pins: &Pins, stale: impl FnOnce()) -> Result<Option<String>> {
        pins.check()?;
        xdp::interface_index(self.interface)?;
        let _lock = pins.lock()?;
        let attached = xdp::attached(self.interface)?;
        let pinned = pins.pinned_program("decap").map(|(_, program)| program);
        let ours = matches!((&attached, &pinned), (Some(a), Some(p)) if a.id == p.id);
        if ours {
            let replaced = self.replace(pins)?;
            self.add_vips(&Table::open(&pins.map_of(Object::BrokerHost, VIPS))?)?;
            let changed = self.set_sources(&open_sources(pins)?)?;
            let asked = self.set_keys(&open_keys(pins)?)?;
            let sources: Vec<_> = self.sources.iter().map(ToString::to_string).collect();
            let done = [
                (replaced, "decap of this build".to_owned()),
                (changed, format!("decapsulates what comes from {}", sources.join(", "))),
                (asked, "other keys for a fleet's questions".to_owned()),
            ];
            let done: Vec<_> =
                done.into_iter().filter_map(|(so, what)| so.then_some(what)).collect();
            return Ok((!done.is_empty()).then(|| done.join("; ")));
        }
        if let Some(program) = attached {
            return Err(BpfError::ForeignXdp {
                interface: self.interface.to_owned(),
                program: program.name,
                id: program.id,
                root_array: pins.root_array().to_owned(),
            });
        }
        stale();
        unpin(pins)?;
        self.load(pins)?;
        Ok(Some(format!("decap on {}", self.interface)))
    }

    fn load(&self, pins: &Pins) -> Result<()> {
        pins::make_dir(&pins.current(Object::BrokerHost))?;
        let mut storage = MaybeUninit::uninit();
        let mut skel = self.load_program(&mut storage, &[])?;
        self.add_vips(&Table::of(&skel.maps.decap_vips)?)?;
        self.set_sources(&Table::of(&skel.maps.decap_sources)?)?;
        self.set_keys(&Table::of(&skel.maps.ask_keys)?)?;
        xdp::attach(self.interface, skel.progs.decap.as_fd(), self.mode)?;
        pin_all(&mut skel, pins)
    }

    /// Puts this build's program, with these ports, in the place of one that differs; whether it did. The addresses
    /// stay, and so do counters, if they are the same.
    fn replace(&self, pins: &Pins) -> Result<bool> {
        let Some((old_fd, old)) = pins.pinned_program("decap") else { return Ok(false) };
        let mut storage = MaybeUninit::uninit();
        let mut skel = self.load_program(&mut storage, &pinned_maps(pins))?;
        let new = ProgramInfo::by_fd(skel.progs.decap.as_fd());
        if new.as_ref().is_some_and(|new| new.tag == old.tag && rodata(new) == rodata(&old)) {
            return Ok(false);
        }
        xdp::replace(self.interface, skel.progs.decap.as_fd(), old_fd.as_fd())?;
        for name in MAPS {
            pins::remove_pin(&pins.map_of(Object::BrokerHost, name))?;
        }
        pins::remove_pin(&pins.program("decap"))?;
        pin_all(&mut skel, pins)?;
        Ok(true)
    }

    /// Loads it, with those of the pinned maps that fit.
    fn load_program<'obj>(
        &self,
        storage: &'obj mut MaybeUninit<OpenObject>,
        pinned: &[(&str, MapHandle)],
    ) -> Result<DecapSkel<'obj>> {
        let failed = |source| BpfError::Load { object: "decap", source };
        let mut open = DecapSkelBuilder::default().open(storage).map_err(failed)?;
        if let Some(rodata) = open.maps.rodata_data.as_deref_mut() {
            rodata.gue_port = self.gue_port;
            rodata.ask_port = self.ask_port;
        }
        for mut map in open.open_object_mut().maps_mut() {
            let shape = (map.key_size(), map.value_size(), map.max_entries());
            let old = pinned.iter().find(|(name, _)| map.name() == *name).map(|(_, map)| map);
            let fits =
                |old: &&MapHandle| (old.key_size(), old.value_size(), old.max_entries()) == shape;
            if let Some(old) = old.filter(fits) {
                map.reuse_fd(old.as_fd()).map_err(failed)?;
            }
        }
        open.load().map_err(failed)
    }

    fn add_vips(&self, table: &Table<address, u8>) -> Result<()> {
        for vip in self.vips {
            table.put(&address { addr: addr_words(*vip) }, &1)?;
        }
        Ok(())
    }

    /// Whether other keys were there.
    fn set_keys(&self, table: &Table<u32, ask_keys>) -> Result<bool> {
        let before = table.get(&0)?.unwrap_or_default();
        if before.key == self.ask_keys {
            return Ok(false);
        }
        table.put(&0, &ask_keys { key: self.ask_keys })?;
        Ok(true)
    }

    /// Makes the sources these and no others; whether they were not.
    fn set_sources(&self, table: &Table<source, u8>) -> Result<bool> {
        let before: HashSet<IpNet> = table.keys()?.iter().map(network_of).collect();
        let wanted: HashSet<IpNet> = self.sources.iter().copied().collect();
        for network in wanted.difference(&before) {
            table.put(&source_of(*network), &1)?;
        }
        for network in before.difference(&wanted) {
            table.remove(&source_of(*network))?;
        }
        Ok(before != wanted)
    }
}

/// IPv4-mapped IPv6 begins with so many bits.
const MAPPED: u8 = 96;

fn source_of(network: IpNet) -> source {
    let (addr, length) = match network.trunc() {
        IpNet::V4(v4) => (v4.network().to_ipv6_mapped(), MAPPED + v4.prefix_len()),
        IpNet::V6(v6) => (v6.network(), v6.prefix_len()),
    };
    source { prefix_length: length.into(), addr: addr_words(addr.into()) }
}

fn network_of(key: &source) -> IpNet {
    let (addr, length) = (words_addr(key.addr, true), key.prefix_length as u8);
    let network = match (addr.to_canonical(), length.checked_sub(MAPPED)) {
        (v4 @ IpAddr::V4(_), Some(length)) => IpNet::new(v4, length),
        _ => IpNet::new(addr, length),
    };
    network.expect("the kernel takes no longer prefix")
}

const MAPS: [&str; 5] = [VIPS, SOURCES, COUNTERS, ASK_KEYS, ASKED_AT];

fn pinned_maps(pins: &Pins) -> Vec<(&'static str, MapHandle)> {
    let open = |name| MapHandle::from_pinned_path(pins.map_of(Object::BrokerHost, name)).ok();
    MAPS.into_iter().filter_map(|name| Some((name, open(name)?))).collect()
}

fn pin_all(skel: &mut DecapSkel<'_>, pins: &Pins) -> Result<()> {
    let pin = |source| BpfError::Pin { path: pins.dir(), action: "pinning", source };
    let maps = &mut skel.maps;
    let all = [
        (VIPS, &mut maps.decap_vips),
        (SOURCES, &mut maps.decap_sources),
        (COUNTERS, &mut maps.decap_counters),
        (ASK_KEYS, &mut maps.ask_keys),
        (ASKED_AT, &mut maps.asked_at),
    ];
    for (name, map) in all {
        map.pin(pins.map_of(Object::BrokerHost, name)).map_err(pin)?;
    }
    skel.progs.decap.pin(pins.program("decap")).map_err(pin)
}

/// A program's constants.
fn rodata(program: &ProgramInfo) -> Option<Vec<u8>> {
    let maps = program.map_ids.iter().flatten().filter_map(|id| MapHandle::from_map_id(*id).ok());
    let map = maps.into_iter().find(|map| map.name().to_string_lossy().ends_with(".rodata"))?;
    map.lookup(&0u32.to_ne_bytes(), MapFlags::ANY).ok()?
}

fn open_keys(pins: &Pins) -> Result<Table<u32, ask_keys>> {
    Table::open(&pins.map_of(Object::BrokerHost, ASK_KEYS))
}

/// Whether it answers a fleet's questions; `None`: it is not loaded.
pub fn answers(pins: &Pins) -> Option<AskKeys> {
    open_keys(pins).ok()?.get(&0).ok()?.map(|held| held.key)
}

/// How long ago the last question came (CLOCK_BOOTTIME); `None`: none has.
pub fn last_question(pins: &Pins) -> Option<std::time::Duration> {
    let table: Table<u32, u64> = Table::open(&pins.map_of(Object::BrokerHost, ASKED_AT)).ok()?;
    let at = table.get(&0).ok()?.filter(|at| *at != 0)?;
    Some(super::boot_time().saturating_sub(std::time::Duration::from_nanos(at)))
}

fn open_sources(pins: &Pins) -> Result<Table<source, u8>> {
    Table::open(&pins.map_of(Object::BrokerHost, SOURCES))
}

/// Where it takes packets from; none if it is not loaded.
pub fn sources(pins: &Pins) -> Vec<IpNet> {
    let keys = open_sources(pins).and_then(|table| table.keys()).unwrap_or_default();
    let mut networks: Vec<_> = keys.iter().map(network_of).collect();
    networks.sort();
    networks
}

/// What it counted, for people; nothing if it is not loaded.
pub fn counters(pins: &Pins) -> Result<Vec<(&'static str, u64)>> {
    let path = pins.map_of(Object::BrokerHost, COUNTERS);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let table = Table::<u32, u64>::open(&path)?;
    let texts = [
        (decap_counter::DECAP_UNWRAPPED, "packets decapsulated"),
        (
            decap_counter::DECAP_OTHER_SERVICE,
            "encapsulated packets for no service of this host: left as they are",
        ),
        (
            decap_counter::DECAP_OTHER_SOURCE,
            "encapsulated packets from where no balancer sends (`host up --from`): left as they are",
        ),
        (decap_counter::DECAP_ANSWERED, "questions of a fleet answered"),
        (
            decap_counter::DECAP_DENIED,
            "questions that are not authenticated: another key (`host up --fleet-key`), or a stranger's",
        ),
        (
            decap_counter::DECAP_RETURNED,
            "segments of no connection of this host, sent back for the fleet to ask who has it",
        ),
    ];
    texts
        .into_iter()
        .map(|(counter, text)| Ok((text, table.get_per_cpu(&counter.0)?.iter().sum())))
        .collect()
}

/// Takes it off the interface and removes all pins; its id, if it was attached.
pub fn detach(interface: &str, pins: &Pins) -> Result<Option<u32>> {
    let id = pins.pinned_program("decap").map(|(_, program)| program.id);
    let detached = id.filter(|id| xdp::detach(interface, *id).unwrap_or(false));
    unpin(pins)?;
    Ok(detached)
}

fn unpin(pins: &Pins) -> Result<()> {
    takeover::detach(pins)?;
    pins::remove_pins_in(&pins.current(Object::BrokerHost))?;
    pins::remove_pin(&pins.program("decap"))?;
    Ok(())
}

/// The addresses whose packets it unwraps; none if it is not loaded.
pub fn vips(pins: &Pins) -> Vec<IpAddr> {
    let addr = |key: &address| words_addr(key.addr, key.addr[1..].iter().any(|w| *w != 0));
    Table::<address, u8>::open(&pins.map_of(Object::BrokerHost, VIPS))
        .and_then(|table| table.keys())
        .unwrap_or_default()
        .iter()
        .map(addr)
        .collect()
}

/// Puts a program that passes everything on the other end of a veth pair. What a native XDP
/// program sends back (`XDP_TX`) arrives there only if there is a native program, too.
pub fn veth_peer_up(interface: &str) -> Result<()> {
    if xdp::attached(interface)?.is_some() {
        return Ok(());
    }
    let failed = |source| BpfError::Load { object: "xdp_root", source };
    let mut storage = MaybeUninit::uninit();
    let open = XdpRootSkelBuilder::default().open(&mut storage).map_err(failed)?;
    let skel = open.load().map_err(failed)?;
    xdp::attach(interface, skel.progs.xdp_root.as_fd(), XdpMode::Native)
}
