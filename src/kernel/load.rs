//! Loads the programs, adopts or makes their pinned maps, and undoes it.
//!
//! The order is such that packets never meet half a chain: maps, program, its position, and
//! only then the root on the interface. What fails midway takes its own new pins back.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

use libbpf_rs::skel::{OpenSkel, Skel, SkelBuilder};
use libbpf_rs::{MapCore as _, MapHandle, OpenMapMut, Program};
use tracing::{debug, info};

use super::chain::{self, Chain};
use super::pins::{self, Pins};
use super::sizes::{MapSizes, Rates};
use super::skeletons::balancer::BalancerSkelBuilder;
use super::skeletons::mqtt_fwd::MqttFwdSkelBuilder;
use super::skeletons::xdp_root::XdpRootSkelBuilder;
use super::xdp::{self, ProgramInfo};
use super::{BpfError, Result};
use crate::domain::XdpMode;

/// What is to be loaded, and where.
#[derive(Debug, Clone)]
pub struct LoadSpec {
    /// The interface that clients' packets come in on.
    pub interface: String,
    /// How the root runs there.
    pub xdp_mode: XdpMode,
    /// Where programs and maps are pinned.
    pub pins: Pins,
    /// Capacities.
    pub maps: MapSizes,
    /// Rates.
    pub rates: Rates,
}

/// What [`load`] found and did, for people.
#[derive(Debug)]
pub struct Loaded {
    /// The root was there already, ours or Katran's.
    pub root_reused: bool,
    /// Maps whose contents were taken over.
    pub adopted: Vec<String>,
    /// The program now at `mqtt_fwd`'s position.
    pub program: ProgramInfo,
}

/// What [`unload`] left in place, and why.
#[derive(Debug, Default)]
pub struct Unloaded {
    /// What was removed.
    pub removed: Vec<String>,
    /// What stays, with the reason.
    pub kept: Vec<String>,
}

/// Pins made so far; taken back unless everything succeeded.
#[derive(Default)]
struct NewPins {
    paths: Vec<PathBuf>,
    keep: bool,
}

impl Drop for NewPins {
    fn drop(&mut self) {
        if !self.keep {
            for path in self.paths.iter().rev() {
                let _ = pins::remove_pin(path);
            }
        }
    }
}

fn check_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() { Ok(()) } else { Err(BpfError::NotRoot) }
}

/// Loads `mqtt_fwd` into its position and attaches the root, as far as that is not so yet.
pub fn load(spec: &LoadSpec, replace_maps: bool) -> Result<Loaded> {
    check_root()?;
    let pins = &spec.pins;
    pins.check()?;
    xdp::interface_index(&spec.interface)?;
    let _lock = pins.lock()?;

    recover_root_array(spec, pins)?;
    let existing = Chain::open(pins)?;
    let attached = xdp::attached(&spec.interface)?;
    let root_reused = check_attached(spec, pins, existing.as_ref(), attached.as_ref())?;
    if let Some(chain) = &existing {
        check_position(pins, chain, chain::MQTT_FWD, "mqtt_fwd")?;
    }

    let mut new_pins = NewPins::default();
    let mut storage = MaybeUninit::uninit();
    let mut open = open_skeleton(MqttFwdSkelBuilder::default(), "mqtt_fwd", &mut storage)?;
    if let Some(rodata) = open.maps.rodata_data.as_deref_mut() {
        rodata.cache_set_bits = spec.maps.cache_sets().ilog2();
        rodata.events_per_window = Rates::per_window(spec.rates.events);
        rodata.flows_per_window = Rates::per_window(spec.rates.new_flows);
        rodata.topics_per_window = Rates::per_window(spec.rates.new_topics);
    }
    let sizes = |name: &str| spec.maps.of_mqtt_fwd(name);
    let place = |name: &str| pins.map(name);
    let adopted = adopt_maps(open.open_object_mut(), &place, &sizes, replace_maps)?;
    let mut skel = open.load().map_err(|source| BpfError::Load { object: "mqtt_fwd", source })?;
    pin_new_maps(skel.object_mut(), &place, &adopted, &mut new_pins)?;

    let chain = Chain::open(pins)?.ok_or_else(|| BpfError::NotLoaded {
        path: pins.root_array().to_owned(),
        what: "the program array vanished",
    })?;
    pin_program(&mut skel.progs.mqtt_fwd, &pins.program("mqtt_fwd"), &mut new_pins)?;
    chain.set(chain::MQTT_FWD, skel.progs.mqtt_fwd.as_fd())?;
    if !root_reused {
        attach_root(spec, pins, &chain, &mut new_pins)?;
    }
    new_pins.keep = true;

    let program = ProgramInfo::by_fd(skel.progs.mqtt_fwd.as_fd()).ok_or(BpfError::NotLoaded {
        path: pins.program("mqtt_fwd"),
        what: "the program vanished",
    })?;
    info!(interface = spec.interface, id = program.id, root_reused, "mqtt_fwd is in the chain");
    Ok(Loaded { root_reused, adopted, program })
}

/// Loads the embedded balancer into its position; its maps stay what they were.
pub fn load_balancer(spec: &LoadSpec, replace_maps: bool) -> Result<ProgramInfo> {
    check_root()?;
    let pins = &spec.pins;
    pins.check()?;
    let _lock = pins.lock()?;
    pins::make_dir(&pins.balancer_dir())?;
    let chain = Chain::open(pins)?.ok_or_else(|| BpfError::NotLoaded {
        path: pins.root_array().to_owned(),
        what: "there is no chain",
    })?;
    check_position(pins, &chain, chain::BALANCER, "balancer_ingress")?;

    let mut new_pins = NewPins::default();
    let mut storage = MaybeUninit::uninit();
    let mut open = open_skeleton(BalancerSkelBuilder::default(), "balancer", &mut storage)?;
    let sizes = |name: &str| spec.maps.of_balancer(name);
    let place = |name: &str| match name {
        "mqtt_service_vips" => pins.service_vips(),
        _ => pins.balancer_dir().join(name),
    };
    let adopted = adopt_maps(open.open_object_mut(), &place, &sizes, replace_maps)?;
    let mut skel = open.load().map_err(|source| BpfError::Load { object: "balancer", source })?;
    pin_new_maps(skel.object_mut(), &place, &adopted, &mut new_pins)?;
    pin_program(
        &mut skel.progs.balancer_ingress,
        &pins.program("balancer_ingress"),
        &mut new_pins,
    )?;
    chain.set(chain::BALANCER, skel.progs.balancer_ingress.as_fd())?;
    new_pins.keep = true;

    ProgramInfo::by_fd(skel.progs.balancer_ingress.as_fd()).ok_or(BpfError::NotLoaded {
        path: pins.program("balancer_ingress"),
        what: "the program vanished",
    })
}

/// Takes `mqtt_fwd` out of the chain, and nothing else: the next [`load`] finds all flows and
/// predictions. Until then packets go to the balancer as they came.
pub fn take_out(spec: &LoadSpec) -> Result<Unloaded> {
    check_root()?;
    let pins = &spec.pins;
    pins.check()?;
    let _lock = pins.lock()?;
    let mut report = Unloaded::default();
    let Some(chain) = Chain::open(pins)? else { return Ok(report) };
    if let Some(program) = check_position(pins, &chain, chain::MQTT_FWD, "mqtt_fwd")? {
        chain.clear(chain::MQTT_FWD)?;
        pins::remove_pin(&pins.program("mqtt_fwd"))?;
        report.removed.push(format!("{} (id {})", program.name, program.id));
        report.kept.push(format!("maps in {}", pins.dir().display()));
    }
    Ok(report)
}

/// Takes out exactly what is ours: our programs, our pins, and the root if nobody else needs it.
pub fn unload(spec: &LoadSpec) -> Result<Unloaded> {
    check_root()?;
    let pins = &spec.pins;
    pins.check()?;
    let _lock = pins.lock()?;
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

    for dir in [pins.balancer_dir(), pins.dir()] {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            // By it, a later unload knows the root for ours.
            if root_kept && entry.path() == pins.program("xdp_root") {
                continue;
            }
            if entry.file_type().is_ok_and(|t| !t.is_dir()) && pins::remove_pin(&entry.path())? {
                debug!(path = %entry.path().display(), "unpinned");
            }
        }
    }
    let user = chain.as_ref().and_then(|chain| chain.program(chain::BALANCER));
    match user.filter(|program| program.uses_pinned_map(&pins.service_vips())) {
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
    pins.remove_dirs();
    Ok(report)
}

/// Returns whether our root stays, because somebody else's program needs it.
fn detach_root(
    spec: &LoadSpec,
    pins: &Pins,
    chain: Option<&Chain>,
    report: &mut Unloaded,
) -> Result<bool> {
    let Some(root) = pinned_program(&pins.program("xdp_root")) else {
        if let Some(chain) = chain
            && xdp::attached(&spec.interface).ok().flatten().is_none()
            && (0..chain::POSITIONS).all(|p| chain.program(p).is_none())
            && pins::remove_pin(pins.root_array())?
        {
            report.removed.push(pins.root_array().display().to_string());
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

/// Somebody removed the array's pin, while our root goes on using the array: pins it again.
fn recover_root_array(spec: &LoadSpec, pins: &Pins) -> Result<()> {
    if pins.root_array().exists() {
        return Ok(());
    }
    let ours = pinned_program(&pins.program("xdp_root")).map(|root| root.id);
    let Some(root) = xdp::attached(&spec.interface)?.filter(|root| Some(root.id) == ours) else {
        return Ok(());
    };
    let array = root
        .map_ids
        .iter()
        .filter_map(|id| MapHandle::from_map_id(*id).ok())
        .find(|map| map.map_type() == libbpf_rs::MapType::ProgArray);
    if let Some(mut array) = array {
        array.pin(pins.root_array()).map_err(|source| BpfError::Pin {
            path: pins.root_array().to_owned(),
            action: "pinning again",
            source,
        })?;
        info!(path = %pins.root_array().display(), "pinned again; it was removed");
    }
    Ok(())
}

/// Is the root on the interface already? A program that does not use the chain is in the way.
fn check_attached(
    spec: &LoadSpec,
    pins: &Pins,
    chain: Option<&Chain>,
    attached: Option<&ProgramInfo>,
) -> Result<bool> {
    let Some(program) = attached else { return Ok(false) };
    let uses_chain = chain.and_then(Chain::map_id).is_some_and(|id| program.map_ids.contains(&id));
    if uses_chain {
        return Ok(true);
    }
    Err(BpfError::ForeignXdp {
        interface: spec.interface.clone(),
        program: program.name.clone(),
        id: program.id,
        root_array: pins.root_array().to_owned(),
    })
}

/// The program at a position if it is ours, `None` if the position is free.
fn check_position(
    pins: &Pins,
    chain: &Chain,
    position: u32,
    name: &str,
) -> Result<Option<ProgramInfo>> {
    let Some(there) = chain.program(position) else { return Ok(None) };
    let ours = pinned_program(&pins.program(name)).is_some_and(|pinned| pinned.id == there.id)
        || shares_our_maps(pins, name, &there);
    if ours {
        return Ok(Some(there));
    }
    Err(BpfError::ForeignProgram {
        root_array: pins.root_array().to_owned(),
        position,
        program: there.name,
        id: there.id,
    })
}

/// A program whose pin was lost (killed between the two steps) is still known by its maps.
fn shares_our_maps(pins: &Pins, name: &str, program: &ProgramInfo) -> bool {
    let map = match name {
        "mqtt_fwd" => pins.map("flows"),
        _ => pins.balancer_dir().join("connections"),
    };
    program.uses_pinned_map(&map)
}

/// The program pinned at a path.
pub fn pinned_program(path: &Path) -> Option<ProgramInfo> {
    let fd = path.exists().then(|| Program::fd_from_pinned_path(path).ok()).flatten()?;
    ProgramInfo::by_fd(fd.as_fd())
}

fn open_skeleton<'obj, B: SkelBuilder<'obj>>(
    builder: B,
    object: &'static str,
    storage: &'obj mut MaybeUninit<libbpf_rs::OpenObject>,
) -> Result<B::Output> {
    builder.open(storage).map_err(|source| BpfError::Load { object, source })
}

/// libbpf's own maps (.rodata, .bss) belong to the program and go with it.
fn is_internal(name: &str) -> bool {
    name.contains('.')
}

/// Sets the sizes, and takes over maps that are pinned already. Returns those.
fn adopt_maps(
    object: &mut libbpf_rs::OpenObject,
    place: &dyn Fn(&str) -> PathBuf,
    size: &dyn Fn(&str) -> Option<u32>,
    replace: bool,
) -> Result<Vec<String>> {
    let mut adopted = Vec::new();
    for mut map in object.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        if is_internal(&name) {
            continue;
        }
        let failed = |action| {
            let map = name.clone();
            move |source| BpfError::Map { map, action, source }
        };
        if let Some(entries) = size(&name) {
            map.set_max_entries(entries).map_err(failed("setting its size"))?;
        }
        let path = place(&name);
        if !path.exists() {
            continue;
        }
        let pinned = MapHandle::from_pinned_path(&path).map_err(|source| BpfError::Pin {
            path: path.clone(),
            action: "opening",
            source,
        })?;
        let (found, wanted) = (describe_pinned(&pinned), describe_wanted(&map));
        // Katran's program array may have more positions than ours.
        let fits = found == wanted || name == "root_array";
        if fits {
            map.reuse_fd(pinned.as_fd()).map_err(failed("taking over the pinned one"))?;
            adopted.push(name);
        } else if replace {
            info!(path = %path.display(), %found, %wanted, "replacing the pinned map");
            pins::remove_pin(&path)?;
        } else {
            return Err(BpfError::MapMismatch { path, found, wanted });
        }
    }
    Ok(adopted)
}

fn describe_pinned(map: &MapHandle) -> String {
    let (k, v, n) = (map.key_size(), map.value_size(), map.max_entries());
    format!("{:?} {k} B → {v} B × {n}", map.map_type())
}

fn describe_wanted(map: &OpenMapMut<'_>) -> String {
    let (k, v, n) = (map.key_size(), map.value_size(), map.max_entries());
    format!("{:?} {k} B → {v} B × {n}", map.map_type())
}

fn pin_new_maps(
    object: &mut libbpf_rs::Object,
    place: &dyn Fn(&str) -> PathBuf,
    adopted: &[String],
    new_pins: &mut NewPins,
) -> Result<()> {
    for mut map in object.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        if is_internal(&name) || adopted.contains(&name) || name == "work" {
            continue;
        }
        let path = place(&name);
        map.pin(&path).map_err(|source| BpfError::Pin {
            path: path.clone(),
            action: "pinning",
            source,
        })?;
        new_pins.paths.push(path);
    }
    Ok(())
}

/// Pins a program in place of an earlier one, whose descriptor the chain holds until it is replaced.
fn pin_program(
    program: &mut libbpf_rs::ProgramMut<'_>,
    path: &Path,
    new_pins: &mut NewPins,
) -> Result<()> {
    let had_one = pins::remove_pin(path)?;
    program.pin(path).map_err(|source| BpfError::Pin {
        path: path.to_owned(),
        action: "pinning",
        source,
    })?;
    if !had_one {
        new_pins.paths.push(path.to_owned());
    }
    Ok(())
}

fn attach_root(spec: &LoadSpec, pins: &Pins, chain: &Chain, new_pins: &mut NewPins) -> Result<()> {
    let failed = |source| BpfError::Load { object: "xdp_root", source };
    let mut storage = MaybeUninit::uninit();
    let mut open = open_skeleton(XdpRootSkelBuilder::default(), "xdp_root", &mut storage)?;
    open.maps.root_array.reuse_fd(chain.map().as_fd()).map_err(failed)?;
    let mut skel = open.load().map_err(failed)?;
    let root: BorrowedFd<'_> = skel.progs.xdp_root.as_fd();
    xdp::attach(&spec.interface, root, spec.xdp_mode)?;
    let pinned = pin_program(&mut skel.progs.xdp_root, &pins.program("xdp_root"), new_pins);
    if pinned.is_err()
        && let Some(program) = ProgramInfo::by_fd(skel.progs.xdp_root.as_fd())
    {
        let _ = xdp::detach(&spec.interface, program.id);
    }
    pinned
}
