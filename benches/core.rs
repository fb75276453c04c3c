//! What one CPU forwards, with real frames on a wire and nothing else on that CPU: frames go from a generator on the first CPU
//! over a veth pair to the chain, which a kernel thread on the last CPU runs (threaded NAPI), and come back wrapped. They are XDP
//! frames throughout, as a network card's driver has them, not packets of sockets that are copied into XDP frames. At most 192
//! are under way, so that no ring overflows. With `--json` behind `--`, a line of JSON for each row.
//!
//! `ns` is all that the thread did for a packet: veth's receiving and sending, too. It is not busy all of the time, as the
//! generator is slower.

#[allow(unused)]
mod common;
#[path = "../tests/support/mod.rs"]
#[allow(unused)]
mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Duration;

use common::rewind::RewindSkel;
use common::{
    Bench, CONFIG, Case, Order, case, load_balancer, load_sender, median, open_and_publish,
    rewind_to,
};
use libbpf_rs::MapCore as _;
use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};
use mqtt_fwd::config::MapSizes;
use mqtt_fwd::domain::XdpMode;
use mqtt_fwd::kernel::abi::Pod as _;
use mqtt_fwd::kernel::skeletons::xdp_root::XdpRootSkelBuilder;
use mqtt_fwd::kernel::{chain, test_run, xdp};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use nix::unistd::Pid;
use support::datapath::{Fixture, XDP_TX, sentinel};
use support::mqtt;
use support::net::sh;

const NAMESPACE: &str = "mqtt-fwd-core";
/// Where frames are sent and come back; where the chain is.
const WIRE: [&str; 2] = ["wire0", "wire1"];
/// Times that the generator looks whether it may send: about a second.
const ATTEMPTS: u32 = 6_000_000;
const ROUNDS: usize = 3;

fn pin(thread: Pid, cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).unwrap();
    sched_setaffinity(thread, &set).unwrap();
}

/// The wire, in a namespace that this thread is in from then on.
struct Wire {
    /// Index of the interface that frames are sent to.
    near: u32,
    /// The threads that receive, of each interface.
    threads: [Pid; 2],
}

impl Wire {
    fn new() -> Self {
        let [near, far] = WIRE;
        sh(&format!(
            "ip netns del {NAMESPACE} 2>/dev/null || true; ip netns add {NAMESPACE}
             # Nobody else is to send anything.
             ip netns exec {NAMESPACE} sysctl -qw net.ipv6.conf.default.disable_ipv6=1
             ip -n {NAMESPACE} link add {near} numrxqueues 1 numtxqueues 1 type veth \
                 peer name {far} numrxqueues 1 numtxqueues 1
             ip -n {NAMESPACE} link set {near} up; ip -n {NAMESPACE} link set {far} up"
        ));
        let namespace = File::open(format!("/run/netns/{NAMESPACE}")).unwrap();
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
        Self { near: nix::net::if_::if_nametoindex(near).unwrap(), threads: [Pid::from_raw(0); 2] }
    }

    /// With a program on each end, its frames are received by a thread: the chain's on the last CPU, the rest on the first.
    fn give_threads(&mut self) {
        let last = std::thread::available_parallelism().unwrap().get() - 1;
        for (i, cpu) in [0, last].into_iter().enumerate() {
            let interface = WIRE[i];
            sh(&format!(
                "ip netns exec {NAMESPACE} sh -c 'echo 1 >/sys/class/net/{interface}/threaded'"
            ));
            let thread = sh(&format!("pgrep '^napi/{interface}-'"));
            self.threads[i] = Pid::from_raw(thread.trim().parse().unwrap());
            pin(self.threads[i], cpu);
        }
        // What comes back is taken at once, before more is sent.
        sh(&format!("chrt -f -p 1 {}", self.threads[0]));
        pin(Pid::from_raw(0), 0);
    }

    /// With what puts a case's packets on the wire, from a sequence number on, and takes what comes back.
    fn with_sender<T>(
        &mut self,
        case: &Case,
        seq: u32,
        bench: &Bench,
        work: impl FnOnce(&Self, &RewindSkel<'_>) -> T,
    ) -> T {
        let sender = load_sender(case, 0, self.near, &bench.fixture);
        rewind_to(&sender, seq);
        let receiver = xdp::ProgramInfo::by_fd(sender.progs.receive.as_fd()).unwrap().id;
        xdp::attach(WIRE[0], sender.progs.receive.as_fd(), XdpMode::Native).unwrap();
        self.give_threads();
        let result = work(self, &sender);
        xdp::detach(WIRE[0], receiver).unwrap();
        result
    }

    /// Nanoseconds that the chain's thread has run.
    fn cpu_ns(&self) -> u64 {
        let path = format!("/proc/{}/schedstat", self.threads[1]);
        let text = std::fs::read_to_string(path).unwrap();
        text.split(' ').next().unwrap().parse().unwrap()
    }

    /// Nanoseconds of CPU a frame.
    fn run(&self, sender: &RewindSkel<'_>, frame: &[u8], attempts: u32) -> f64 {
        let bss = sender.maps.bss_data.as_ref().unwrap();
        let (sent, received) = (&raw const bss.sent, &raw const bss.received);
        // SAFETY: the map stays mapped as long as the skeleton; the kernel writes to it.
        let read = || unsafe { (sent.read_volatile(), received.read_volatile()) };
        let (cpu, before) = (self.cpu_ns(), read().1);
        test_run::inject_copies(sender.progs.send.as_fd(), 1, frame, attempts).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let (sent, received) = read();
        assert_eq!(sent, received, "frames were lost");
        (self.cpu_ns() - cpu) as f64 / f64::from(received - before)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        sh(&format!("ip netns del {NAMESPACE}"));
    }
}

fn main() {
    // `cargo test --benches` runs this, too; it is not a test.
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    let json = std::env::args().any(|a| a == "--json");
    if std::thread::available_parallelism().unwrap().get() < 2 {
        return eprintln!("core: needs two CPUs, one of them for the chain alone");
    }
    let sizes = MapSizes { clients: 100_000, flows: 100_000, ..MapSizes::default() };
    let bench = Bench { fixture: Fixture::sized(CONFIG, &sizes), end: sentinel(XDP_TX) };
    let (balancer, vip) = load_balancer(false);
    let mut wire = Wire::new();

    let storage = Box::leak(Box::new(MaybeUninit::uninit()));
    let mut root = XdpRootSkelBuilder::default().open(storage).unwrap();
    root.maps.root_array.reuse_fd(bench.fixture.skel.maps.root_array.as_fd()).unwrap();
    let root = root.load().unwrap();
    let payload = mqtt::publish(b"site/7/temperature/cpu", 0, &[b'x'; 200]);
    xdp::attach(WIRE[1], root.progs.xdp_root.as_fd(), XdpMode::Native).unwrap();

    let (balancer, end) = (balancer.progs.balancer_ingress.as_fd(), bench.end.as_fd());
    let mqtt_fwd = bench.fixture.skel.progs.mqtt_fwd.as_fd();
    if !json {
        println!("{:36}{:>8}{:>10}{:>18}", "", "flows", "ns", "a second, if full");
    }
    for flows in [1000, 10_000] {
        // Sequence numbers go on where flows have been opened.
        let publish = case(false, flows, &payload);
        put(&bench, Some(mqtt_fwd), end);
        let next = open_and_publish(&bench, false, flows, &payload);
        let straight = Case { dst: vip, ..publish.clone() };
        for (name, case, first, last) in [
            ("veth alone", &straight, None, end),
            ("bare balancer", &straight, None, balancer),
            ("mqtt-fwd and balancer", &publish, Some(mqtt_fwd), balancer),
        ] {
            put(&bench, first, last);
            // The balancer meets them in the order of their opening, too: each repeats its last segment.
            let opening = Case { order: Order::Opening, seq_step: 0, ..case.clone() };
            wire.with_sender(&opening, next - payload.len() as u32, &bench, |wire, sender| {
                wire.run(sender, &case.packet, ATTEMPTS / 10);
            });
            let before = bench.fixture.counters();
            let ns = wire.with_sender(case, next, &bench, |wire, sender| {
                wire.run(sender, &case.packet, ATTEMPTS / 10);
                median((0..ROUNDS).map(|_| wire.run(sender, &case.packet, ATTEMPTS)).collect())
            });
            if first.is_some() {
                check(&bench, &before);
            }
            if json {
                println!("{{\"way\": \"{name}\", \"flows\": {flows}, \"ns\": {ns:.0}}}");
            } else {
                println!("{name:36}{flows:>8}{ns:>10.0}{:>18.0}", 1e9 / ns);
            }
        }
    }
}

/// The chain: mqtt_fwd, or nothing, and what stands in the balancer's position.
fn put(bench: &Bench, first: Option<BorrowedFd<'_>>, last: BorrowedFd<'_>) {
    match first {
        Some(program) => bench.put(chain::MQTT_FWD, program),
        None => drop(bench.fixture.skel.maps.root_array.delete(chain::MQTT_FWD.bytes())),
    }
    bench.put(chain::BALANCER, last);
}

/// Every frame was a message of its flow's group, and nothing else.
fn check(bench: &Bench, before: &BTreeMap<&'static str, u64>) {
    let mut rose = bench.fixture.counters();
    rose.retain(|name, n| {
        *n -= before.get(name).copied().unwrap_or(0);
        *n > 0
    });
    assert!(rose.keys().all(|name| ["data", "publish"].contains(name)), "{rose:?}");
    assert_eq!(rose["data"], rose["publish"]);
}
