//! Packets of every kind of wrongness: none is dropped, none aborts the program, and none that is
//! not for a service is changed by a bit.
//!
//! `FUZZ_PACKETS` sets how many (default 100000), `FUZZ_SEED` which ones.

use std::net::{IpAddr, SocketAddr};

use crate::support::datapath::{Fixture, JUMPED, SERVICE, SERVICE6, XDP_DROP, XDP_TX};
use crate::support::{mqtt, packet};

/// SplitMix64 (Steele, Lea, Flood 2014): small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// Good packets, to start from.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (client, service) in [("10.1.1.1:4000", SERVICE), ("[fd01:1::1]:4000", SERVICE6)] {
        let (client, service): (SocketAddr, SocketAddr) =
            (client.parse().unwrap(), service.parse().unwrap());
        let data = |payload: &[u8]| packet::tcp(client, service, 100, 7, |_| {}, payload);
        seeds.push(packet::tcp(client, service, 99, 0, |h| h.syn = true, &[]));
        seeds.push(data(&mqtt::connect(4)));
        seeds.push(data(&mqtt::publish(b"sensor/a", 1, b"21.5")));
        seeds.push(data(&mqtt::publish(b"tree/x/y/z", 0, &[b'1'; 1300])));
        seeds.push(data(&[mqtt::connect(5), mqtt::publish(b"a", 0, b"1").repeat(20)].concat()));
        seeds.push(packet::tcp(client, service, 100, 7, |h| h.fin = true, &[]));
        seeds.push(packet::tcp(client, service, 100, 7, |_| {}, &[b'x'; 1460]));
        // An ICMP error that quotes a packet of the service.
        let quoted = &packet::tcp(service, client, 9, 9, |_| {}, &[])[14..];
        let mut icmp = data(quoted);
        let (proto, at) = if client.is_ipv4() { (23, 34) } else { (20, 54) };
        icmp[proto] = if client.is_ipv4() { 1 } else { 58 };
        let mut error = icmp[..at].to_vec();
        error.extend([if client.is_ipv4() { 3 } else { 2 }, 4, 0, 0, 0, 0, 5, 0]);
        error.extend(quoted);
        seeds.push(error);
    }
    seeds
}

fn mutate(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut packet = seeds[random.below(seeds.len())].clone();
    if random.below(50) == 0 {
        packet = (0..14 + random.below(1500)).map(|_| random.next() as u8).collect();
    }
    // Mostly the headers: the payload has its own test.
    for _ in 0..random.below(4) {
        let reach = packet.len().min(if random.below(4) == 0 { 2000 } else { 90 });
        let at = 12 + random.below(reach - 12);
        packet[at] = match random.below(3) {
            0 => packet[at] ^ 1 << random.below(8),
            1 => [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            _ => random.next() as u8,
        };
    }
    match random.below(8) {
        0 => {
            let length = 14 + random.below(packet.len() - 13);
            packet.truncate(length);
        }
        1 => packet.extend(std::iter::repeat_n(0, random.below(40))),
        2 => {
            // VLAN tag, IP options or an extension header in between.
            let (at, bytes): (usize, &[u8]) = [
                (12, &[0x81, 0x00, 0x00, 0x01][..]),
                (34, &[1, 1, 1, 0]),
                (54, &[6, 0, 1, 4, 0, 0, 0, 0]),
            ][random.below(3)];
            if packet.len() > at {
                packet.splice(at..at, bytes.iter().copied());
                if at == 34 {
                    packet[14] = 0x46;
                } else if at == 54 {
                    packet[20] = [0, 43, 44, 51, 60][random.below(5)];
                }
            }
        }
        _ => {}
    }
    packet
}

/// Is it, as far as its headers say, a whole TCP segment for a service, or an ICMP error about
/// one? Only those may be changed.
fn may_change(packet: &[u8]) -> bool {
    let ip = &packet[14..];
    match packet[12..14] {
        [0x08, 0x00] if ip.len() >= 20 => match ip[9] {
            6 => ip.len() >= 40 && ip[16..20] == [10, 1, 50, 200] && ip[22..24] == [7, 91],
            1 => ip.len() >= 52 && ip[40..44] == [10, 1, 50, 200] && ip[16..20] == ip[40..44],
            _ => false,
        },
        [0x86, 0xdd] if ip.len() >= 40 => match ip[6] {
            6 => ip.len() >= 60 && ip[24..28] == [0xfd, 1, 0, 0x50] && ip[42..44] == [7, 91],
            58 => ip.len() >= 92 && ip[56..60] == [0xfd, 1, 0, 0x50] && ip[24..40] == ip[56..72],
            _ => false,
        },
        _ => false,
    }
}

#[test]
fn nothing_is_dropped_and_nothing_of_others_is_changed() {
    let count: u64 = std::env::var("FUZZ_PACKETS")
        .map_or(100_000, |n| n.parse().expect("FUZZ_PACKETS is a number"));
    let seed = std::env::var("FUZZ_SEED").map_or(1883, |s| s.parse().expect("a number"));
    let f = Fixture::new();
    let (seeds, mut random) = (seeds(), Random(seed));
    let (mut others, mut services, mut answered) = (0u64, 0u64, 0u64);
    let before: u64 = verdicts(&f);
    let group_vips: Vec<IpAddr> =
        f.config.services.iter().flat_map(|s| s.groups.iter().map(|g| g.vip)).collect();
    for i in 0..count {
        let sent = mutate(&mut random, &seeds);
        let outcome = f.send(&sent);
        let context = || format!("packet {i} of seed {seed}: {sent:02x?}");
        match outcome.verdict {
            JUMPED => {}
            // Only what is too big is answered, and only to a service.
            XDP_TX => {
                assert!(may_change(&sent) && sent.len() > 1474, "{}", context());
                answered += 1;
                continue;
            }
            // What is for a group must come through its service.
            XDP_DROP if group_vips.contains(&packet::dst(&sent)) => {
                others += 1;
                continue;
            }
            verdict => panic!("verdict {verdict}: {}", context()),
        }
        if outcome.packet == sent {
            others += 1;
            continue;
        }
        assert!(may_change(&sent), "changed: {}", context());
        assert_eq!(outcome.packet.len(), sent.len(), "{}", context());
        services += 1;
    }
    println!(
        "{count} packets, seed {seed}: 0 dropped, 0 aborted; {others} passed unchanged, \
         {services} sent to a group, {answered} answered with ICMP\n{:?}",
        f.counters()
    );
    assert_eq!(verdicts(&f) - before, count, "every packet has exactly one verdict");
    assert!(others > count / 10 && services > count / 10 && answered > 0);
}

fn verdicts(f: &Fixture) -> u64 {
    let counters = f.counters();
    let reasons = mqtt_fwd::kernel::reasons::REASONS.iter().filter(|r| r.is_verdict);
    reasons.filter_map(|r| counters.get(r.name)).sum()
}

#[test]
fn packets_cut_at_every_length_are_passed_on() {
    let f = Fixture::new();
    for packet in seeds() {
        for length in 14..packet.len() {
            let cut = &packet[..length];
            let outcome = f.send(cut);
            assert_eq!(outcome.verdict, JUMPED, "{length} of {}", packet.len());
            assert_eq!(outcome.packet, cut, "a cut packet is nobody's to change");
        }
    }
}
