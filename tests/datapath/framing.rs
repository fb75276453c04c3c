//! Control packets in a TCP stream, rule by rule (docs/datapath.md), on the real program in this
//! kernel.

use crate::support::conn::{Conn, predicted, seen};
use crate::support::datapath::Fixture;
use crate::support::{mqtt, packet};

#[test]
fn payload_digits_are_not_control_packets() {
    // Rule 1. '0' … '?' are 0x30 … 0x3f, the first bytes that a PUBLISH can have.
    let f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    let big = mqtt::publish(b"sensor/c", 0, &b"0123456789:;<=>?".repeat(100));
    for part in big.chunks(7) {
        assert_eq!(c.data(part).group, "default");
    }
    assert_eq!(c.prediction(), predicted("sensor/c", "default"));
    assert_eq!(f.counters().get("publish"), Some(&1));
    assert_eq!(f.counters().get("malformed"), None);
}

#[test]
fn a_segment_can_hold_many_packets() {
    // Rule 2.
    let f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    let mut stream = mqtt::connect(4);
    for _ in 0..10 {
        stream.extend(mqtt::publish(b"sensor/c", 0, b"1"));
    }
    stream.extend(mqtt::subscribe(b"x"));
    stream.extend(mqtt::pingreq());
    stream.extend(mqtt::puback());
    stream.extend(mqtt::disconnect());
    // It is not known yet whether its broker takes it.
    assert_eq!(c.data(&stream), seen("default", &["data 1", "publish 10"]));
    let acknowledged = c.flagged(|_| {});
    assert_eq!(acknowledged, seen("default", &["learned 1", "no_data 1"]));
}

#[test]
fn a_packet_can_be_split_at_every_byte() {
    // Rule 2: header, varint, topic length and topic, for topics that fill one, two and more
    // bytes of the varint.
    let f = Fixture::new();
    let mut port = 4000;
    for topic in [b"sensor/a".to_vec(), [b"tree/".to_vec(), vec![b'x'; 300]].concat()] {
        let publish = mqtt::publish(&topic, 1, &[b'0'; 150]);
        for cut in 1..publish.len() {
            port += 1;
            let mut c = Conn::open(&f, &format!("10.1.1.1:{port}"));
            c.data(&mqtt::connect(4));
            for part in [&publish[..cut], &publish[cut..]] {
                c.write(part);
            }
            let state = f.flow(c.client).unwrap();
            assert_eq!(state.topic.trim_end_matches('…').len(), topic.len().min(256));
            assert!(state.state == "connected" || state.state == "ended", "{}", state.state);
        }
    }
    let one_by_one = mqtt::publish(b"sensor/b", 2, b"1");
    let mut c = Conn::open(&f, "10.1.1.2:4000");
    for byte in mqtt::connect(5).iter().chain(&one_by_one) {
        c.write(&[*byte]);
    }
    assert_eq!(c.prediction(), predicted("sensor/b", "b"));
    assert_eq!(f.counters().get("malformed"), None);
}

#[test]
fn repeated_and_overlapping_data_is_skipped() {
    // Rule 3.
    let f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    let publish = mqtt::publish(b"sensor/c", 0, b"1");
    let start = c.sent;
    c.data(&publish);
    assert_eq!(c.data_at(start, &publish), seen("default", &["data 1", "segment_old 1"]));
    // One old packet, one new, in one segment.
    let both = [publish.clone(), publish].concat();
    assert_eq!(c.data_at(start, &both), seen("default", &["data 1", "publish 1"]));
}

#[test]
fn reordered_segments_are_caught_up_with() {
    // Rule 3: what came before its turn is not sent again once the hole is filled.
    let f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    let publish = mqtt::publish(b"sensor/c", 0, b"1");
    let (hole, length) = (c.sent, publish.len() as u32);
    assert_eq!(c.data_at(hole + length, &publish), seen("default", &["data 1", "segment_ahead 1"]));
    assert_eq!(c.prediction(), None, "data beyond a hole must not teach");
    assert_eq!(
        c.data_at(hole, &publish),
        seen("default", &["data 1", "learned 1", "publish 1", "resynced 1"])
    );
    assert_eq!(c.data_at(hole + 2 * length, &publish), seen("default", &["data 1", "publish 1"]));
}

#[test]
fn a_hole_that_stays_is_given_up_on_evidence() {
    let f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    let publish = mqtt::publish(b"sensor/c", 0, b"1");
    c.sent += 1000;
    for _ in 0..2 {
        assert_eq!(c.data(&publish), seen("default", &["data 1", "segment_ahead 1"]));
    }
    assert_eq!(c.data(&publish), seen("default", &["data 1", "resynced 1", "segment_ahead 1"]));
    assert_eq!(c.data(&publish), seen("default", &["data 1", "learned 1", "publish 1"]));
}

#[test]
fn a_flow_seen_from_its_middle_is_bound_but_does_not_teach() {
    // Rules 3 and 8.
    let f = Fixture::new();
    let mut c = Conn::new(&f, "10.1.1.1:4000");
    assert_eq!(c.data(b"half a payload"), seen("default", &["flow_adopted 1"]));
    assert_eq!(c.data(b"3 more of it"), seen("default", &["data 1"]));
    let publish = mqtt::publish(b"sensor/a", 0, b"1");
    assert_eq!(c.data(&publish), seen("default", &["data 1", "resynced 1"]));
    assert_eq!(c.data(&publish), seen("default", &["data 1", "mispredicted 1"]));
    assert_eq!(c.prediction(), None);
}

#[test]
fn spoofed_data_does_not_teach() {
    // Rule 8: right addresses and ports, but not the flow's sequence number.
    let f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    let publish = mqtt::publish(b"sensor/a", 0, b"1");
    for offset in [500_000, 1 << 30, 3 << 30] {
        c.data_at(offset, &publish);
    }
    assert_eq!(c.prediction(), None);
    assert_eq!(
        c.data(&mqtt::publish(b"sensor/c", 0, b"1")),
        seen("default", &["data 1", "learned 1", "publish 1"])
    );
}

#[test]
fn a_flow_found_again_teaches_only_if_it_can_be_the_same_client() {
    // Rule 8: acknowledgements and sequence numbers have to be near those before the hole.
    for (gap, ack, teaches) in [(1000, 4, true), (1000, 90_000, false), (2 << 20, 4, false)] {
        let f = Fixture::new();
        let mut c = Conn::open(&f, "10.1.1.1:4000");
        // Far from where acknowledgements begin: it is the last one before the hole that counts.
        let (last_ack, connect) = (1_000_000, mqtt::connect(4));
        c.seen(&packet::tcp(c.client, c.service, c.next_seq(), last_ack, |_| {}, &connect));
        c.sent += connect.len() as u32;
        let publish = mqtt::publish(b"sensor/c", 0, b"1");
        c.sent += gap;
        for _ in 0..4 {
            let seq = c.next_seq();
            c.seen(&packet::tcp(c.client, c.service, seq, last_ack + ack, |_| {}, &publish));
            c.sent += publish.len() as u32;
        }
        assert_eq!(f.counters().get("resynced"), Some(&1));
        assert_eq!(c.prediction().is_some(), teaches, "gap {gap}, ack {ack}");
    }
}

#[test]
fn long_topics_route_by_all_of_their_bytes() {
    // Rule 4.
    let f = Fixture::new();
    for (i, length) in [1usize, 2, 255, 256, 257, 1000, 65_535].into_iter().enumerate() {
        let mut topic = b"tree/".to_vec();
        topic.resize(length.max(5), b'x');
        if length < 5 {
            topic.truncate(length);
        }
        let mut c = Conn::open(&f, &format!("10.1.1.{}:4000", i + 1));
        c.data(&mqtt::connect(4));
        for part in mqtt::publish(&topic, 0, b"1").chunks(1400) {
            f.send(&c.segment(part));
            c.sent += part.len() as u32;
        }
        let (_, group) = c.prediction().unwrap();
        assert_eq!(group, if length < 5 { "default" } else { "b" }, "{length}");
    }
}

#[test]
fn a_topic_is_told_from_the_flow_s_last_by_each_of_its_bytes() {
    let f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    let publish = |topic: &[u8]| mqtt::publish(topic, 0, b"1");
    let client = c.client;
    let last = || f.flow(client).unwrap().topic;
    for length in (1..=40).chain([64, 127, 255, 256]) {
        let topic = vec![b'x'; length];
        let mut others: Vec<Vec<u8>> = [0, 7, 8, 31, 32, length / 2, length - 1]
            .into_iter()
            .filter(|at| *at < length)
            .map(|at| {
                let mut other = topic.clone();
                other[at] = b'y';
                other
            })
            .collect();
        others.extend([vec![b'x'; length + 1], vec![b'x'; length - 1]]);
        others.retain(|other| (1..=256).contains(&other.len()));
        for other in others {
            // In segments of their own, and in one.
            for segments in [vec![&topic, &topic, &other], vec![&topic]] {
                for topic in segments {
                    c.data(&publish(topic));
                    assert_eq!(last().as_bytes(), topic, "{}", topic.len());
                }
            }
            c.data(&[publish(&topic), publish(&topic), publish(&other)].concat());
            assert_eq!(last().as_bytes(), other, "{}", other.len());
        }
    }
    assert_eq!(f.counters().get("malformed"), None);
}

#[test]
fn a_topic_alias_is_as_before() {
    // Rule 4, MQTT 5 §3.3.2.3.4.
    let f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(5));
    c.data(&mqtt::publish_alias(b"sensor/c", 1, b"1"));
    assert_eq!(
        c.data(&mqtt::publish_alias(b"", 1, b"2")),
        seen("default", &["data 1", "publish 1"])
    );
}

#[test]
fn what_is_not_mqtt_is_left_alone() {
    let f = Fixture::new();
    let mut tls = Conn::open(&f, "10.1.1.1:4000");
    assert_eq!(
        tls.data(&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01]),
        seen("default", &["data 1", "not_mqtt 1"])
    );
    assert_eq!(tls.data(&mqtt::publish(b"sensor/a", 0, b"1")), seen("default", &["data 1"]));
    assert_eq!(tls.prediction(), None);

    let table: &[(&str, &[u8])] = &[
        ("reserved type", &[0x00, 0x00]),
        ("CONNACK from a client", &[0x20, 0x02, 0, 0]),
        ("QoS 3", &[0x36, 0x05, 0, 1, b'a', 0, 1]),
        ("SUBSCRIBE without its flag", &[0x80, 0x05, 0, 1, 0, 0, 0]),
        ("remaining length of five bytes", &[0x30, 0xff, 0xff, 0xff, 0xff, 0x01]),
        ("topic longer than its packet", &[0x30, 0x04, 0, 9, b'a', b'b']),
        ("PINGREQ with a body", &[0xc0, 0x01, 0]),
        ("QoS 1 without room for its identifier", &[0x32, 0x04, 0, 2, b'a', b'b']),
    ];
    for (i, (what, bytes)) in table.iter().enumerate() {
        for pieces in [bytes.len(), 1] {
            let mut c = Conn::open(&f, &format!("10.1.2.{i}:400{pieces}"));
            c.data(&mqtt::connect(4));
            for piece in bytes.chunks(pieces) {
                c.data(piece);
            }
            assert_eq!(f.flow(c.client).unwrap().state, "unframed", "{what}");
            assert_eq!(c.prediction(), None, "{what}");
        }
    }
}
