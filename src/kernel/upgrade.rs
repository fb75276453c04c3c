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

use super::catalog::{Role, role};
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
    /// What was written, as a hash of the old value it was made of.
    written: HashMap<Vec<u8>, u64>,
}

/// The move from one directory of pinned maps to another.
pub struct Upgrade {
    pairs: Vec<Pair>,
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
            if pair.role == Role::Flows {
                pair.copy(MapFlags::NO_EXIST)?;
            }
        }
        let mut moved = Moved::default();
        for pair in &mut self.pairs {
            if matches!(pair.role, Role::Flows | Role::Knowledge) {
                moved.entries.insert(pair.name.clone(), pair.catch_up()?);
            }
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
                        written.insert(key, fingerprint(old_value));
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

    /// Copies what the old program changed since, unless the new one changed it as well; how many
    /// entries there are in all.
    fn catch_up(&mut self) -> Result<u64> {
        let mut count = self.written.len() as u64;
        for_each_batch(&self.old, |keys, values| {
            for (old_key, old_value) in keys.zip(values) {
                let key = self.to.key.convert(&self.from.key, old_key);
                let known = self.written.get(&key);
                if known == Some(&fingerprint(old_value)) {
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
