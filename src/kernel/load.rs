//! Loads the programs, adopts, makes or moves their pinned maps.
//!
//! The order is such that packets never meet half a chain: maps, program, its position, and
//! only then the root on the interface. What fails midway takes its own new pins back.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

use libbpf_rs::skel::{OpenSkel, Skel, SkelBuilder};
use libbpf_rs::{MapCore as _, MapFlags, MapHandle, OpenMapMut, OpenObject, Program};
use nix::fcntl::Flock;
use tracing::info;

use super::abi::{Pod as _, fleet_mode, limits, map_use};
use super::catalog;
use super::chain::{self, Chain};
use super::layout;
use super::maps::Table;
use super::namespace;
use super::pins::{self, Pins};
use super::privileges;
use super::skeletons::balancer::BalancerSkelBuilder;
use super::skeletons::mqtt_fwd::MqttFwdSkelBuilder;
use super::skeletons::xdp_root::XdpRootSkelBuilder;
use super::upgrade::{Moved, Upgrade};
use super::xdp::{self, ProgramInfo};
use super::{BpfError, Result};
use crate::domain::{FleetRates, MapSizes, Rates, XdpMode};

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
    /// What was moved from maps of another build, or of other sizes.
    pub moved: Option<Moved>,
    /// The program now in the position.
    pub program: ProgramInfo,
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

pub(super) fn check_privileges() -> Result<()> {
    let missing = privileges::missing();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(BpfError::Privileges { missing: missing.join(", ") })
    }
}

/// Loads `mqtt_fwd` into its position and attaches the root, as far as that is not so yet. What
/// maps of another build, or of other sizes, hold is moved to the new ones while packets pass.
pub fn load(spec: &LoadSpec) -> Result<Loaded> {
    let mut storage = MaybeUninit::uninit();
    let mut open = open_skeleton(MqttFwdSkelBuilder::default(), "mqtt_fwd", &mut storage)?;
    if let Some(rodata) = open.maps.rodata_data.as_deref_mut() {
        rodata.cache_set_bits = spec.maps.cache_sets().ilog2();
        rodata.flow_sets = spec.maps.flow_places() / limits::FLOW_WAYS.0;
        rodata.untracked_bits = spec.maps.untracked().ilog2();
        rodata.events_per_window = Rates::per_window(spec.rates.events);
        rodata.flows_per_window = Rates::per_window(spec.rates.new_flows);
        rodata.topics_per_window = Rates::per_window(spec.rates.new_topics);
        rodata.handovers_per_second = spec.maps.handovers_per_second();
        rodata.handovers_per_window = Rates::per_window(rodata.handovers_per_second);
        rodata.clients_per_second = spec.maps.clients_per_second();
        rodata.clients_per_window = Rates::per_window(rodata.clients_per_second);
        let fleet = spec.rates.fleet;
        rodata.fleet = match fleet {
            None => fleet_mode::FLEET_NONE,
            Some(FleetRates { store: false, .. }) => fleet_mode::FLEET_MEMBER,
            Some(FleetRates { store: true, .. }) => fleet_mode::FLEET_WITH_STORE,
        }
        .0 as u8;
        rodata.misses_per_window = fleet.map_or(0, |fleet| Rates::per_window(fleet.misses));
        rodata.connections_per_address = spec.rates.connections_per_address;
        rodata.messages_per_client = spec.rates.messages_per_client;
    }
    let place = Place::mqtt_fwd(spec)?;
    let prepared = prepare(spec, place.object, open.open_object_mut())?;
    if let Some(rodata) = open.maps.rodata_data.as_deref_mut() {
        rodata.has_predecessor = prepared.old.is_some().into();
    }
    let mut skel = open.load().map_err(|source| BpfError::Load { object: "mqtt_fwd", source })?;
    install(spec, &place, prepared, skel.object_mut())
}

/// [`load`], of another build's `mqtt_fwd`.
pub fn load_build(spec: &LoadSpec, mut open: OpenObject) -> Result<Loaded> {
    let place = Place::mqtt_fwd(spec)?;
    let prepared = prepare(spec, place.object, &mut open)?;
    let mut object = open.load().map_err(|source| BpfError::Load { object: "mqtt_fwd", source })?;
    install(spec, &place, prepared, &mut object)
}

/// Loads the embedded balancer into its position.
pub fn load_balancer(spec: &LoadSpec) -> Result<Loaded> {
    let mut storage = MaybeUninit::uninit();
    let mut open = open_skeleton(BalancerSkelBuilder::default(), "balancer", &mut storage)?;
    let place = Place::balancer(spec)?;
    let prepared = prepare(spec, place.object, open.open_object_mut())?;
    if let Some(rodata) = open.maps.rodata_data.as_deref_mut() {
        rodata.has_predecessor = prepared.old.is_some().into();
    }
    let mut skel = open.load().map_err(|source| BpfError::Load { object: "balancer", source })?;
    install(spec, &place, prepared, skel.object_mut())
}

/// Where a program goes, and the lock on it.
struct Place {
    object: pins::Object,
    program: &'static str,
    position: u32,
    root_reused: bool,
    _lock: Flock<File>,
}

impl Place {
    fn mqtt_fwd(spec: &LoadSpec) -> Result<Self> {
        let pins = &spec.pins;
        check_privileges()?;
        pins.check()?;
        xdp::interface_index(&spec.interface)?;
        let lock = pins.lock()?;
        namespace::claim(pins)?;
        recover_root_array(spec, pins)?;
        let existing = Chain::open(pins)?;
        let attached = xdp::attached(&spec.interface)?;
        let root_reused = check_attached(spec, pins, existing.as_ref(), attached.as_ref())?;
        if let Some(chain) = &existing {
            check_position(pins, chain, chain::MQTT_FWD, "mqtt_fwd")?;
        }
        Ok(Self {
            object: pins::Object::MqttFwd,
            program: "mqtt_fwd",
            position: chain::MQTT_FWD,
            root_reused,
            _lock: lock,
        })
    }

    fn balancer(spec: &LoadSpec) -> Result<Self> {
        let pins = &spec.pins;
        check_privileges()?;
        pins.check()?;
        let lock = pins.lock()?;
        namespace::claim(pins)?;
        let chain = Chain::open(pins)?.ok_or_else(|| BpfError::NotLoaded {
            path: pins.root_array().to_owned(),
            what: "there is no chain",
        })?;
        check_position(pins, &chain, chain::BALANCER, "balancer_ingress")?;
        Ok(Self {
            object: pins::Object::Balancer,
            program: "balancer_ingress",
            position: chain::BALANCER,
            root_reused: true,
            _lock: lock,
        })
    }
}

/// Which maps an object is going to use.
struct Prepared {
    /// Where its own are pinned.
    dir: PathBuf,
    /// Taken over as they are.
    adopted: Vec<String>,
    /// Those of another build, or of other sizes, that are in use.
    old: Option<PathBuf>,
}

/// Sets the sizes, and takes over the maps that fit.
fn prepare(spec: &LoadSpec, object: pins::Object, open: &mut OpenObject) -> Result<Prepared> {
    for mut map in open.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        if let Some(entries) = spec.maps.of(&name) {
            let failed = |source| BpfError::Map { map: name, action: "setting its size", source };
            map.set_max_entries(entries).map_err(failed)?;
        }
    }
    let dir = spec.pins.of_hash(object, &layout::hash_of(open));
    let old = spec.pins.current_target(object).filter(|old| *old != dir && old.exists());
    if old.is_some() {
        // Left by an upgrade that was cut short: what it holds is not what is in use.
        pins::remove_pins_in(&dir)?;
    }
    let adopted = adopt_maps(open, &|name| spec.pins.place(&dir, name))?;
    Ok(Prepared { dir, adopted, old })
}

/// Pins a loaded object's maps and program, moves what is to be moved, and lets packets at it.
fn install(
    spec: &LoadSpec,
    place: &Place,
    prepared: Prepared,
    object: &mut libbpf_rs::Object,
) -> Result<Loaded> {
    let pins = &spec.pins;
    let Prepared { dir, adopted, old } = prepared;
    let mut new_pins = NewPins::default();
    pins::make_dir(&dir)?;
    pin_new_maps(object, &|name| pins.place(&dir, name), &adopted, &mut new_pins)?;
    let chain = Chain::open(pins)?.ok_or_else(|| BpfError::NotLoaded {
        path: pins.root_array().to_owned(),
        what: "the program array vanished",
    })?;

    let mut upgrade = old.as_deref().map(|old| Upgrade::between(old, &dir)).transpose()?;
    if let Some(upgrade) = &mut upgrade {
        upgrade.before()?;
    }
    let predecessor = Predecessor::open(&dir)?;
    if let (Some(_), Some(old)) = (&upgrade, chain.program(place.position)) {
        let fd = match pins.pinned_program(place.program) {
            Some((fd, pinned)) if pinned.id == old.id => fd,
            _ => Program::fd_from_id(old.id).map_err(Predecessor::failed)?,
        };
        predecessor.set(fd.as_fd())?;
    }
    if let Some(mut adopt) = object.progs_mut().find(|program| program.name() == pins::ADOPT) {
        pin_program(&mut adopt, &pins.program(pins::ADOPT), &mut new_pins)?;
    }
    let mut program = object
        .progs_mut()
        .find(|program| program.name() == place.program)
        .ok_or_else(|| BpfError::NotLoaded { path: dir.clone(), what: "the program vanished" })?;
    pin_program(&mut program, &pins.program(place.program), &mut new_pins)?;
    chain.set(place.position, program.as_fd())?;
    let info = ProgramInfo::by_fd(program.as_fd()).ok_or_else(|| BpfError::NotLoaded {
        path: pins.program(place.program),
        what: "the program vanished",
    })?;
    pins.set_current(place.object, &dir)?;
    if !place.root_reused {
        attach_root(spec, pins, &chain, &mut new_pins)?;
    }
    new_pins.keep = true;

    let mut moved = None;
    if let (Some(mut upgrade), Some(old)) = (upgrade, old) {
        let counts = upgrade.after()?;
        predecessor.clear()?;
        count_as_added(&dir, &counts)?;
        pins::remove_pins_in(&old)?;
        info!(from = %old.display(), to = %dir.display(), "moved what the pinned maps held");
        moved = Some(counts);
    }
    let Place { root_reused, program, .. } = place;
    info!(interface = spec.interface, program, id = info.id, root_reused, "is in the chain");
    Ok(Loaded { root_reused: *root_reused, adopted, moved, program: info })
}

/// The program that knows the flows which are not moved yet (`upgrade`).
struct Predecessor(Option<MapHandle>);

impl Predecessor {
    fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("predecessor");
        if !path.exists() {
            return Ok(Self(None));
        }
        let failed = |source| BpfError::Pin { path: path.clone(), action: "opening", source };
        MapHandle::from_pinned_path(&path).map(|map| Self(Some(map))).map_err(failed)
    }

    fn failed(source: libbpf_rs::Error) -> BpfError {
        let map = "predecessor".to_owned();
        BpfError::Map { map, action: "putting the old program into it", source }
    }

    fn set(&self, program: BorrowedFd<'_>) -> Result<()> {
        let Some(map) = &self.0 else { return Ok(()) };
        let fd = program.as_raw_fd().cast_unsigned();
        map.update(0u32.bytes(), fd.bytes(), MapFlags::ANY).map_err(Self::failed)
    }

    fn clear(&self) -> Result<()> {
        match self.0.as_ref().map(|map| map.delete(0u32.bytes())) {
            Some(Err(source)) if source.kind() != libbpf_rs::ErrorKind::NotFound => {
                let map = "predecessor".to_owned();
                Err(BpfError::Map { map, action: "emptying", source })
            }
            _ => Ok(()),
        }
    }
}

/// What was moved was added, as far as evictions are concerned.
fn count_as_added(dir: &Path, moved: &Moved) -> Result<()> {
    let path = dir.join("map_uses");
    if !path.exists() {
        return Ok(());
    }
    let uses: Table<u32, map_use> = Table::open(&path)?;
    for (name, tracked) in catalog::tracked() {
        let mut cpus = uses.get_per_cpu(&tracked.index_of_ours())?;
        if let (Some(first), Some(count)) = (cpus.first_mut(), moved.entries.get(name)) {
            first.added += count;
            uses.put_per_cpu(&tracked.index_of_ours(), &cpus)?;
        }
    }
    Ok(())
}

/// Somebody removed the array's pin, while our root goes on using the array: pins it again.
pub(super) fn recover_root_array(spec: &LoadSpec, pins: &Pins) -> Result<()> {
    if pins.root_array().exists() {
        return Ok(());
    }
    let Some((_, root)) = pins.pinned_program("xdp_root") else { return Ok(()) };
    if xdp::attached(&spec.interface)?.is_none_or(|attached| attached.id != root.id) {
        return Ok(());
    }
    let array = root
        .map_ids
        .iter()
        .flatten()
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

/// Whether the root is on the interface already. A program that does not use the chain is in the way.
fn check_attached(
    spec: &LoadSpec,
    pins: &Pins,
    chain: Option<&Chain>,
    attached: Option<&ProgramInfo>,
) -> Result<bool> {
    let Some(program) = attached else { return Ok(false) };
    let program = pins.identify(program.clone());
    match chain.and_then(Chain::map_id).map_or(Some(false), |id| program.uses_map(id)) {
        Some(true) => return Ok(true),
        Some(false) => {}
        None => {
            let missing = "CAP_SYS_ADMIN (to tell what XDP program is attached)".to_owned();
            return Err(BpfError::Privileges { missing });
        }
    }
    Err(BpfError::ForeignXdp {
        interface: spec.interface.clone(),
        program: program.name,
        id: program.id,
        root_array: pins.root_array().to_owned(),
    })
}

/// The program at a position if it is ours, `None` if the position is free.
pub(super) fn check_position(
    pins: &Pins,
    chain: &Chain,
    position: u32,
    name: &str,
) -> Result<Option<ProgramInfo>> {
    let Some(there) = chain.program(position) else { return Ok(None) };
    let there = pins.identify(there);
    let ours = pins.pinned_program(name).is_some_and(|(_, pinned)| pinned.id == there.id)
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
        _ => pins.map_of(pins::Object::Balancer, "connections"),
    };
    program.uses_pinned_map(&map) == Some(true)
}

pub(super) fn open_skeleton<'obj, B: SkelBuilder<'obj>>(
    builder: B,
    object: &'static str,
    storage: &'obj mut MaybeUninit<libbpf_rs::OpenObject>,
) -> Result<B::Output> {
    builder.open(storage).map_err(|source| BpfError::Load { object, source })
}

/// Takes over maps that are pinned already. Returns those.
fn adopt_maps(object: &mut OpenObject, place: &dyn Fn(&str) -> PathBuf) -> Result<Vec<String>> {
    let mut adopted = Vec::new();
    for mut map in object.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        if !catalog::is_pinned(&name) {
            continue;
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
        if found != wanted && name != "root_array" {
            return Err(BpfError::MapMismatch { path, found, wanted });
        }
        map.reuse_fd(pinned.as_fd()).map_err(|source| BpfError::Map {
            map: name.clone(),
            action: "taking over the pinned one",
            source,
        })?;
        adopted.push(name);
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
        if !catalog::is_pinned(&name) || adopted.contains(&name) {
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
