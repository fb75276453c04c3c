//! The table of flows (`bpf/forward/flow/table.h`). As a whole it is read, and flows are marked, and moved at an
//! upgrade, in memory, by the rules of the datapath, which goes on writing to it.

use std::mem::offset_of;
use std::num::NonZeroUsize;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use libbpf_rs::{MapCore as _, MapHandle};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use siphasher::sip::SipHasher13;

use super::abi::{Pod as _, flow, flow6, limits};
use super::maps::Table;
use super::{BpfError, Result};

/// Places of a set, of which a flow has two.
const WAYS: u32 = limits::FLOW_WAYS.0;
/// Values of `flow.id` that are no flow's.
const FREE: u64 = 0;
const CLAIMED: u64 = u64::MAX;

/// A flow's id, by the same rule as `flow_id()` of `bpf/forward/flow/conn.h`.
pub fn flow_id(key: &flow6, v6: bool, secret: [u64; 2]) -> u64 {
    let key = if v6 {
        SipHasher13::new_with_keys(secret[0], secret[1]).hash(key.bytes()) | 1 << 63
    } else {
        u64::from(key.addr[0]) | u64::from(key.port) << 32 | u64::from(key.service) << 48
    };
    let id = (key ^ secret[0]).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let id = (id ^ id >> 32).wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
    match id ^ id >> 32 {
        FREE | CLAIMED => 1,
        id => id,
    }
}

/// What the place of a flow says of whose it is: `flow_tag` in `bpf/forward/flow/conn.h`.
pub fn flow_tag(id: u64) -> u32 {
    ((id ^ id >> 32) as u32).max(1)
}

/// Whether a place is some flow's.
pub fn is_taken(id: u64) -> bool {
    id != FREE && id != CLAIMED
}

/// A flow's places in a table of so many, the likelier ones first (`flow_place()`).
pub fn candidates(places: u32, id: u64) -> impl Iterator<Item = u32> {
    let sets = u64::from(places / WAYS);
    [(id >> 32) as u32, id as u32].into_iter().flat_map(move |half| {
        let set = ((u64::from(half) * sets) >> 32) as u32 * WAYS;
        (0..WAYS).map(move |i| set + (half.wrapping_add(i) & (WAYS - 1)))
    })
}

/// The table.
#[derive(Debug)]
pub struct FlowTable(Table<u32, flow>);

impl FlowTable {
    /// Opens the pinned one.
    pub fn open(path: &Path) -> Result<Self> {
        Table::open(path).map(Self)
    }

    /// Of a loaded object.
    pub fn of(map: &libbpf_rs::MapMut<'_>) -> Result<Self> {
        Table::of(map).map(Self)
    }

    /// How many places there are.
    pub fn places(&self) -> u32 {
        self.0.max_entries()
    }

    /// The flow at a place, if there is one.
    pub fn get(&self, place: u32) -> Result<Option<flow>> {
        Ok(self.0.get(&place)?.filter(|f| is_taken(f.id)))
    }

    /// The flow of an id, with its place.
    pub fn find(&self, id: u64) -> Result<Option<(u32, flow)>> {
        for place in candidates(self.places(), id) {
            if let Some(f) = self.get(place)?.filter(|f| f.id == id) {
                return Ok(Some((place, f)));
            }
        }
        Ok(None)
    }

    /// The table in memory, for as long as the answer is kept: all of it counts as the process's meanwhile.
    pub fn mapped(&self) -> Result<Mapped> {
        Places::map(self.0.handle(), offset_of!(flow, id)).map(Mapped)
    }
}

/// Places in memory, of this build's layout or another's.
#[derive(Debug)]
pub struct Places {
    memory: NonNull<u64>,
    count: u32,
    /// Words of each.
    size: usize,
    /// Which of them is its flow's id.
    id_at: usize,
}

impl Places {
    /// A table's, whose flows have their ids at an offset in bytes.
    pub fn map(table: &MapHandle, id_at: usize) -> Result<Self> {
        let (count, size) = (table.max_entries(), table.value_size().div_ceil(8) as usize);
        assert!(id_at.is_multiple_of(8) && id_at / 8 < size, "an id is a word of its flow");
        let length = NonZeroUsize::new(count as usize * size * 8).unwrap_or(NonZeroUsize::MIN);
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping of a map that is open, and unmapped once, when this is dropped.
        let memory = unsafe { mmap(None, length, rights, MapFlags::MAP_SHARED, table.as_fd(), 0) };
        let memory = memory.map_err(|e| BpfError::Map {
            map: table.name().to_string_lossy().into_owned(),
            action: "mapping into memory",
            source: std::io::Error::from(e).into(),
        })?;
        Ok(Self { memory: memory.cast(), count, size, id_at: id_at / 8 })
    }

    fn at(&self, place: u32) -> *mut u64 {
        assert!(place < self.count, "a place of the table");
        // SAFETY: within the mapping.
        unsafe { self.memory.as_ptr().add(place as usize * self.size) }
    }

    fn id(&self, place: u32) -> &AtomicU64 {
        // SAFETY: within the place (`map`), and mapped as long as this lives.
        unsafe { AtomicU64::from_ptr(self.at(place).add(self.id_at)) }
    }

    fn find(&self, id: u64) -> Option<u32> {
        candidates(self.count, id).find(|place| self.id(*place).load(Ordering::Acquire) == id)
    }

    /// Writes all of a flow but its id.
    fn write(&self, place: u32, f: &[u8]) {
        let (at, words) = (self.at(place), f.chunks_exact(8));
        assert!(words.len() <= self.size, "a flow of this table");
        for (word, value) in words.enumerate().filter(|(word, _)| *word != self.id_at) {
            let value = u64::from_ne_bytes(value.try_into().unwrap_or_default());
            // SAFETY: within the place.
            unsafe { at.add(word).write_volatile(value) };
        }
    }

    /// The flow in a claimed place.
    fn read(&self, place: u32, id: u64) -> Vec<u8> {
        let at = self.at(place);
        let word = |i| {
            // SAFETY: within the place.
            if i == self.id_at { id } else { unsafe { at.add(i).read_volatile() } }
        };
        (0..self.size).flat_map(|i| word(i).to_ne_bytes()).collect()
    }

    /// Puts a flow in a free place; false: it is there already, or there is none.
    pub fn insert(&self, id: u64, f: &[u8]) -> bool {
        if self.find(id).is_some() {
            return false;
        }
        let claim = |place: &u32| {
            let id = self.id(*place);
            id.compare_exchange(FREE, CLAIMED, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let Some(place) = candidates(self.count, id).find(claim) else { return false };
        self.write(place, f);
        // The datapath may have come to know it meanwhile.
        let is_new = self.find(id).is_none();
        self.id(place).store(if is_new { id } else { FREE }, Ordering::Release);
        is_new
    }

    /// Writes a flow over another state of it, if that is what `was` says it is; false: it is another's, or gone.
    pub fn replace(&self, id: u64, was: impl FnOnce(&[u8]) -> bool, f: &[u8]) -> bool {
        let claim = |place: &u32| {
            let now = self.id(*place);
            now.compare_exchange(id, CLAIMED, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let Some(place) = candidates(self.count, id).find(claim) else { return false };
        let is_it = was(&self.read(place, id));
        if is_it {
            self.write(place, f);
        }
        self.id(place).store(id, Ordering::Release);
        is_it
    }

    /// Forgets a flow, as if another had been given its place.
    pub fn remove(&self, id: u64) -> bool {
        self.find(id).is_some_and(|place| {
            let was = self.id(place);
            was.compare_exchange(id, FREE, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, and nothing refers to it any more.
        let unmapped = unsafe { munmap(self.memory.cast(), self.count as usize * self.size * 8) };
        debug_assert!(unmapped.is_ok());
    }
}

/// The table in memory, of this build's flows.
#[derive(Debug)]
pub struct Mapped(Places);

impl Mapped {
    /// The places, whatever is in them.
    pub fn places(&self) -> &Places {
        &self.0
    }

    fn at(&self, place: u32) -> *mut flow {
        self.0.at(place).cast()
    }

    /// All flows, with their places.
    pub fn entries(&self) -> impl Iterator<Item = (u32, flow)> + '_ {
        (0..self.0.count).filter_map(|place| {
            let id = self.0.id(place).load(Ordering::Acquire);
            if !is_taken(id) {
                return None;
            }
            // SAFETY: any bytes are a flow; the datapath may write to it, as it may to what a system call copies.
            let read = unsafe { self.at(place).read_volatile() };
            (read.id == id).then_some((place, read))
        })
    }

    /// Sets flags of a flow, and what goes with them: where it was ended, and its rescue. False: the place is another's.
    pub fn mark(&self, place: u32, f: &flow, flags: u16) -> bool {
        if self.0.id(place).load(Ordering::Acquire) != f.id {
            return false;
        }
        let at = self.at(place);
        // SAFETY: fields of a flow within the mapping, each written at once.
        unsafe {
            (&raw mut (*at).__anon_flow_3).write_volatile(f.__anon_flow_3);
            (&raw mut (*at).__anon_flow_4).write_volatile(f.__anon_flow_4);
            (&raw mut (*at).candidates).write_volatile(f.candidates);
            AtomicU16::from_ptr(&raw mut (*at).flags).fetch_or(flags, Ordering::Release);
        }
        true
    }
}
