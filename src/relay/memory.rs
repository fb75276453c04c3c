//! What clients have the relay keep: `[relay] max_memory`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::counter::Counter;

/// Memory that any connection takes, with two brokers and nothing under way.
pub const CONNECTION: usize = 16 << 10;

/// The memory of all holders together.
#[derive(Debug, Default)]
pub struct Memory {
    /// Bytes that are held.
    pub used: Counter,
    /// Those who hold something.
    holders: Counter,
    most: u64,
    /// The process has more than it may have, whatever is known to be held.
    over: AtomicBool,
}

impl Memory {
    /// With a ceiling, in bytes.
    pub fn new(most: u64) -> Arc<Self> {
        Arc::new(Self { most, ..Self::default() })
    }

    /// Whether more is held than may be, so that nothing new is begun.
    pub fn is_full(&self) -> bool {
        self.used.get() > self.most || self.over.load(Ordering::Relaxed)
    }

    /// Compares what the process has with the ceiling.
    pub fn check(&self, ceiling: u64) {
        let mut over = resident() > ceiling;
        if over {
            // What was given back may lie between what is in use.
            #[cfg(target_env = "gnu")]
            // SAFETY: it takes a number.
            unsafe {
                libc::malloc_trim(0);
            }
            over = resident() > ceiling;
        }
        self.over.store(over, Ordering::Relaxed);
    }
}

/// There is no memory left, and this one holds more than its share.
#[derive(Debug, thiserror::Error)]
#[error(
    "too much memory is in use ([relay] max_memory), and this connection holds more than its share"
)]
pub struct TooMuch;

impl From<TooMuch> for io::Error {
    fn from(too_much: TooMuch) -> Self {
        Self::new(io::ErrorKind::OutOfMemory, too_much)
    }
}

/// What one holds, until it is dropped.
#[derive(Debug)]
pub struct Held {
    memory: Arc<Memory>,
    bytes: usize,
}

impl Held {
    /// Nothing yet.
    pub fn new(memory: &Arc<Memory>) -> Self {
        memory.holders.add(1);
        Self { memory: Arc::clone(memory), bytes: 0 }
    }

    /// It holds so many bytes now. Fails if all together hold too much and this one more than an equal share:
    /// whoever holds less is left alone.
    pub fn set(&mut self, bytes: usize) -> Result<(), TooMuch> {
        if bytes > self.bytes {
            self.memory.used.add((bytes - self.bytes) as u64);
        } else if bytes < self.bytes {
            self.memory.used.sub((self.bytes - bytes) as u64);
        }
        self.bytes = bytes;
        let share = || self.memory.most / self.memory.holders.get().max(1);
        if self.memory.is_full() && bytes as u64 > share() { Err(TooMuch) } else { Ok(()) }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.memory.used.sub(self.bytes as u64);
        self.memory.holders.sub(1);
    }
}

/// The default ceiling: half of what this process may have.
pub fn half_of_the_machine() -> u64 {
    let total = nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |s| s.ram_total());
    total.min(cgroup_limit().unwrap_or(u64::MAX)) / 2
}

/// Bytes of memory that this process has.
pub fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
    pages * page.unwrap_or(4096).cast_unsigned()
}

/// `memory.max` of the control group, or of one around it.
fn cgroup_limit() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let group = std::path::Path::new("/sys/fs/cgroup").join(path);
    let limits = group.ancestors().take_while(|at| at.starts_with("/sys/fs/cgroup"));
    let read = |at: &std::path::Path| std::fs::read_to_string(at.join("memory.max")).ok();
    limits.filter_map(read).filter_map(|text| text.trim().parse().ok()).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_holds_most_goes_first_and_gives_back_what_it_held() {
        let memory = Memory::new(1000);
        let mut small: Vec<Held> = (0..3).map(|_| Held::new(&memory)).collect();
        for one in &mut small {
            one.set(200).unwrap();
        }
        let mut large = Held::new(&memory);
        large.set(400).unwrap();
        assert!(!memory.is_full());
        assert!(large.set(401).is_err());
        assert!(memory.is_full());
        // 250 each.
        assert!(small[0].set(201).is_ok());
        assert!(small[0].set(251).is_err());
        drop(large);
        assert!(!memory.is_full());
        assert!(small[0].set(300).is_ok());
        drop(small);
        assert_eq!((memory.used.get(), memory.holders.get()), (0, 0));
    }
}
