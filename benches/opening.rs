//! What opening a connection costs with delayed binding, step by step, beside the balancer.
//!
//! Each packet is another connection's, so packets are not repeated but sent one by one, with a
//! system call in between: what is printed is the kernel's own figure of each program's run time
//! (BPF_ENABLE_STATS), less that of a program that does nothing. The balancer is measured alike.

#[allow(dead_code)]
mod common;
#[path = "../tests/support/mod.rs"]
#[allow(unused)]
mod support;

use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use common::{load_balancer, median};
use etherparse::{SlicedPacket, TcpHeader, TransportSlice};
use mqtt_fwd::config::MapSizes;
use mqtt_fwd::kernel::abi::handover_keys;
use support::datapath::{Fixture, SERVICE, SERVICE6, XDP_TX, sentinel, test_run};
use support::{datapath, mqtt, packet};

const CONNECTIONS: u32 = 4000;
const ROUNDS: usize = 7;

/// The kernel's count of a program's runs and their time.
fn stats(program: BorrowedFd<'_>) -> (u64, u64) {
    let mut info = libbpf_sys::bpf_prog_info::default();
    let mut size = size_of_val(&info) as u32;
    // SAFETY: info is valid for its size.
    let failed = unsafe {
        libbpf_sys::bpf_obj_get_info_by_fd(
            program.as_raw_fd(),
            (&raw mut info).cast(),
            &raw mut size,
        )
    };
    assert_eq!(failed, 0);
    (info.run_cnt, info.run_time_ns)
}

/// Nanoseconds a run while `run` runs.
fn cost(program: BorrowedFd<'_>, run: impl FnOnce()) -> f64 {
    let before = stats(program);
    run();
    let after = stats(program);
    (after.1 - before.1) as f64 / (after.0 - before.0) as f64
}

/// Cost of a segment of each client.
fn cost_of(program: BorrowedFd<'_>, clients: &[Client], seq: u32, payload: &[u8]) -> f64 {
    let packets: Vec<_> = clients.iter().map(|c| c.segment(seq, payload)).collect();
    cost(program, || {
        for p in &packets {
            test_run(&program, p, 1);
        }
    })
}

struct Client {
    addr: SocketAddr,
    service: SocketAddr,
    ack: u32,
}

impl Client {
    fn new(v6: bool, n: u32) -> Self {
        let addr = if v6 {
            format!("[fd01:9::{n:x}]:4000")
        } else {
            format!("{}:4000", std::net::Ipv4Addr::from(0x0b00_0000_u32.wrapping_add(n)))
        };
        let service = if v6 { SERVICE6 } else { SERVICE };
        Self { addr: addr.parse().unwrap(), service: service.parse().unwrap(), ack: 0 }
    }

    /// Takes a SYN-ACK.
    fn answered(&mut self, answer: &[u8]) {
        let sliced = SlicedPacket::from_ethernet(answer).unwrap();
        let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!() };
        self.ack = tcp.sequence_number().wrapping_add(1);
    }

    fn segment(&self, seq: u32, payload: &[u8]) -> Vec<u8> {
        let shape = |h: &mut TcpHeader| {
            h.syn = payload.is_empty();
            let options: &[_] = if h.syn {
                &[
                    etherparse::TcpOptionElement::MaximumSegmentSize(1460),
                    etherparse::TcpOptionElement::SelectiveAcknowledgementPermitted,
                    etherparse::TcpOptionElement::WindowScale(7),
                ]
            } else {
                &[]
            };
            h.set_options(options).unwrap();
        };
        packet::tcp(self.addr, self.service, seq, self.ack, shape, payload)
    }
}

/// The same flood of SYNs from all over, with both kinds of binding.
fn flood() {
    const SYNS: u32 = 100_000;
    for (name, text) in [
        ("predicted", datapath::CONFIG.to_owned()),
        ("delayed", datapath::CONFIG.replace("max_packet", "binding = \"delayed\"\nmax_packet")),
    ] {
        let sizes = MapSizes { flows: 1 << 17, ..datapath::SMALL };
        let f = Fixture::sized(&text, &sizes);
        let keys = handover_keys { key: [[1, 2], [3, 4]], epoch: 1, pad: 0 };
        f.datapath.handover_keys.put(&0, &keys).unwrap();
        let forward = f.skel.progs.mqtt_fwd.as_fd();
        let packets: Vec<_> = (0..SYNS)
            .map(|n| {
                let spread = n.wrapping_mul(0x9e37_79b1);
                Client { addr: Client::new(false, spread).addr, ..Client::new(false, 0) }
                    .segment(n, &[])
            })
            .collect();
        let mut on = 0;
        let ns = cost(forward, || {
            for p in &packets {
                on += u32::from(test_run(&forward, p, 1).0.verdict != XDP_TX);
            }
        });
        let flows = f.datapath.flows.mapped().unwrap().entries().count();
        println!(
            "{SYNS} spoofed SYNs, {name}: {ns:.0} ns each, {flows} flows stored, {on} on to brokers"
        );
    }
}

#[allow(clippy::too_many_lines)] // one step after the other
fn main() {
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    // SAFETY: no pointers; the descriptor keeps the statistics on until it is closed.
    let _on = unsafe {
        let fd = libbpf_sys::bpf_enable_stats(libbpf_sys::BPF_STATS_RUN_TIME);
        assert!(fd >= 0, "the kernel's statistics of BPF programs");
        OwnedFd::from_raw_fd(fd)
    };
    let text = datapath::CONFIG.replace("max_packet", "binding = \"delayed\"\nmax_packet");
    let sizes = MapSizes { flows: 1 << 20, client_ids: 1 << 18, ..datapath::SMALL };
    let f = Fixture::sized(&text, &sizes);
    let keys = handover_keys { key: [[1, 2], [3, 4]], epoch: 1, pad: 0 };
    f.datapath.handover_keys.put(&0, &keys).unwrap();
    let text = text.replace(
        "route = [",
        "protocol = \"tls\"\nroute = [\n{ sni = \"tenant-a.example.net\", group = \"a\" },",
    );
    let tls = Fixture::sized(&text, &sizes);
    tls.datapath.handover_keys.put(&0, &keys).unwrap();
    let nothing = sentinel(XDP_TX);
    flood();

    println!("{:52}{:>10}{:>12}", "one by one, with a system call in between", "ns", "× balancer");
    for v6 in [false, true] {
        let family = if v6 { ", IPv6" } else { "" };
        let (balancer, vip) = load_balancer(v6);
        let mut rows: Vec<(&str, Vec<f64>)> = Vec::new();
        let mut add = |name, ns| match rows.iter_mut().find(|(n, _)| *n == name) {
            Some((_, all)) => all.push(ns),
            None => rows.push((name, vec![ns])),
        };
        let forward = f.skel.progs.mqtt_fwd.as_fd();
        for round in 0..ROUNDS as u32 {
            let first = round * CONNECTIONS;
            let mut clients: Vec<Client> =
                (first..first + CONNECTIONS).map(|n| Client::new(v6, n)).collect();
            let bare = cost(nothing.as_fd(), || {
                for client in &clients {
                    test_run(&nothing, &client.segment(1, &[]), 1);
                }
            });
            let mut balanced = Vec::new();
            for client in &clients {
                let to_vip = Client { service: SocketAddr::new(vip, 1883), ..Client::new(v6, 0) };
                let to_vip = Client { addr: client.addr, ..to_vip };
                balanced.push((to_vip.segment(1, &[]), to_vip.segment(2, b"data")));
            }
            let program = balancer.progs.balancer_ingress.as_fd();
            let new = cost(program, || {
                for (syn, _) in &balanced {
                    test_run(&program, syn, 1);
                }
            });
            add("embedded balancer, SYN of a new connection", new - bare);
            let known = cost(program, || {
                for (_, data) in &balanced {
                    test_run(&program, data, 1);
                }
            });
            add("embedded balancer, its next segment", known - bare);

            let mut answers = Vec::new();
            let syn = cost(forward, || {
                for client in &clients {
                    answers.push(test_run(&forward, &client.segment(1, &[]), 1).0.packet);
                }
            });
            add("SYN → SYN-ACK", syn - bare);
            for (client, answer) in clients.iter_mut().zip(&answers) {
                client.answered(answer);
            }
            // A third each: known by client id, unknown, CONNECT and PUBLISH together.
            let publish = mqtt::publish(b"sensor/a", 1, b"21.5");
            let (a, rest) = clients.split_at(clients.len() / 3);
            let (b, c) = rest.split_at(rest.len() / 2);
            let known = mqtt::connect_as(4, 2, b"known", &[]);
            let unknown = mqtt::connect_as(4, 2, b"", &[]);
            let together = [&known[..], &publish].concat();
            let run = |clients: &[Client], seq: u32, payload: &[u8]| {
                cost_of(forward, clients, seq, payload) - bare
            };
            add("CONNECT and PUBLISH → bound, framed", run(c, 2, &together));
            add("CONNECT of a known client id → bound", run(a, 2, &known));
            add("CONNECT → CONNACK", run(b, 2, &unknown));
            let behind = 2 + unknown.len() as u32;
            add("PUBLISH after it → bound, CONNECT in front", run(b, behind, &publish));
            let behind = 2 + known.len() as u32;
            add("PUBLISH, still unconfirmed → marked", run(a, behind, &publish));
            // Acknowledging something of the broker's.
            let confirming: Vec<Client> =
                c.iter().map(|c| Client { ack: c.ack + 8, ..*c }).collect();
            let behind = 2 + together.len() as u32;
            add("PUBLISH that confirms", run(&confirming, behind, &publish));
            let behind = behind + publish.len() as u32;
            add("PUBLISH, established", run(&confirming, behind, &publish));

            // The same connections to a service that speaks TLS, as mosquitto_pub says hello.
            let hello = include_bytes!("../tests/hellos/mosquitto.bin");
            let forward = tls.skel.progs.mqtt_fwd.as_fd();
            for client in &mut clients {
                client.ack = 0;
                let answer = test_run(&forward, &client.segment(1, &[]), 1).0.packet;
                client.answered(&answer);
            }
            let run = |clients: &[Client], seq: u32, payload: &[u8]| {
                cost_of(forward, clients, seq, payload) - bare
            };
            add("ClientHello → bound by its server name", run(&clients, 2, hello));
            let answered: Vec<Client> =
                clients.iter().map(|c| Client { ack: c.ack + 1000, ..*c }).collect();
            let behind = 2 + hello.len() as u32;
            add("TLS record that confirms", run(&answered, behind, &publish));
            let behind = behind + publish.len() as u32;
            add("TLS record, established", run(&answered, behind, &publish));
        }
        let base = rows
            .iter()
            .find(|(name, _)| name.contains("next segment"))
            .map_or(1.0, |(_, all)| median(all.clone()));
        for (name, all) in rows {
            let ns = median(all);
            println!("{:52}{ns:>10.0}{:>12.2}", format!("{name}{family}"), ns / base);
        }
    }
}
