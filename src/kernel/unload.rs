//! Takes programs and pins out again: exactly what is ours.

use std::collections::BTreeSet;

use tracing::debug;

use super::abi::{group, vip_definition};
use super::chain::{self, Chain};
use super::load::{LoadSpec, check_position, check_privileges, recover_root_array};
use super::maps::Table;
use super::pins::{self, Pins};
use super::xdp;
use super::{BpfError, Result, namespace};

/// What [`unload`] left in place, and why.
#[derive(Debug, Default)]
pub struct Unloaded {
    /// What was removed.
    pub removed: Vec<String>,
    /// What stays, with the reason.
    pub kept: Vec<String>,
}

/// Takes `mqtt_fwd` out of the chain, and nothing else: the next [`load`] finds all flows and
/// predictions. Until then packets go to the balancer as they came.
pub fn take_out(spec: &LoadSpec) -> Result<Unloaded> {
    check_privileges()?;
    let pins = &spec.pins;
    pins.check()?;
    let _lock = pins.lock()?;
    namespace::claim(pins)?;
    let mut report = Unloaded::default();
    let Some(chain) = Chain::open(pins)? else { return Ok(report) };
    if let Some(program) = check_position(pins, &chain, chain::MQTT_FWD, "mqtt_fwd")? {
        chain.clear(chain::MQTT_FWD)?;
        pins::remove_pin(&pins.program("mqtt_fwd"))?;
        pins::remove_pin(&pins.program(pins::ADOPT))?;
        report.removed.push(format!("{} (id {})", program.name, program.id));
        report.kept.push(format!("maps in {}", pins.current(pins::Object::MqttFwd).display()));
    }
    Ok(report)
}

/// Takes out exactly what is ours: our programs, our pins, and the root if nobody else needs it. `meanwhile` comes when no
/// packet gets to our programs any more, and their maps are still pinned.
pub fn unload(spec: &LoadSpec, meanwhile: impl FnOnce()) -> Result<Unloaded> {
    check_privileges()?;
    let pins = &spec.pins;
    pins.check()?;
    let _lock = pins.lock()?;
    namespace::claim(pins)?;
    let mut report = Unloaded::default();

    recover_root_array(spec, pins)?;
    let chain = Chain::open(pins)?;
    if let Some(chain) = &chain {
        for (position, name) in
            [(chain::MQTT_FWD, "mqtt_fwd"), (chain::BALANCER, "balancer_ingress")]
        {
            match check_position(pins, chain, position, name) {
                Ok(Some(program)) => {
                    chain.clear(position)?;
                    report.removed.push(format!("{} (id {})", program.name, program.id));
                }
                Ok(None) => {}
                Err(BpfError::ForeignProgram { program, id, .. }) => {
                    report
                        .kept
                        .push(format!("{program} (id {id}) at position {position}: not ours"));
                }
                Err(e) => return Err(e),
            }
        }
    }
    let root_kept = detach_root(spec, pins, chain.as_ref(), &mut report)?;
    meanwhile();

    remove_own_service_vips(pins);
    for object in [pins::Object::MqttFwd, pins::Object::Balancer] {
        for path in pins.remove_object(object)? {
            debug!(path = %path.display(), "unpinned");
        }
    }
    for program in pins::PROGRAMS {
        // By it, a later unload knows the root for ours.
        if !(root_kept && program == "xdp_root") {
            pins::remove_pin(&pins.program(program))?;
        }
    }
    let user = chain.as_ref().and_then(|chain| chain.program(chain::BALANCER));
    match user.filter(|program| program.uses_pinned_map(&pins.service_vips()) != Some(false)) {
        // It would go on with its own, and a later one of this name would be another.
        Some(program) => report.kept.push(format!(
            "{}: {} (id {}) uses it",
            pins.service_vips().display(),
            program.name,
            program.id
        )),
        None if pins::remove_pin(&pins.service_vips())? => {
            report.removed.push(pins.service_vips().display().to_string());
        }
        None => {}
    }
    if !root_kept {
        namespace::release(pins)?;
    }
    pins.remove_dir();
    Ok(report)
}

/// Removes the group VIPs of our groups from the map that the balancer goes on using.
fn remove_own_service_vips(pins: &Pins) {
    let groups = Table::<u32, group>::open(&pins.map("groups"));
    let shared = Table::<vip_definition, vip_definition>::open(&pins.service_vips());
    let (Ok(groups), Ok(shared)) = (groups, shared) else { return };
    let groups = groups.entries().unwrap_or_default();
    let own: BTreeSet<[u32; 4]> =
        groups.iter().filter(|(_, group)| group.epoch != 0).map(|(_, group)| group.vip).collect();
    for vip in shared.keys().unwrap_or_default().iter().filter(|vip| own.contains(&vip.addr)) {
        let _ = shared.remove(vip);
    }
}

/// Returns whether our root stays, because somebody else's program needs it.
fn detach_root(
    spec: &LoadSpec,
    pins: &Pins,
    chain: Option<&Chain>,
    report: &mut Unloaded,
) -> Result<bool> {
    let Some((_, root)) = pins.pinned_program("xdp_root") else {
        if let Some(chain) = chain
            && xdp::attached(&spec.interface).ok().flatten().is_none()
            && (0..chain::POSITIONS).all(|p| chain.program(p).is_none())
            && pins::remove_pin(pins.root_array())?
        {
            report.removed.push(pins.root_array().display().to_string());
        }
        if let Some(root) = xdp::attached(&spec.interface).ok().flatten() {
            report.kept.push(format!(
                "{} (id {}) on {}: not known as ours; if its pins were removed, `mqtt-fwd load \
                 --adopt` takes it over",
                root.name, root.id, spec.interface
            ));
        }
        return Ok(false);
    };
    let others: Vec<_> = chain
        .iter()
        .flat_map(|c| (0..chain::POSITIONS).filter_map(|p| c.program(p)))
        .map(|p| format!("{} (id {})", p.name, p.id))
        .collect();
    if !others.is_empty() {
        report.kept.push(format!("xdp_root and its chain: {} needs them", others.join(", ")));
        return Ok(true);
    }
    // The interface may be gone, and the program with it.
    if xdp::detach(&spec.interface, root.id).unwrap_or(false) {
        report.removed.push(format!("xdp_root (id {}) on {}", root.id, spec.interface));
    }
    if pins::remove_pin(pins.root_array())? {
        report.removed.push(pins.root_array().display().to_string());
    }
    Ok(false)
}
