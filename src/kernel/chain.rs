//! The chain: `root_array` and what is in its positions.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::PathBuf;

use libbpf_rs::{MapCore as _, MapFlags, MapHandle, MapType};

use super::abi::{Pod as _, chain_position, lb_stats, limits, real_definition, words_addr};
use super::pins::{Object, Pins};
use super::xdp::ProgramInfo;
use super::{BpfError, Result};

/// Position of `mqtt_fwd`.
pub const MQTT_FWD: u32 = chain_position::POSITION_MQTT_FWD.0;
/// Position of the balancer.
pub const BALANCER: u32 = chain_position::POSITION_BALANCER.0;
/// How many positions there are.
pub const POSITIONS: u32 = limits::ROOT_ARRAY_SIZE.0;

/// Packets of groups that the balancer dropped, since it knew no service for them: the embedded one's count, or that of
/// katran-patches/. `None`: it has none, or this process may not look (CAP_SYS_ADMIN).
pub fn balancer_misses(pins: &Pins) -> Option<u64> {
    let map = balancers_map(pins, "inner_dst_misses")?;
    let values = map.lookup_percpu(0u32.bytes(), MapFlags::ANY).ok()??;
    Some(values.iter().map(|value| u64::from_bytes(&value[..8])).sum())
}

/// Packets and bytes that the balancer sent to each real, for all VIPs; the embedded one and Katran count alike.
/// `None`: this process may not look.
pub fn real_traffic(pins: &Pins) -> Option<BTreeMap<IpAddr, (u64, u64)>> {
    let (reals, stats) = (balancers_map(pins, "reals")?, balancers_map(pins, "reals_stats")?);
    let mut traffic = BTreeMap::new();
    for number in 0..reals.max_entries().min(stats.max_entries()) {
        let Ok(Some(real)) = reals.lookup(number.bytes(), MapFlags::ANY) else { continue };
        let real = real_definition::from_bytes(real.get(..size_of::<real_definition>())?);
        if real.addr == [0; 4] {
            continue;
        }
        let Ok(Some(counts)) = stats.lookup_percpu(number.bytes(), MapFlags::ANY) else { continue };
        let counts = counts.iter().filter_map(|value| value.get(..size_of::<lb_stats>()));
        let sum = counts
            .map(lb_stats::from_bytes)
            .fold((0, 0), |(packets, bytes), one| (packets + one.v1, bytes + one.v2));
        // A real that was removed and added again has another number, and its old counts are its own.
        let all: &mut (u64, u64) =
            traffic.entry(words_addr(real.addr, real.v6 & 1 != 0)).or_default();
        *all = (all.0 + sum.0, all.1 + sum.1);
    }
    Some(traffic)
}

/// Connections that a Katran remembers, at most: it has a table for each CPU that forwards. `None`: it is no Katran, or this
/// process may not look.
pub fn remembered_connections(pins: &Pins) -> Option<u64> {
    let tables = balancers_map(pins, "lru_mapping")?;
    let of_cpu = |cpu: u32| {
        let id = tables.lookup(cpu.bytes(), MapFlags::ANY).ok()??;
        Some(u32::from_bytes(&id))
    };
    let ids: BTreeSet<u32> = (0..tables.max_entries()).filter_map(of_cpu).collect();
    let tables = ids.into_iter().filter_map(|id| MapHandle::from_map_id(id).ok());
    Some(tables.map(|table| u64::from(table.max_entries())).sum())
}

/// A map of the program in the balancer's position, or of the embedded one, by its pin.
fn balancers_map(pins: &Pins, name: &str) -> Option<MapHandle> {
    let of_program = || {
        let program = Chain::open(pins).ok()??.program(BALANCER)?;
        let maps = program.map_ids?.into_iter().filter_map(|id| MapHandle::from_map_id(id).ok());
        maps.into_iter().find(|map| map.name() == name)
    };
    of_program().or_else(|| MapHandle::from_pinned_path(pins.map_of(Object::Balancer, name)).ok())
}

/// A pinned `root_array`, ours or Katran's.
#[derive(Debug)]
pub struct Chain {
    map: MapHandle,
    path: PathBuf,
}

impl Chain {
    /// Opens the pinned array; `None` if there is none.
    pub fn open(pins: &Pins) -> Result<Option<Self>> {
        let path = pins.root_array().to_owned();
        if !path.exists() {
            return Ok(None);
        }
        let map = MapHandle::from_pinned_path(&path).map_err(|source| BpfError::Pin {
            path: path.clone(),
            action: "opening",
            source,
        })?;
        if map.map_type() != MapType::ProgArray || map.max_entries() < POSITIONS {
            return Err(BpfError::MapMismatch {
                found: format!("{:?} of {}", map.map_type(), map.max_entries()),
                wanted: format!("{:?} of {POSITIONS}", MapType::ProgArray),
                path,
            });
        }
        Ok(Some(Self { map, path }))
    }

    /// The array, for a program's object to use.
    pub fn map(&self) -> &MapHandle {
        &self.map
    }

    /// The kernel's identifier of the array.
    pub fn map_id(&self) -> Option<u32> {
        libbpf_rs::MapInfo::new(self.map.as_fd()).ok().map(|info| info.info.id)
    }

    /// The identifier of the program at a position.
    pub fn program_id(&self, position: u32) -> Option<u32> {
        // Of a program array, user space reads identifiers (and writes descriptors).
        let id = self.map.lookup(position.bytes(), MapFlags::ANY).ok()??;
        Some(u32::from_bytes(&id))
    }

    /// The program at a position.
    pub fn program(&self, position: u32) -> Option<ProgramInfo> {
        self.program_id(position).and_then(ProgramInfo::by_id)
    }

    /// Puts a program into a position, in one step for the packets.
    pub fn set(&self, position: u32, program: BorrowedFd<'_>) -> Result<()> {
        let fd = program.as_raw_fd().cast_unsigned();
        self.map.update(position.bytes(), fd.bytes(), MapFlags::ANY).map_err(|source| {
            BpfError::Pin { path: self.path.clone(), action: "putting a program into it", source }
        })
    }

    /// Empties a position.
    pub fn clear(&self, position: u32) -> Result<()> {
        match self.map.delete(position.bytes()) {
            Err(source) if source.kind() != libbpf_rs::ErrorKind::NotFound => Err(BpfError::Pin {
                path: self.path.clone(),
                action: "taking a program out of it",
                source,
            }),
            _ => Ok(()),
        }
    }
}
