//! What those can cost who have not shown that they get answers.

use std::net::SocketAddr;

use etherparse::TcpHeader;
use mqtt_fwd::domain::MapSizes;
use mqtt_fwd::kernel::abi::handover_keys;
use proptest::prelude::*;

use super::connection::{Client, delayed, delayed_at, delayed_where, delayed_with, kept, reply};
use crate::support::datapath::{JUMPED, SERVICE, SMALL, XDP_DROP, XDP_TX};
use crate::support::{mqtt, packet};

#[test]
fn spoofed_syns_change_nothing_and_get_no_further() {
    let f = delayed();
    // A flow that is there, bound.
    let client = Client::open(&f, "10.1.1.1:5000", 7);
    let first =
        [mqtt::connect_as(4, 2, b"known", &[]), mqtt::publish(b"sensor/a", 0, b"x")].concat();
    assert_eq!(f.send(&client.segment(0, &first, |_| {})).verdict, JUMPED);
    let before = kept(&f);
    // From addresses all over; SPOOFED_SYNS=1000000 is the full flood.
    let spoofed = std::env::var("SPOOFED_SYNS").map_or(20_000, |n| n.parse().expect("a number"));
    for i in 0..spoofed {
        let ip = std::net::Ipv4Addr::from(0x0b00_0000 + i * 257);
        let from = format!("{ip}:{}", 1024 + i % 60_000);
        let outcome = f.send(&Client::new(&from, i).syn());
        assert_eq!(outcome.verdict, XDP_TX);
    }
    assert_eq!(kept(&f), before, "nothing is kept");
    let counters = f.counters();
    assert_eq!(counters["syn_answered"], u64::from(spoofed) + 1);
    // The flow goes on, at its group.
    let next = client.segment(first.len() as u32, &mqtt::publish(b"sensor/a", 0, b"y"), |_| {});
    assert_eq!(packet::dst(&f.send(&next).packet).to_string(), "10.1.50.1");
}

/// Without a flow, nothing would tell the broker host to take the connection over.
#[test]
fn above_the_rate_of_new_flows_segments_are_dropped_and_bound_when_repeated() {
    let f = delayed_at(1);
    let window = std::time::Duration::from_millis(1100);
    let connect = mqtt::connect_as(4, 2, b"", &[]);
    let publish = mqtt::publish(b"sensor/a", 0, b"x");
    let together = [&connect[..], &publish].concat();
    let waits = Client::open(&f, "10.1.1.1:5001", 7);
    assert_eq!(f.send(&waits.segment(0, &connect, |_| {})).verdict, XDP_TX, "CONNACK");
    let (first, late) =
        (Client::open(&f, "10.1.1.1:5002", 8), Client::open(&f, "10.1.1.1:5003", 9));
    std::thread::sleep(window);
    assert_eq!(f.send(&first.segment(0, &together, |_| {})).verdict, JUMPED);
    let segments =
        [late.segment(0, &together, |_| {}), waits.segment(connect.len() as u32, &publish, |_| {})];
    for segment in &segments {
        let (outcome, counted) = f.send_counting(segment);
        assert_eq!((outcome.verdict, counted["handover_failed"]), (XDP_DROP, 1));
    }
    for segment in &segments {
        std::thread::sleep(window);
        let outcome = f.send(segment);
        assert_eq!(outcome.verdict, JUMPED);
        assert_eq!(packet::dst(&outcome.packet).to_string(), "10.1.50.1");
    }
}

#[test]
fn a_guessed_cookie_opens_nothing() {
    let f = delayed();
    let mut client = Client::open(&f, "10.1.1.2:5001", 99);
    let right = client.ack;
    let connect = mqtt::connect_as(4, 2, b"guess", &[]);
    for wrong in [right ^ 1 << 8, right ^ 1 << 31, right.wrapping_add(1), right ^ 1 << 4, 12345] {
        client.ack = wrong;
        assert_eq!(f.send(&client.segment(0, &connect, |_| {})).verdict, XDP_DROP);
    }
    // With timestamps, 8 bits more.
    client.ack = right;
    client.tsecr ^= 0x40;
    assert_eq!(f.send(&client.segment(0, &connect, |_| {})).verdict, XDP_DROP);
    assert_eq!(kept(&f), 0);
    client.tsecr ^= 0x40;
    assert_eq!(f.send(&client.segment(0, &connect, |_| {})).verdict, XDP_TX);
    // The key before, or the next, is good, too; another is not.
    let other = |key| handover_keys { key, epoch: 2, pad: 0 };
    for (port, key, verdict) in [
        (5002, [[9, 9], [3, 4]], XDP_TX),
        (5003, [[9, 9], [8, 8]], XDP_DROP),
        (5004, [[9, 9], [0, 0]], XDP_DROP),
    ] {
        f.datapath
            .handover_keys
            .put(&0, &handover_keys { key: [[1, 2], [3, 4]], epoch: 1, pad: 0 })
            .unwrap();
        let client = Client::open(&f, &format!("10.1.1.2:{port}"), 99);
        f.datapath.handover_keys.put(&0, &other(key)).unwrap();
        assert_eq!(f.send(&client.segment(0, &connect, |_| {})).verdict, verdict, "{key:?}");
    }
}

/// Recorded, or guessed at leisure, a cookie is worth nothing after two periods.
#[test]
fn a_cookie_has_its_age_and_the_options_that_were_offered() {
    let f = delayed_where(&SMALL, |rodata| rodata.cookie_period_ms = 300);
    let connect = mqtt::connect_as(4, 2, b"old", &[]);
    let verdict = |client: &Client| f.send(&client.segment(0, &connect, |_| {})).verdict;
    let period = std::time::Duration::from_millis(300);
    // Up to one period old it is good, whenever the next one begins.
    let client = Client::open(&f, "10.1.1.2:6001", 99);
    std::thread::sleep(period / 2);
    assert_eq!(verdict(&client), XDP_TX);
    let client = Client::open(&f, "10.1.1.2:6002", 99);
    std::thread::sleep(2 * period);
    assert_eq!(verdict(&client), XDP_DROP);
    // Timestamps that were offered cannot be left out, nor others brought.
    for (port, offered) in [(6003, true), (6004, false)] {
        let mut client = Client::new(&format!("10.1.1.2:{port}"), 99);
        client.offer.timestamps = offered;
        client.opened(&reply(&f.send(&client.syn())));
        client.offer.timestamps = !offered;
        assert_eq!(verdict(&client), XDP_DROP, "offered: {offered}");
        client.offer.timestamps = offered;
        assert_eq!(verdict(&client), XDP_TX, "offered: {offered}");
    }
}

#[test]
fn whatever_strangers_send_nothing_is_kept_and_no_answer_is_longer() {
    let f = delayed();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 3000,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let packets = (any::<u32>(), any::<u16>(), any::<u32>(), any::<u32>(), any::<u8>(), 0usize..6);
    let checked = runner.run(&packets, |(addr, port, seq, ack, flags, payload)| {
        let payload: Vec<u8> = [
            Vec::new(),
            mqtt::connect(4),
            [mqtt::connect(4), mqtt::publish(b"sensor/a", 1, b"x")].concat(),
            mqtt::publish(b"sensor/b", 0, b"x"),
            vec![0x10],
            vec![0x30; 1400],
        ][payload]
            .clone();
        let from =
            SocketAddr::new(std::net::Ipv4Addr::from(addr | 0x0100_0000).into(), port.max(1));
        let shape = |h: &mut TcpHeader| {
            (h.syn, h.fin, h.rst) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
            (h.ack, h.psh) = (flags & 8 != 0, flags & 16 != 0);
        };
        let sent = packet::tcp(from, SERVICE.parse().unwrap(), seq, ack, shape, &payload);
        let outcome = f.send(&sent);
        if outcome.verdict == XDP_TX {
            prop_assert!(outcome.packet.len() <= sent.len());
        }
        Ok(())
    });
    if let Err(error) = checked {
        panic!("{error}");
    }
    assert_eq!(kept(&f), 0);
}

/// A balancer that was restarted, or took over from another: flows go on once their second segment shows that they are alive.
#[test]
fn flows_whose_state_was_lost_go_on_and_stay() {
    const FLOWS: u32 = 2_000;
    let f = delayed_with(&MapSizes { flows: 1 << 16, ..SMALL });
    let segments: Vec<_> = (0..FLOWS)
        .map(|i| {
            let from = SocketAddr::new(std::net::Ipv4Addr::from(0x0a01_0000 + i).into(), 5000);
            let shape = |h: &mut TcpHeader| h.psh = true;
            let payload = mqtt::publish(b"sensor/a", 0, b"x");
            packet::tcp(from, SERVICE.parse().unwrap(), 77, 88, shape, &payload)
        })
        .collect();
    let passed = || segments.iter().filter(|s| f.send(s).verdict == JUMPED).count();
    assert_eq!(passed(), 0, "each might be nobody's");
    std::thread::sleep(std::time::Duration::from_millis(3100));
    // All but those that share a place with another: 3 % on average, at one flow in 32 places.
    let again = passed();
    assert!(again > FLOWS as usize * 9 / 10, "{again}");
    assert_eq!(passed(), again, "as long as they go on");
}
