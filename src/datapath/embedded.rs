//! The embedded balancer's state: the balancer for where no Katran is at hand. It lives in pinned maps, so it
//! survives the server.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::domain::Vip;
use crate::kernel;
use crate::kernel::abi::{
    Pod as _, balancer_limits, gateway, lb_stats, real_definition, vip_definition, vip_meta,
    vip_real,
};
use crate::kernel::abi::{addr_words, balancer_stat, vip_key, words_addr};
use crate::kernel::maps::Table;
use crate::kernel::pins::{Object, Pins};
use crate::routes::ring::{self, Member};

const _: () = assert!(ring::SIZE == balancer_limits::RING_SIZE.0 as usize);

/// Why a request was refused.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("there is a VIP {0} already")]
    VipExists(Vip),
    #[error("there is no VIP {0}")]
    NoVip(Vip),
    #[error("VIP {0}: only TCP VIPs with a port are balanced here")]
    NotTcp(Vip),
    #[error("there are {0} VIPs already, as many as fit; raise maps.vips")]
    TooManyVips(u32),
    #[error("there are {0} reals already, as many as fit")]
    TooManyReals(u32),
    #[error("VIP {0} has no real {1}")]
    NoReal(Vip, IpAddr),
    #[error("real {1} is IPv4 and cannot get packets of the IPv6 VIP {0}")]
    MixedFamilies(Vip, IpAddr),
    #[error("real {0}: its weight must be at least 1; to stop its traffic, remove it")]
    NoWeight(IpAddr),
    #[error("random numbers: {0}")]
    Random(getrandom::Error),
    #[error(transparent)]
    Bpf(#[from] kernel::BpfError),
}

type Result<T> = std::result::Result<T, Refusal>;

/// Handles on the balancer's maps.
#[derive(Debug)]
pub struct Embedded {
    vips: Table<vip_definition, vip_meta>,
    rings: Table<u32, u32>,
    reals: Table<u32, real_definition>,
    members: Table<vip_real, u32>,
    gateway: Table<u32, gateway>,
    vip_stats: Table<u32, lb_stats>,
    reals_stats: Table<u32, lb_stats>,
    stats: Table<u32, lb_stats>,
}

impl Embedded {
    /// Opens the maps that [`crate::kernel::load::load_balancer`] pinned.
    pub fn open(pins: &Pins) -> kernel::Result<Self> {
        let dir = pins.current(Object::Balancer);
        Ok(Self {
            vips: Table::open(&dir.join("vip_map"))?,
            rings: Table::open(&dir.join("ch_rings"))?,
            reals: Table::open(&dir.join("reals"))?,
            members: Table::open(&dir.join("vip_reals"))?,
            gateway: Table::open(&dir.join("ctl_array"))?,
            vip_stats: Table::open(&dir.join("vip_stats"))?,
            reals_stats: Table::open(&dir.join("reals_stats"))?,
            stats: Table::open(&dir.join("balancer_stats"))?,
        })
    }

    /// All VIPs with flags.
    pub fn vips(&self) -> Result<BTreeMap<Vip, u32>> {
        Ok(self.all()?.into_iter().map(|(vip, meta)| (vip, meta.flags)).collect())
    }

    fn all(&self) -> Result<BTreeMap<Vip, vip_meta>> {
        let entry = |(key, meta): (vip_definition, vip_meta)| {
            // An IPv6 address with only its first word set is possible, but nobody's VIP.
            let v6 = key.addr[1..].iter().any(|w| *w != 0);
            let addr = words_addr(key.addr, v6);
            (Vip { addr, port: u16::from_be(key.port), protocol: key.proto }, meta)
        };
        Ok(self.vips.entries()?.into_iter().map(entry).collect())
    }

    fn meta(&self, vip: Vip) -> Result<vip_meta> {
        self.vips.get(&vip_key(vip.addr, vip.port))?.ok_or(Refusal::NoVip(vip))
    }

    /// Adds a VIP without reals; it drops packets until it has one.
    pub fn add_vip(&self, vip: Vip, flags: u32) -> Result<()> {
        if i32::from(vip.protocol) != libc::IPPROTO_TCP || vip.port == 0 {
            return Err(Refusal::NotTcp(vip));
        }
        let all = self.all()?;
        if all.contains_key(&vip) {
            return Err(Refusal::VipExists(vip));
        }
        let taken: BTreeSet<u32> = all.values().map(|meta| meta.vip_num).collect();
        let capacity = self.vips.max_entries();
        let vip_num =
            (0..capacity).find(|n| !taken.contains(n)).ok_or(Refusal::TooManyVips(capacity))?;
        // The number may have been another VIP's: its ring must not send there.
        self.write_ring(vip_num, &[])?;
        let epoch = getrandom::u32().map_err(Refusal::Random)?;
        let cpus = self.vip_stats.get_per_cpu(&vip_num)?.len();
        self.vip_stats.put_per_cpu(&vip_num, &vec![lb_stats::zeroed(); cpus])?;
        self.vips.put(&vip_key(vip.addr, vip.port), &vip_meta { flags, vip_num, epoch })?;
        Ok(())
    }

    /// Removes a VIP and what belongs to it.
    pub fn del_vip(&self, vip: Vip) -> Result<()> {
        let meta = self.meta(vip)?;
        self.vips.remove(&vip_key(vip.addr, vip.port))?;
        for real_num in self.member_numbers(meta.vip_num)?.into_keys() {
            self.members.remove(&vip_real { vip_num: meta.vip_num, real_num })?;
        }
        Ok(())
    }

    /// Sets or clears bits of a VIP's flags.
    pub fn modify_vip(&self, vip: Vip, flags: u32, set: bool) -> Result<()> {
        let mut meta = self.meta(vip)?;
        if set {
            meta.flags |= flags;
        } else {
            meta.flags &= !flags;
        }
        Ok(self.vips.put(&vip_key(vip.addr, vip.port), &meta)?)
    }

    /// A VIP's flags.
    pub fn vip_flags(&self, vip: Vip) -> Result<u32> {
        Ok(self.meta(vip)?.flags)
    }

    /// A VIP's reals with their weights.
    pub fn reals(&self, vip: Vip) -> Result<BTreeMap<IpAddr, u32>> {
        let numbers = self.member_numbers(self.meta(vip)?.vip_num)?;
        let mut reals = BTreeMap::new();
        for (number, weight) in numbers {
            reals.insert(self.real_addr(number)?, weight);
        }
        Ok(reals)
    }

    /// Adds reals, or changes their weights.
    pub fn add_reals(&self, vip: Vip, reals: &BTreeMap<IpAddr, u32>) -> Result<()> {
        let meta = self.meta(vip)?;
        for (addr, weight) in reals {
            if vip.addr.is_ipv6() && addr.is_ipv4() {
                return Err(Refusal::MixedFamilies(vip, *addr));
            }
            if *weight == 0 {
                return Err(Refusal::NoWeight(*addr));
            }
        }
        for (addr, weight) in reals {
            let real_num = self.real_number(*addr)?;
            self.members.put(&vip_real { vip_num: meta.vip_num, real_num }, weight)?;
        }
        self.refill(meta.vip_num)
    }

    /// Takes reals out. Established connections stay on them, as with Katran.
    pub fn del_reals(&self, vip: Vip, reals: &BTreeMap<IpAddr, u32>) -> Result<()> {
        let meta = self.meta(vip)?;
        let present = self.reals(vip)?;
        if let Some(addr) = reals.keys().find(|addr| !present.contains_key(addr)) {
            return Err(Refusal::NoReal(vip, *addr));
        }
        for (real_num, _) in self.member_numbers(meta.vip_num)? {
            if reals.contains_key(&self.real_addr(real_num)?) {
                self.members.remove(&vip_real { vip_num: meta.vip_num, real_num })?;
            }
        }
        self.refill(meta.vip_num)
    }

    /// Packets and bytes of a VIP.
    pub fn vip_stats(&self, vip: Vip) -> Result<(u64, u64)> {
        let cpus = self.vip_stats.get_per_cpu(&self.meta(vip)?.vip_num)?;
        Ok(sum(&cpus))
    }

    /// Packets, and how many of them missed the connection table.
    pub fn lru_stats(&self) -> Result<(u64, u64)> {
        Ok(sum(&self.stats.get_per_cpu(&balancer_stat::STAT_LRU.0)?))
    }

    /// Misses of SYNs, and of other segments.
    pub fn lru_miss_stats(&self) -> Result<(u64, u64)> {
        Ok(sum(&self.stats.get_per_cpu(&balancer_stat::STAT_LRU_MISS.0)?))
    }

    /// Where encapsulated packets go.
    pub fn set_mac(&self, mac: [u8; 6]) -> Result<()> {
        Ok(self.gateway.put(&0, &gateway { mac, pad: [0; 2] })?)
    }

    /// The inverse of [`Embedded::set_mac`].
    pub fn mac(&self) -> Result<[u8; 6]> {
        Ok(self.gateway.get(&0)?.map(|g| g.mac).unwrap_or_default())
    }

    fn member_numbers(&self, vip_num: u32) -> Result<BTreeMap<u32, u32>> {
        let members = self.members.entries()?;
        Ok(members
            .into_iter()
            .filter(|(key, _)| key.vip_num == vip_num)
            .map(|(key, weight)| (key.real_num, weight))
            .collect())
    }

    fn real_addr(&self, number: u32) -> Result<IpAddr> {
        let real = self.reals.get(&number)?.unwrap_or_else(real_definition::zeroed);
        Ok(words_addr(real.addr, real.v6 != 0))
    }

    /// The number of a real, a new one if it has none. Connections of the table go on naming a
    /// number after its real was removed, so numbers are used again only when there is no other.
    fn real_number(&self, addr: IpAddr) -> Result<u32> {
        let wanted =
            real_definition { addr: addr_words(addr), v6: addr.is_ipv6().into(), pad: [0; 3] };
        let used: BTreeSet<u32> =
            self.members.entries()?.into_iter().map(|(key, _)| key.real_num).collect();
        let (mut never_used, mut no_longer_used) = (None, None);
        let first = balancer_limits::NO_REAL.0 + 1;
        for number in first..self.reals.max_entries() {
            let real = self.reals.get(&number)?.unwrap_or_else(real_definition::zeroed);
            if real.bytes() == wanted.bytes() {
                return Ok(number);
            }
            if real.addr == [0; 4] {
                never_used = never_used.or(Some(number));
            } else if !used.contains(&number) {
                no_longer_used = no_longer_used.or(Some(number));
            }
        }
        let number = never_used
            .or(no_longer_used)
            .ok_or(Refusal::TooManyReals(self.reals.max_entries() - first))?;
        // It may have been another's.
        let cpus = self.reals_stats.get_per_cpu(&number)?.len();
        self.reals_stats.put_per_cpu(&number, &vec![lb_stats::zeroed(); cpus])?;
        self.reals.put(&number, &wanted)?;
        Ok(number)
    }

    fn refill(&self, vip_num: u32) -> Result<()> {
        let mut members = Vec::new();
        for (number, weight) in self.member_numbers(vip_num)? {
            members.push(Member { number, addr: self.real_addr(number)?, weight });
        }
        self.write_ring(vip_num, &members)
    }

    fn write_ring(&self, vip_num: u32, members: &[Member]) -> Result<()> {
        let first = vip_num * balancer_limits::RING_SIZE.0;
        let slots: Vec<(u32, u32)> = (first..).zip(ring::fill(members)).collect();
        Ok(self.rings.put_all(&slots)?)
    }
}

fn sum(cpus: &[lb_stats]) -> (u64, u64) {
    cpus.iter().fold((0, 0), |(v1, v2), s| (v1 + s.v1, v2 + s.v2))
}
