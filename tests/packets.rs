//! The datapath's rules (docs/datapath.md), one test each, on the real program in this kernel.

mod support;

use std::net::SocketAddr;

use mqtt_fwd::bpf::types::client4;
use support::datapath::{CONFIG, Fixture, JUMPED, SERVICE, SERVICE6, XDP_PASS, XDP_TX};
use support::{mqtt, packet};

/// A client's connection: sends its stream in whatever pieces the test wants.
struct Conn<'a> {
    fixture: &'a Fixture,
    client: SocketAddr,
    service: SocketAddr,
    isn: u32,
    sent: u32,
}

/// What the tests look at.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    group: &'static str,
    counters: Vec<String>,
}

impl<'a> Conn<'a> {
    fn new(fixture: &'a Fixture, client: &str) -> Self {
        let client: SocketAddr = client.parse().unwrap();
        let service = if client.is_ipv4() { SERVICE } else { SERVICE6 };
        // Close to the wrap, so that every test crosses it.
        Self { fixture, client, service: service.parse().unwrap(), isn: u32::MAX - 20, sent: 0 }
    }

    fn open(fixture: &'a Fixture, client: &str) -> Self {
        let mut conn = Self::new(fixture, client);
        conn.syn();
        conn
    }

    fn next_seq(&self) -> u32 {
        self.isn.wrapping_add(1).wrapping_add(self.sent)
    }

    fn seen(&self, sent: &[u8]) -> Seen {
        let (outcome, counters) = self.fixture.send_counting(sent);
        assert_eq!(outcome.verdict, JUMPED, "the balancer was not reached");
        assert!(packet::ip_checksum_right(&outcome.packet));
        assert_eq!(outcome.packet.len(), sent.len());
        let group = match packet::dst(&outcome.packet).to_string().as_str() {
            "10.1.50.1" | "fd01:50::1" => "a",
            "10.1.50.2" | "fd01:50::2" => "b",
            "10.1.50.250" | "fd01:50::250" => "default",
            _ => "none",
        };
        Seen { group, counters: counters.into_iter().map(|(k, n)| format!("{k} {n}")).collect() }
    }

    fn syn(&mut self) -> Seen {
        self.seen(&packet::tcp(self.client, self.service, self.isn, 0, |h| h.syn = true, &[]))
    }

    fn data_at(&self, offset: u32, payload: &[u8]) -> Seen {
        let seq = self.isn.wrapping_add(1).wrapping_add(offset);
        self.seen(&packet::tcp(self.client, self.service, seq, 77, |_| {}, payload))
    }

    fn data(&mut self, payload: &[u8]) -> Seen {
        let seen = self.data_at(self.sent, payload);
        self.sent += payload.len() as u32;
        seen
    }

    fn flagged(&self, shape: impl FnOnce(&mut etherparse::TcpHeader)) -> Seen {
        self.seen(&packet::tcp(self.client, self.service, self.next_seq(), 77, shape, &[]))
    }

    fn prediction(&self) -> Option<(String, String)> {
        let row = self.fixture.client(&self.client.ip().to_string())?;
        Some((row.topic, row.group))
    }
}

#[allow(clippy::unnecessary_wraps)] // to be compared with what may be missing
fn predicted(topic: &str, group: &str) -> Option<(String, String)> {
    Some((topic.to_owned(), group.to_owned()))
}

fn seen(group: &'static str, counters: &[&str]) -> Seen {
    Seen { group, counters: counters.iter().map(|c| (*c).to_owned()).collect() }
}

#[test]
fn an_unknown_client_goes_to_the_default_group_and_is_learned_from_its_publish() {
    for client in ["10.1.1.1:4000", "[fd01:1::1]:4000"] {
        let f = Fixture::new();
        let mut c = Conn::new(&f, client);
        assert_eq!(c.syn(), seen("default", &["flow_new 1"]));
        assert_eq!(c.data(&mqtt::connect(4)), seen("default", &["data 1"]));
        assert_eq!(c.prediction(), None);
        // Its flow is with the wrong brokers: it is sent to the right ones, to be reset.
        assert_eq!(
            c.data(&mqtt::publish(b"sensor/a", 0, b"21.5")),
            seen("a", &["data 1", "learned 1", "mispredicted 1", "reset 1"])
        );
        assert_eq!(c.prediction(), predicted("sensor/a", "a"));

        let mut again = Conn::new(&f, &client.replace("4000", "4001"));
        assert_eq!(again.syn(), seen("a", &["flow_predicted 1"]));
        again.data(&mqtt::connect(4));
        assert_eq!(
            again.data(&mqtt::publish(b"sensor/a", 0, b"21.5")),
            seen("a", &["data 1", "prediction_hit 1", "publish 1"])
        );
    }
}

#[test]
fn routes_follow_topic_filters() {
    let f = Fixture::new();
    let table: &[(&[u8], &str)] = &[
        (b"sensor/a", "a"),
        (b"sensor/b", "b"),
        (b"sensor/c", "default"),
        (b"sensor", "default"),
        (b"sensor/a/", "default"),
        (b"wild/x/a", "a"),
        (b"wild//a", "a"),
        (b"wild/x/b", "default"),
        (b"wild/x/a/y", "default"),
        (b"tree", "b"),
        (b"tree/x/y/z", "b"),
        (b"tree/leaf", "a"),
        (b"tree/leaf/x", "b"),
        (b"$SYS/uptime", "b"),
        (b"$other", "default"),
        (b"/", "default"),
    ];
    for (i, (topic, group)) in table.iter().enumerate() {
        let mut c = Conn::open(&f, &format!("10.1.1.{}:4000", i + 1));
        c.data(&mqtt::connect(4));
        c.data(&mqtt::publish(topic, 0, b"1"));
        let text = String::from_utf8(topic.to_vec()).unwrap();
        assert_eq!(c.prediction(), predicted(&text, group));
    }
}

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
    assert_eq!(c.data(&stream), seen("default", &["data 1", "learned 1", "publish 10"]));
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
            c.data(&publish[..cut]);
            c.data(&publish[cut..]);
            let state = f.flow(c.client).unwrap();
            assert_eq!(state.topic.trim_end_matches('…').len(), topic.len().min(256));
            assert!(state.state == "connected" || state.state == "reset", "{}", state.state);
        }
    }
    let one_by_one = mqtt::publish(b"sensor/b", 2, b"1");
    let mut c = Conn::open(&f, "10.1.1.2:4000");
    for byte in mqtt::connect(5).iter().chain(&one_by_one) {
        c.data(&[*byte]);
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
            c.data(part);
        }
        let (_, group) = c.prediction().unwrap();
        assert_eq!(group, if length < 5 { "default" } else { "b" }, "{length}");
    }
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
fn a_flow_stays_bound_whatever_a_neighbour_publishes() {
    let f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    c.data(&mqtt::publish(b"sensor/c", 0, b"1"));
    let mut neighbour = Conn::open(&f, "10.1.1.1:5000");
    neighbour.data(&mqtt::connect(4));
    neighbour.data(&mqtt::publish(b"sensor/a", 0, b"1"));
    assert_eq!(c.prediction(), predicted("sensor/a", "a"));
    assert_eq!(c.flagged(|_| {}), seen("default", &["no_data 1"]));
    assert_eq!(
        c.data(&mqtt::publish(b"sensor/c", 0, b"1")),
        seen("default", &["data 1", "publish 1"])
    );
}

#[test]
fn a_repeated_syn_stays_bound_and_a_new_one_rebinds() {
    let f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    let mut neighbour = Conn::open(&f, "10.1.1.1:5000");
    neighbour.data(&mqtt::connect(4));
    neighbour.data(&mqtt::publish(b"sensor/a", 0, b"1"));
    assert_eq!(c.syn(), seen("default", &["syn_again 1"]));
    c.isn = 12_345;
    c.sent = 0;
    assert_eq!(c.syn(), seen("a", &["flow_predicted 1"]));
}

#[test]
fn a_closed_flow_still_forwards_late_segments() {
    let f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    c.data(&mqtt::publish(b"sensor/a", 0, b"1"));
    let mut c = Conn::open(&f, "10.1.1.1:4001");
    c.data(&mqtt::connect(4));
    assert_eq!(c.flagged(|h| h.fin = true), seen("a", &["flow_closed 1", "no_data 1"]));
    c.sent += 1;
    assert_eq!(c.flagged(|_| {}), seen("a", &["no_data 1"]));
    assert_eq!(f.flow(c.client).unwrap().state, "closing");
    assert_eq!(f.datapath.flows.keys().count(), 1, "only the first flow is left in the main map");
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

#[test]
fn a_client_that_goes_back_and_forth_is_mixed_and_not_reset_for_it_all_the_time() {
    let f = Fixture::new();
    let mut resets = 0;
    for round in 0..6 {
        let mut c = Conn::open(&f, &format!("10.1.1.1:{}", 4000 + round));
        c.data(&mqtt::connect(4));
        for topic in [b"sensor/a", b"sensor/b"] {
            let counters = c.data(&mqtt::publish(topic, 0, b"1")).counters;
            resets += usize::from(counters.contains(&"reset 1".to_owned()));
        }
    }
    let row = f.client("10.1.1.1").unwrap();
    assert!(row.mixed);
    assert!(row.group_changes >= 3, "{}", row.group_changes);
    assert!(resets <= 3, "{resets} resets in 6 connections");
}

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
        ("a group VIP", syn("10.1.50.1:1883"), "not_service"),
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
fn a_change_of_routes_moves_predictions_but_not_flows() {
    let mut f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    c.data(&mqtt::publish(b"sensor/c", 0, b"1"));
    let (isn, sent) = (c.isn, c.sent);

    for route in &mut f.config.services[0].routes {
        if route.filter.to_string() == "sensor/a" {
            route.filter = "sensor/c".parse().unwrap();
        }
    }
    f.apply();
    assert_eq!(f.datapath.generation().unwrap(), 2);
    let mut c = Conn { isn, sent, ..Conn::new(&f, "10.1.1.1:4000") };
    assert_eq!(c.flagged(|_| {}), seen("default", &["no_data 1"]));
    // The topic is the flow's old one, but its group has to be found again.
    let counters = c.data(&mqtt::publish(b"sensor/c", 0, b"1")).counters;
    assert!(counters.contains(&"mispredicted 1".to_owned()), "{counters:?}");

    // A client that published only before the change is predicted by the new routes.
    let mut other = Conn::new(&f, "10.1.1.1:4001");
    assert_eq!(other.syn().group, "a");
}

#[test]
fn a_flow_whose_group_is_removed_gets_another() {
    let mut f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    c.data(&mqtt::publish(b"sensor/a", 0, b"1"));
    let mut c = Conn::open(&f, "10.1.1.1:4001");
    let (isn, sent) = (c.isn, c.sent);
    assert_eq!(c.data(&mqtt::connect(4)).group, "a");
    let service = &mut f.config.services[0];
    service.groups.retain(|g| g.name != "a");
    service.routes.retain(|r| r.group != "a");
    f.apply();
    let c = Conn { isn, sent, ..Conn::new(&f, "10.1.1.1:4001") };
    assert_eq!(c.flagged(|_| {}), seen("default", &["group_gone 1", "no_data 1"]));
}

#[test]
fn full_maps_forget_the_oldest_and_go_on() {
    let f = Fixture::new();
    for i in 0..20_000u32 {
        let client = format!("10.{}.{}.{}:4000", 2 + (i >> 16), (i >> 8) & 255, i & 255);
        let c = Conn::new(&f, &client);
        let syn = packet::tcp(c.client, c.service, 1, 0, |h| h.syn = true, &[]);
        assert_eq!(f.send(&syn).verdict, JUMPED);
    }
    assert_eq!(f.counters().get("map_full"), None);
    assert_eq!(f.counters().get("flow_new"), Some(&20_000));
}

#[test]
fn a_flow_found_again_teaches_only_if_it_can_be_the_same_client() {
    // Rule 8: acknowledgements and sequence numbers have to be near those before the hole.
    for (gap, ack, teaches) in [(1000, 78, true), (1000, 90_000, false), (2 << 20, 78, false)] {
        let f = Fixture::new();
        let mut c = Conn::open(&f, "10.1.1.1:4000");
        c.data(&mqtt::connect(4));
        let publish = mqtt::publish(b"sensor/c", 0, b"1");
        c.sent += gap;
        for _ in 0..4 {
            let seq = c.next_seq();
            c.seen(&packet::tcp(c.client, c.service, seq, ack, |_| {}, &publish));
            c.sent += publish.len() as u32;
        }
        assert_eq!(f.counters().get("resynced"), Some(&1));
        assert_eq!(c.prediction().is_some(), teaches, "gap {gap}, ack {ack}");
    }
}

#[test]
fn a_mixed_client_s_flow_is_not_reset_once_it_was_right() {
    for agreed in [false, true] {
        let f = Fixture::new();
        for (port, topic) in [(4000, b"sensor/a"), (4001, b"sensor/b"), (4002, b"sensor/a")] {
            let mut c = Conn::open(&f, &format!("10.1.1.1:{port}"));
            c.data(&mqtt::connect(4));
            c.data(&mqtt::publish(topic, 0, b"1"));
        }
        assert!(f.client("10.1.1.1").unwrap().mixed);
        // As if its last reset were long ago.
        let service = f.datapath.service_table().unwrap().service[0].id;
        let key = client4 { addr: u32::from_ne_bytes([10, 1, 1, 1]), service, pad: 0 };
        let mut entry = f.datapath.clients.get(&key).unwrap().unwrap();
        entry.reset_s = 0;
        f.datapath.clients.put(&key, &entry).unwrap();

        let mut c = Conn::open(&f, "10.1.1.1:4003");
        c.data(&mqtt::connect(4));
        if agreed {
            c.data(&mqtt::publish(b"sensor/a", 0, b"1"));
        }
        let counters = c.data(&mqtt::publish(b"sensor/b", 0, b"1")).counters;
        assert_eq!(counters.contains(&"reset 1".to_owned()), !agreed, "{counters:?}");
    }
}

#[test]
fn a_service_may_keep_mispredicted_flows_where_they_are() {
    let f = Fixture::with(&CONFIG.replace("max_packet", "on_misprediction = \"keep\"\nmax_packet"));
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    for _ in 0..2 {
        let seen = c.data(&mqtt::publish(b"sensor/a", 0, b"1"));
        assert_eq!(seen.group, "default");
        assert!(seen.counters.contains(&"mispredicted 1".to_owned()));
    }
    assert!(f.flow(c.client).unwrap().astray);
}

#[test]
fn a_syn_on_a_closed_flow_is_a_new_flow() {
    let f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.flagged(|h| h.rst = true);
    assert_eq!(c.syn(), seen("default", &["flow_new 1"]));
    assert_eq!(f.flow(c.client).unwrap().state, "opening");
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
        first.data(&mqtt::publish(b"sensor/a", 0, b"1"));
        let c = Conn::open(&f, &client.replace("4000", "4001"));
        // What a router between real and client says about a packet service → client.
        let quoted = packet::tcp(c.service, c.client, 9, 9, |_| {}, &[b'x'; 100]);
        let builder = etherparse::PacketBuilder::ethernet2(packet::CLIENT_MAC, packet::LB_MAC);
        let mut sent = Vec::new();
        match (c.client.ip(), c.service.ip()) {
            (std::net::IpAddr::V4(_), std::net::IpAddr::V4(service)) => builder
                .ipv4([10, 1, 9, 9], service.octets(), 64)
                .icmpv4(etherparse::Icmpv4Type::DestinationUnreachable(
                    etherparse::icmpv4::DestUnreachableHeader::FragmentationNeeded {
                        next_hop_mtu: 1300,
                    },
                ))
                .write(&mut sent, &quoted[14..]),
            (_, std::net::IpAddr::V6(service)) => builder
                .ipv6(
                    "fd01:9::9".parse::<std::net::Ipv6Addr>().unwrap().octets(),
                    service.octets(),
                    64,
                )
                .icmpv6(etherparse::Icmpv6Type::PacketTooBig { mtu: 1300 })
                .write(&mut sent, &quoted[14..]),
            _ => unreachable!(),
        }
        .unwrap();

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
fn a_hundred_thousand_routes_load_and_route() {
    let routes: Vec<String> = (0..100_000)
        .map(|i| {
            let group = if i % 2 == 0 { "a" } else { "b" };
            format!("{{ topic = \"site/{}/dev{i}\", group = \"{group}\" }}", i % 100)
        })
        .collect();
    let route =
        format!("route = [{{ topic = \"site/+/#\", group = \"a\" }}, {}]", routes.join(", "));
    let start = CONFIG.find("route = [").unwrap();
    let end = start + CONFIG[start..].find("\n]\n").unwrap() + 3;
    let text = CONFIG.replace(&CONFIG[start..end], &format!("{route}\n"));
    let sizes = mqtt_fwd::config::MapSizes::default();
    let f = Fixture::sized(&text, &sizes);
    for (i, (topic, group)) in [
        ("site/7/dev77707", "b"),
        ("site/8/dev77707", "a"),
        ("site/8/dev8", "a"),
        ("site/7", "a"),
        ("sight/7", "default"),
    ]
    .iter()
    .enumerate()
    {
        let mut c = Conn::open(&f, &format!("10.1.1.{}:4000", i + 1));
        c.data(&mqtt::connect(4));
        c.data(&mqtt::publish(topic.as_bytes(), 0, b"1"));
        assert_eq!(c.prediction(), predicted(topic, group));
    }
}
