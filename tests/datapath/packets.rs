//! What goes in and what comes out, byte by byte, on the real program in this kernel.

use std::net::SocketAddr;

use crate::support::conn::{Conn, seen};
use crate::support::datapath::{Fixture, JUMPED, SERVICE, SERVICE6, XDP_DROP, XDP_PASS, XDP_TX};
use crate::support::{mqtt, packet};

#[test]
fn without_a_balancer_the_packet_reaches_the_stack_as_it_came() {
    let f = Fixture::new();
    f.set_balancer(false);
    for client in ["10.1.1.1:4000", "[fd01:1::1]:4000"] {
        let client: SocketAddr = client.parse().unwrap();
        let service = if client.is_ipv4() { SERVICE } else { SERVICE6 };
        let syn = packet::tcp(client, service.parse().unwrap(), 1, 0, |h| h.syn = true, &[]);
        let (outcome, counters) = f.send_counting(&syn);
        assert_eq!(outcome.verdict, XDP_PASS);
        assert_eq!(outcome.packet, syn);
        assert_eq!(counters.get("no_balancer"), Some(&1));
    }
}

#[test]
fn packets_of_others_pass_unchanged() {
    // Rule 6.
    let f = Fixture::new();
    let client: SocketAddr = "10.1.1.1:4000".parse().unwrap();
    let client6: SocketAddr = "[fd01:1::1]:4000".parse().unwrap();
    let syn = |to: &str| {
        let to: SocketAddr = to.parse().unwrap();
        let from = if to.is_ipv4() { client } else { client6 };
        packet::tcp(from, to, 1, 0, |h| h.syn = true, &[])
    };
    let patched = |mut packet: Vec<u8>, at: usize, byte: u8| {
        packet[at] = byte;
        packet
    };
    let vlan = |mut packet: Vec<u8>| {
        packet.splice(12..12, [0x81, 0x00, 0x00, 0x05]);
        packet
    };
    let table: Vec<(&str, Vec<u8>, &str)> = vec![
        ("another address", syn("10.1.50.201:1883"), "not_service"),
        ("another port", syn("10.1.50.200:1884"), "not_service"),
        ("another IPv6 address", syn("[fd01:50::201]:1883"), "not_service"),
        ("UDP", patched(syn(SERVICE), 23, 17), "not_service"),
        ("ARP", patched(syn(SERVICE), 13, 0x06), "not_ip"),
        ("VLAN", vlan(syn(SERVICE)), "not_ip"),
        ("more fragments", patched(syn(SERVICE), 20, 0x20), "ip_fragment"),
        ("a later fragment", patched(syn(SERVICE), 21, 0x08), "ip_fragment"),
        ("IP options", patched(syn(SERVICE), 14, 0x46), "ip_options"),
        ("IPv6 hop-by-hop options", patched(syn(SERVICE6), 20, 0), "ipv6_extension"),
        ("IPv6 fragment", patched(syn(SERVICE6), 20, 44), "ipv6_extension"),
        ("TCP header shorter than 20 B", patched(syn(SERVICE), 46, 0x40), "truncated"),
        ("TCP header longer than the packet", patched(syn(SERVICE), 46, 0xf0), "truncated"),
        ("IP length beyond the frame", patched(syn(SERVICE), 16, 0x10), "truncated"),
        ("IP length within the TCP header", patched(syn(SERVICE), 17, 30), "truncated"),
    ];
    for (what, sent, reason) in table {
        let (outcome, counters) = f.send_counting(&sent);
        assert_eq!(outcome.verdict, JUMPED, "{what}");
        assert_eq!(outcome.packet, sent, "{what}");
        assert_eq!(counters.into_iter().collect::<Vec<_>>(), [(reason, 1)], "{what}");
    }
}

#[test]
fn what_comes_from_outside_for_a_group_is_dropped() {
    let f = Fixture::new();
    let send = |from: &str, to: SocketAddr| {
        let syn = packet::tcp(from.parse().unwrap(), to, 1, 0, |h| h.syn = true, &[]);
        let (outcome, counters) = f.send_counting(&syn);
        (outcome.verdict, counters.into_iter().collect::<Vec<_>>())
    };
    let service = &f.config.services[0];
    let mut families = [false, false];
    for service in &f.config.services {
        for group in &service.groups {
            let from = if group.vip.is_ipv4() { "10.1.1.1:4000" } else { "[fd01:1::1]:4000" };
            families[usize::from(group.vip.is_ipv6())] = true;
            let seen = send(from, SocketAddr::new(group.vip, service.port));
            assert_eq!(seen, (XDP_DROP, vec![("group_vip", 1)]), "{}", group.vip);
        }
    }
    assert_eq!(families, [true, true]);
    // Another port there is somebody else's.
    let other = SocketAddr::new(service.groups[0].vip, service.port + 1);
    assert_eq!(send("10.1.1.1:4000", other), (JUMPED, vec![("not_service", 1)]));
}

#[test]
fn the_tcp_checksum_is_right_again_when_the_balancer_restores_the_service() {
    // Rule 7.
    let f = Fixture::new();
    let client: SocketAddr = "10.1.1.1:4000".parse().unwrap();
    let service: SocketAddr = SERVICE.parse().unwrap();
    let syn = packet::tcp(client, service, 1, 0, |h| h.syn = true, &[]);
    assert!(packet::tcp_checksum_right(&syn));
    let mut out = f.send(&syn).packet;
    assert!(packet::ip_checksum_right(&out));
    assert!(!packet::tcp_checksum_right(&out));
    out[30..34].copy_from_slice(&[10, 1, 50, 200]);
    assert!(packet::tcp_checksum_right(&out));
}

#[test]
fn a_packet_too_large_to_be_wrapped_is_answered_with_icmp() {
    // design: size on the wire. Quotes the packet as it came, from MQTT_VIP.
    let f = Fixture::new();
    for (client, service, limit) in
        [("10.1.1.1:4000", SERVICE, 1480usize), ("[fd01:1::1]:4000", SERVICE6, 1460)]
    {
        let (client, service): (SocketAddr, SocketAddr) =
            (client.parse().unwrap(), service.parse().unwrap());
        let headers = if client.is_ipv4() { 40 } else { 60 };
        let df = |mut packet: Vec<u8>| {
            if client.is_ipv4() && packet[20] & 0x40 == 0 {
                packet[20] |= 0x40;
                let check = u16::from_be_bytes([packet[24], packet[25]]);
                packet[24..26].copy_from_slice(&(check.wrapping_sub(0x4000)).to_be_bytes());
            }
            packet
        };
        let of_length = |length: usize| {
            df(packet::tcp(client, service, 1, 77, |_| {}, &vec![b'x'; length - headers]))
        };
        let (fits, counters) = f.send_counting(&of_length(limit));
        assert_eq!(fits.verdict, JUMPED);
        assert!(!counters.contains_key("too_big"));

        let sent = of_length(limit + 1);
        let (outcome, counters) = f.send_counting(&sent);
        assert_eq!(outcome.verdict, XDP_TX);
        assert_eq!(counters.into_iter().collect::<Vec<_>>(), [("too_big", 1)]);
        let reply = outcome.packet;
        assert_eq!(reply[..6], packet::CLIENT_MAC);
        assert_eq!(reply[6..12], packet::LB_MAC);
        assert_eq!(packet::dst(&reply), client.ip());
        assert!(packet::ip_checksum_right(&reply));
        if client.is_ipv4() {
            assert_eq!(reply.len(), 14 + 576);
            assert_eq!(reply[26..30], [10, 1, 50, 200], "from MQTT_VIP");
            let icmp = &reply[34..];
            assert_eq!(icmp[..2], [3, 4]);
            assert_eq!(u16::from_be_bytes([icmp[6], icmp[7]]), 1480);
            assert_eq!(packet::checksum(&[icmp]), 0);
            assert_eq!(icmp[8..], sent[14..14 + 548]);
        } else {
            assert_eq!(reply.len(), 14 + 1280);
            let icmp = &reply[54..];
            assert_eq!(icmp[..2], [2, 0]);
            assert_eq!(u32::from_be_bytes([icmp[4], icmp[5], icmp[6], icmp[7]]), 1460);
            let length = (icmp.len() as u32).to_be_bytes();
            assert_eq!(packet::checksum(&[&reply[22..54], &length, &[0, 0, 0, 58], icmp]), 0);
            assert_eq!(icmp[8..], sent[14..14 + 1232]);
        }
    }
    // Without DF it is the network's to fragment (RFC 791).
    let (client, service): (SocketAddr, SocketAddr) =
        ("10.1.1.1:4000".parse().unwrap(), SERVICE.parse().unwrap());
    let mut sent = packet::tcp(client, service, 1, 77, |_| {}, &[b'x'; 1460]);
    sent[20] &= !0x40;
    let (outcome, counters) = f.send_counting(&sent);
    assert_eq!(outcome.verdict, JUMPED);
    assert_eq!(counters.get("too_big_no_df"), Some(&1));
}

#[test]
fn an_icmp_error_about_a_flow_goes_to_its_group() {
    let f = Fixture::new();
    // The client's flow is bound to a, not to the default.
    for client in ["10.1.1.1:4000", "[fd01:1::1]:4000"] {
        let mut first = Conn::open(&f, client);
        first.data(&mqtt::connect(4));
        first.ended(&mqtt::publish(b"sensor/a", 0, b"1"));
        let c = Conn::open(&f, &client.replace("4000", "4001"));
        // What a router between real and client says about a packet service → client.
        let sent = packet::icmp_error(c.service, c.client);

        assert_eq!(c.seen(&sent), seen("a", &["icmp_error 1"]));
        // The quoted source is the group VIP, too: that is what Katran looks up.
        let out = f.send(&sent).packet;
        let at = if c.client.is_ipv4() { 42 + 12 } else { 62 + 8 };
        let vip = if c.client.is_ipv4() { &[10, 1, 50, 1][..] } else { &[0xfd, 0x01, 0, 0x50][..] };
        assert_eq!(out[at..at + 4], *vip);
        // Checksums of ICMP and of the quoted header stay, to be right again when it is put back.
        let mut restored = out.clone();
        let dst = if c.client.is_ipv4() { 30..34 } else { 38..54 };
        restored[dst.clone()].copy_from_slice(&sent[dst]);
        let length = if c.client.is_ipv4() { 4 } else { 16 };
        restored[at..at + length].copy_from_slice(&sent[at..at + length]);
        restored[24..26].copy_from_slice(&sent[24..26]);
        assert_eq!(restored, sent);

        f.set_balancer(false);
        assert_eq!(f.send(&sent).packet, sent, "without a balancer it is as it came");
        f.set_balancer(true);

        // About a flow that is not known, or not a service's: not ours to send anywhere.
        let mut unknown = sent.clone();
        let port = if c.client.is_ipv4() { 42 + 20 + 2 } else { 62 + 40 + 2 };
        unknown[port] ^= 1;
        assert_eq!(f.send(&unknown).packet, unknown);
    }
}

#[test]
fn an_icmp_error_that_is_not_the_service_s_passes_byte_for_byte() {
    let f = Fixture::new();
    for client in ["10.1.1.1:4000", "[fd01:1::1]:4000"] {
        let c = Conn::open(&f, client);
        let sent = packet::icmp_error(c.service, c.client);
        assert_eq!(c.seen(&sent), seen("default", &["icmp_error 1"]));
        // To another address, though it quotes a packet of the service; or a fragment's.
        let v4 = c.client.is_ipv4();
        let mut elsewhere = sent.clone();
        elsewhere[if v4 { 33 } else { 53 }] ^= 1;
        let mut cases = vec![elsewhere];
        if v4 {
            let mut fragment = sent.clone();
            fragment[42 + 6] |= 0x20; // more fragments, in the quoted header
            cases.push(fragment);
        }
        for case in cases {
            let (outcome, counters) = f.send_counting(&case);
            assert_eq!(outcome.packet, case);
            assert_eq!(counters.into_iter().collect::<Vec<_>>(), [("not_service", 1)]);
        }
    }
}

#[test]
fn no_packet_of_a_client_s_looks_marked_to_its_broker() {
    // abi/handover.h: a broker host answers no RST to what is marked.
    let f = Fixture::new();
    for client in ["10.1.1.1:4000", "[fd01:1::1]:4000"] {
        let c = Conn::open(&f, client);
        let word = if c.client.is_ipv4() { 18 } else { 16 };
        for (id, is_marked) in [(0x4d00_u16, true), (0x4dff, true), (0x4c17, false), (0, false)] {
            let mut sent = packet::tcp(c.client, c.service, 9, 9, |_| {}, b"x");
            sent[word..word + 2].copy_from_slice(&id.to_be_bytes());
            if c.client.is_ipv4() {
                sent[24..26].fill(0);
                let sum = packet::checksum(&[&sent[14..34]]);
                sent[24..26].copy_from_slice(&sum.to_be_bytes());
            }
            let out = f.send(&sent).packet;
            let left = u16::from_be_bytes([out[word], out[word + 1]]);
            assert_eq!(left, if is_marked { id ^ 0x8000 } else { id }, "{client}");
            assert!(packet::ip_checksum_right(&out));
        }
        // Without DF, the identification is what fragments on the way are put together by.
        if c.client.is_ipv4() {
            let mut sent = packet::tcp(c.client, c.service, 9, 9, |_| {}, b"x");
            sent[18..22].copy_from_slice(&[0x4d, 0, 0, 0]);
            assert_eq!(f.send(&sent).packet[18..20], [0x4d, 0]);
        }
    }
}
