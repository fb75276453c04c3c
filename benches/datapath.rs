//! Nanoseconds a packet (BPF_PROG_TEST_RUN), each as the difference to the bare chain in the same
//! run. The chain is `rewind` → `mqtt_fwd` → the end; the bare one is `rewind` → the end. Runs
//! of the two take turns, and the median of the differences is printed.
//!
//! `rewind` (bpf/rewind.bpf.c) makes the packet of the last run the next packet of a client.

mod common;
#[path = "../tests/support/mod.rs"]
#[allow(unused)]
mod support;

use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::process::ExitCode;

use common::baseline::Baseline;
use common::rewind::types::place;
use common::rewind::{RewindSkel, RewindSkelBuilder};
use common::{
    Bench, CONFIG, Case, ROUNDS, case, client_addr, load_balancer, load_rewind, median,
    open_and_publish, rewind_to,
};
use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};
use libbpf_rs::{MapCore as _, MapFlags, OpenObject};
use mqtt_fwd::config::MapSizes;
use mqtt_fwd::kernel::abi::handover_keys;
use mqtt_fwd::kernel::chain;
use mqtt_fwd::kernel::skeletons::takeover::TakeoverSkelBuilder;
use mqtt_fwd::kernel::takeover;
use mqtt_fwd::kernel::xdp::ProgramInfo;
use support::datapath::{Fixture, SERVICE, XDP_TX, sentinel, sentinel_tc, test_run};
use support::{mqtt, packet};

const MILLION: u32 = 1_000_000;

/// The embedded balancer alone, one established flow.
fn balancer_cost(bench: &Bench, v6: bool) -> (f64, u32) {
    let (skel, vip) = load_balancer(v6);
    let ack = Case { dst: vip, ..case(v6, 1, &[]) };
    let wrapped = if v6 { 40 } else { 20 };
    let (plain, stripping) =
        (load_rewind(&ack, 0, &bench.fixture), load_rewind(&ack, wrapped, &bench.fixture));
    let room = |payload: &[u8]| {
        // The first run takes off what is not there yet.
        let mut packet = vec![0; usize::from(wrapped)];
        packet.extend(payload);
        packet
    };
    let balancer = skel.progs.balancer_ingress.as_fd();
    let costs = (0..ROUNDS)
        .map(|_| {
            let bare = bench.run(&plain, bench.end.as_fd(), &ack.packet);
            let wrap = bench.run(&stripping, stripping.progs.bare_wrap.as_fd(), &room(&ack.packet));
            // Taking off is the bench's, putting on is the balancer's: half each.
            let strip = (wrap - bare) / 2.0;
            bench.run(&stripping, balancer, &room(&ack.packet)) - bare - strip
        })
        .collect();
    (median(costs), ProgramInfo::by_fd(balancer).map_or(0, |p| p.instructions))
}

/// Nanoseconds that an access at random to memory as large as the table of flows takes, where one again and again
/// does not; and the MiB.
fn random_access(bench: &Bench) -> (f64, usize) {
    let places = bench.fixture.skel.maps.flows.max_entries();
    let storage = Box::leak(Box::new(MaybeUninit::uninit()));
    let mut open = RewindSkelBuilder::default().open(storage).unwrap();
    open.maps.places.set_max_entries(places).unwrap();
    let skel = open.load().unwrap();
    let fill = |next: &dyn Fn(u32) -> u32| {
        let all: Vec<u32> = (0..places).collect();
        for keys in all.chunks(4096) {
            let mut values = vec![0; keys.len() * size_of::<place>()];
            for (value, key) in values.chunks_exact_mut(size_of::<place>()).zip(keys) {
                value[..4].copy_from_slice(&next(*key).to_ne_bytes());
            }
            let (count, keys) = (keys.len() as u32, keys.iter().flat_map(|k| k.to_ne_bytes()));
            let keys: Vec<u8> = keys.collect();
            let map = &skel.maps.places;
            map.update_batch(&keys, &values, count, MapFlags::ANY, MapFlags::ANY).unwrap();
        }
    };
    let run = || f64::from(test_run(&skel.progs.access.as_fd(), &[0; 64], 4 * MILLION).1);
    let measure = || median((0..ROUNDS).map(|_| run()).collect());
    fill(&|_| 0);
    let again = measure();
    // A full-period generator (Hull and Dobell), of which what is too much is left out.
    let mask = places.next_power_of_two() - 1;
    let after = |i: u32| i.wrapping_mul(22_695_477).wrapping_add(1) & mask;
    fill(&|i| {
        std::iter::successors(Some(after(i)), |i| Some(after(*i))).find(|i| *i < places).unwrap()
    });
    (measure() - again, (places as usize * size_of::<place>()) >> 20)
}

fn publishes() -> Vec<(&'static str, Case)> {
    let topic = |length: usize| {
        let mut topic = b"site/7/".to_vec();
        topic.resize(length, b'x');
        topic
    };
    let mut cases = Vec::new();
    for clients in [1, MILLION] {
        for (name, length) in [
            ("PUBLISH, same topic of 8 B", 8),
            ("PUBLISH, same topic of 24 B", 24),
            ("PUBLISH, same topic of 80 B", 80),
            ("PUBLISH, same topic of 256 B", 256),
        ] {
            let payload = mqtt::publish(&topic(length), 0, b"21.5");
            cases.push((name, case(false, clients, &payload)));
        }
        for (name, length) in [
            ("PUBLISH, new topic of 8 B", 8),
            ("PUBLISH, new topic of 24 B, 3 levels, wildcard", 24),
            ("PUBLISH, new topic of 80 B", 80),
            ("PUBLISH, new topic of 256 B", 256),
        ] {
            let payload = mqtt::publish(&topic(length), 0, b"21.5");
            let mut changed = case(false, clients, &payload);
            changed.topic_offset = (changed.packet.len() - b"21.5".len() - 1) as u32;
            cases.push((name, changed));
        }
        let name = "10 PUBLISHes in a segment";
        let ten = mqtt::publish(&topic(24), 0, b"21.5").repeat(10);
        cases.push((name, case(false, clients, &ten)));
    }
    let name = "PUBLISH, same topic of 24 B, IPv6";
    let payload = mqtt::publish(&topic(24), 0, b"21.5");
    cases.push((name, case(true, 1, &payload)));
    cases
}

/// What the broker host's programs cost on an established flow, which they leave alone: ingress and
/// egress.
fn takeover_cost() -> Option<(f64, f64)> {
    if !takeover::supported() {
        return None;
    }
    let storage: &'static mut MaybeUninit<OpenObject> = Box::leak(Box::new(MaybeUninit::uninit()));
    let skel = TakeoverSkelBuilder::default().open(storage).unwrap().load().unwrap();
    let (client, service): (SocketAddr, SocketAddr) =
        (client_addr(false), SERVICE.parse().unwrap());
    let publish = mqtt::publish(b"sensor/a", 1, b"21.5");
    let incoming = packet::tcp(client, service, 1, 1, |_| {}, &publish);
    let outgoing = packet::tcp(service, client, 1, 1, |_| {}, &mqtt::puback());
    let nothing = sentinel_tc();
    let cost = |program: BorrowedFd<'_>, packet: &[u8]| {
        let ns = |program: &BorrowedFd<'_>| f64::from(test_run(program, packet, MILLION).1);
        median((0..ROUNDS).map(|_| ns(&program) - ns(&nothing.as_fd())).collect())
    };
    Some((
        cost(skel.progs.takeover_ingress.as_fd(), &incoming),
        cost(skel.progs.takeover_egress.as_fd(), &outgoing),
    ))
}

/// An established segment while its service binds in one way and in the other, turn by turn: once
/// its broker answered, a flow is the same in both.
fn established_by_binding(bench: &mut Bench, payload: &[u8]) -> (f64, f64) {
    let predicted = bench.fixture.config.clone();
    let delayed = support::datapath::config(
        &CONFIG.replace("max_packet", "binding = \"delayed\"\nmax_packet"),
    );
    let keys = handover_keys { key: [[1, 2], [3, 4]], epoch: 1, pad: 0 };
    bench.fixture.datapath.handover_keys.put(&0, &keys).unwrap();
    let case = case(false, 1, payload);
    let next = open_and_publish(bench, false, 1, payload);
    let rewind = load_rewind(&case, 0, &bench.fixture);
    rewind_to(&rewind, next);
    let bare = load_rewind(&case, 0, &bench.fixture);
    let mut all = (Vec::new(), Vec::new());
    for _ in 0..3 * ROUNDS {
        for (config, ns) in [(&predicted, &mut all.0), (&delayed, &mut all.1)] {
            bench.fixture.config = config.clone();
            bench.fixture.apply();
            let mqtt_fwd = bench.fixture.skel.progs.mqtt_fwd.as_fd();
            let bare = bench.run(&bare, bench.end.as_fd(), &case.packet);
            ns.push(bench.run(&rewind, mqtt_fwd, &case.packet) - bare);
        }
    }
    bench.fixture.config = predicted;
    bench.fixture.apply();
    (median(all.0), median(all.1))
}

fn main() -> ExitCode {
    // `cargo test --benches` runs this, too; it is not a test.
    if !std::env::args().any(|a| a == "--bench") {
        return ExitCode::SUCCESS;
    }
    let mut baseline = Baseline::open();
    // Clients: twice what is used, as docs/configuration.md advises.
    let sizes = MapSizes { clients: 2 * MILLION, flows: MILLION, ..MapSizes::default() };
    let fixture = Fixture::loaded(CONFIG, &sizes, |rodata| {
        rodata.flows_per_window = u32::MAX;
        rodata.topics_per_window = u32::MAX;
        // As a balancer in a fleet, to compare by turns.
        rodata.fleet = if std::env::var_os("FLEET").is_some() { 2 } else { 0 };
    });
    let mut bench = Bench { fixture, end: sentinel(XDP_TX) };
    bench.put(chain::BALANCER, bench.end.as_fd());

    let info = ProgramInfo::by_fd(bench.fixture.skel.progs.mqtt_fwd.as_fd()).unwrap();
    let (balancer4, instructions) = balancer_cost(&bench, false);
    let (balancer6, _) = balancer_cost(&bench, true);
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    println!("mqtt_fwd: {} instructions; embedded balancer: {instructions}", info.instructions);
    println!("{:52}{:>10}{:>10}{:>12}", "", "flows", "ns", "× balancer");
    baseline.instructions("mqtt_fwd", info.instructions);
    baseline.instructions("embedded balancer", instructions);
    let mut line = |name: &str, clients: u32, ns: f64, v6: bool| {
        let ratio = ns / if v6 { balancer6 } else { balancer4 };
        println!("{name:52}{clients:>10}{ns:>10.0}{ratio:>12.2}");
        baseline.row(name, clients, ratio);
    };
    line("embedded balancer, established ACK", 1, balancer4, false);
    line("embedded balancer, established ACK, IPv6", 1, balancer6, true);

    let wanted = |name: &str| name.contains(&filter);
    let (access, size) = random_access(&bench);
    line(&format!("an access at random to {size} MiB"), MILLION, access, false);
    if wanted("broker host") {
        match takeover_cost() {
            Some((ingress, egress)) => {
                line("broker host, ingress, established", 1, ingress, false);
                line("broker host, egress, established", 1, egress, false);
                line("broker host, both", 1, ingress + egress, false);
            }
            None => println!("broker host: this kernel cannot take connections over"),
        }
    }
    let publish = mqtt::publish(b"site/7/x", 0, b"21.5");
    for (name, payload) in [("ACK", &[][..]), ("PUBLISH", &publish)] {
        if wanted("established by binding") {
            let (predicted, delayed) = established_by_binding(&mut bench, payload);
            line(&format!("established {name}, binding = predicted"), 1, predicted, false);
            line(&format!("established {name}, binding = delayed"), 1, delayed, false);
        }
    }
    if wanted("not ours") {
        let others = Case { dst: "10.1.50.201".parse().unwrap(), ..case(false, 1, &[]) };
        line("not ours", 1, bench.measure(&others, |_| {}), false);
    }

    for v6 in [false, true] {
        for clients in [1, MILLION] {
            let name = if v6 { "established ACK, IPv6" } else { "established ACK" };
            if !wanted(name) {
                continue;
            }
            let ack = case(v6, clients, &[]);
            let ns = bench.measure(&ack, |rewind| {
                let next = open_and_publish(&bench, v6, clients, &[]);
                rewind_to(rewind, next);
                bench.round(rewind, &ack.packet, clients);
            });
            line(name, clients, ns, v6);
        }
    }
    for clients in [1, MILLION] {
        // Without a prediction: these clients never published. Each round has other ISNs.
        for (name, src) in [
            ("SYN on a known flow, no prediction", "12.0.0.0"),
            ("SYN on a known flow, prediction", "11.0.0.0"),
        ] {
            if !wanted(name) {
                continue;
            }
            let service: SocketAddr = SERVICE.parse().unwrap();
            let client = SocketAddr::new(src.parse().unwrap(), 4001);
            let syn = Case {
                packet: packet::tcp(client, service, 0, 0, |h| h.syn = true, &[]),
                src: client.ip(),
                seq_step: 1000,
                ..case(false, clients, &[])
            };
            let learn = |_: &RewindSkel<'_>| {
                if src == "11.0.0.0" {
                    open_and_publish(&bench, false, clients, &mqtt::publish(b"t", 0, b""));
                }
            };
            line(name, clients, bench.measure(&syn, learn), false);
        }
    }
    for (name, publish) in publishes().into_iter().filter(|(name, _)| wanted(name)) {
        let v6 = publish.dst.is_ipv6();
        let ns = bench.measure(&publish, |rewind| {
            let next = open_and_publish(&bench, v6, publish.clients, &[]);
            rewind_to(rewind, next);
        });
        line(name, publish.clients, ns, v6);
    }
    baseline.finish()
}
