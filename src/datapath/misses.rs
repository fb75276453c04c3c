//! Segments of connections that this balancer does not know, as the datapath hands them over
//! (`bpf/forward/fleet/miss.h`), and what it is told about them (`adopt.h`).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use libbpf_rs::{MapHandle, RingBuffer, RingBufferBuilder};

use super::Datapath;
use super::names::{address_of, services_of};
use crate::config::Config;
use crate::kernel::abi::{
    Pod as _, addr_words, adoption, adoption_kind, binding_of, handover, miss, words_addr,
};
use crate::kernel::pins::{self, Pins};
use crate::kernel::{BpfError, Result, test_run};

/// Offsets in the frame (RFC 894, RFC 791 §3.1, RFC 8200 §3, RFC 9293 §3.1).
const IP: usize = 14;
const TCP_V4: usize = IP + 20;
const TCP_V6: usize = IP + 40;
const FIN: u8 = 1;
const RST: u8 = 4;

/// A client's segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub client: SocketAddr,
    /// The service's number.
    pub service: u16,
    /// Sequence and acknowledgement number.
    pub seq: u32,
    pub ack: u32,
    /// When it came (CLOCK_BOOTTIME).
    pub when: Duration,
    payload_length: u16,
    fin: bool,
    rst: bool,
    frame: Vec<u8>,
}

/// What was found out of a segment's connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A broker host has it: the binding of the group of that host alone.
    Real(u32),
    /// No broker has it yet: another balancer kept its CONNECT.
    Waiting(Kept),
    /// Nobody has it.
    Nobody,
}

/// A connection's CONNECT and numbers, as a balancer keeps them; opaque outside the datapath.
#[derive(Clone, Copy)]
pub struct Kept(handover);

impl PartialEq for Kept {
    fn eq(&self, other: &Self) -> bool {
        self.bytes() == other.bytes()
    }
}

impl Eq for Kept {}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kept({} + {})", self.0.start, self.0.connect_length)
    }
}

impl Kept {
    /// As it is stored.
    pub fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }

    /// From what was stored; `None`: another build's.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        (bytes.len() == size_of::<handover>()).then(|| Self(handover::from_bytes(bytes)))
    }

    /// Whether a segment is of this connection: what follows CONNECT, or CONNECT again.
    pub fn is_before(&self, segment: &Segment) -> bool {
        let behind = self.0.start.wrapping_add(u32::from(self.0.connect_length));
        segment.seq == behind
            || segment.seq == self.0.start
            || segment.seq == behind.wrapping_sub(1)
    }
}

impl From<handover> for Kept {
    fn from(kept: handover) -> Self {
        Self(kept)
    }
}

impl Segment {
    /// A record of the ring buffer; `None`: it is cut short.
    pub fn read(record: &[u8]) -> Option<Self> {
        let (head, frame) = record.split_at_checked(size_of::<miss>())?;
        let head = miss::from_bytes(head);
        let frame = frame.get(..usize::from(head.length))?;
        let word = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
        let (tcp, behind_ip) = if head.v6 != 0 {
            (TCP_V6, word(IP + 4)?)
        } else {
            (TCP_V4, word(IP + 2)?.checked_sub(20)?)
        };
        let header = u16::from(frame.get(tcp + 12)? >> 4) * 4;
        let flags = *frame.get(tcp + 13)?;
        Some(Self {
            client: SocketAddr::new(
                words_addr(head.client, head.v6 != 0),
                u16::from_be(head.client_port),
            ),
            service: head.service,
            seq: head.seq,
            ack: head.ack,
            when: Duration::from_nanos(head.time_ns),
            payload_length: behind_ip.checked_sub(header)?,
            fin: flags & FIN != 0,
            rst: flags & RST != 0,
            frame: frame.to_vec(),
        })
    }

    /// As it came in.
    pub fn frame(&self) -> &[u8] {
        &self.frame
    }

    /// What the program that carries an answer out gets.
    pub fn with(&self, answer: &Answer) -> Vec<u8> {
        let mut head = adoption {
            client: addr_words(self.client.ip()),
            client_port: self.client.port().to_be(),
            service: self.service,
            seq: self.seq,
            ack: self.ack,
            payload_length: self.payload_length,
            v6: self.client.is_ipv6().into(),
            fin: self.fin.into(),
            rst: self.rst.into(),
            ..adoption::zeroed()
        };
        let kind = match answer {
            Answer::Real(binding) => {
                head.binding = *binding;
                adoption_kind::ADOPTED_FROM_REAL
            }
            Answer::Waiting(kept) => {
                head.handover = kept.0;
                adoption_kind::ADOPTED_FROM_STORE
            }
            Answer::Nobody => adoption_kind::ADOPTED_BY_NOBODY,
        };
        head.kind = kind.0 as u8;
        [head.bytes(), &self.frame].concat()
    }
}

/// The program that carries answers out, on the interface that clients' packets come in on.
#[derive(Debug)]
pub struct Adopter {
    program: OwnedFd,
    interface: i32,
}

impl Adopter {
    /// The pinned one.
    pub fn open(pins: &Pins, interface: i32) -> Result<Self> {
        let (program, _) = pins.pinned_program(pins::ADOPT).ok_or_else(|| BpfError::NotLoaded {
            path: pins.program(pins::ADOPT),
            what: "this program is of a build without fleets",
        })?;
        Ok(Self { program, interface })
    }

    /// Lets a held segment go on, or its client know that nobody has the connection.
    pub fn carry_out(&self, segment: &Segment, answer: &Answer) -> std::io::Result<()> {
        test_run::inject(self.program.as_fd(), self.interface, &segment.with(answer))
    }
}

/// Opens the pinned ring buffer; `take` gets each segment.
pub fn ring<'a>(pins: &Pins, mut take: impl FnMut(Segment) + 'a) -> Result<RingBuffer<'a>> {
    let path = pins.map("misses");
    let failed = |action| {
        let path = path.clone();
        move |source| BpfError::Pin { path, action, source }
    };
    let map = MapHandle::from_pinned_path(&path).map_err(failed("opening"))?;
    let mut builder = RingBufferBuilder::new();
    let handle = move |bytes: &[u8]| {
        if let Some(segment) = Segment::read(bytes) {
            take(segment);
        }
        0
    };
    builder.add(&map, handle).map_err(failed("reading"))?;
    builder.build().map_err(failed("reading"))
}

/// A service, by its number in the datapath, and where its connections may be.
#[derive(Debug, Clone)]
pub struct Places {
    pub addr: SocketAddr,
    pub name: String,
    /// Its reals, and the binding to each alone.
    pub reals: BTreeMap<IpAddr, u32>,
}

impl Datapath {
    /// All services' places, as far as the maps have the configuration's VIPs of reals.
    pub fn places(&self, config: &Config) -> Result<BTreeMap<u16, Places>> {
        let table = self.service_table()?;
        let groups = self.groups()?;
        let mut places = BTreeMap::new();
        for service in services_of(&table) {
            let addr = address_of(service);
            let Some(configured) =
                config.services.iter().find(|s| SocketAddr::new(s.addr, s.port) == addr)
            else {
                continue;
            };
            let binding = |vip: IpAddr| {
                let words = addr_words(vip);
                let found = groups.iter().find(|(_, g)| g.service == service.id && g.vip == words);
                found.map(|(id, g)| binding_of(*id, g.epoch))
            };
            let mut reals = BTreeMap::new();
            for real in configured.groups.iter().flat_map(|group| &group.reals) {
                if let Some(binding) = real.vip.and_then(binding) {
                    reals.entry(real.addr).or_insert(binding);
                }
            }
            places.insert(service.id, Places { addr, name: configured.name.clone(), reals });
        }
        Ok(places)
    }
}
