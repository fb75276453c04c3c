//! Three readers of one byte stream: the datapath's framer, the relay's, and the codec library. And
//! arbitrary bytes.

use std::collections::BTreeSet;

use crate::support::conn::Conn;
use crate::support::datapath::Fixture;
use crate::support::mqtt;
use bytes::BytesMut;
use mqtt_fwd::mqtt::wire::{self, kind};
use proptest::prelude::*;
use rmqtt_codec::{v3, v5};
use tokio_util::codec::Decoder as _;

/// What is read of a stream: how many messages, and their topics.
#[derive(Debug, Default, PartialEq, Eq)]
struct Read {
    messages: u64,
    topics: BTreeSet<String>,
}

fn by_the_relay(stream: &[u8]) -> Read {
    let mut read = Read::default();
    let mut at = 0;
    while let Some(h) = wire::header(&stream[at..]).unwrap() {
        if h.kind() == kind::PUBLISH {
            let p = wire::publish(&stream[at..], h, false).unwrap().unwrap();
            read.messages += 1;
            read.topics.insert(p.topic.to_owned());
        }
        at += h.total();
    }
    assert_eq!(at, stream.len());
    read
}

fn by_the_library(stream: &[u8]) -> Read {
    let mut read = Read::default();
    let mut bytes = BytesMut::from(stream);
    let mut codec = v3::Codec::default();
    while let Some((packet, _)) = codec.decode(&mut bytes).unwrap() {
        if let v3::Packet::Publish(p) = packet {
            read.messages += 1;
            read.topics.insert(p.topic.to_string());
        }
    }
    read
}

/// And how many messages it left unjudged, as a segment's topics may cost so much and no more.
fn by_the_datapath(f: &Fixture, n: u32, stream: &[u8], cuts: &[usize]) -> (Read, u64) {
    let count = |name| f.counters().get(name).copied().unwrap_or(0);
    let before = (count("publish"), count("unjudged"));
    for (key, _) in f.datapath.topics.entries().unwrap() {
        f.datapath.topics.remove(&key).unwrap();
    }
    let mut c = Conn::open(f, &format!("10.{}.{}.1:4000", 2 + n / 250, n % 250));
    let mut rest = stream;
    for cut in cuts {
        let (segment, behind) = rest.split_at((*cut).min(rest.len()));
        if !segment.is_empty() {
            c.data(segment);
        }
        rest = behind;
    }
    for segment in rest.chunks(1400) {
        c.data(segment);
    }
    let text = |t: mqtt_fwd::kernel::abi::topic| {
        String::from_utf8(t.text[..usize::from(t.length)].to_vec()).unwrap()
    };
    let topics = f.datapath.topics.entries().unwrap();
    let unjudged = count("unjudged") - before.1;
    let read = Read {
        messages: count("publish") - before.0 + unjudged,
        topics: topics.into_iter().map(|(_, t)| text(t)).collect(),
    };
    (read, unjudged)
}

fn packet() -> impl Strategy<Value = Vec<u8>> {
    let topic = prop_oneof!["[a-z]{1,8}", "[a-z/]{9,40}", "[a-zäπ/]{1,60}"];
    let publish = (topic, 0..3u8, prop::collection::vec(any::<u8>(), 0..200))
        .prop_map(|(topic, qos, payload)| mqtt::publish(topic.as_bytes(), qos, &payload));
    prop_oneof![
        8 => publish,
        1 => Just(mqtt::pingreq()),
        1 => Just(mqtt::puback()),
        1 => "[a-z/]{1,20}".prop_map(|filter| mqtt::subscribe(filter.as_bytes())),
    ]
}

#[test]
fn datapath_relay_and_library_read_the_same() {
    // Flows are not ended, whatever their messages' groups.
    let text = crate::support::datapath::CONFIG
        .replace("default_group", "on_misprediction = \"keep\"\ndefault_group");
    let f = Fixture::with(&text);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(300));
    let n = std::cell::Cell::new(0);
    let strategy =
        (prop::collection::vec(packet(), 1..20), prop::collection::vec(1..300usize, 0..12));
    runner
        .run(&strategy, |(packets, cuts)| {
            n.set(n.get() + 1);
            let stream = [vec![mqtt::connect(4)], packets].concat().concat();
            let relay = by_the_relay(&stream);
            prop_assert_eq!(&relay, &by_the_library(&stream));
            let (datapath, unjudged) = by_the_datapath(&f, n.get(), &stream, &cuts);
            prop_assert_eq!(relay.messages, datapath.messages);
            prop_assert!(datapath.topics.is_subset(&relay.topics));
            prop_assert!(unjudged > 0 || datapath.topics == relay.topics);
            Ok(())
        })
        .unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    /// Whatever the bytes: nothing panics, and what is read lies within them.
    #[test]
    fn any_bytes_can_be_looked_at(bytes in prop::collection::vec(any::<u8>(), 0..80), v5: bool) {
        if let Ok(Some(h)) = wire::header(&bytes) {
            prop_assert!(h.length <= bytes.len());
            if let Ok(Some(p)) = wire::publish(&bytes, h, v5) {
                prop_assert!(p.payload_at <= bytes.len() && p.payload_at <= h.total());
                let mut again = Vec::new();
                wire::rewrite_publish(h, &p, "t", 0, &mut again);
            }
        }
        mqtt_fwd::relay::read_anything(&bytes, v5);
    }

    /// A packet that is damaged in one place.
    #[test]
    fn damaged_packets_are_read_or_refused(
        packet in packet(),
        at in any::<prop::sample::Index>(),
        byte: u8,
        v5: bool,
    ) {
        let mut packet = packet;
        let at = at.index(packet.len());
        packet[at] = byte;
        if let Ok(Some(h)) = wire::header(&packet) && h.kind() == kind::PUBLISH {
            let _ = wire::publish(&packet, h, v5);
        }
        mqtt_fwd::relay::read_anything(&packet, v5);
    }

    /// MQTT 5's PUBLISH: what the library writes, the relay reads.
    #[test]
    fn properties_are_read_as_the_library_writes_them(
        alias in proptest::option::of(1..100u16),
        user in prop::collection::vec(("[a-z]{0,5}", "[a-z]{0,5}"), 0..4),
        expiry in proptest::option::of(1..1000u32),
        topic in "[a-z/]{1,20}",
    ) {
        use tokio_util::codec::Encoder as _;
        let properties = v5::PublishProperties {
            topic_alias: alias.and_then(std::num::NonZeroU16::new),
            message_expiry_interval: expiry.and_then(std::num::NonZeroU32::new),
            user_properties: user.iter().map(|(k, v)| (k.as_str().into(), v.as_str().into())).collect(),
            ..Default::default()
        };
        let publish = rmqtt_codec::types::Publish {
            dup: false,
            retain: true,
            qos: rmqtt_codec::types::QoS::AtLeastOnce,
            topic: topic.as_str().into(),
            packet_id: std::num::NonZeroU16::new(7),
            payload: "payload".into(),
            properties: Some(properties),
        };
        let mut bytes = BytesMut::new();
        v5::Codec::default().encode(v5::Packet::Publish(Box::new(publish)), &mut bytes).unwrap();
        let h = wire::header(&bytes).unwrap().unwrap();
        let p = wire::publish(&bytes, h, true).unwrap().unwrap();
        prop_assert_eq!((p.topic, p.id, p.alias), (topic.as_str(), 7, alias.unwrap_or(0)));
        prop_assert_eq!(&bytes[p.payload_at..], b"payload");
        // Without its alias, and with another topic, it is the same message.
        let mut again = Vec::new();
        wire::rewrite_publish(h, &p, "other", 0, &mut again);
        again.extend(b"payload");
        let mut again = BytesMut::from(&again[..]);
        let Ok(Some((v5::Packet::Publish(read), _))) = v5::Codec::default().decode(&mut again) else {
            panic!("{again:02x?}");
        };
        prop_assert_eq!((&*read.topic, &*read.payload), ("other", &b"payload"[..]));
        prop_assert_eq!(read.properties.unwrap().topic_alias, None);
    }
}
