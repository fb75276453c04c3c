//! The program that takes the balancer's packets out of their encapsulation on a broker host, and the
//! one that lets a veth pair's other end take what a native XDP program sends.

use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::AsFd as _;

use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};

use super::abi::{addr_words, address, words_addr};
use super::maps::Table;
use super::pins::{self, Object, Pins};
use super::skeletons::decap::DecapSkelBuilder;
use super::skeletons::xdp_root::XdpRootSkelBuilder;
use super::xdp;
use super::{BpfError, Result, takeover};
use crate::domain::XdpMode;

const VIPS: &str = "decap_vips";
const COUNTERS: &str = "decap_counters";

/// What it needs to know.
#[derive(Debug, Clone, Copy)]
pub struct Decap<'a> {
    pub interface: &'a str,
    /// The services' addresses.
    pub vips: &'a [IpAddr],
    pub mode: XdpMode,
    /// UDP port of GUE (Katran's `GUE_DPORT`).
    pub gue_port: u16,
}

impl Decap<'_> {
    /// Attaches it, or adds addresses to the one that is attached; whether it was not. Calls `stale`
    /// first if pins are left of one that is gone.
    pub fn attach(&self, pins: &Pins, stale: impl FnOnce()) -> Result<bool> {
        pins.check()?;
        xdp::interface_index(self.interface)?;
        let _lock = pins.lock()?;
        let attached = xdp::attached(self.interface)?;
        let pinned = pins.pinned_program("decap").map(|(_, program)| program);
        let ours = matches!((&attached, &pinned), (Some(a), Some(p)) if a.id == p.id);
        if ours {
            self.add_vips(&Table::open(&pins.map_of(Object::BrokerHost, VIPS))?)?;
            return Ok(false);
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
        Ok(true)
    }

    fn load(&self, pins: &Pins) -> Result<()> {
        pins::make_dir(&pins.current(Object::BrokerHost))?;
        let failed = |source| BpfError::Load { object: "decap", source };
        let mut storage = MaybeUninit::uninit();
        let mut open = DecapSkelBuilder::default().open(&mut storage).map_err(failed)?;
        if let Some(rodata) = open.maps.rodata_data.as_deref_mut() {
            rodata.gue_port = self.gue_port;
        }
        let mut skel = open.load().map_err(failed)?;
        self.add_vips(&Table::of(&skel.maps.decap_vips)?)?;
        xdp::attach(self.interface, skel.progs.decap.as_fd(), self.mode)?;
        let pin = |source| BpfError::Pin { path: pins.dir(), action: "pinning", source };
        skel.maps.decap_vips.pin(pins.map_of(Object::BrokerHost, VIPS)).map_err(pin)?;
        skel.maps.decap_counters.pin(pins.map_of(Object::BrokerHost, COUNTERS)).map_err(pin)?;
        skel.progs.decap.pin(pins.program("decap")).map_err(pin)
    }

    fn add_vips(&self, table: &Table<address, u8>) -> Result<()> {
        for vip in self.vips {
            table.put(&address { addr: addr_words(*vip) }, &1)?;
        }
        Ok(())
    }
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
