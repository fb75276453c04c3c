//! The patched datapath of a real Katran behind `mqtt_fwd`, packet by packet. KATRAN_BALANCER names
//! its object: none of Katran is kept here, so `scripts/test --katran` runs these tests. Built with more of Katran's
//! options (-DGUE_ENCAP, -DICMP_TOOBIG_GENERATION, -DLOCAL_DELIVERY_OPTIMIZATION), more is looked at.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::PathBuf;

use crate::support::conn::Conn;
use crate::support::datapath::{Fixture, XDP_DROP, XDP_PASS, XDP_TX, test_run};
use crate::support::katran_object::{KatranObject, LOCAL_VIP};
use crate::support::{mqtt, packet};
use libbpf_rs::{MapCore as _, MapFlags};
use mqtt_fwd::balancer::flags::GROUP_FLAG;
use mqtt_fwd::kernel::abi::Pod as _;
use mqtt_fwd::kernel::chain;

fn object() -> PathBuf {
    std::env::var_os("KATRAN_BALANCER").expect("KATRAN_BALANCER, a patched balancer.bpf.o").into()
}

/// Without an option, there is nothing to look at. KATRAN_BUILT_WITH says which there are.
fn built_without(option: &str) -> bool {
    let options = std::env::var("KATRAN_BUILT_WITH").unwrap_or_default();
    assert!(!options.contains(option), "built with -D{option}, and it does not do it");
    eprintln!("not looked at: KATRAN_BUILT_WITH does not name -D{option}");
    true
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

const GROUPS: [(&str, &str, &str); 4] = [
    ("10.1.50.1", "10.1.50.200", "10.1.3.201"),
    ("10.1.50.250", "10.1.50.200", "fd01:3::203"),
    ("fd01:50::1", "fd01:50::200", "fd01:3::201"),
    ("fd01:50::250", "fd01:50::200", "fd01:3::203"),
];

/// mqtt_fwd in front of Katran.
fn chained(katran: &KatranObject) -> Fixture {
    let fixture = Fixture::new();
    for (number, (group, service, real)) in (0..).zip(GROUPS) {
        katran.add_vip(number, ip(group), 1883, GROUP_FLAG, ip(real));
        katran.set_service(ip(group), ip(service), 1883);
    }
    let fd = katran.program().as_fd().as_raw_fd().cast_unsigned();
    let array = &fixture.skel.maps.root_array;
    array.update(chain::BALANCER.bytes(), fd.bytes(), MapFlags::ANY).unwrap();
    fixture
}

/// What lies inside of IPIP or GUE, from its IP header on.
fn inner(packet: &[u8]) -> &[u8] {
    let (protocol, end) = match packet[12..14] {
        [0x08, 0x00] => (packet[23], 14 + 20),
        _ => (packet[20], 14 + 40),
    };
    match protocol {
        4 | 41 => &packet[end..],
        17 => &packet[end + 8..],
        other => panic!("outer protocol {other}"),
    }
}

#[test]
#[ignore = "needs a Katran: scripts/test --katran"]
fn reals_get_what_clients_sent() {
    let katran = KatranObject::load(&object());
    let f = chained(&katran);
    for client in ["10.1.1.1:4000", "[fd01:1::1]:4000"] {
        let c = Conn::new(&f, client);
        let headers = if c.client.is_ipv4() { 20 } else { 40 };
        let segment = |seq: u32, syn: bool, fin: bool, payload: &[u8]| {
            let shape = |h: &mut etherparse::TcpHeader| (h.syn, h.fin) = (syn, fin);
            // With a CONNACK behind CONNECT.
            let ack = if [100, 101, 5000, 5001].contains(&seq) { 9 } else { 13 };
            packet::tcp(c.client, c.service, seq, ack, shape, payload)
        };
        let arrives = |sent: &[u8], arrives: &[u8], real: &str| {
            let got = f.send(sent);
            assert_eq!(got.verdict, XDP_TX, "{client}");
            assert_eq!(packet::dst(&got.packet), ip(real));
            assert!(packet::ip_checksum_right(&got.packet));
            // The IP header's identification and checksum are not compared where it was cut.
            let from = if sent == arrives { 0 } else { headers };
            let inner = &inner(&got.packet)[from..];
            assert_eq!(inner, &arrives[14 + from..], "{client}: not what was sent");
        };
        let send = |seq: u32, syn: bool, payload: &[u8], real: &str| {
            let sent = segment(seq, syn, false, payload);
            arrives(&sent, &sent, real);
        };
        let (default, a) = match c.client {
            SocketAddr::V4(_) => ("fd01:3::203", "10.1.3.201"),
            SocketAddr::V6(_) => ("fd01:3::203", "fd01:3::201"),
        };
        let connect = mqtt::connect(4);
        send(100, true, &[], default);
        send(101, false, &connect, default);
        let next = 101 + connect.len() as u32;
        // Its group is another: the broker gets DISCONNECT and FIN, with a right checksum.
        let publish = mqtt::publish(b"sensor/a", 0, b"21.5");
        let cut = segment(next, false, true, &mqtt::disconnect());
        arrives(&segment(next, false, false, &publish), &cut, default);
        // The next connection, on the same port, is the right group's.
        send(5000, true, &[], a);
        send(5001, false, &connect, a);
        send(5001 + connect.len() as u32, false, &publish, a);

        // An ICMP error about it: both addresses are the service's again, and all checksums right.
        let error = packet::icmp_error(c.service, c.client);
        let got = f.send(&error);
        assert_eq!(got.verdict, XDP_TX);
        assert_eq!(packet::dst(&got.packet), ip(a));
        assert_eq!(inner(&got.packet), &error[14..]);
    }
}

#[test]
#[ignore = "needs a Katran: scripts/test --katran"]
fn vips_of_others_are_left_alone() {
    let katran = KatranObject::load(&object());
    for (number, vip, real) in [(0, "10.9.9.9", "10.1.3.201"), (1, "fd09::9", "fd01:3::201")] {
        katran.add_vip(number, ip(vip), 1883, 0, ip(real));
        // Somebody's mistake: without the flag it means nothing.
        katran.set_service(ip(vip), ip(if number == 0 { "10.1.50.200" } else { "fd01::1" }), 1883);
        let client = SocketAddr::new(ip(if number == 0 { "10.1.1.1" } else { "fd01:1::1" }), 4000);
        let sent = packet::tcp(client, SocketAddr::new(ip(vip), 1883), 1, 0, |h| h.syn = true, &[]);
        let (got, _) = test_run(&katran.program().as_fd(), &sent, 1);
        assert_eq!(got.verdict, XDP_TX);
        assert_eq!(inner(&got.packet), &sent[14..]);
    }
}

/// As mqtt_fwd hands it on: to the group's VIP, with the checksum of the service.
fn to_group(client: SocketAddr, service: SocketAddr, group: IpAddr, payload: &[u8]) -> Vec<u8> {
    let mut sent = packet::tcp(client, service, 1, 9, |_| {}, payload);
    match group {
        IpAddr::V4(addr) => {
            sent[30..34].copy_from_slice(&addr.octets());
            sent[24..26].fill(0);
            let check = packet::checksum(&[&sent[14..34]]);
            sent[24..26].copy_from_slice(&check.to_be_bytes());
        }
        IpAddr::V6(addr) => sent[38..54].copy_from_slice(&addr.octets()),
    }
    sent
}

#[test]
#[ignore = "needs a Katran: scripts/test --katran"]
fn icmp_too_big_comes_from_the_service() {
    let katran = KatranObject::load(&object());
    for (number, (group, service, real)) in (0..).zip(GROUPS) {
        katran.add_vip(number, ip(group), 1883, GROUP_FLAG, ip(real));
        katran.set_service(ip(group), ip(service), 1883);
        let client = if ip(service).is_ipv4() { "10.1.1.1:4000" } else { "[fd01:1::1]:4000" };
        let service = SocketAddr::new(ip(service), 1883);
        let sent = to_group(client.parse().unwrap(), service, ip(group), &[b'x'; 1600]);
        let (got, _) = test_run(&katran.program().as_fd(), &sent, 1);
        if got.verdict == XDP_DROP && built_without("ICMP_TOOBIG_GENERATION") {
            return;
        }
        assert_eq!(got.verdict, XDP_TX);
        let (src, quoted_dst) = if service.is_ipv4() {
            (&got.packet[26..30], &got.packet[14 + 28 + 16..14 + 28 + 20])
        } else {
            (&got.packet[22..38], &got.packet[14 + 48 + 24..14 + 48 + 40])
        };
        let octets = match service.ip() {
            IpAddr::V4(addr) => addr.octets().to_vec(),
            IpAddr::V6(addr) => addr.octets().to_vec(),
        };
        assert_eq!((src, quoted_dst), (&octets[..], &octets[..]));
        assert!(packet::ip_checksum_right(&got.packet));
        if service.is_ipv4() {
            assert!(packet::ip_checksum_right(&[&got.packet[..14], &got.packet[42..]].concat()));
        }
    }
}

#[test]
#[ignore = "needs a Katran: scripts/test --katran"]
fn local_delivery_is_to_the_service() {
    let katran = KatranObject::load(&object());
    for (number, (group, service, real)) in (0..).zip(GROUPS) {
        katran.add_vip(number, ip(group), 1883, GROUP_FLAG | LOCAL_VIP, ip(real));
        katran.set_service(ip(group), ip(service), 1883);
        let client = if ip(service).is_ipv4() { "10.1.1.1:4000" } else { "[fd01:1::1]:4000" };
        let (client, service) = (client.parse().unwrap(), SocketAddr::new(ip(service), 1883));
        let sent = to_group(client, service, ip(group), b"hello");
        let (got, _) = test_run(&katran.program().as_fd(), &sent, 1);
        if got.verdict == XDP_TX && built_without("LOCAL_DELIVERY_OPTIMIZATION") {
            return;
        }
        assert_eq!(got.verdict, XDP_PASS);
        assert_eq!(got.packet, packet::tcp(client, service, 1, 9, |_| {}, b"hello"));
    }
}
