//! How a packet's cost grows with what there is: flows, clients, routes, groups, and what a segment is filled with. Each
//! point is the chain with mqtt_fwd in it, beside the bare chain in the same run (BPF_PROG_TEST_RUN, medians). With `--json FILE`
//! behind `--`, points go there, a line each, for `scripts/experiment growth`.

#[allow(unused)]
mod common;
#[path = "../tests/support/mod.rs"]
#[allow(unused)]
mod support;

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;

use common::{Bench, Case, case, median, open_and_publish, rewind_to};
use mqtt_fwd::config::MapSizes;
use mqtt_fwd::kernel::chain;
use support::conn::Conn;
use support::datapath::{Fixture, SERVICE, XDP_TX, sentinel, test_run};
use support::{mqtt, packet};

const MILLION: u32 = 1_000_000;
const STEPS: [u32; 7] = [1, 10, 100, 1000, 10_000, 100_000, MILLION];
const ROUNDS: usize = 5;

/// Everything is the default group's, so that nothing is mispredicted.
fn config(groups: &str, routes: &str) -> String {
    format!(
        r#"
interface = "lo"
balancer = "embedded"
gateway_mac = "02:00:00:00:00:09"
events_per_second = 0

[maps]
vips = 512

[[service]]
name = "mqtt"
address = "10.1.50.200"
default_group = "default"
max_packet = 1500
group = [
    {{ name = "default", vip = "10.1.50.250", reals = [{{ address = "10.1.3.203" }}] }},
{groups}]
route = [{routes}]
"#
    )
}

fn bench(text: &str) -> Bench {
    let sizes = MapSizes { clients: 2 * MILLION, flows: 2 * MILLION, ..MapSizes::default() };
    let bench = Bench { fixture: Fixture::sized(text, &sizes), end: sentinel(XDP_TX) };
    bench.put(chain::BALANCER, bench.end.as_fd());
    bench
}

#[derive(Default)]
struct Points(String);

impl Points {
    fn add(&mut self, plot: &str, x: u32, (bare, whole): (f64, f64)) {
        println!("{plot:10}{x:>10}{bare:>10.0}{whole:>10.0}");
        writeln!(
            self.0,
            "{{\"plot\": \"{plot}\", \"x\": {x}, \"bare_ns\": {bare:.0}, \"ns\": {whole:.0}}}"
        )
        .unwrap();
    }
}

fn medians(pairs: Vec<(f64, f64)>) -> (f64, f64) {
    let (bare, whole) = pairs.into_iter().unzip();
    (median(bare), median(whole))
}

/// A PUBLISH of a topic that its flow has published before.
fn publish(bench: &Bench, clients: u32, topic: &[u8]) -> (f64, f64) {
    let payload = mqtt::publish(topic, 0, b"21.5");
    let case = case(false, clients, &payload);
    medians(bench.pairs(&case, ROUNDS, |rewind| {
        let next = open_and_publish(bench, false, clients, &[]);
        rewind_to(rewind, next);
    }))
}

/// A SYN of a client that published before, and is predicted by that.
fn predicted_syn(bench: &Bench, clients: u32) -> (f64, f64) {
    let first = case(false, clients, &[]);
    let client = SocketAddr::new(first.src, 4001);
    let service: SocketAddr = SERVICE.parse().unwrap();
    let syn = Case {
        packet: packet::tcp(client, service, 0, 0, |h| h.syn = true, &[]),
        seq_step: 1000,
        ..first
    };
    medians(bench.pairs(&syn, ROUNDS, |_| {
        open_and_publish(bench, false, clients, &mqtt::publish(b"t", 0, b""));
    }))
}

/// A PUBLISH of another topic each time.
fn new_topic(bench: &Bench) -> (f64, f64) {
    let payload = mqtt::publish(b"site/7/dev00000", 0, b"21.5");
    let mut case = case(false, 1, &payload);
    case.topic_offset = (case.packet.len() - b"21.5".len() - 1) as u32;
    medians(bench.pairs(&case, ROUNDS, |rewind| {
        let next = open_and_publish(bench, false, 1, &[]);
        rewind_to(rewind, next);
    }))
}

/// A segment of so many bytes, full of PUBLISHes of topics that nobody has published: the least of some, on cold caches.
fn full_of_topics(bench: &Bench, bytes: usize, next: &mut u32) -> (f64, f64) {
    let program = bench.fixture.skel.progs.mqtt_fwd.as_fd();
    let (mut bare, mut whole) = (u32::MAX, u32::MAX);
    for _ in 0..40 {
        *next += 1;
        let client = SocketAddr::new(IpAddr::V4(Ipv4Addr::from(0x0c00_0000 + *next)), 4000);
        let mut c = Conn::new(&bench.fixture, &client.to_string());
        bench.fixture.send(&packet::tcp(c.client, c.service, c.isn, 0, |h| h.syn = true, &[]));
        let connect = mqtt::connect(4);
        bench.fixture.send(&c.segment(&connect));
        c.sent += connect.len() as u32;
        let mut payload = Vec::new();
        for i in 0_u32.. {
            let fresh = next.wrapping_mul(300).wrapping_add(i).to_be_bytes().map(|b| b | 1 << 6);
            let one = mqtt::publish(&fresh, 0, b"");
            if payload.len() + one.len() > bytes {
                break;
            }
            payload.extend(one);
        }
        let segment = c.segment(&payload);
        bare = bare.min(test_run(&bench.end.as_fd(), &segment, 1).1);
        whole = whole.min(test_run(&program, &segment, 1).1);
    }
    (f64::from(bare), f64::from(whole))
}

fn main() {
    // `cargo test --benches` runs this, too; it is not a test.
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    let file = std::env::args().skip_while(|a| a != "--json").nth(1);
    let mut points = Points::default();
    println!("{:10}{:>10}{:>10}{:>10}", "", "x", "bare, ns", "ns");
    let plain = bench(&config("", "{ topic = \"site/+/#\", group = \"default\" }"));
    for clients in STEPS {
        points.add("flows", clients, publish(&plain, clients, b"site/7/temperature/cpu"));
    }
    for clients in STEPS {
        points.add("clients", clients, predicted_syn(&plain, clients));
    }
    let mut next = 0;
    for bytes in [60, 120, 240, 480, 720, 960, 1200, 1460] {
        points.add("segment", bytes, full_of_topics(&plain, bytes as usize, &mut next));
    }
    drop(plain);
    for routes in [1, 10, 100, 1000, 10_000, 100_000] {
        let mut text = String::from("{ topic = \"site/+/#\", group = \"default\" },");
        for i in 1..routes {
            write!(text, "{{ topic = \"site/{}/dev{i}\", group = \"default\" }},", i % 100)
                .unwrap();
        }
        points.add("routes", routes, new_topic(&bench(&config("", &text))));
    }
    for groups in [1, 10, 50, 100, 250, 500] {
        let (mut text, mut routes) = (String::new(), String::new());
        for i in 1..groups {
            let (a, b) = (i / 250, i % 250 + 1);
            writeln!(
                text,
                "    {{ name = \"g{i}\", vip = \"10.1.{}.{b}\", reals = [{{ address = \"10.1.3.203\" }}] }},",
                60 + a
            )
            .unwrap();
            write!(routes, "{{ topic = \"g{i}/#\", group = \"g{i}\" }},").unwrap();
        }
        let bench = bench(&config(&text, &routes));
        points.add("groups", groups, publish(&bench, 1, b"site/7/temperature/cpu"));
    }
    if let Some(file) = file {
        std::fs::write(file, points.0).unwrap();
    }
}
