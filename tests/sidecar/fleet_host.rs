//! A broker host in a fleet: it says which connections it has, to whom it may, and sends back what is of none.

use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};

use etherparse::{PacketBuilder, PacketHeaders};
use mqtt_fwd::fleet::key::ask_keys;
use mqtt_fwd::handover::keys::{KeyFile, now};
use mqtt_fwd::kernel::ask::{Asked, Had, Question, read_answer};
use mqtt_fwd::kernel::decap::AskKeys;
use mqtt_fwd::kernel::pins::Pins;
use mqtt_fwd::kernel::test_run;

use crate::support::net::{Net, numbers};
use crate::support::packet;

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;
const SERVICES: [&str; 2] = ["10.1.50.200:1883", "[fd01:50::200]:1883"];

struct Host {
    net: Net,
    up: Vec<String>,
}

impl Host {
    fn new() -> Self {
        let net = Net::new();
        net.ok(&["keys", "new", "--file", net.dir.join("key").to_str().unwrap()]);
        let bpffs = net.dir.join("bpf");
        let up =
            ["host", "up", "--interface", "eth0", "--vip", "10.1.50.200", "--vip", "fd01:50::200"];
        let mut up: Vec<_> = up.iter().map(ToString::to_string).collect();
        up.extend(["--advmss", "0", "--bpffs", bpffs.to_str().unwrap()].map(str::to_owned));
        Self { net, up }
    }

    fn up(&self, more: &[&str]) -> String {
        let args: Vec<&str> =
            self.up.iter().map(String::as_str).chain(more.iter().copied()).collect();
        self.net.ok(&args)
    }

    fn key(&self) -> String {
        self.net.dir.join("key").to_str().unwrap().to_owned()
    }

    fn keys(&self) -> (AskKeys, u32) {
        let keys = KeyFile::read(self.key().as_ref()).unwrap().cookie_keys(now());
        (ask_keys(&keys), keys.epoch)
    }

    fn program(&self) -> OwnedFd {
        Pins::new(&self.net.dir.join("bpf"), "eth0", None).pinned_program("decap").unwrap().0
    }

    /// Sockets are looked up in the namespace of whoever runs the program.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let ns = std::fs::File::open(format!("/run/netns/{}", self.net.name)).unwrap();
        std::thread::scope(|scope| {
            let inside = scope.spawn(move || {
                nix::sched::setns(ns.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            inside.join().unwrap()
        })
    }
}

/// A question as it goes over the wire to this host.
fn wrapped(question: &[u8], v6: bool) -> Vec<u8> {
    let mut frame = Vec::new();
    let eth = PacketBuilder::ethernet2(packet::LB_MAC, packet::CLIENT_MAC);
    if v6 {
        let address = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
        let ip = eth.ipv6(address("fd01:2::102"), address("fd01:3::201"), 64);
        ip.udp(40_000, 18_830).write(&mut frame, question).unwrap();
    } else {
        let ip = eth.ipv4([10, 1, 2, 102], [10, 1, 3, 201], 64);
        ip.udp(40_000, 18_830).write(&mut frame, question).unwrap();
    }
    frame
}

#[test]
fn only_authentic_questions_of_a_fleet_are_answered() {
    let host = Host::new();
    let (keys, epoch) = host.keys();
    host.up(&[]);
    let silent = host.program();
    let said = host.up(&["--fleet-key", &host.key()]);
    assert!(said.contains("keys for a fleet's questions"), "{said}");
    assert_eq!(host.up(&["--fleet-key", &host.key()]), "nothing to do\n");
    let program = host.program();
    host.inside(|| {
        for service in SERVICES {
            let service: SocketAddr = service.parse().unwrap();
            let listener = TcpListener::bind(service).unwrap();
            let client = TcpStream::connect(service).unwrap();
            let _accepted = listener.accept().unwrap();
            let (seq, ack) = numbers(&client);
            let near = Asked { client: client.local_addr().unwrap(), seq, ack };
            let connections = [
                near,
                Asked { seq: seq.wrapping_add(1 << 25), ..near },
                Asked { ack: ack.wrapping_sub(1 << 25), ..near },
                Asked { client: SocketAddr::new(near.client.ip(), 9), ..near },
            ];
            let question = Question { nonce: 42, epoch, service, connections: &connections };
            let ask = |bytes: &[u8]| {
                test_run::run(program.as_fd(), &wrapped(bytes, service.is_ipv6()), 1).unwrap()
            };
            let sent = question.encode(&keys);
            let run = ask(&sent);
            assert_eq!(run.verdict, XDP_TX);
            assert_eq!(
                run.frame.len(),
                wrapped(&sent, service.is_ipv6()).len(),
                "no amplification"
            );
            let answer = &run.frame[run.frame.len() - sent.len()..];
            let had = vec![Had::This, Had::Other, Had::Other, Had::Nothing];
            assert_eq!(read_answer(&keys, answer), Some((42, had)));
            let back = PacketHeaders::from_ethernet_slice(&run.frame).unwrap();
            assert_eq!(back.transport.unwrap().udp().unwrap().destination_port, 40_000);

            assert_ne!(ask(answer).verdict, XDP_TX, "an answer is no question");
            for byte in 0..sent.len() {
                let mut damaged = sent.clone();
                damaged[byte] ^= 4;
                assert_ne!(ask(&damaged).verdict, XDP_TX, "byte {byte}");
                assert_ne!(ask(&sent[..byte]).verdict, XDP_TX, "{byte} bytes");
            }
            assert_eq!(ask(&question.encode(&[[7, 8]; 2])).verdict, XDP_DROP, "another key");
            let other = Question { epoch: epoch + 1, ..question };
            assert_eq!(ask(&other.encode(&[[7, 8]; 2])).verdict, XDP_DROP, "no key of that epoch");
            assert_eq!(ask(&[b'x'; 100]).verdict, XDP_PASS, "not ours");
        }
    });
    drop(silent);
    // Another port is another program: it takes the place of this one, and goes on counting.
    let moved = host.up(&["--fleet-key", &host.key(), "--ask-port", "18831"]);
    assert!(moved.contains("decap of this build"), "{moved}");
    let status = ["host", "status", "--interface", "eth0", "--bpffs"];
    let bpffs = host.net.dir.join("bpf");
    let status = host.net.mqtt_fwd(&[&status[..], &[bpffs.to_str().unwrap()]].concat());
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.contains("         2  questions of a fleet answered"), "{status}");
    host.net.ok(&["host", "down", "--interface", "eth0", "--bpffs", bpffs.to_str().unwrap()]);
}

#[test]
fn what_is_of_no_connection_goes_back_while_somebody_asks() {
    let host = Host::new();
    let (keys, epoch) = host.keys();
    host.up(&["--fleet-key", &host.key()]);
    let program = host.program();
    host.inside(|| {
        for service in SERVICES {
            let service: SocketAddr = service.parse().unwrap();
            let listener = TcpListener::bind(service).unwrap();
            let client = TcpStream::connect(service).unwrap();
            let _accepted = listener.accept().unwrap();
            let (seq, ack) = numbers(&client);
            let here = client.local_addr().unwrap();
            let segment = |client, seq, shape: fn(&mut etherparse::TcpHeader), id: u16| {
                let mut inner = packet::tcp(client, service, seq, ack, shape, b"x");
                if service.is_ipv4() {
                    inner[18..20].copy_from_slice(&id.to_be_bytes());
                    inner[20] |= 0x40;
                    inner[24..26].fill(0);
                    let sum = packet::checksum(&[&inner[14..34]]);
                    inner[24..26].copy_from_slice(&sum.to_be_bytes());
                } else {
                    inner[16..18].copy_from_slice(&id.to_be_bytes());
                }
                let mut outer = Vec::new();
                let eth = PacketBuilder::ethernet2(packet::LB_MAC, packet::CLIENT_MAC);
                if service.is_ipv4() {
                    let ip = eth.ipv4([172, 16, 0, 1], [10, 1, 3, 201], 64);
                    ip.write(&mut outer, etherparse::ip_number::IPV4, &inner[14..]).unwrap();
                } else {
                    let address = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
                    let ip = eth.ipv6(address("100::1"), address("fd01:3::201"), 64);
                    ip.write(&mut outer, etherparse::ip_number::IPV6, &inner[14..]).unwrap();
                }
                test_run::run(program.as_fd(), &outer, 1).unwrap()
            };
            let stranger = SocketAddr::new(here.ip(), 9);
            if service.is_ipv4() {
                // Nobody has asked yet: RST is the kernel's to send.
                assert_eq!(segment(stranger, seq, |_| {}, 1).verdict, XDP_PASS);
            }
            let question = Question { nonce: 1, epoch, service, connections: &[] }.encode(&keys);
            let run = test_run::run(program.as_fd(), &wrapped(&question, service.is_ipv6()), 1);
            assert_eq!(run.unwrap().verdict, XDP_TX);

            assert_eq!(segment(here, seq, |_| {}, 1).verdict, XDP_PASS, "its own");
            assert_eq!(segment(stranger, seq, |h| h.syn = true, 1).verdict, XDP_PASS, "a new one");
            assert_eq!(segment(stranger, seq, |h| h.rst = true, 1).verdict, XDP_PASS, "an end");
            assert_eq!(segment(stranger, seq, |_| {}, 0x4d00).verdict, XDP_PASS, "is handed over");
            assert_eq!(
                segment(stranger, seq, |_| {}, 0xcdff).verdict,
                XDP_PASS,
                "was sent back before, to a balancer that knows of no fleets"
            );
            for (client, seq) in [(stranger, seq), (here, seq.wrapping_add(1 << 26))] {
                let back = segment(client, seq, |_| {}, 1);
                assert_eq!(back.verdict, XDP_TX);
                assert!(packet::ip_checksum_right(&back.frame));
                assert_eq!(back.frame[..6], packet::LB_MAC, "to where it came from");
                let mark =
                    if service.is_ipv4() { &back.frame[18..20] } else { &back.frame[16..18] };
                assert_eq!(mark, 0x4dffu16.to_be_bytes());
                assert_eq!(packet::dst(&back.frame), service.ip());
            }
        }
    });
}
