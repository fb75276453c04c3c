//! Typed access to maps.

use std::ffi::OsStr;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;

use libbpf_rs::{MapCore as _, MapFlags, MapHandle, MapType};

use super::abi::Pod;
use super::{BpfError, Result};

/// Entries asked for in one call. More bounds nothing, less costs calls.
const BATCH: u32 = 4096;
/// No bucket has so many.
const MAX_BATCH: u32 = 1 << 20;

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
        Self::new(map, name).map_err(|found| BpfError::OtherLayout {
            path: path.to_owned(),
            found,
            wanted: format!("{} + {}", size_of::<K>(), size_of::<V>()),
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
            return Err(format!("{} + {}", map.key_size(), map.value_size()));
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

    /// Sets the value at a key that is there; false: it is not.
    pub fn replace(&self, key: &K, value: &V) -> Result<bool> {
        match self.map.update(key.bytes(), value.bytes(), MapFlags::EXIST) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == libbpf_rs::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(self.failed("writing")(e)),
        }
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

    /// All entries of a hash map or an array, complete: see [`for_each_batch`].
    pub fn entries(&self) -> Result<Vec<(K, V)>> {
        let mut all = Vec::new();
        self.for_each(|key, value| all.push((key, value)))?;
        Ok(all)
    }

    /// Gives each of them to `handle`, and keeps none.
    pub fn for_each(&self, mut handle: impl FnMut(K, V)) -> Result<()> {
        for_each_batch(&self.map, |keys, values| {
            for (key, value) in keys.zip(values) {
                handle(K::from_bytes(key), V::from_bytes(value));
            }
            Ok(())
        })
    }

    /// All keys, as [`Table::entries`].
    pub fn keys(&self) -> Result<Vec<K>> {
        Ok(self.entries()?.into_iter().map(|(key, _)| key).collect())
    }

    /// All keys, of a map that is neither hash nor array, and that nobody else changes.
    pub fn keys_one_by_one(&self) -> Vec<K> {
        self.map.keys().map(|key| K::from_bytes(&key)).collect()
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

/// Keys or values of a batch.
pub type Chunks<'a> = std::iter::Take<Strided<'a>>;

/// Values as long as the map says, however the kernel pads them.
#[derive(Debug)]
pub struct Strided<'a> {
    chunks: std::slice::ChunksExact<'a, u8>,
    size: usize,
}

impl<'a> Iterator for Strided<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.chunks.next().map(|chunk| &chunk[..self.size])
    }
}

/// Gives all entries of a hash map, an array or a trie to `handle`, keys and values of some at a time.
/// Every entry that is there from the first moment to the last is among them, however packets
/// change the map meanwhile.
///
/// The kernel reads bucket by bucket and returns early when the next bucket does not fit, so a
/// short batch is not the last one; only ENOENT says so. Bounded by the number of buckets.
pub fn for_each_batch(
    map: &MapHandle,
    mut handle: impl FnMut(Chunks<'_>, Chunks<'_>) -> Result<()>,
) -> Result<()> {
    let (key_size, value_size) = (map.key_size() as usize, map.value_size() as usize);
    // Arrays' values are padded to eight bytes.
    let stride = match map.map_type() {
        MapType::Array => value_size.next_multiple_of(8),
        _ => value_size,
    };
    let mut room = BATCH.min(map.max_entries().max(16));
    let mut keys = vec![0u8; room as usize * key_size];
    let mut values = vec![0u8; room as usize * stride];
    // For hash maps the position is a bucket's number, four bytes, for others a key.
    let mut position: Option<Vec<u8>> = None;
    loop {
        let mut next = vec![0u8; key_size.max(4)];
        let mut count = room;
        let from = position.as_ref().map_or(std::ptr::null(), Vec::as_ptr);
        // SAFETY: the buffers have room for `count` keys and values, and the positions for
        // what the kernel has of them, all for the whole call.
        let error = unsafe {
            libbpf_sys::bpf_map_lookup_batch(
                map.as_fd().as_raw_fd(),
                from.cast_mut().cast(),
                next.as_mut_ptr().cast(),
                keys.as_mut_ptr().cast(),
                values.as_mut_ptr().cast(),
                &raw mut count,
                std::ptr::null(),
            )
        };
        let last = error == -libc::ENOENT;
        if error == -libc::ENOSPC && room < MAX_BATCH {
            // A bucket has more entries than there was room for.
            room *= 2;
            keys.resize(room as usize * key_size, 0);
            values.resize(room as usize * stride, 0);
            continue;
        }
        if error != 0 && !last {
            let source = std::io::Error::from_raw_os_error(-error).into();
            let map = map.name().to_string_lossy().into_owned();
            return Err(BpfError::Map { map, action: "reading", source });
        }
        let chunks = |bytes, stride, size| {
            Strided { chunks: <[u8]>::chunks_exact(bytes, stride), size }.take(count as usize)
        };
        handle(chunks(&keys, key_size, key_size), chunks(&values, stride, value_size))?;
        if last {
            return Ok(());
        }
        position = Some(next);
    }
}
