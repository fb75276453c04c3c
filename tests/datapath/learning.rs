//! What is learned of clients, from whom, and what follows from it.

use crate::handshake::connection::{Client, delayed_of, reply};
use crate::support::conn::{Conn, predicted, seen};
use crate::support::datapath::{CONFIG, Fixture, JUMPED, SMALL, XDP_TX};
use crate::support::{mqtt, packet};

#[test]
fn a_client_that_goes_back_and_forth_is_multi_group_and_not_ended_for_it_all_the_time() {
    let f = Fixture::new();
    let mut ended = 0;
    for round in 0..6 {
        let mut c = Conn::open(&f, &format!("10.1.1.1:{}", 4000 + round));
        c.data(&mqtt::connect(4));
        for topic in [b"sensor/a", b"sensor/b"] {
            let (_, counters) = f.send_counting(&c.segment(&mqtt::publish(topic, 0, b"1")));
            c.sent += mqtt::publish(topic, 0, b"1").len() as u32;
            ended += u64::from(counters.contains_key("flow_ended"));
        }
    }
    let row = f.client("10.1.1.1").unwrap();
    assert!(row.multi_group);
    assert!(row.group_changes >= 3, "{}", row.group_changes);
    assert!(ended <= 3, "{ended} of 6 connections were ended");
}

#[test]
fn a_device_with_a_birth_message_is_predicted_by_its_telemetry() {
    // On each connection: devices/x/status (default group), then telemetry (a).
    let f = Fixture::new();
    let (mut right, mut wrong) = (0, 0);
    for round in 0..40 {
        let mut c = Conn::open(&f, &format!("10.1.1.1:{}", 4000 + round));
        c.data(&mqtt::connect(4));
        for (i, topic) in
            [&b"devices/x/status"[..]].iter().chain(&[&b"sensor/a"[..]; 20]).enumerate()
        {
            let packet = c.segment(&mqtt::publish(topic, 0, b"1"));
            c.sent += mqtt::publish(topic, 0, b"1").len() as u32;
            let (_, counters) = f.send_counting(&packet);
            if counters.contains_key("flow_ended") {
                break; // the client reconnects
            }
            if round >= 4 && i > 0 {
                *(if counters.contains_key("publish") { &mut right } else { &mut wrong }) += 1;
            }
        }
    }
    assert_eq!((right, wrong), (36 * 20, 0), "from the fifth connection on");
}

#[test]
fn a_topic_for_any_group_follows_its_flow_and_teaches_nothing() {
    let f = Fixture::with(&CONFIG.replace(
        "{ topic = \"sensor/a\"",
        "{ topic = \"devices/+/status\", group = \"any\" },\n    { topic = \"sensor/a\"",
    ));
    let status = mqtt::publish(b"devices/x/status", 0, b"online");
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    assert_eq!(c.data(&status), seen("default", &["data 1", "publish 1"]));
    assert_eq!(c.data(&status), seen("default", &["data 1", "publish 1"]));
    assert_eq!(c.prediction(), None);
    c.ended(&mqtt::publish(b"sensor/a", 0, b"1"));
    assert_eq!(c.prediction(), predicted("sensor/a", "a"));

    // From the second connection on, all is right, for good.
    for round in 1..20 {
        let mut c = Conn::open(&f, &format!("10.1.1.1:{}", 4000 + round));
        c.data(&mqtt::connect(4));
        assert_eq!(c.data(&status), seen("a", &["data 1", "publish 1"]));
        let counters = c.data(&mqtt::publish(b"sensor/a", 0, b"1")).counters;
        assert_eq!(counters, ["data 1", "prediction_hit 1", "publish 1"]);
        assert_eq!(c.data(&status), seen("a", &["data 1", "publish 1"]));
        assert_eq!(c.prediction(), predicted("sensor/a", "a"));
    }
    assert!(!f.client("10.1.1.1").unwrap().multi_group);
}

/// A stranger writes in a client's name, blindly: a SYN and a segment with the next number, acknowledging what it guesses.
#[test]
fn who_does_not_hear_its_broker_teaches_nothing() {
    let f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    let hurry =
        [mqtt::connect(4), mqtt::publish(b"sensor/c", 0, b"1"), mqtt::subscribe(b"x")].concat();
    c.data(&hurry);
    c.ack = 77;
    for n in 0..70 {
        c.data(&mqtt::publish(format!("other/{n}").as_bytes(), 0, b"1"));
        c.ack = 77;
    }
    c.flagged(|h| h.fin = true);
    assert_eq!(c.prediction(), None);
    // A QoS 0 publisher hears nothing but CONNACK, and says so with its next segment.
    let mut c = Conn::open(&f, "10.1.1.2:4000");
    c.data(&[mqtt::connect(4), mqtt::publish(b"sensor/c", 0, b"1")].concat());
    assert_eq!(c.prediction(), None);
    c.data(&mqtt::publish(b"sensor/c", 0, b"2"));
    assert_eq!(c.prediction(), predicted("sensor/c", "default"));
    // Or with its last one.
    let mut c = Conn::open(&f, "10.1.1.3:4000");
    c.data(&[mqtt::connect(4), mqtt::publish(b"sensor/c", 0, b"1")].concat());
    c.flagged(|h| h.fin = true);
    assert_eq!(c.prediction(), predicted("sensor/c", "default"));
}

#[test]
fn one_connection_does_not_move_a_client_that_published_much() {
    let f = Fixture::new();
    let connect = |port: u16| {
        let mut c = Conn::open(&f, &format!("10.1.1.1:{port}"));
        c.data(&mqtt::connect(4));
        c
    };
    connect(3999).write(&mqtt::publish(b"sensor/a", 0, b"1"));
    let mut c = connect(4000);
    for _ in 0..40 {
        c.write(&mqtt::publish(b"sensor/a", 0, b"1"));
    }
    c.flagged(|h| h.fin = true);
    // One that does, however much it says; and it is ended, so that the next connection tells.
    let mut c = connect(4001);
    assert!(
        c.ended(&mqtt::publish(b"sensor/b", 0, b"1")).counters.contains(&"flow_ended 1".to_owned())
    );
    assert_eq!(c.prediction(), predicted("sensor/a", "a"));
    // The second.
    let mut c = connect(4002);
    assert!(
        c.ended(&mqtt::publish(b"sensor/b", 0, b"1")).counters.contains(&"learned 1".to_owned())
    );
    assert_eq!(c.prediction(), predicted("sensor/b", "b"));
    let mut c = connect(4003);
    assert_eq!(c.data(&mqtt::publish(b"sensor/b", 0, b"1")).group, "b");
}

/// With a relay, as a group of its own.
fn with_relay() -> String {
    CONFIG.replacen("max_packet", "relay = \"relay\"\nmax_packet", 1).replacen(
        "    { name = \"default\"",
        "    { name = \"relay\", vip = \"10.1.50.251\", reals = [{ address = \"10.1.3.207\" }] },\n    \
         { name = \"default\"",
        1,
    )
}

/// A client that has published to one group for so long that it is bound there.
fn settled(f: &Fixture, port: u16) {
    let mut c = Conn::open(f, &format!("10.1.1.1:{port}"));
    c.data(&mqtt::connect(4));
    for _ in 0..70 {
        c.write(&mqtt::publish(b"sensor/a", 0, b"1"));
    }
    c.flagged(|h| h.fin = true);
}

#[test]
fn with_a_relay_a_second_group_on_one_connection_is_proof_enough() {
    let f = Fixture::with(&with_relay());
    let connect = |port: u16| {
        let mut c = Conn::new(&f, &format!("10.1.1.1:{port}"));
        let group = c.syn().group;
        c.data(&mqtt::connect(4));
        (c, group)
    };
    settled(&f, 4000);
    let (mut c, group) = connect(4001);
    assert_eq!(group, "a");
    let seen = c.ended(&mqtt::publish(b"sensor/b", 0, b"1"));
    assert!(seen.counters.contains(&"multi_group 1".to_owned()), "{seen:?}");
    // Once at most.
    let (mut c, group) = connect(4002);
    assert_eq!(group, "relay");
    for topic in [b"sensor/a", b"sensor/b"] {
        assert_eq!(c.data(&mqtt::publish(topic, 0, b"1")).group, "relay");
    }
    let (_, group) = connect(4003);
    assert_eq!(group, "relay");
}

#[test]
fn flags_decay_when_nothing_speaks_for_them_any_more() {
    let f = Fixture::with(&with_relay());
    settled(&f, 4000);
    let mut c = Conn::new(&f, "10.1.1.1:4001");
    assert_eq!(c.syn().group, "a");
    c.data(&mqtt::connect(4));
    c.ended(&mqtt::subscribe(b"commands"));
    // Until it has published to one group for long, without a subscription.
    for port in 4002..4006u16 {
        let mut c = Conn::new(&f, &format!("10.1.1.1:{port}"));
        assert_eq!(c.syn().group, "relay", "{port}");
        c.data(&mqtt::connect(4));
        if port == 4002 {
            c.data(&mqtt::subscribe(b"commands"));
        }
        for _ in 0..if port == 4005 { 100 } else { 10 } {
            c.write(&mqtt::publish(b"sensor/a", 0, b"1"));
        }
    }
    assert_eq!(Conn::new(&f, "10.1.1.1:4006").syn().group, "a");
}

/// Its sender chooses how many topics a segment has; and which group each belongs to, only the relay finds out.
#[test]
fn with_a_relay_what_cannot_be_judged_goes_there() {
    let f = Fixture::with(&with_relay());
    settled(&f, 4000);
    let mut c = Conn::open(&f, "10.1.1.1:4001");
    c.data(&mqtt::connect(4));
    let many: Vec<u8> =
        (0..40).flat_map(|n| mqtt::publish(format!("wild/{n}/a").as_bytes(), 0, b"")).collect();
    let sent = c.segment(&many);
    let (outcome, counters) = f.send_counting(&sent);
    assert_eq!(outcome.verdict, JUMPED);
    assert_eq!((counters["flow_ended"], counters["unjudged"]), (1, 1), "{counters:?}");
    assert!(counters["publish_lost"] > 10 && outcome.packet.len() < sent.len(), "{counters:?}");
    let mut c = Conn::new(&f, "10.1.1.1:4002");
    assert_eq!(c.syn().group, "relay");
    c.data(&mqtt::connect(4));
    let counters = c.data(&many).counters;
    assert!(counters.iter().any(|c| c.starts_with("unjudged ")), "{counters:?}");
    assert!(!counters.iter().any(|c| c.starts_with("flow_ended")), "{counters:?}");
    assert_eq!(Conn::new(&f, "10.1.1.1:4003").syn().group, "relay");
}

/// CONNECT with a will (MQTT 3.1.1 §3.1.2.5).
fn with_will(id: &str, topic: &str) -> Vec<u8> {
    mqtt::connect_as(4, 0x06, id.as_bytes(), &[topic.as_bytes(), b"gone"])
}

#[test]
fn a_client_whose_will_belongs_to_another_group_belongs_to_the_relay() {
    for relay in [true, false] {
        let text = if relay { with_relay() } else { CONFIG.to_owned() };
        let f = delayed_of(&text, &SMALL, |_| {});
        let group = |packet: &[u8]| match packet::dst(packet).to_string().as_str() {
            "10.1.50.1" => "a",
            "10.1.50.251" => "relay",
            other => panic!("{other}"),
        };
        let elsewhere = if relay { "relay" } else { "a" };
        for (port, will, expected) in
            [(5000, "sensor/b", elsewhere), (5001, "sensor/a", "a"), (5002, "wild/1/a", "a")]
        {
            // With the first message behind it, and with one that waits for CONNACK.
            let publish = mqtt::publish(b"sensor/a", 0, b"1");
            let connect = with_will(&format!("w{port}"), will);
            let c = Client::open(&f, &format!("10.1.1.1:{port}"), 7);
            let outcome = f.send(&c.segment(0, &[&connect[..], &publish].concat(), |_| {}));
            assert_eq!((outcome.verdict, group(&outcome.packet)), (JUMPED, expected), "{will}");
            let c = Client::open(&f, &format!("10.1.1.2:{port}"), 7);
            let connack = reply(&f.send(&c.segment(0, &connect, |_| {})));
            assert_eq!(connack.payload, [0x20, 2, 0, 0]);
            let behind = c.segment(connect.len() as u32, &publish, |_| {});
            let outcome = f.send(&behind);
            assert_eq!((outcome.verdict, group(&outcome.packet)), (JUMPED, expected), "{will}");
        }
        // Without a relay, it is counted: somebody has to hear of it.
        assert_eq!(f.counters()["will_elsewhere"], 2);
    }
    // With predicted binding, CONNECT comes too late: from the next connection on.
    let f = Fixture::with(&with_relay());
    settled(&f, 4000);
    let mut c = Conn::new(&f, "10.1.1.1:4001");
    assert_eq!(c.syn().group, "a");
    c.data(&with_will("w", "sensor/b"));
    c.data(&mqtt::publish(b"sensor/a", 0, b"1"));
    for port in 4002..4004 {
        let mut c = Conn::new(&f, &format!("10.1.1.1:{port}"));
        assert_eq!(c.syn().group, "relay");
        c.data(&with_will("w", "sensor/b"));
        for _ in 0..100 {
            c.write(&mqtt::publish(b"sensor/a", 0, b"1"));
        }
    }
}

/// One host with CONNECT and nothing more threw out others' CONNECTs, and all that was known of clients.
#[test]
fn an_address_has_no_more_than_its_share_of_what_is_kept() {
    let f = delayed_of(CONFIG, &SMALL, |rodata| {
        rodata.handovers_per_second = 200;
        rodata.clients_per_second = 100;
    });
    let kept = |host: u32, n: u16| {
        let c = Client::open(&f, &format!("10.1.1.{host}:{}", 5000 + n), 7);
        let connect = mqtt::connect_as(4, 2, format!("c{host}-{n}").as_bytes(), &[]);
        let publish = mqtt::publish(b"sensor/a", 0, b"1");
        let answered = f.send(&c.segment(0, &connect, |_| {})).verdict == XDP_TX;
        answered && f.send(&c.segment(connect.len() as u32, &publish, |_| {})).verdict == JUMPED
    };
    let since = std::time::Instant::now();
    let took = (0..400).filter(|n| kept(1, *n)).count() as u64;
    // Windows of a second, however many there were.
    let windows = since.elapsed().as_secs() + 2;
    assert!(took >= 100 && took <= 100 * windows, "{took} in {windows} windows");
    let counters = f.counters();
    assert_eq!(counters["connect_delayed"], 400 - took);
    assert!(counters["client_not_stored"] >= took - 25 * windows, "{counters:?}");
    // Of IPv6 addresses, a host has as many as it likes.
    let kept6 = |n: u16| {
        let c = Client::open(&f, &format!("[fd01:9::{n:x}]:5000"), 7);
        f.send(&c.segment(0, &mqtt::connect(4), |_| {})).verdict == XDP_TX
    };
    let since = std::time::Instant::now();
    let took6 = (1..300).filter(|n| kept6(*n)).count() as u64;
    let windows = since.elapsed().as_secs() + 2;
    assert!(took6 <= 100 * windows && (took6 < 299 || windows > 2), "{took6}");
    // Somebody else's share is his own; and what was dropped is taken when TCP repeats it.
    assert!((0..50).all(|n| kept(2, n)));
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert!(kept(1, 399));
}

/// A broker that refuses a stranger does not answer him, so he goes on without its CONNACK, if at all.
#[test]
fn who_is_refused_leaves_nothing_behind_in_anothers_name() {
    let f = delayed_of(CONFIG, &SMALL, |_| {});
    let connect = mqtt::connect_as(4, 2, b"victim", &[]);
    let with = |topic: &[u8]| [&connect[..], &mqtt::publish(topic, 0, b"1")].concat();
    let known = || f.client("victim").map(|row| (row.group, row.topic));
    let mut c = Client::open(&f, "10.1.1.1:5000", 7);
    let mut sent = with(b"sensor/b");
    f.send(&c.segment(0, &sent, |_| {}));
    c.ack = c.ack.wrapping_add(4);
    for _ in 0..20 {
        let publish = mqtt::publish(b"sensor/b", 0, b"1");
        f.send(&c.segment(sent.len() as u32, &publish, |_| {}));
        sent.extend(publish);
    }
    let is_b = Some(("b".to_owned(), "sensor/b".to_owned()));
    assert_eq!(known(), is_b);
    for port in 6000..6010 {
        let c = Client::open(&f, &format!("10.1.1.9:{port}"), 7);
        let mut sent = with(b"sensor/a");
        f.send(&c.segment(0, &sent, |_| {}));
        for _ in 0..20 {
            let publish = mqtt::publish(b"sensor/a", 0, b"1");
            f.send(&c.segment(sent.len() as u32, &publish, |_| {}));
            sent.extend(publish);
        }
    }
    assert_eq!(known(), is_b);
    // So CONNECT alone is still enough.
    let c = Client::open(&f, "10.1.1.1:5001", 7);
    let outcome = f.send(&c.segment(0, &connect, |_| {}));
    assert_eq!(outcome.verdict, JUMPED);
    assert_eq!(packet::dst(&outcome.packet).to_string(), "10.1.50.2");
}
