//! Moves what pinned maps hold to maps of another layout or other sizes, while packets pass.
//!
//! The new program is put in its position with the old one as its `predecessor`: a segment whose
//! flow the new one does not know yet goes to the old one, which does, and whose maps it changes.
//! So nothing has to stand still while flows are moved, and what is moved late is not lost.
//!
//! ```text
//! configuration, clients, topics ─► new maps      (the old program works)
//! predecessor ← old program, position ← new one   (the new one works; of what it misses, the old)
//! flows ─► new maps, if they are not there yet
//! what the old program changed meanwhile ─► new maps, if the new one has not changed it, too
//! predecessor ← nothing
//! ```

use std::collections::{BTreeMap, HashMap};
use std::hash::Hasher as _;
use std::path::Path;

use libbpf_rs::{ErrorKind, MapCore as _, MapFlags, MapHandle, MapType};
use siphasher::sip::SipHasher13;

use super::abi::{Pod as _, flow_flags};
use super::catalog::{Role, role};
use super::flow_table::{Places, flow_tag, is_taken};
use super::layout::MapLayout;
use super::maps::for_each_batch;
use super::{BpfError, Result};

/// How much was moved.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Moved {
    /// Entries of each map.
    pub entries: BTreeMap<String, u64>,
}

/// A map's old and new incarnation.
struct Pair {
    name: String,
    role: Role,
    old: MapHandle,
    new: MapHandle,
    from: MapLayout,
    to: MapLayout,
    written: HashMap<Vec<u8>, Written>,
}

/// What was written to the new map, and what it was made of, as hashes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Written {
    old: u64,
    new: u64,
}

impl Written {
    fn of(old: &[u8], new: &[u8]) -> Self {
        Self { old: fingerprint(old), new: fingerprint(new) }
    }
}

/// The move from one directory of pinned maps to another.
pub struct Upgrade {
    pairs: Vec<Pair>,
}

/// A number of so many bytes.
fn number<const SIZE: usize>(value: &[u8], at: usize) -> u64 {
    let bytes = value.get(at..at + SIZE).unwrap_or_default();
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Gives a flow this build's tag, whatever the old one made it of; not one that has another flow's in part.
fn tag(f: &mut [u8], id: u64, bound: usize, next: usize) {
    if number::<4>(f, bound) == number::<4>(f, next) {
        for at in [bound, next] {
            f[at..at + 4].copy_from_slice(&flow_tag(id).to_le_bytes());
        }
    }
}

fn fingerprint(value: &[u8]) -> u64 {
    let mut hasher = SipHasher13::new();
    hasher.write(value);
    hasher.finish()
}

impl Upgrade {
    /// Of the maps that are in both.
    pub fn between(old: &Path, new: &Path) -> Result<Self> {
        let mut pairs = Vec::new();
        for entry in std::fs::read_dir(new).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let (old_path, new_path) = (old.join(&name), entry.path());
            let is_moved =
                matches!(role(&name), Role::Configuration | Role::Knowledge | Role::Flows);
            if !is_moved || !old_path.exists() {
                continue;
            }
            let open = |path: &Path| {
                MapHandle::from_pinned_path(path).map_err(|source| BpfError::Pin {
                    path: path.to_owned(),
                    action: "opening",
                    source,
                })
            };
            let (old, new) = (open(&old_path)?, open(&new_path)?);
            if old.map_type() != new.map_type() {
                tracing::warn!(
                    "{name}: another build keeps it in another way, so it starts empty here; connections that stand go by \
                     prediction from now on, and those that come to another broker by it are reset"
                );
                continue;
            }
            let (Some(from), Some(to)) = (MapLayout::of_map(&old), MapLayout::of_map(&new)) else {
                return Err(BpfError::NoLayout { path: old_path });
            };
            let written = HashMap::new();
            pairs.push(Pair { role: role(&name), name, old, new, from, to, written });
        }
        Ok(Self { pairs })
    }

    /// Moves what the new program needs before it works.
    pub fn before(&mut self) -> Result<()> {
        for pair in &mut self.pairs {
            if matches!(pair.role, Role::Configuration | Role::Knowledge) {
                pair.copy(MapFlags::ANY)?;
            }
        }
        Ok(())
    }

    /// Moves the rest, and what changed since [`Upgrade::before`].
    pub fn after(&mut self) -> Result<Moved> {
        for pair in &mut self.pairs {
            match (pair.role, pair.new.map_type()) {
                (Role::Flows, MapType::Array) => pair.copy_flows()?,
                (Role::Flows, _) => pair.copy(MapFlags::NO_EXIST)?,
                _ => {}
            }
        }
        let mut moved = Moved::default();
        for pair in &mut self.pairs {
            let entries = match (pair.role, pair.new.map_type()) {
                (Role::Flows, MapType::Array) => pair.catch_up_flows()?,
                (Role::Flows | Role::Knowledge, _) => pair.catch_up()?,
                _ => continue,
            };
            moved.entries.insert(pair.name.clone(), entries);
        }
        Ok(moved)
    }
}

impl Pair {
    fn failed(&self, action: &'static str) -> impl FnOnce(libbpf_rs::Error) -> BpfError + use<> {
        let map = self.name.clone();
        move |source| BpfError::Map { map, action, source }
    }

    /// Copies all entries. Those of an array that have no place any more must be empty.
    fn copy(&mut self, flags: MapFlags) -> Result<()> {
        let is_array = self.new.map_type() == MapType::Array;
        let capacity = self.new.max_entries();
        let remember = self.role != Role::Configuration;
        let mut written = std::mem::take(&mut self.written);
        for_each_batch(&self.old, |keys, values| {
            for (old_key, old_value) in keys.zip(values) {
                let empty = is_array && old_value.iter().all(|byte| *byte == 0);
                let key = self.to.key.convert(&self.from.key, old_key);
                if empty {
                    continue;
                }
                if is_array && u32::from_le_bytes([key[0], key[1], key[2], key[3]]) >= capacity {
                    return Err(BpfError::TooSmall { map: self.name.clone(), capacity });
                }
                let value = self.to.value.convert(&self.from.value, old_value);
                match self.new.update(&key, &value, flags) {
                    Ok(()) if remember => {
                        written.insert(key, Written::of(old_value, &value));
                    }
                    Ok(()) => {}
                    // The new program made it meanwhile.
                    Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                    Err(e) => return Err(self.failed("moving entries to")(e)),
                }
            }
            Ok(())
        })?;
        self.written = written;
        Ok(())
    }

    /// The new table of flows, and where they have their ids. What finds no free place there stays behind, as
    /// it would be displaced.
    fn flow_places(&self) -> Result<(Places, usize)> {
        let no_layout = || BpfError::NoLayout { path: self.name.clone().into() };
        let id_at = self.to.value.offset_of("id").ok_or_else(no_layout)?;
        Ok((Places::map(&self.new, id_at)?, id_at))
    }

    /// Each flow of the old table, by its id, in the new layout, with what that was made of.
    fn for_each_flow(&self, id_at: usize, mut handle: impl FnMut(u64, &[u8], &[u8])) -> Result<()> {
        let offset_of = |name| self.to.value.offset_of(name);
        let tagged = offset_of("bound").zip(offset_of("next"));
        for_each_batch(&self.old, |_, values| {
            for old_value in values {
                let mut f = self.to.value.convert(&self.from.value, old_value);
                let id = number::<8>(&f, id_at);
                if is_taken(id) {
                    if let Some((bound, next)) = tagged {
                        tag(&mut f, id, bound + 4, next + 4);
                    }
                    handle(id, &f, old_value);
                }
            }
            Ok(())
        })
    }

    /// Copies all flows, each to its place in the new table, first those that stand.
    fn copy_flows(&mut self) -> Result<()> {
        let (places, id_at) = self.flow_places()?;
        let flags_at = self.to.value.offset_of("flags").unwrap_or_default();
        let over = u64::from(flow_flags::FLOW_CLOSING.0 | flow_flags::FLOW_PROBATION.0);
        let mut written = HashMap::new();
        for is_over in [false, true] {
            self.for_each_flow(id_at, |id, f, old| {
                if (number::<2>(f, flags_at) & over != 0) == is_over && places.insert(id, f) {
                    written.insert(id.bytes().to_vec(), Written::of(old, f));
                }
            })?;
        }
        self.written = written;
        Ok(())
    }

    /// As [`Pair::catch_up`].
    fn catch_up_flows(&mut self) -> Result<u64> {
        let (places, id_at) = self.flow_places()?;
        let mut count = self.written.len() as u64;
        self.for_each_flow(id_at, |id, f, old| match self.written.get(id.bytes()) {
            Some(known) if known.old == fingerprint(old) => {}
            Some(known) => {
                places.replace(id, |was| fingerprint(was) == known.new, f);
            }
            None => count += u64::from(places.insert(id, f)),
        })?;
        Ok(count)
    }

    /// Copies what the old program changed since, unless the new one changed it as well; how many
    /// entries there are in all.
    fn catch_up(&mut self) -> Result<u64> {
        let mut count = self.written.len() as u64;
        for_each_batch(&self.old, |keys, values| {
            for (old_key, old_value) in keys.zip(values) {
                let key = self.to.key.convert(&self.from.key, old_key);
                let known = self.written.get(&key);
                if known.is_some_and(|known| known.old == fingerprint(old_value)) {
                    continue;
                }
                let is_new = |known: &Written| {
                    let now = self.new.lookup(&key, MapFlags::ANY).ok().flatten();
                    now.is_none_or(|now| fingerprint(&now) != known.new)
                };
                if known.is_some_and(is_new) {
                    continue;
                }
                let value = self.to.value.convert(&self.from.value, old_value);
                let flags = if known.is_some() { MapFlags::EXIST } else { MapFlags::NO_EXIST };
                match self.new.update(&key, &value, flags) {
                    Ok(()) => count += u64::from(known.is_none()),
                    // Made, or evicted, by the new program meanwhile.
                    Err(e)
                        if matches!(e.kind(), ErrorKind::AlreadyExists | ErrorKind::NotFound) => {}
                    Err(e) => return Err(self.failed("moving entries to")(e)),
                }
            }
            Ok(())
        })?;
        Ok(count)
    }
}
