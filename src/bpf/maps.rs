//! Typed access to maps.

use std::ffi::OsStr;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::AsFd as _;
use std::path::Path;

use libbpf_rs::{MapCore as _, MapFlags, MapHandle};

use super::types::Pod;
use super::{BpfError, Result};

/// A map with keys `K` and values `V`. Owns a descriptor, so it may outlive the skeleton.
#[derive(Debug)]
pub struct Table<K, V> {
    map: MapHandle,
    name: String,
    types: PhantomData<fn(K) -> V>,
}

impl<K: Pod, V: Pod> Table<K, V> {
    /// Opens a pinned map.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let map = MapHandle::from_pinned_path(path).map_err(|_| BpfError::NotLoaded {
            path: path.to_owned(),
            what: "no such map is pinned, or it is not ours to read",
        })?;
        Self::new(map, name).map_err(|found| BpfError::MapMismatch {
            path: path.to_owned(),
            found,
            wanted: format!("{} B → {} B", size_of::<K>(), size_of::<V>()),
        })
    }

    /// Wraps a map of a loaded object.
    pub fn of(map: &libbpf_rs::MapMut<'_>) -> Result<Self> {
        let name = map.name().to_string_lossy().into_owned();
        let handle = MapHandle::try_from(map).map_err(|source| BpfError::Map {
            map: name.clone(),
            action: "opening",
            source,
        })?;
        Ok(Self::new(handle, name).unwrap_or_else(|e| panic!("skeleton and types differ: {e}")))
    }

    fn new(map: MapHandle, name: String) -> Result<Self, String> {
        if map.key_size() as usize != size_of::<K>() || map.value_size() as usize != size_of::<V>()
        {
            return Err(format!("{} B → {} B", map.key_size(), map.value_size()));
        }
        Ok(Self { map, name, types: PhantomData })
    }

    /// The kernel's identifier of the map.
    pub fn id(&self) -> Option<u32> {
        libbpf_rs::MapInfo::new(self.map.as_fd()).ok().map(|info| info.info.id)
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(libbpf_rs::Error) -> BpfError + '_ {
        move |source| BpfError::Map { map: self.name.clone(), action, source }
    }

    /// The value at `key`.
    pub fn get(&self, key: &K) -> Result<Option<V>> {
        let value = self.map.lookup(key.bytes(), MapFlags::ANY).map_err(self.failed("reading"))?;
        Ok(value.map(|bytes| V::from_bytes(&bytes)))
    }

    /// Sets the value at `key`.
    pub fn put(&self, key: &K, value: &V) -> Result<()> {
        self.map.update(key.bytes(), value.bytes(), MapFlags::ANY).map_err(self.failed("writing"))
    }

    /// Sets many values with few calls.
    pub fn put_all(&self, entries: &[(K, V)]) -> Result<()> {
        // Bounds the kernel's temporary copies.
        for part in entries.chunks(4096) {
            let keys: Vec<u8> = part.iter().flat_map(|(k, _)| k.bytes()).copied().collect();
            let values: Vec<u8> = part.iter().flat_map(|(_, v)| v.bytes()).copied().collect();
            self.map
                .update_batch(&keys, &values, part.len() as u32, MapFlags::ANY, MapFlags::ANY)
                .map_err(self.failed("writing"))?;
        }
        Ok(())
    }

    /// Removes `key`; whether it was there.
    pub fn remove(&self, key: &K) -> Result<bool> {
        match self.map.delete(key.bytes()) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == libbpf_rs::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(self.failed("deleting")(e)),
        }
    }

    /// All keys. Entries that come and go meanwhile may or may not be among them.
    pub fn keys(&self) -> impl Iterator<Item = K> + '_ {
        self.map.keys().map(|bytes| K::from_bytes(&bytes))
    }

    /// All entries of a hash map, read in batches.
    pub fn entries(&self) -> Result<Vec<(K, V)>> {
        let batches = self
            .map
            .lookup_batch(4096, MapFlags::ANY, MapFlags::ANY)
            .map_err(self.failed("reading"))?;
        Ok(batches.map(|(k, v)| (K::from_bytes(&k), V::from_bytes(&v))).collect())
    }

    /// A per-CPU map's values at `key`.
    pub fn get_per_cpu(&self, key: &K) -> Result<Vec<V>> {
        let values =
            self.map.lookup_percpu(key.bytes(), MapFlags::ANY).map_err(self.failed("reading"))?;
        Ok(values
            .unwrap_or_default()
            .iter()
            .map(|bytes| V::from_bytes(&bytes[..size_of::<V>()]))
            .collect())
    }

    /// Sets a per-CPU map's values at `key`, one for each CPU.
    pub fn put_per_cpu(&self, key: &K, values: &[V]) -> Result<()> {
        let values: Vec<Vec<u8>> = values.iter().map(|v| v.bytes().to_vec()).collect();
        self.map.update_percpu(key.bytes(), &values, MapFlags::ANY).map_err(self.failed("writing"))
    }

    /// Capacity.
    pub fn max_entries(&self) -> u32 {
        self.map.max_entries()
    }

    /// The kernel's handle.
    pub fn handle(&self) -> &MapHandle {
        &self.map
    }

    /// The map's name.
    pub fn name(&self) -> &OsStr {
        OsStr::new(&self.name)
    }
}
