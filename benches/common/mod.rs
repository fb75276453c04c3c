//! What the benches share: a packet that `rewind` (bpf/rewind.bpf.c) makes the next packet of a
//! client, again and again, and what a program behind it costs.

pub mod baseline;

use std::mem::{MaybeUninit, offset_of};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};
use libbpf_rs::{MapCore as _, MapFlags, OpenObject};
use mqtt_fwd::kernel::abi::{
    Pod as _, addr_words, real_definition, vip_definition, vip_key, vip_meta,
};
use mqtt_fwd::kernel::chain;
use mqtt_fwd::kernel::maps::Table;
use mqtt_fwd::kernel::skeletons::balancer::{BalancerSkel, BalancerSkelBuilder};
use rewind::types::bss;
use rewind::{RewindSkel, RewindSkelBuilder};

use crate::support::datapath::{Fixture, SERVICE, SERVICE6, XDP_TX, test_run};
use crate::support::{mqtt, packet};

#[allow(warnings, clippy::all, clippy::pedantic, clippy::undocumented_unsafe_blocks)]
pub mod rewind {
    include!(concat!(env!("OUT_DIR"), "/rewind.skel.rs"));
}

pub const ROUNDS: usize = 7;
pub const REPEAT: u32 = 400_000;

/// Everything belongs to the default group, so that nothing is mispredicted.
pub const CONFIG: &str = r#"
interface = "lo"
balancer = "embedded"
gateway_mac = "02:00:00:00:00:09"
events_per_second = 0

[[service]]
name = "mqtt"
address = "10.1.50.200"
default_group = "default"
max_packet = 1480
group = [{ name = "default", vip = "10.1.50.250", reals = [{ address = "10.1.3.203" }] }]
route = [{ topic = "site/+/#", group = "default" }, { topic = "site/+/x", group = "default" }]

[[service]]
name = "mqtt6"
address = "fd01:50::200"
default_group = "default"
max_packet = 1460
group = [{ name = "default", vip = "fd01:50::250", reals = [{ address = "fd01:3::203" }] }]
"#;

#[derive(Clone)]
pub struct Case {
    pub packet: Vec<u8>,
    pub dst: IpAddr,
    pub src: IpAddr,
    pub clients: u32,
    pub seq_step: u32,
    pub topic_offset: u32,
    pub order: Order,
}

/// In which order clients take turns. Measured in the order of its opening, a table that gives its entries out one
/// after the other is read from end to end, which hardware foresees; clients talk in no such order.
#[derive(Clone, Copy)]
pub enum Order {
    Opening,
    Talking,
}

impl Order {
    /// Of the full-period generator in bpf/rewind.bpf.c: 1 modulo 4 (Hull and Dobell).
    fn multiplier(self) -> u32 {
        match self {
            Self::Opening => 1_664_525,
            Self::Talking => 22_695_477,
        }
    }
}

pub struct Bench {
    pub fixture: Fixture,
    pub end: OwnedFd,
}

pub fn load_rewind(case: &Case, wrapped: u16, fixture: &Fixture) -> RewindSkel<'static> {
    load_sender(case, wrapped, 0, fixture)
}

/// The same, for packets that are put on a wire: the interface's index.
pub fn load_sender(case: &Case, wrapped: u16, wire: u32, fixture: &Fixture) -> RewindSkel<'static> {
    let storage: &'static mut MaybeUninit<OpenObject> = Box::leak(Box::new(MaybeUninit::uninit()));
    let mut open = RewindSkelBuilder::default().open(storage).unwrap();
    let rodata = open.maps.rodata_data.as_deref_mut().unwrap();
    rodata.clients = case.clients;
    rodata.clients_mask = case.clients.next_power_of_two() - 1;
    rodata.multiplier = case.order.multiplier();
    rodata.seq_step = case.seq_step;
    rodata.topic_offset = case.topic_offset;
    rodata.wrapped = wrapped;
    rodata.wire = wire;
    rodata.burst = 192;
    rodata.dst = addr_words(case.dst);
    rodata.src = addr_words(case.src);
    open.maps.root_array.reuse_fd(fixture.skel.maps.root_array.as_fd()).unwrap();
    open.load().unwrap()
}

/// The embedded balancer with the group VIP of one family, and one real behind it.
pub fn load_balancer(v6: bool) -> (BalancerSkel<'static>, IpAddr) {
    let storage: &'static mut MaybeUninit<OpenObject> = Box::leak(Box::new(MaybeUninit::uninit()));
    let mut open = BalancerSkelBuilder::default().open(storage).unwrap();
    open.maps.rodata_data.as_deref_mut().unwrap().has_predecessor = 0;
    let skel = open.load().unwrap();
    // The group's VIP, as mqtt_fwd hands it on: with the service's address to put back.
    let (service, vip, real): (SocketAddr, IpAddr, IpAddr) = if v6 {
        (SERVICE6.parse().unwrap(), "fd01:50::250".parse().unwrap(), "fd01:3::203".parse().unwrap())
    } else {
        (SERVICE.parse().unwrap(), "10.1.50.250".parse().unwrap(), "10.1.3.203".parse().unwrap())
    };
    let vips: Table<vip_definition, vip_meta> = Table::of(&skel.maps.vip_map).unwrap();
    let flags = mqtt_fwd::balancer::flags::GROUP_FLAG;
    vips.put(&vip_key(vip, 1883), &vip_meta { flags, vip_num: 0, epoch: 1 }).unwrap();
    let services: Table<vip_definition, vip_definition> =
        Table::of(&skel.maps.vip_inner_dst).unwrap();
    services.put(&vip_key(vip, 1883), &vip_key(service.ip(), 1883)).unwrap();
    let reals: Table<u32, real_definition> = Table::of(&skel.maps.reals).unwrap();
    let definition = real_definition { addr: addr_words(real), v6: v6.into(), pad: [0; 3] };
    reals.put(&1, &definition).unwrap();
    let rings: Table<u32, u32> = Table::of(&skel.maps.ch_rings).unwrap();
    rings.put_all(&(0..65_537).map(|i| (i, 1)).collect::<Vec<_>>()).unwrap();
    (skel, vip)
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl Bench {
    pub fn put(&self, position: u32, program: BorrowedFd<'_>) {
        let fd = program.as_raw_fd().cast_unsigned();
        let array = &self.fixture.skel.maps.root_array;
        array.update(position.bytes(), fd.bytes(), MapFlags::ANY).unwrap();
    }

    /// Average of one call, with `program` behind `rewind`.
    pub fn run(&self, rewind: &RewindSkel<'_>, program: BorrowedFd<'_>, packet: &[u8]) -> f64 {
        self.put(chain::MQTT_FWD, program);
        let repeat = REPEAT.max(2 * rewind.maps.rodata_data.as_ref().unwrap().clients);
        let (outcome, ns) = test_run(&rewind.progs.rewind.as_fd(), packet, repeat);
        assert_eq!(outcome.verdict, XDP_TX, "the chain was left early: {:02x?}", outcome.packet);
        f64::from(ns)
    }

    /// Sends every client's next packet once, so that flows and topics are there.
    pub fn round(&self, rewind: &RewindSkel<'_>, packet: &[u8], clients: u32) {
        self.put(chain::MQTT_FWD, self.fixture.skel.progs.mqtt_fwd.as_fd());
        test_run(&rewind.progs.rewind.as_fd(), packet, clients);
    }

    /// Nanoseconds that mqtt_fwd adds.
    pub fn measure(&self, case: &Case, prepare: impl Fn(&RewindSkel<'_>)) -> f64 {
        let pairs = self.pairs(case, ROUNDS, prepare);
        median(pairs.into_iter().map(|(bare, whole)| whole - bare).collect())
    }

    /// Nanoseconds of the bare chain and of the one with mqtt_fwd in it, turn by turn.
    pub fn pairs(
        &self,
        case: &Case,
        rounds: usize,
        prepare: impl Fn(&RewindSkel<'_>),
    ) -> Vec<(f64, f64)> {
        let rewind = load_rewind(case, 0, &self.fixture);
        // The bare chain has one of its own: mqtt_fwd must see every sequence number.
        let bare = load_rewind(case, 0, &self.fixture);
        prepare(&rewind);
        let mqtt_fwd = self.fixture.skel.progs.mqtt_fwd.as_fd();
        self.run(&rewind, mqtt_fwd, &case.packet);
        (0..rounds)
            .map(|_| {
                let bare = self.run(&bare, self.end.as_fd(), &case.packet);
                (bare, self.run(&rewind, mqtt_fwd, &case.packet))
            })
            .collect()
    }
}

/// The first of a case's clients; the others have the addresses behind it.
pub fn client_addr(v6: bool) -> SocketAddr {
    if v6 { "[fd01:1::]:4000" } else { "11.0.0.0:4000" }.parse().unwrap()
}

/// Packets of so many clients to the service, one after the other.
pub fn case(v6: bool, clients: u32, payload: &[u8]) -> Case {
    let service: SocketAddr = if v6 { SERVICE6 } else { SERVICE }.parse().unwrap();
    let client = client_addr(v6);
    Case {
        // It has its CONNACK.
        packet: packet::tcp(client, service, 0, 11, |_| {}, payload),
        dst: service.ip(),
        src: client.ip(),
        clients,
        seq_step: payload.len() as u32,
        topic_offset: 0,
        order: Order::Talking,
    }
}

/// Opens a flow of each client and sends CONNECT; then `payload`, if any. The next sequence number.
pub fn open_and_publish(bench: &Bench, v6: bool, clients: u32, payload: &[u8]) -> u32 {
    let service: SocketAddr = if v6 { SERVICE6 } else { SERVICE }.parse().unwrap();
    let client = client_addr(v6);
    let mut seq = 0u32;
    let connect = mqtt::connect(4);
    // With a CONNACK behind CONNECT.
    for (syn, ack, payload) in [(true, 0, &[][..]), (false, 7, &connect), (false, 11, payload)] {
        if !syn && payload.is_empty() {
            continue;
        }
        let step = Case {
            packet: packet::tcp(client, service, 0, ack, |h| h.syn = syn, payload),
            seq_step: 0,
            order: Order::Opening,
            ..case(v6, clients, &[])
        };
        let rewind = load_rewind(&step, 0, &bench.fixture);
        rewind_to(&rewind, seq);
        bench.round(&rewind, &step.packet, clients);
        seq += if syn { 1 } else { payload.len() as u32 };
    }
    seq
}

/// The first packet of `rewind` has this sequence number.
pub fn rewind_to(rewind: &RewindSkel<'_>, seq: u32) {
    let rodata = rewind.maps.rodata_data.as_ref().unwrap();
    // Rounds begin with client 0, and with it the step.
    let (mut value, at) = ([0; size_of::<bss>()], offset_of!(bss, seq));
    value[at..at + 4].copy_from_slice(&seq.wrapping_sub(rodata.seq_step).to_ne_bytes());
    rewind.maps.bss.update(0u32.bytes(), &value, MapFlags::ANY).unwrap();
}
