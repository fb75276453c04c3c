//! Nanoseconds of a packet that comes alone: between packets, the processor did other things, and its caches have
//! neither the programs nor their maps. BPF_PROG_TEST_RUN of one packet after the other, between walks through other
//! data and other code (x86), of so many KiB each. The chain is `rewind` → `mqtt_fwd` → embedded balancer, the same
//! without `mqtt_fwd`, and `rewind` alone, in turns; means without the outer tenths.
//!
//! The same packet again and again (datapath) shows what instructions cost, and this what it costs to fetch them.

#[allow(unused)]
mod common;
#[path = "../tests/support/mod.rs"]
#[allow(unused)]
mod support;

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd as _, BorrowedFd};

use common::{Bench, CONFIG, Case, case, load_balancer, load_rewind, open_and_publish, rewind_to};
use mqtt_fwd::config::MapSizes;
use mqtt_fwd::kernel::chain;
use mqtt_fwd::kernel::test_run;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use support::datapath::{Fixture, XDP_TX, sentinel};
use support::mqtt;

const FLOWS: u32 = 300;
const SAMPLES: usize = 12_000;
/// Samples of one chain, one after the other.
const TURN: usize = 50;
const LINE: usize = 64;

/// Work between packets: its memory, and its code.
struct Other {
    data: Vec<u64>,
    /// A jump in each cache line to the next one, and a return in the last.
    code: *const u8,
    lines: usize,
}

impl Other {
    fn new(kib: usize) -> Self {
        let (bytes, lines) = (kib * 1024, kib * 1024 / LINE);
        let mut code = vec![0xcc; bytes];
        for i in 0..lines {
            // x86: JMP rel32, to a line elsewhere; the order is the one of `data`.
            code[i * LINE] = 0xe9;
        }
        let mut at = 0usize;
        for _ in 1..lines {
            let next = Self::after(at, lines);
            let to = |offset: usize| i32::try_from(offset).unwrap();
            let by = to(next * LINE) - to(at * LINE + 5);
            code[at * LINE + 1..at * LINE + 5].copy_from_slice(&by.to_le_bytes());
            at = next;
        }
        if lines > 0 {
            code[at * LINE] = 0xc3;
        }
        Self { data: vec![1; bytes / 8], code: executable(&code), lines }
    }

    /// In an order that no prefetcher foresees, as work is: Hull and Dobell's, for a power of two.
    fn after(at: usize, lines: usize) -> usize {
        (at.wrapping_mul(22_695_477).wrapping_add(1)) & (lines - 1)
    }

    fn work(&mut self) {
        if self.lines == 0 {
            return;
        }
        let mut at = 0;
        for _ in 0..self.lines {
            at = Self::after(at, self.lines);
            self.data[at * LINE / 8] += 1;
        }
        black_box(&self.data);
        if cfg!(target_arch = "x86_64") {
            // SAFETY: what new() has written there.
            unsafe { std::mem::transmute::<*const u8, extern "C" fn()>(self.code)() };
        }
    }
}

fn executable(code: &[u8]) -> *const u8 {
    if code.is_empty() {
        return std::ptr::null();
    }
    let all = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE | ProtFlags::PROT_EXEC;
    let length = NonZeroUsize::new(code.len()).unwrap();
    // SAFETY: new memory, which is never unmapped.
    unsafe {
        let memory = mmap_anonymous(None, length, all, MapFlags::MAP_PRIVATE);
        let memory = memory.unwrap().as_ptr().cast::<u8>();
        memory.copy_from_nonoverlapping(code.as_ptr(), code.len());
        memory
    }
}

/// The mean of what is neither among the lowest nor the highest tenth: the clock ticks in tens of nanoseconds, so a median does.
fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let tenth = values.len() / 10;
    let middle = &values[tenth..values.len() - tenth];
    middle.iter().sum::<f64>() / middle.len() as f64
}

fn main() {
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    let sizes = MapSizes { clients: 4096, flows: 65_536, ..MapSizes::default() };
    let fixture = Fixture::loaded(CONFIG, &sizes, |rodata| rodata.flows_per_window = u32::MAX);
    let bench = Bench { fixture, end: sentinel(XDP_TX) };
    let (balancer, vip) = load_balancer(false);
    let balancer = balancer.progs.balancer_ingress.as_fd();
    let mqtt_fwd = bench.fixture.skel.progs.mqtt_fwd.as_fd();
    let publish = mqtt::publish(b"measurements/temperature", 0, &[b'x'; 200]);
    println!(
        "{:16}{:>14}{:>10}{:>10}{:>8}{:>18}",
        "ns", "other memory", "balancer", "+ us", "adds", "of the balancer's"
    );
    for (name, payload) in [("ACK", &[][..]), ("PUBLISH, 24 B", &publish)] {
        for kib in [0, 32, 64, 128] {
            let ours = case(false, FLOWS, payload);
            let bare = Case { dst: vip, ..ours.clone() };
            let chains: [(&Case, BorrowedFd<'_>, BorrowedFd<'_>); 3] = [
                (&bare, bench.end.as_fd(), bench.end.as_fd()),
                (&bare, balancer, bench.end.as_fd()),
                (&ours, mqtt_fwd, balancer),
            ];
            bench.put(chain::BALANCER, balancer);
            let next = open_and_publish(&bench, false, FLOWS, payload);
            let senders = chains.map(|(case, ..)| {
                let rewind = load_rewind(case, 0, &bench.fixture);
                rewind_to(&rewind, next);
                rewind
            });
            let mut other = Other::new(kib);
            let mut ns = [const { Vec::new() }; 3];
            for _ in 0..SAMPLES / TURN {
                for (i, (case, first, last)) in chains.iter().enumerate() {
                    bench.put(chain::MQTT_FWD, *first);
                    bench.put(chain::BALANCER, *last);
                    let sender = senders[i].progs.rewind.as_fd();
                    for _ in 0..TURN {
                        other.work();
                        let run = test_run::run(sender, &case.packet, 1).unwrap();
                        assert_eq!(run.verdict, XDP_TX);
                        ns[i].push(f64::from(run.ns));
                    }
                }
            }
            let [empty, alone, both] = ns.map(middle);
            println!(
                "{name:16}{kib:>10} KiB{:>10.0}{:>10.0}{:>8.0}{:>18.2}",
                alone - empty,
                both - empty,
                both - alone,
                (both - alone) / (alone - empty)
            );
        }
    }
}
