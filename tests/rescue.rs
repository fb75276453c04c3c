//! What the datapath hands to the sidecar of a misrouted client's stream, and what it answers.

mod support;

use std::cell::RefCell;
use std::net::SocketAddr;

use etherparse::{SlicedPacket, TcpHeader, TransportSlice};
use libbpf_rs::RingBufferBuilder;
use mqtt_fwd::control::view;
use mqtt_fwd::kernel::abi::{Pod as _, rescue, rescue_flags};
use support::conn::Conn;
use support::datapath::{CONFIG, Fixture, JUMPED};
use support::{mqtt, packet};

const XDP_DROP: u32 = 1;
const XDP_TX: u32 = 3;
/// What the client has of its broker before that ends the connection, and after.
const BEFORE: u32 = 77;
const TOLD: u32 = 78;

fn fixture() -> Fixture {
    let text = CONFIG.replacen("max_packet", "relay = \"relay\"\nmax_packet", 1).replacen(
        "    { name = \"default\"",
        "    { name = \"relay\", vip = \"10.1.50.251\", reals = [{ address = \"10.1.3.207\" }] },\n    \
         { name = \"default\"",
        1,
    );
    let f = Fixture::with(&text);
    let until = view::boot_time().as_nanos() as u64 + 60_000_000_000;
    f.datapath.rescue_until.put(&0, &until).unwrap();
    f
}

/// A connection of an address that is known to publish sensor/a, so that it is bound there.
fn known<'a>(f: &'a Fixture, addr: &str, connect: &[u8]) -> Conn<'a> {
    let mut teacher = Conn::open(f, &format!("{addr}:4000"));
    teacher.data(&mqtt::connect(4));
    for _ in 0..100 {
        teacher.data(&mqtt::publish(b"sensor/a", 0, b"1"));
    }
    let mut c = Conn::new(f, &format!("{addr}:4001"));
    assert_eq!(c.syn().group, "a");
    c.data(connect);
    c
}

#[derive(Debug, PartialEq)]
struct Piece {
    client: SocketAddr,
    start: u32,
    seq: u32,
    last: bool,
    v5: bool,
    bytes: Vec<u8>,
}

fn pieces(f: &Fixture) -> Vec<Piece> {
    let all = RefCell::new(Vec::new());
    let mut builder = RingBufferBuilder::new();
    builder
        .add(&f.skel.maps.rescues, |record| {
            let (head, bytes) = record.split_at(size_of::<rescue>());
            let head = rescue::from_bytes(head);
            assert_eq!(usize::from(head.length), bytes.len());
            let has = |flag: rescue_flags| u32::from(head.flags) & flag.0 != 0;
            let ip = std::net::Ipv4Addr::from(head.client[0].to_ne_bytes());
            all.borrow_mut().push(Piece {
                client: SocketAddr::new(ip.into(), u16::from_be(head.client_port)),
                start: head.start,
                seq: head.seq,
                last: has(rescue_flags::RESCUE_LAST),
                v5: has(rescue_flags::RESCUE_MQTT5),
                bytes: bytes.to_vec(),
            });
            0
        })
        .unwrap();
    builder.build().unwrap().consume().unwrap();
    all.into_inner()
}

/// A segment at an offset of the client's stream; what comes back: the number that is acknowledged.
fn segment(c: &Conn<'_>, offset: u32, ack: u32, fin: bool, payload: &[u8]) -> Result<u32, u32> {
    let seq = c.isn.wrapping_add(1).wrapping_add(offset);
    let options = [etherparse::TcpOptionElement::Timestamp(1000, 2000)];
    let shape = |h: &mut TcpHeader| {
        h.fin = fin;
        h.set_options(&options).unwrap();
    };
    let outcome = c.fixture.send(&packet::tcp(c.client, c.service, seq, ack, shape, payload));
    if outcome.verdict != XDP_TX {
        return Err(outcome.verdict);
    }
    assert!(packet::ip_checksum_right(&outcome.packet));
    assert!(packet::tcp_checksum_right(&outcome.packet));
    let sliced = SlicedPacket::from_ethernet(&outcome.packet).unwrap();
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("no TCP") };
    assert_eq!((tcp.source_port(), tcp.destination_port()), (c.service.port(), c.client.port()));
    assert_eq!((tcp.ack(), tcp.syn(), tcp.fin(), tcp.rst()), (true, false, false, false));
    assert_eq!(tcp.sequence_number(), ack, "behind what the client has");
    let answered: Vec<_> = tcp.options_iterator().filter_map(Result::ok).collect();
    assert!(
        answered.contains(&etherparse::TcpOptionElement::Timestamp(2000, 1000)),
        "{answered:?}"
    );
    Ok(tcp.acknowledgment_number().wrapping_sub(c.isn.wrapping_add(1)))
}

#[test]
fn a_stream_is_handed_over_in_order_and_acknowledged_once_its_broker_has_ended() {
    let f = fixture();
    let mut c = known(&f, "10.1.1.1", &mqtt::connect(4));
    let start = c.sent;
    let first = mqtt::publish(b"sensor/b", 0, b"first");
    let seen = c.ended(&first);
    assert!(seen.counters.contains(&"flow_rescued 1".to_owned()), "{seen:?}");
    assert!(!seen.counters.iter().any(|c| c.starts_with("publish_lost")), "{seen:?}");
    let base = c.isn.wrapping_add(1);
    let piece = |offset: u32, last: bool, bytes: &[u8]| Piece {
        client: c.client,
        start: base.wrapping_add(start),
        seq: base.wrapping_add(offset),
        last,
        v5: false,
        bytes: bytes.to_vec(),
    };
    assert_eq!(pieces(&f), [piece(start, false, &first)]);

    let at = c.sent;
    // Its broker has not answered yet: taken, but the client has to go on repeating.
    assert_eq!(segment(&c, at, BEFORE, false, b"second"), Err(XDP_DROP));
    assert_eq!(pieces(&f), [piece(at, false, b"second")]);
    assert_eq!(segment(&c, at, TOLD, false, b"second"), Ok(at + 6), "repeated");
    assert_eq!(pieces(&f), []);
    // Beyond a gap, nothing is taken; then what is new of a repetition.
    assert_eq!(segment(&c, at + 10, TOLD, false, b"beyond"), Ok(at + 6));
    assert_eq!(segment(&c, at + 3, TOLD, false, b"ond third"), Ok(at + 12));
    assert_eq!(pieces(&f), [piece(at + 6, false, b" third")]);
    // A stranger that does not know the numbers.
    for far in [1 << 16, 1 << 30, 1 << 31, u32::MAX - (1 << 20)] {
        segment(&c, at.wrapping_add(far), TOLD, false, b"forged").ok();
    }
    assert_eq!(pieces(&f), []);
    // A repetition of the segment that ended the flow goes to its broker again.
    assert_eq!(segment(&c, start, TOLD, false, &first), Err(JUMPED));
    assert_eq!(pieces(&f), []);
    assert_eq!(segment(&c, at + 12, TOLD, true, b"end"), Ok(at + 16), "FIN counts");
    assert_eq!(pieces(&f), [piece(at + 12, true, b"end")]);
    assert_eq!(segment(&c, at + 15, TOLD, true, b""), Ok(at + 16), "FIN repeated");
    assert_eq!(pieces(&f), []);
}

#[test]
fn without_room_nothing_is_acknowledged_and_without_any_the_flow_ends_as_ever() {
    let f = fixture();
    let mut c = known(&f, "10.1.1.1", &mqtt::connect(4));
    c.ended(&mqtt::publish(b"sensor/b", 0, b"1"));
    let mut offset = c.sent;
    let chunk = [0x55; 1400];
    for length in [1400, 100, 1] {
        loop {
            match segment(&c, offset, TOLD, false, &chunk[..length]) {
                Ok(acked) if acked == offset + length as u32 => offset = acked,
                other => break assert_eq!(other, Ok(offset), "what came before, again"),
            }
        }
    }
    assert!(offset > 3 << 20, "{offset}");
    assert!(f.counters()["rescue_full"] >= 3);
    let lost = known(&f, "10.1.1.2", &mqtt::connect(4)).ended(&mqtt::publish(b"sensor/b", 0, b"1"));
    assert!(lost.counters.contains(&"publish_lost 1".to_owned()), "{lost:?}");
    assert!(!lost.counters.iter().any(|c| c.starts_with("flow_rescued")), "{lost:?}");
    assert_eq!(
        pieces(&f).iter().map(|p| p.bytes.len()).sum::<usize>() as u32,
        offset - c.sent + 13
    );
    assert_eq!(segment(&c, offset, TOLD, false, &chunk), Ok(offset + 1400));
}

#[test]
fn only_what_surely_has_no_credentials_is_handed_over() {
    let f = fixture();
    let v5 = |properties: &[u8]| {
        let mut body = b"\x00\x04MQTT\x05\x02\x00\x3c".to_vec();
        body.push(properties.len() as u8);
        body.extend(properties);
        body.extend(b"\x00\x01c");
        [&[0x10, body.len() as u8], &body[..]].concat()
    };
    let mut split = mqtt::connect(4);
    let rest = split.split_off(9);
    let cases: Vec<(Vec<u8>, Option<bool>)> = vec![
        (mqtt::connect(4), Some(false)),
        (mqtt::connect_as(4, 0x82, b"c", &[b"user"]), None),
        (mqtt::connect_as(4, 0xc2, b"c", &[b"user", b"password"]), None),
        (v5(b""), Some(true)),
        (v5(b"\x11\0\0\0\x05\x21\0\x09\x27\0\0\xff\xff\x22\0\x02\x17\x01\x19\x01"), Some(true)),
        (v5(b"\x15\x00\x01m"), None),
        (v5(b"\x22\0\x02\x15\x00\x01m"), None),
        (v5(b"\x26\x00\x01k\x00\x01v"), None), // not looked into
        (split, None),
    ];
    for (n, (connect, expected)) in cases.iter().enumerate() {
        let mut c = known(&f, &format!("10.1.2.{n}"), connect);
        if n == cases.len() - 1 {
            c.data(&rest);
        }
        let publish = if connect.get(8) == Some(&5) {
            mqtt::publish5(b"sensor/b", b"1")
        } else {
            mqtt::publish(b"sensor/b", 0, b"1")
        };
        let seen = c.ended(&publish);
        let handed = pieces(&f);
        assert_eq!(handed.first().map(|p| p.v5), *expected, "{connect:02x?}: {seen:?}");
        let counter = if expected.is_some() { "flow_rescued 1" } else { "not_rescued 1" };
        assert!(seen.counters.contains(&counter.to_owned()), "{seen:?}");
    }
    // Nobody reads.
    f.datapath.rescue_until.put(&0, &0).unwrap();
    let mut c = known(&f, "10.1.3.1", &mqtt::connect(4));
    let seen = c.ended(&mqtt::publish(b"sensor/b", 0, b"1"));
    assert!(seen.counters.contains(&"not_rescued 1".to_owned()), "{seen:?}");
}
