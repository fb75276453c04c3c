//! A broker host: takes the balancer's packets out of their wrapping and answers clients as
//! MQTT_VIP. Everything is undone by [`down`].

mod net;
mod notes;
pub mod status;
mod sysctl;
pub mod takeover;

use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};

use notes::Notes;

use crate::domain::XdpMode;
use crate::handover;
use crate::handover::keys::{KeyError, KeyFile};
use crate::kernel::BpfError;
use crate::kernel::abi::{addr_words, address};
use crate::kernel::maps::Table;
use crate::kernel::pins::{self, Object, Pins};
use crate::kernel::skeletons::decap::DecapSkelBuilder;
use crate::kernel::skeletons::xdp_root::XdpRootSkelBuilder;
use crate::kernel::xdp;

/// What can go wrong here.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error(transparent)]
    Key(#[from] KeyError),
}

type Result<T, E = HostError> = std::result::Result<T, E>;

/// IP and TCP headers without options.
const HEADERS_V4: u32 = 20 + 20;
const HEADERS_V6: u32 = 40 + 20;
/// The most that a balancer adds: GUE towards an IPv6 real.
const ENCAPSULATION: u32 = 40 + 8;

/// What a broker host has to know.
#[derive(Debug, Clone)]
pub struct BrokerHost {
    /// The interface that the balancer's packets come in on.
    pub interface: String,
    /// The services' addresses.
    pub vips: Vec<IpAddr>,
    /// Native or generic XDP.
    pub mode: XdpMode,
    /// UDP port of GUE (Katran's `GUE_DPORT`).
    pub gue_port: u16,
    /// bpffs.
    pub bpffs: std::path::PathBuf,
    /// The key of delayed binding; `None`: this host's kernel takes no connections over.
    pub handover_key: Option<PathBuf>,
    /// MSS to advertise; `None`: what leaves room for the encapsulation; 0: leave routes alone.
    pub advmss: Option<u32>,
}

fn pins_of(bpffs: &Path, interface: &str) -> Pins {
    Pins::new(bpffs, interface, None)
}

/// Prepares the host. Repeatable: what is so already stays.
pub fn up(host: &BrokerHost) -> Result<Vec<String>> {
    let mut done = Vec::new();
    // Before anything is changed: a key that cannot be read.
    let keys = host.handover_key.as_deref().map(KeyFile::read).transpose()?;
    attach_decap(host, &mut done)?;
    let mut notes = Notes::read(&host.interface);
    for vip in &host.vips {
        if !net::on_loopback(*vip)? {
            notes.loopback.insert(*vip);
            notes.write(&host.interface)?;
            net::add_to_loopback(*vip)?;
            done.push(format!("{vip} on lo"));
        }
    }
    // Packets of clients come in and answers go out by different ways: that is what direct
    // server return means, and what strict reverse path filtering refuses.
    let mut wanted = sysctl::wanted(&host.interface);
    if keys.is_some() {
        wanted.extend(sysctl::wanted_for_takeover());
    }
    for (key, value) in wanted {
        if sysctl::set(&mut notes, &host.interface, &key, value)? {
            done.push(format!("{key} = {value}"));
        }
    }
    if let Some(keys) = &keys {
        let image = keys.image(handover::keys::now());
        if takeover::attach(&pins_of(&host.bpffs, &host.interface), &host.interface, &image)? {
            done.push(format!("takeover on {}", host.interface));
        }
    }
    // With delayed binding, the balancer's SYN-ACK says what fits.
    if host.advmss.is_some_and(|mss| mss > 0) || (host.advmss.is_none() && keys.is_none()) {
        let mtu = xdp::interface_mtu(&host.interface)?;
        for v6 in [false, true] {
            if !host.vips.iter().any(|vip| vip.is_ipv6() == v6) {
                continue;
            }
            let headers = if v6 { HEADERS_V6 } else { HEADERS_V4 };
            let mss = host.advmss.unwrap_or(mtu.saturating_sub(headers + ENCAPSULATION));
            for route in net::set_advmss(&host.interface, v6, mss)? {
                done.push(format!("route {} advmss {mss}", route.destination));
                let noted = |r: &net::ChangedRoute| {
                    (&r.destination, r.priority) == (&route.destination, route.priority)
                };
                if !notes.routes.iter().any(noted) {
                    notes.routes.push(route);
                }
            }
            notes.write(&host.interface)?;
        }
    }
    Ok(done)
}

/// Undoes [`up`].
pub fn down(interface: &str, bpffs: &Path) -> Result<Vec<String>> {
    let mut done = Vec::new();
    let pins = pins_of(bpffs, interface);
    pins.check()?;
    let notes = Notes::read(interface);
    done.extend(net::restore_advmss(interface, &notes.routes)?);
    if takeover::detach(&pins)? {
        done.push(format!("takeover off {interface}"));
    }
    done.extend(sysctl::restore(&notes));
    // One that was there before is not ours to remove.
    for vip in notes.loopback {
        if net::remove_from_loopback(vip)? {
            done.push(format!("{vip} off lo"));
        }
    }
    Notes::forget(interface);
    if let Some(program) = pins.pinned_program("decap").map(|(_, program)| program)
        && xdp::detach(interface, program.id).unwrap_or(false)
    {
        done.push(format!("decap (id {}) off {interface}", program.id));
    }
    unpin(&pins)?;
    pins.remove_dir();
    Ok(done)
}

/// The services' addresses that this host unwraps packets for.
fn vips(pins: &Pins) -> Vec<IpAddr> {
    Table::<address, u8>::open(&pins.map_of(Object::BrokerHost, "decap_vips"))
        .and_then(|table| table.keys())
        .unwrap_or_default()
        .iter()
        .map(vip_of)
        .collect()
}

fn unpin(pins: &Pins) -> Result<()> {
    takeover::detach(pins)?;
    pins::remove_pins_in(&pins.current(Object::BrokerHost))?;
    pins::remove_pin(&pins.program("decap"))?;
    Ok(())
}

fn vip_key(vip: IpAddr) -> address {
    address { addr: addr_words(vip) }
}

fn vip_of(key: &address) -> IpAddr {
    let v6 = key.addr[1..].iter().any(|w| *w != 0);
    crate::kernel::abi::words_addr(key.addr, v6)
}

fn attach_decap(host: &BrokerHost, done: &mut Vec<String>) -> Result<()> {
    let pins = pins_of(&host.bpffs, &host.interface);
    pins.check()?;
    xdp::interface_index(&host.interface)?;
    let _lock = pins.lock()?;
    let attached = xdp::attached(&host.interface)?;
    let pinned = pins.pinned_program("decap").map(|(_, program)| program);
    let ours = matches!((&attached, &pinned), (Some(a), Some(p)) if a.id == p.id);
    if let (Some(program), false) = (&attached, ours) {
        return Err(BpfError::ForeignXdp {
            interface: host.interface.clone(),
            program: program.name.clone(),
            id: program.id,
            root_array: pins.root_array().to_owned(),
        }
        .into());
    }
    if !ours {
        // Pins and notes of a program that is not attached any more.
        Notes::forget(&host.interface);
        unpin(&pins)?;
        pins::make_dir(&pins.current(Object::BrokerHost))?;
        let failed = |source| BpfError::Load { object: "decap", source };
        let mut storage = MaybeUninit::uninit();
        let mut open = DecapSkelBuilder::default().open(&mut storage).map_err(failed)?;
        if let Some(rodata) = open.maps.rodata_data.as_deref_mut() {
            rodata.gue_port = host.gue_port;
        }
        let mut skel = open.load().map_err(failed)?;
        let table = Table::<address, u8>::of(&skel.maps.decap_vips)?;
        for vip in &host.vips {
            table.put(&vip_key(*vip), &1)?;
        }
        xdp::attach(&host.interface, skel.progs.decap.as_fd(), host.mode)?;
        done.push(format!("decap on {}", host.interface));
        let pin = |source| BpfError::Pin { path: pins.dir(), action: "pinning", source };
        skel.maps.decap_vips.pin(pins.map_of(Object::BrokerHost, "decap_vips")).map_err(pin)?;
        skel.maps
            .decap_counters
            .pin(pins.map_of(Object::BrokerHost, "decap_counters"))
            .map_err(pin)?;
        skel.progs.decap.pin(pins.program("decap")).map_err(pin)?;
        return Ok(());
    }
    let table = Table::<address, u8>::open(&pins.map_of(Object::BrokerHost, "decap_vips"))?;
    for vip in &host.vips {
        table.put(&vip_key(*vip), &1)?;
    }
    Ok(())
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
    Ok(xdp::attach(interface, skel.progs.xdp_root.as_fd(), XdpMode::Native)?)
}
