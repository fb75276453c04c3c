//! The chain as `run` holds it, by descriptors, which no other process can take away: what is removed
//! from bpffs or from the interface is put back from here, without loading anything.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use libbpf_rs::MapHandle;

use super::chain::{self, Chain};
use super::load::LoadSpec;
use super::pins::{self, Object, Pins};
use super::xdp::{self, ProgramInfo};
use super::{BpfError, Result};

/// A program of ours in a position of the chain.
#[derive(Debug)]
struct Placed {
    name: &'static str,
    position: u32,
    fd: OwnedFd,
    info: ProgramInfo,
}

/// An object's pinned maps.
#[derive(Debug)]
struct OfObject {
    object: Object,
    dir: PathBuf,
    maps: Vec<(PathBuf, MapHandle)>,
}

/// One interface's chain.
#[derive(Debug)]
pub struct ChainHandle {
    chain: Chain,
    /// Ours; `None`: the root on the interface is another's.
    root: Option<(OwnedFd, ProgramInfo)>,
    programs: Vec<Placed>,
    maps: Vec<OfObject>,
}

/// What [`ChainHandle::restore`] did, or found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// What was put back.
    pub put_back: Vec<String>,
    /// Another process loaded: what is held is no longer what is pinned.
    pub replaced: bool,
    /// The root was another's and is gone.
    pub rootless: bool,
}

impl ChainHandle {
    /// Opens all that is pinned; of the balancer only if that is this process' own.
    pub fn open(spec: &LoadSpec, own_balancer: bool) -> Result<Self> {
        let pins = &spec.pins;
        let chain = Chain::open(pins)?.ok_or_else(|| BpfError::NotLoaded {
            path: pins.root_array().to_owned(),
            what: "there is no chain",
        })?;
        let all = [
            (Object::MqttFwd, "mqtt_fwd", chain::MQTT_FWD),
            (Object::Balancer, "balancer_ingress", chain::BALANCER),
        ];
        let ours = || all.into_iter().take(if own_balancer { 2 } else { 1 });
        let placed = |(_, name, position)| {
            let (fd, info) = pins.pinned_program(name)?;
            Some(Placed { name, position, fd, info })
        };
        Ok(Self {
            chain,
            root: pins.pinned_program("xdp_root"),
            programs: ours().filter_map(placed).collect(),
            maps: ours().filter_map(|(object, ..)| OfObject::open(pins, object)).collect(),
        })
    }

    /// Puts back what is missing of it. What another put in its place is left, for
    /// `chain::health` to report.
    pub fn restore(&self, spec: &LoadSpec) -> Result<Restored> {
        let pins = &spec.pins;
        // Another process is loading or unloading: it is about to change all this.
        let Ok(_lock) = pins.try_lock() else { return Ok(Restored::default()) };
        let mut done = Restored::default();
        if self.is_replaced(pins)? {
            done.replaced = true;
            return Ok(done);
        }
        if !pins.root_array().exists() {
            pin(self.chain.map(), pins.root_array(), &mut done)?;
        }
        for object in &self.maps {
            object.restore(pins, &mut done)?;
        }
        for placed in &self.programs {
            pin_program(pins, placed.name, &placed.fd, &mut done)?;
            if self.chain.program_id(placed.position).is_none() {
                self.chain.set(placed.position, placed.fd.as_fd())?;
                done.put_back.push(format!("{} into position {}", placed.name, placed.position));
            }
        }
        let attached = xdp::attached(&spec.interface)?.is_some();
        if let Some((root, _)) = &self.root {
            pin_program(pins, "xdp_root", root, &mut done)?;
            if !attached {
                xdp::attach(&spec.interface, root.as_fd(), spec.xdp_mode)?;
                done.put_back.push(format!("xdp_root on {}", spec.interface));
            }
        } else {
            done.rootless = !attached;
        }
        Ok(done)
    }

    fn is_replaced(&self, pins: &Pins) -> Result<bool> {
        let other_chain = Chain::open(pins)?.is_some_and(|c| c.map_id() != self.chain.map_id());
        let ours = self.programs.iter().map(|p| (p.name, p.info.id));
        let root = self.root.iter().map(|(_, info)| ("xdp_root", info.id));
        let other_program = ours
            .chain(root)
            .any(|(name, id)| pins.pinned_program(name).is_some_and(|(_, info)| info.id != id));
        Ok(other_chain || other_program)
    }
}

impl OfObject {
    fn open(pins: &Pins, object: Object) -> Option<Self> {
        let dir = pins.current_target(object)?;
        let names = std::fs::read_dir(&dir).ok()?.flatten().map(|entry| entry.path());
        let shared = (object == Object::MqttFwd).then(|| pins.service_vips());
        let open = |path: PathBuf| Some((path.clone(), MapHandle::from_pinned_path(&path).ok()?));
        Some(Self { object, dir, maps: names.chain(shared).filter_map(open).collect() })
    }

    fn restore(&self, pins: &Pins, done: &mut Restored) -> Result<()> {
        if !self.dir.exists() {
            pins::make_dir(&self.dir)?;
        }
        for (path, map) in self.maps.iter().filter(|(path, _)| !path.exists()) {
            pin(map, path, done)?;
        }
        if pins.current_target(self.object).as_ref() != Some(&self.dir) {
            pins.set_current(self.object, &self.dir)?;
        }
        Ok(())
    }
}

fn pin(map: &MapHandle, path: &Path, done: &mut Restored) -> Result<()> {
    pins::pin(map.as_fd(), path)?;
    done.put_back.push(path.display().to_string());
    Ok(())
}

fn pin_program(
    pins: &Pins,
    name: &'static str,
    program: &OwnedFd,
    done: &mut Restored,
) -> Result<()> {
    let path = pins.program(name);
    if !path.exists() {
        pins::pin(program.as_fd(), &path)?;
        done.put_back.push(path.display().to_string());
    }
    Ok(())
}
