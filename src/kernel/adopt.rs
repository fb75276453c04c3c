//! Takes over a chain of ours whose pins were removed: pins again what the programs on the interface
//! use. [`super::load::load`] does the rest, as it does after an upgrade.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};

use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};
use libbpf_rs::{MapCore as _, MapHandle, OpenObject, Program};

use super::chain::{self, Chain};
use super::load::{LoadSpec, check_privileges};
use super::pins::{self, Object, Pins};
use super::skeletons::balancer::BalancerSkelBuilder;
use super::skeletons::mqtt_fwd::MqttFwdSkelBuilder;
use super::xdp::{self, ProgramInfo};
use super::{BpfError, Result, catalog, namespace, privileges};

/// Characters of a name that the kernel keeps (BPF_OBJ_NAME_LEN, less the zero).
const NAME_KEPT: usize = 15;

/// Adopts. Returns what was pinned again.
pub fn adopt(spec: &LoadSpec) -> Result<Vec<String>> {
    check_privileges()?;
    if !privileges::sees_layouts() {
        let missing = "CAP_SYS_ADMIN (to find maps by their programs)".to_owned();
        return Err(BpfError::Privileges { missing });
    }
    let pins = &spec.pins;
    pins.check()?;
    let _lock = pins.lock()?;
    namespace::claim(pins)?;
    let mut done = Vec::new();
    if let Some(root) = xdp::attached(&spec.interface)?.filter(|root| root.name == "xdp_root") {
        adopt_program(pins, "xdp_root", &root, &mut done)?;
        if !pins.root_array().exists() {
            let array = maps_of(&root).into_iter().find(|map| is_called(map, "root_array"));
            if let Some(array) = array {
                pins::pin(array.as_fd(), pins.root_array())?;
                done.push(pins.root_array().display().to_string());
            }
        }
    }
    let Some(chain) = Chain::open(pins)? else { return Ok(done) };
    for (object, name, position) in [
        (Object::MqttFwd, "mqtt_fwd", chain::MQTT_FWD),
        (Object::Balancer, "balancer_ingress", chain::BALANCER),
    ] {
        if let Some(program) = chain.program(position).filter(|p| is_of(p, name, object)) {
            adopt_program(pins, name, &program, &mut done)?;
            adopt_maps(pins, object, &program, &mut done)?;
        }
    }
    Ok(done)
}

/// Katran's balancer has the same name as the embedded one, but not its maps.
fn is_of(program: &ProgramInfo, name: &str, object: Object) -> bool {
    let own = if object == Object::Balancer { "connections6" } else { "binding_cache" };
    name.starts_with(&program.name) && maps_of(program).iter().any(|map| is_called(map, own))
}

fn is_called(map: &MapHandle, name: &str) -> bool {
    map.name().to_string_lossy() == name[..name.len().min(NAME_KEPT)]
}

fn maps_of(program: &ProgramInfo) -> Vec<MapHandle> {
    let ids = program.map_ids.iter().flatten();
    ids.filter_map(|id| MapHandle::from_map_id(*id).ok()).collect()
}

fn adopt_program(
    pins: &Pins,
    name: &str,
    program: &ProgramInfo,
    done: &mut Vec<String>,
) -> Result<()> {
    let path = pins.program(name);
    if !path.exists() {
        let failed = |source| BpfError::Pin { path: path.clone(), action: "opening", source };
        let fd: OwnedFd = Program::fd_from_id(program.id).map_err(failed)?;
        pins::pin(fd.as_fd(), &path)?;
        done.push(path.display().to_string());
    }
    Ok(())
}

fn adopt_maps(
    pins: &Pins,
    object: Object,
    program: &ProgramInfo,
    done: &mut Vec<String>,
) -> Result<()> {
    // Which build's these are is not known: `load` finds out, and moves what they hold if need be.
    let dir = match pins.current_target(object).filter(|dir| dir.exists()) {
        Some(dir) => dir,
        None => pins.of_hash(object, "adopted"),
    };
    pins::make_dir(&dir)?;
    let maps = maps_of(program);
    for name in names(object)? {
        let path = pins.place(&dir, &name);
        if let Some(map) = maps.iter().find(|map| is_called(map, &name))
            && !path.exists()
        {
            pins::pin(map.as_fd(), &path)?;
            done.push(path.display().to_string());
        }
    }
    pins.set_current(object, &dir)
}

/// The whole names of an object's maps.
fn names(object: Object) -> Result<Vec<String>> {
    let list = |open: &OpenObject| {
        let names = open.maps().map(|map| map.name().to_string_lossy().into_owned());
        names.filter(|name| catalog::is_pinned(name)).collect()
    };
    let failed = |source| BpfError::Load { object: "its maps", source };
    let mut storage = MaybeUninit::uninit();
    if object == Object::Balancer {
        let open = BalancerSkelBuilder::default().open(&mut storage).map_err(failed)?;
        return Ok(list(open.open_object()));
    }
    let open = MqttFwdSkelBuilder::default().open(&mut storage).map_err(failed)?;
    Ok(list(open.open_object()))
}
