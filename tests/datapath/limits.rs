//! `[limits]`: a client that is above them becomes slow, and loses nothing.

use std::time::{Duration, Instant};

use mqtt_fwd::kernel::skeletons::mqtt_fwd::types::rodata;

use crate::handshake::connection::{Client, delayed_where};
use crate::support::conn::Conn;
use crate::support::datapath::{CONFIG, Fixture, JUMPED, SMALL, XDP_DROP};
use crate::support::mqtt;
use crate::support::net::wait_for;

const MOST: u32 = 20;

fn limited(set: impl FnOnce(&mut rodata)) -> Fixture {
    Fixture::loaded(CONFIG, &SMALL, |rodata| {
        rodata.flows_per_window = u32::MAX;
        rodata.topics_per_window = u32::MAX;
        set(rodata);
    })
}

/// Sends until it passes, as TCP does; whether it was dropped before.
fn repeated(f: &Fixture, segment: &[u8]) -> bool {
    let mut dropped = false;
    wait_for("the segment to pass", || {
        let (outcome, counted) = f.send_counting(segment);
        if outcome.verdict == JUMPED {
            return Some(());
        }
        assert_eq!((outcome.verdict, counted.get("rate_limited")), (XDP_DROP, Some(&1)));
        assert_eq!(counted.len(), 1, "nothing else has happened: {counted:?}");
        dropped = true;
        None
    });
    dropped
}

#[test]
fn a_client_that_publishes_too_fast_is_slowed_down_and_each_message_counts_once() {
    let f = limited(|rodata| rodata.messages_per_client = MOST);
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    c.data(&mqtt::publish(b"else", 0, b"first"));
    let before = f.counters()["publish"];
    let (start, mut dropped) = (Instant::now(), 0);
    let publish = mqtt::publish(b"else", 0, b"x");
    for _ in 0..3 * MOST {
        dropped += u32::from(repeated(&f, &c.segment(&publish)));
        c.sent += publish.len() as u32;
    }
    assert_eq!(f.counters()["publish"] - before, u64::from(3 * MOST));
    // The limit holds for each second of the clock, and the test began somewhere within one.
    assert!(start.elapsed() > Duration::from_secs(1), "{:?}", start.elapsed());
    assert!((1..=4).contains(&dropped), "{dropped}");
    // Another address is another client.
    let mut other = Conn::open(&f, "10.1.1.2:4000");
    other.data(&mqtt::connect(4));
}

#[test]
fn a_segment_of_many_messages_is_paid_for_afterwards() {
    let f = limited(|rodata| rodata.messages_per_client = MOST);
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    let publish = mqtt::publish(b"else", 0, b"x");
    let burst = publish.repeat(3 * MOST as usize);
    assert!(!repeated(&f, &c.segment(&burst)), "it may pass");
    c.sent += burst.len() as u32;
    let start = Instant::now();
    assert!(repeated(&f, &c.segment(&publish)));
    assert!(start.elapsed() > Duration::from_secs(1), "{:?}", start.elapsed());
    // RST, and segments without data, are never in question.
    c.sent += publish.len() as u32;
    repeated(&f, &c.segment(&burst));
    c.sent += burst.len() as u32;
    c.flagged(|h| h.ack = true);
    c.flagged(|h| h.rst = true);
}

#[test]
fn clients_behind_one_address_have_a_limit_each_by_their_ids() {
    let f = delayed_where(&SMALL, |rodata| rodata.messages_per_client = MOST);
    let publish = mqtt::publish(b"sensor/a", 0, b"x");
    let open = |id: &[u8], port: u16| {
        let client = Client::open(&f, &format!("10.1.1.1:{port}"), 7);
        let first = [mqtt::connect_as(4, 2, id, &[]), publish.clone()].concat();
        assert_eq!(f.send(&client.segment(0, &first, |_| {})).verdict, JUMPED);
        (client, first.len() as u32)
    };
    let (fast, mut at) = open(b"fast", 5001);
    let mut limited = false;
    for _ in 0..3 * MOST {
        limited |= f.send(&fast.segment(at, &publish, |_| {})).verdict == XDP_DROP;
        at += publish.len() as u32;
    }
    assert!(limited);
    let (slow, at) = open(b"slow", 5002);
    assert_eq!(f.send(&slow.segment(at, &publish, |_| {})).verdict, JUMPED);
}

#[test]
fn a_stranger_under_a_clients_id_does_not_use_up_what_it_may() {
    let f = delayed_where(&SMALL, |rodata| rodata.messages_per_client = MOST);
    let publish = mqtt::publish(b"sensor/a", 0, b"x");
    let open = |from: &str| {
        let client = Client::open(&f, from, 7);
        let first = [mqtt::connect_as(4, 2, b"device", &[]), publish.clone()].concat();
        assert_eq!(f.send(&client.segment(0, &first, |_| {})).verdict, JUMPED);
        (client, first.len() as u32)
    };
    let (device, device_at) = open("10.1.1.1:5001");
    // No broker has accepted him, or will.
    let (stranger, mut at) = open("10.1.1.66:5001");
    let mut limited = false;
    for _ in 0..3 * MOST {
        limited |= f.send(&stranger.segment(at, &publish, |_| {})).verdict == XDP_DROP;
        at += publish.len() as u32;
    }
    assert!(limited);
    assert_eq!(f.send(&device.segment(device_at, &publish, |_| {})).verdict, JUMPED);
}

#[test]
fn an_address_opens_so_many_connections_a_second() {
    let f = limited(|rodata| rodata.connections_per_address = 5);
    let syn = |client: &str| {
        let conn = Conn::new(&f, client);
        let client = conn.client;
        let packet = crate::support::packet::tcp(client, conn.service, 1, 0, |h| h.syn = true, &[]);
        f.send(&packet).verdict
    };
    let passed = (0..30).filter(|n| syn(&format!("10.1.1.1:{}", 4000 + n)) == JUMPED).count();
    // The second may have ended meanwhile.
    assert!((5..=10).contains(&passed), "{passed}");
    assert_eq!(syn("10.1.1.2:4000"), JUMPED);
    // One host has a network of 64 bits.
    let passed = (0..30).filter(|n| syn(&format!("[fd01:1::{n}]:4000")) == JUMPED).count();
    assert!((5..=10).contains(&passed), "{passed}");
    assert!(f.counters()["rate_limited"] >= 40);
}
