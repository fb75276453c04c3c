//! What a broker host has, and what it lacks: each problem with what to do about it.

use std::net::IpAddr;
use std::path::Path;

use serde::Serialize;

use super::{HostError, pins_of, sysctl};
use crate::balancer::sock_diag;
use crate::handover::keys::{KeyFile, now};
use crate::kernel::{decap, takeover, xdp};

/// For tables and JSON.
#[derive(Debug, Serialize)]
#[allow(clippy::struct_excessive_bools)] // each by itself
pub struct Status {
    /// The services' addresses that packets are unwrapped for.
    pub vips: Vec<IpAddr>,
    /// Networks that a balancer's outer headers may come from.
    pub sources: Vec<String>,
    /// The unwrapping program is on the interface.
    pub unwraps: bool,
    /// The programs that take connections over are.
    pub takes_over: bool,
    /// This kernel can.
    pub can_take_over: bool,
    /// Epoch of the key that is in use, if there is one.
    pub key_epoch: Option<u32>,
    /// It says to a fleet of balancers which connections it has.
    pub answers_fleet: bool,
    /// How long ago it was asked last, in seconds.
    pub asked_s: Option<u64>,
    /// What the programs have done.
    pub counters: Vec<(&'static str, u64)>,
    /// What is wrong, and what to do about it.
    pub problems: Vec<String>,
}

/// Looks at the host. With a key file: also whether that is what the programs hold.
pub fn status(interface: &str, bpffs: &Path, key_file: Option<&Path>) -> Result<Status, HostError> {
    let pins = pins_of(bpffs, interface);
    pins.check()?;
    let attached = xdp::attached(interface)?;
    let pinned = pins.pinned_program("decap").map(|(_, program)| program);
    let unwraps = matches!((&attached, &pinned), (Some(a), Some(d)) if a.id == d.id);
    let takes_over = takeover::is_attached(&pins);
    let vips = decap::vips(&pins);
    let mut problems = Vec::new();
    if !unwraps {
        problems.push(format!(
            "{interface}: packets are not unwrapped; run `mqtt-fwd host up` (again)"
        ));
    }
    for vip in &vips {
        if !super::net::on_loopback(*vip)? {
            problems.push(format!(
                "{vip} is not on lo: packets for it go nowhere; run `mqtt-fwd host up` again"
            ));
        }
    }
    wrong_settings(interface, takes_over, &mut problems);
    let sources = decap::sources(&pins).iter().map(ToString::to_string).collect();
    let mut counters = decap::counters(&pins)?;
    let mut key_epoch = None;
    if takes_over {
        counters.extend(takeover::counters(&pins)?);
        let held = takeover::keys(&pins)?;
        key_epoch = Some(held.epoch);
        if let Some(path) = key_file {
            let file = KeyFile::read(path)?;
            let wanted = file.cookie_keys(now());
            if held.key != wanted.key {
                problems.push(format!(
                    "{} holds other keys than the programs; `mqtt-fwd host up` again gives them \
                     these",
                    path.display()
                ));
            }
        }
        listeners(&vips, &mut problems);
    }
    let can_take_over = takeover::supported();
    let answers_fleet =
        decap::answers(&pins).is_some_and(|keys| keys.as_flattened().iter().any(|w| *w != 0));
    let asked_s = decap::last_question(&pins).map(|age| age.as_secs());
    Ok(Status {
        vips,
        sources,
        unwraps,
        takes_over,
        can_take_over,
        key_epoch,
        answers_fleet,
        asked_s,
        counters,
        problems,
    })
}

fn wrong_settings(interface: &str, takes_over: bool, problems: &mut Vec<String>) {
    let mut wanted = sysctl::wanted(interface);
    if takes_over {
        wanted.extend(sysctl::wanted_for_takeover());
    }
    for (key, wanted) in wanted {
        let Some(value) = sysctl::value(&key) else { continue };
        if !sysctl::is_enough(&key, wanted, value) {
            problems.push(format!(
                "{} = {value}; it has to be {wanted}: `mqtt-fwd host up` again sets it",
                key.replace('/', ".")
            ));
        }
    }
}

/// A listener that takes multipath TCP, as Go's do from 1.24 on, cannot be given connections.
fn listeners(vips: &[IpAddr], problems: &mut Vec<String>) {
    let Ok(all) = sock_diag::listening() else { return };
    let concerns = |ip: IpAddr| ip.is_unspecified() || vips.contains(&ip);
    for listener in all.iter().filter(|l| l.mptcp && concerns(l.local.ip())) {
        problems.push(format!(
            "{}: listens for multipath TCP, so connections cannot be handed to it; turn that off \
             (Go: GODEBUG=multipathtcp=0)",
            listener.local
        ));
    }
    if !all.iter().any(|l| concerns(l.local.ip())) {
        problems.push(
            "nobody listens for the services' addresses in this network namespace; start the \
             broker, here and not in another namespace"
                .to_owned(),
        );
    }
}
