//! Segments of connections that this balancer does not know, as the datapath hands them over
//! (`bpf/forward/fleet/miss.h`), and what it is told about them (`adopt.h`).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use etherparse::{SlicedPacket, TcpOptionElement, TransportSlice};
use libbpf_rs::{MapHandle, RingBuffer, RingBufferBuilder};

use super::clients::client_hash;
use super::image::keys_of;
use super::names::{address_of, services_of};
use super::{Datapath, Silent};
use crate::config::Config;
use crate::domain::waiting::Waiting;
use crate::kernel::abi::{
    Pod as _, addr_words, adoption, adoption_kind, binding_of, handover, handover_id,
    handover_state, name_text, report_kind, segment_report, set_handover_id, special_group,
    words_addr,
};
use crate::kernel::pins::{self, Pins};
use crate::kernel::wire::Wire;
use crate::kernel::{BpfError, Result, boot_time, test_run};
use crate::routes::hash::Keys;

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
#[derive(Debug, Clone)]
pub enum Answer {
    /// A broker host has it: the binding of the group of that host alone.
    Real(u32),
    /// No broker has it yet: another balancer kept its CONNECT.
    Waiting(Box<Kept>),
    /// Nobody has it.
    Nobody,
    /// Another balancer has gone on with it.
    Elsewhere,
}

/// A CONNECT as the datapath keeps it.
#[derive(Clone, Copy)]
pub struct Kept(handover);

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kept({} + {})", self.0.start, self.0.connect_length)
    }
}

/// A connection: its client and its service's number.
pub type Connection = (SocketAddr, u16);

/// What the datapath tells.
#[derive(Debug)]
pub enum Report {
    /// A segment of a connection that it does not know.
    Missed(Segment),
    /// It has answered a CONNECT, and keeps it.
    Kept(Connection, Kept),
    /// A broker is given that now.
    Given(Connection),
    /// A segment of a ClientHello whose server name is still to come.
    Hello(Segment),
}

impl Report {
    /// A record of the ring buffer; `None`: it is cut short.
    pub fn read(record: &[u8]) -> Option<Self> {
        let (head, rest) = record.split_at_checked(size_of::<segment_report>())?;
        let head = segment_report::from_bytes(head);
        let client =
            SocketAddr::new(words_addr(head.client, head.v6 != 0), u16::from_be(head.client_port));
        match report_kind(head.kind.into()) {
            report_kind::REPORT_MISSED => Segment::read(&head, client, rest).map(Self::Missed),
            report_kind::REPORT_HELLO => Segment::read(&head, client, rest).map(Self::Hello),
            report_kind::REPORT_KEPT => {
                let kept = rest.get(..size_of::<handover>()).map(handover::from_bytes)?;
                Some(Self::Kept((client, head.service), Kept(kept)))
            }
            _ => Some(Self::Given((client, head.service))),
        }
    }
}

impl Segment {
    /// A CONNECT that was answered here, once more.
    pub fn of_silent(silent: &Silent, frame: Vec<u8>) -> Self {
        Self {
            client: silent.client,
            service: silent.service_number(),
            seq: silent.start,
            ack: silent.server,
            when: boot_time(),
            payload_length: silent.connect.len() as u16,
            fin: false,
            rst: false,
            frame,
        }
    }

    /// One without a frame, for tests.
    #[cfg(test)]
    pub(crate) fn of_numbers(client: SocketAddr, service: u16, seq: u32) -> Self {
        let (when, frame) = (Duration::ZERO, Vec::new());
        Self {
            client,
            service,
            seq,
            ack: 1,
            when,
            payload_length: 1,
            fin: false,
            rst: false,
            frame,
        }
    }

    fn read(head: &segment_report, client: SocketAddr, frame: &[u8]) -> Option<Self> {
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
            client,
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

    /// Whether it only acknowledges.
    pub fn is_bare(&self) -> bool {
        self.payload_length == 0 && !self.fin && !self.rst
    }

    /// As it came in.
    pub fn frame(&self) -> &[u8] {
        &self.frame
    }

    /// Its payload, and its timestamps (RFC 7323 §3).
    pub fn payload(&self) -> (&[u8], Option<(u32, u32)>) {
        let sliced = SlicedPacket::from_ethernet(&self.frame).ok();
        let Some(TransportSlice::Tcp(tcp)) = sliced.and_then(|sliced| sliced.transport) else {
            return (&[], None);
        };
        let timestamps = tcp.options_iterator().flatten().find_map(|option| match option {
            TcpOptionElement::Timestamp(value, echo) => Some((value, echo)),
            _ => None,
        });
        let payload = tcp.payload();
        (&payload[..payload.len().min(self.payload_length.into())], timestamps)
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
            Answer::Elsewhere => adoption_kind::ADOPTED_ELSEWHERE,
        };
        head.kind = kind.0 as u8;
        [head.bytes(), &self.frame].concat()
    }
}

/// Carries answers out. The program makes of the segment what it would be if it had just come in; that it is put on the
/// wire by a packet socket, and not by the kernel's own way of running a program on a live frame, saves four fifths of
/// the time.
#[derive(Debug)]
pub struct Adopter {
    program: OwnedFd,
    wire: Wire,
}

impl Adopter {
    /// The pinned one.
    pub fn open(pins: &Pins, interface: i32) -> Result<Self> {
        let (program, _) = pins.pinned_program(pins::ADOPT).ok_or_else(|| BpfError::NotLoaded {
            path: pins.program(pins::ADOPT),
            what: "this program is of a build without fleets",
        })?;
        let failed = |source| BpfError::Io {
            path: "packet socket".into(),
            action: "opening (CAP_NET_RAW)",
            source,
        };
        Ok(Self { program, wire: Wire::open(interface).map_err(failed)? })
    }

    /// Lets a held segment go on, or its client know that nobody has the connection.
    pub fn carry_out(&self, segment: &Segment, answer: &Answer) -> std::io::Result<()> {
        let run = test_run::run(self.program.as_fd(), &segment.with(answer), 1)?;
        if run.verdict == libbpf_sys::XDP_TX { self.wire.send(&run.frame) } else { Ok(()) }
    }
}

/// Opens a pinned ring buffer; `take` gets each report.
pub fn ring<'a>(
    pins: &Pins,
    name: &str,
    mut take: impl FnMut(Report) + 'a,
) -> Result<RingBuffer<'a>> {
    let path = pins.map(name);
    let failed = |action| {
        let path = path.clone();
        move |source| BpfError::Pin { path, action, source }
    };
    let map = MapHandle::from_pinned_path(&path).map_err(failed("opening"))?;
    let mut builder = RingBufferBuilder::new();
    let handle = move |bytes: &[u8]| {
        if let Some(report) = Report::read(bytes) {
            take(report);
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
    /// Its groups, by number.
    groups: BTreeMap<u16, String>,
    number: u16,
    keys: Keys,
}

impl Places {
    /// A kept CONNECT for other balancers; `None`: it is not whole.
    pub fn waiting(&self, kept: &Kept) -> Option<Waiting> {
        let h = &kept.0;
        let connect = h.connect.get(..usize::from(h.connect_length))?.to_vec();
        (u32::from(h.state) <= handover_state::HANDOVER_SILENT.0).then(|| Waiting {
            start: h.start,
            server: h.server,
            timestamps: (h.timestamps != 0).then_some((h.tsval, h.client_tsval)),
            client_id: (h.id_offset, if handover_id(h) == 0 { 0 } else { h.id_length }),
            will_group: self.groups.get(&h.will_group).cloned(),
            connect,
            connect_sum: h.connect_sum,
        })
    }

    /// One of another balancer, as this one would keep it; `None`: it is too long.
    pub fn kept(&self, waiting: &Waiting) -> Option<Kept> {
        let mut h = handover::zeroed();
        h.connect.get_mut(..waiting.connect.len())?.copy_from_slice(&waiting.connect);
        let (offset, length) = waiting.client_id;
        let id = usize::from(offset)..usize::from(offset) + usize::from(length);
        let id = waiting.connect.get(id).filter(|id| !id.is_empty());
        let group = |name: &String| {
            self.groups.iter().find_map(|(number, known)| (known == name).then_some(*number))
        };
        h.start = waiting.start;
        h.server = waiting.server;
        h.timestamps = waiting.timestamps.is_some().into();
        (h.tsval, h.client_tsval) = waiting.timestamps.unwrap_or_default();
        h.connect_length = waiting.connect.len() as u16;
        h.connect_sum = waiting.connect_sum;
        h.state = handover_state::HANDOVER_WAIT.0 as u8;
        set_handover_id(&mut h, id.map_or(0, |id| client_hash(&self.keys, self.number, id)));
        (h.id_offset, h.id_length) = (offset, length);
        h.will_group =
            waiting.will_group.as_ref().and_then(group).unwrap_or(special_group::NO_GROUP.0 as u16);
        Some(Kept(h))
    }
}

impl Datapath {
    /// Whether a client has a flow, of whatever service.
    pub fn has_flow(&self, client: SocketAddr) -> Result<bool> {
        for service in self.service_numbers()?.into_values() {
            if self.flow(client, service)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Connections whose CONNECT was answered here within the last `age_s` seconds and that no broker has yet, each with
    /// its service's name.
    pub fn waiting(
        &self,
        places: &BTreeMap<u16, Places>,
        age_s: u64,
    ) -> Result<Vec<(String, SocketAddr, Waiting)>> {
        let now = boot_time().as_secs();
        let mut all = Vec::new();
        self.handovers.for_each(|key, h| {
            if let Some(places) = places.get(&key.service)
                && now.saturating_sub(h.born_s.into()) <= age_s
                && let Some(waiting) = places.waiting(&Kept(h))
            {
                let addr = words_addr(key.addr, places.addr.is_ipv6());
                let client = SocketAddr::new(addr, u16::from_be(key.port));
                all.push((places.name.clone(), client, waiting));
            }
        })?;
        Ok(all)
    }

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
            let of_service =
                groups.iter().filter(|(id, g)| g.service == service.id && g.parent == *id);
            let place = Places {
                addr,
                name: configured.name.clone(),
                reals,
                groups: of_service.map(|(id, g)| (*id, name_text(&g.name))).collect(),
                number: service.id,
                keys: keys_of(&table),
            };
            places.insert(service.id, place);
        }
        Ok(places)
    }
}
