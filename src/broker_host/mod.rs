//! A broker host: takes the balancer's packets out of their wrapping and answers clients as
//! MQTT_VIP. Everything is undone by [`down`].

mod net;
mod notes;
pub mod status;
mod sysctl;

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use notes::Notes;

use crate::domain::XdpMode;
use crate::fleet::key;
use crate::handover;
use crate::handover::keys::{KeyError, KeyFile};
use crate::kernel::decap::{self, Decap};
use crate::kernel::pins::Pins;
use crate::kernel::{BpfError, takeover, xdp};

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
    /// Where the balancer's outer headers come from; none: as Katran and the embedded balancer have them.
    pub sources: Vec<IpNet>,
    /// Native or generic XDP.
    pub mode: XdpMode,
    /// UDP port of GUE (Katran's `GUE_DPORT`).
    pub gue_port: u16,
    /// bpffs.
    pub bpffs: std::path::PathBuf,
    /// The key of delayed binding; `None`: this host's kernel takes no connections over.
    pub handover_key: Option<PathBuf>,
    /// The same key, of a fleet, whose questions are answered then; `None`: none are.
    pub fleet_key: Option<PathBuf>,
    /// UDP port of a fleet's questions.
    pub ask_port: u16,
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
    let fleet = host.fleet_key.as_deref().map(KeyFile::read).transpose()?;
    let pins = pins_of(&host.bpffs, &host.interface);
    let decap = Decap {
        interface: &host.interface,
        vips: &host.vips,
        sources: if host.sources.is_empty() { &decap::USUAL_SOURCES } else { &host.sources },
        mode: host.mode,
        gue_port: host.gue_port,
        ask_port: host.ask_port,
        ask_keys: fleet
            .map_or([[0; 2]; 2], |file| key::ask_keys(&file.cookie_keys(handover::keys::now()))),
    };
    done.extend(decap.attach(&pins, || Notes::forget(&host.interface))?);
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
        let keys = keys.cookie_keys(handover::keys::now());
        if takeover::attach(&pins, &host.interface, &keys)? {
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
    if let Some(id) = decap::detach(interface, &pins)? {
        done.push(format!("decap (id {id}) off {interface}"));
    }
    pins.remove_dir();
    Ok(done)
}
