//! What the datapath counts: packets by reason, and how full its maps are.

use serde::Serialize;

use super::Datapath;
use crate::kernel::Result;
use crate::kernel::abi::{Pod, map_use};
use crate::kernel::catalog::{self, Tracked};
use crate::kernel::maps::Table;
use crate::kernel::reasons::{REASONS, Reason};

/// The counters at one moment, in the order of [`REASONS`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters(Vec<u64>);

impl Counters {
    /// Of values in the order of [`REASONS`].
    pub fn of(values: Vec<u64>) -> Self {
        Self(values)
    }

    /// One of them; 0 if there is none of that name.
    pub fn get(&self, name: &str) -> u64 {
        let at = REASONS.iter().position(|reason| reason.name == name);
        at.and_then(|at| self.0.get(at)).copied().unwrap_or_default()
    }

    /// Whether any of them is larger than the other's: those began at zero since.
    pub fn is_beyond(&self, later: &Self) -> bool {
        self.0.iter().zip(&later.0).any(|(before, now)| before > now)
    }

    /// By how much each has grown since.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let grown =
            |(i, now): (usize, &u64)| now.saturating_sub(before.0.get(i).copied().unwrap_or(0));
        Self(self.0.iter().enumerate().map(grown).collect())
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&'static Reason, u64)> + '_ {
        REASONS.iter().zip(self.0.iter().copied())
    }

    /// The sum of some of them.
    pub fn sum(&self, is_meant: impl Fn(&Reason) -> bool) -> u64 {
        self.iter().filter(|(reason, _)| is_meant(reason)).map(|(_, n)| n).sum()
    }
}

/// One counter, for tables.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Counter {
    pub name: String,
    /// A packet has exactly one verdict, and any number of notes.
    pub is_verdict: bool,
    pub count: u64,
    pub meaning: String,
}

impl From<(&'static Reason, u64)> for Counter {
    fn from((reason, count): (&'static Reason, u64)) -> Self {
        Self {
            name: reason.name.to_owned(),
            is_verdict: reason.is_verdict,
            count,
            meaning: reason.text.to_owned(),
        }
    }
}

/// How full a map is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MapUse {
    pub map: String,
    pub capacity: u32,
    pub used: u64,
    /// Entries displaced by newer ones since the map was made.
    pub evicted: u64,
}

impl Datapath {
    /// The reasons' counters, summed over CPUs.
    pub fn counters(&self) -> Result<Counters> {
        let of_cpus = self.counters.get_per_cpu(&0)?;
        let sum = |i: usize| of_cpus.iter().map(|cpu| cpu.of[i]).sum();
        Ok(Counters((0..REASONS.len()).map(sum).collect()))
    }

    /// The maps that packets fill, and how full they are.
    pub fn map_uses(&self) -> Result<Vec<MapUse>> {
        catalog::tracked().map(|(name, tracked)| self.map_use(name, tracked)).collect()
    }

    fn map_use(&self, name: &str, tracked: Tracked) -> Result<MapUse> {
        match tracked {
            Tracked::Flows => self.use_of_flows(name, tracked),
            Tracked::Clients => self.use_of(name, tracked, &self.clients),
            Tracked::Clients6 => self.use_of(name, tracked, &self.clients6),
            Tracked::Topics => self.use_of(name, tracked, &self.topics),
            Tracked::ClientIds => self.use_of(name, tracked, &self.client_ids),
            Tracked::Handovers => self.use_of(name, tracked, &self.handovers),
        }
    }

    /// Closing flows, and those on probation, give their places to others as they should. There are twice as many
    /// places as flows are meant to be.
    fn use_of_flows(&self, name: &str, tracked: Tracked) -> Result<MapUse> {
        let mut used = 0;
        self.for_each_standing(|_, _| used += 1)?;
        Ok(MapUse {
            map: name.to_owned(),
            capacity: self.flows.places() / 2,
            used,
            evicted: self.map_uses.get_per_cpu(&tracked.index())?.iter().map(|u| u.removed).sum(),
        })
    }

    /// Counts what this process added to a map, or removed from it.
    pub fn count_own(&self, tracked: Tracked, added: u64, removed: u64) -> Result<()> {
        let mut cpus = self.map_uses.get_per_cpu(&tracked.index_of_ours())?;
        if let Some(first) = cpus.first_mut() {
            (first.added, first.removed) = (first.added + added, first.removed + removed);
        }
        self.map_uses.put_per_cpu(&tracked.index_of_ours(), &cpus)
    }

    fn use_of<K: Pod, V: Pod>(
        &self,
        name: &str,
        tracked: Tracked,
        map: &Table<K, V>,
    ) -> Result<MapUse> {
        // Packets go on adding and removing: the number of added entries is read first and that of removed ones
        // last, so that no entry seems evicted that was not.
        let uses = || -> Result<Vec<map_use>> {
            let ours = self.map_uses.get_per_cpu(&tracked.index_of_ours())?;
            Ok([self.map_uses.get_per_cpu(&tracked.index())?, ours].concat())
        };
        let added: u64 = uses()?.iter().map(|u| u.added).sum();
        let used = map.keys()?.len() as u64;
        let removed: u64 = uses()?.iter().map(|u| u.removed).sum();
        Ok(MapUse {
            map: name.to_owned(),
            capacity: map.max_entries(),
            used,
            evicted: added.saturating_sub(removed).saturating_sub(used),
        })
    }
}
