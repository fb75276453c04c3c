//! What the datapath hands to the sidecar of a misrouted client's stream, and what it answers.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::time::Duration;

use crate::support::datapath::{CONFIG, Fixture, JUMPED, Outcome, SERVICE, XDP_TX};
use crate::support::{mqtt, packet};
use etherparse::{SlicedPacket, TcpHeader, TcpOptionElement, TransportSlice};
use libbpf_rs::RingBufferBuilder;
use mqtt_fwd::datapath::names::boot_time;
use mqtt_fwd::kernel::abi::{
    Pod as _, handover_keys, rescue, rescue_flags, rescue_limits, rescuer,
};

const XDP_DROP: u32 = 1;
/// Of its broker's stream, what the client has acknowledged.
const NOTHING: u32 = 1;
const CONNACK: u32 = 5;
const FIN: u32 = 6;

fn sign_of_life(f: &Fixture, instance: u32, alive: bool, full: bool) {
    let until = if alive { boot_time().as_nanos() as u64 + 60_000_000_000 } else { 0 };
    f.datapath.rescuer.put(&0, &rescuer { until, instance, full: full.into() }).unwrap();
}

fn fixture() -> Fixture {
    let text = CONFIG
        .replacen("max_packet", "relay = \"relay\"\nbinding = \"delayed\"\nmax_packet", 1)
        .replacen(
            "    { name = \"default\"",
            "    { name = \"relay\", vip = \"10.1.50.251\", reals = [{ address = \"10.1.3.207\" }] },\n    \
             { name = \"default\"",
            1,
        );
    let f = Fixture::with(&text);
    let keys = handover_keys { key: [[1, 2], [3, 4]], epoch: 1, pad: 0 };
    f.datapath.handover_keys.put(&0, &keys).unwrap();
    sign_of_life(&f, 1, true, false);
    f
}

/// A connection through the datapath.
struct Client<'a> {
    f: &'a Fixture,
    addr: SocketAddr,
    /// Its first sequence number, close to the wrap; and the SYN-ACK's.
    isn: u32,
    server: u32,
    sent: u32,
}

impl<'a> Client<'a> {
    fn open(f: &'a Fixture, addr: &str) -> Self {
        let mut c = Self { f, addr: addr.parse().unwrap(), isn: u32::MAX - 20, server: 0, sent: 0 };
        let service = SERVICE.parse().unwrap();
        let syn = packet::tcp(c.addr, service, c.isn, 0, |h| h.syn = true, &[]);
        c.server = answered(&f.send(&syn)).sequence_number;
        c
    }

    /// Bound to sensor/a's group by its first message, which comes with CONNECT.
    fn at_a(f: &'a Fixture, addr: &str, connect: &[u8]) -> Self {
        let mut c = Self::open(f, addr);
        let publish: fn(&[u8]) -> Vec<u8> = if connect.get(8) == Some(&5) {
            |topic| mqtt::publish5(topic, b"1")
        } else {
            |topic| mqtt::publish(topic, 0, b"1")
        };
        let first = [connect, &publish(b"sensor/a")].concat();
        assert_eq!(c.data(NOTHING, &first).verdict, JUMPED);
        assert_eq!(f.flow(c.addr).unwrap().group, "a");
        c
    }

    fn packet(&self, offset: u32, ack: u32, fin: bool, payload: &[u8]) -> Vec<u8> {
        let seq = self.isn.wrapping_add(1).wrapping_add(offset);
        let options = [TcpOptionElement::Timestamp(1000, 2000)];
        let shape = |h: &mut TcpHeader| {
            h.fin = fin;
            if ack >= FIN {
                h.set_options(&options).unwrap();
            }
        };
        let ack = self.server.wrapping_add(ack);
        packet::tcp(self.addr, SERVICE.parse().unwrap(), seq, ack, shape, payload)
    }

    /// The next bytes.
    fn data(&mut self, ack: u32, payload: &[u8]) -> Outcome {
        let outcome = self.f.send(&self.packet(self.sent, ack, false, payload));
        self.sent += payload.len() as u32;
        outcome
    }

    /// A misrouted PUBLISH, which ends it: what its broker gets is DISCONNECT and FIN.
    fn end(&mut self, publish: &[u8]) {
        let outcome = self.data(CONNACK, publish);
        assert_eq!(outcome.verdict, JUMPED);
        let sliced = SlicedPacket::from_ethernet(&outcome.packet).unwrap();
        let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("no TCP") };
        assert_eq!((tcp.fin(), tcp.payload()), (true, &mqtt::disconnect()[..]));
    }

    /// A segment after that; how far it is acknowledged, or the verdict.
    fn after(&self, offset: u32, ack: u32, fin: bool, payload: &[u8]) -> Result<u32, u32> {
        let outcome = self.f.send(&self.packet(offset, ack, fin, payload));
        if outcome.verdict != XDP_TX {
            return Err(outcome.verdict);
        }
        let tcp = answered(&outcome);
        assert_eq!((tcp.ack, tcp.syn, tcp.fin, tcp.rst), (true, false, false, false));
        assert_eq!(tcp.sequence_number, self.server.wrapping_add(ack), "behind what it has");
        let echoed = tcp.options_iterator().filter_map(Result::ok);
        assert_eq!(
            echoed.collect::<Vec<_>>(),
            [
                TcpOptionElement::Noop,
                TcpOptionElement::Noop,
                TcpOptionElement::Timestamp(2000, 1000)
            ]
        );
        Ok(tcp.acknowledgment_number.wrapping_sub(self.isn.wrapping_add(1)))
    }

    fn piece(&self, offset: u32, last: bool, bytes: &[u8], start: u32) -> Piece {
        let base = self.isn.wrapping_add(1);
        Piece {
            client: self.addr,
            start: base.wrapping_add(start),
            seq: base.wrapping_add(offset),
            last,
            v5: false,
            bytes: bytes.to_vec(),
        }
    }
}

fn answered(outcome: &Outcome) -> TcpHeader {
    assert_eq!(outcome.verdict, XDP_TX);
    assert!(
        packet::ip_checksum_right(&outcome.packet) && packet::tcp_checksum_right(&outcome.packet)
    );
    let sliced = SlicedPacket::from_ethernet(&outcome.packet).unwrap();
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("no TCP") };
    tcp.to_header()
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

fn plain(id: &str) -> Vec<u8> {
    mqtt::connect_as(4, 2, id.as_bytes(), &[])
}

fn counter(f: &Fixture, name: &str) -> u64 {
    f.counters().get(name).copied().unwrap_or(0)
}

#[test]
fn a_stream_is_handed_over_in_order_and_acknowledged_once_its_broker_has_ended() {
    let f = fixture();
    let mut c = Client::at_a(&f, "10.1.1.1:4000", &plain("1"));
    let start = c.sent;
    let first = mqtt::publish(b"sensor/b", 0, b"first");
    c.end(&first);
    assert_eq!((counter(&f, "flow_rescued"), counter(&f, "publish_lost")), (1, 0));
    assert_eq!(pieces(&f), [c.piece(start, false, &first, start)]);

    let at = c.sent;
    // Its broker has not answered yet: taken, but the client has to go on repeating.
    assert_eq!(c.after(at, CONNACK, false, b"second"), Err(XDP_DROP));
    assert_eq!(pieces(&f), [c.piece(at, false, b"second", start)]);
    assert_eq!(c.after(at, FIN, false, b"second"), Ok(at + 6), "repeated");
    assert_eq!(pieces(&f), []);
    // Beyond a gap, nothing is taken; then what is new of a repetition.
    assert_eq!(c.after(at + 10, FIN, false, b"beyond"), Ok(at + 6));
    assert_eq!(c.after(at + 3, FIN, false, b"ond third"), Ok(at + 12));
    assert_eq!(pieces(&f), [c.piece(at + 6, false, b" third", start)]);
    // A stranger that does not know the numbers.
    for far in [1 << 16, 1 << 30, 1 << 31, u32::MAX - (1 << 20)] {
        c.after(at.wrapping_add(far), FIN, false, b"forged").ok();
    }
    // Damaged on the way.
    let mut damaged = c.packet(at + 12, FIN, false, b"damaged");
    *damaged.last_mut().unwrap() ^= 1;
    assert_eq!(f.send(&damaged).verdict, XDP_DROP);
    assert_eq!(pieces(&f), []);
    // A repetition of the segment that ended the flow goes to its broker again.
    assert_eq!(c.after(start, CONNACK, false, &first), Err(JUMPED));
    assert_eq!(pieces(&f), []);
    // Its acknowledgement of FIN goes there, too; later ones would only be answered with RST.
    assert_eq!(c.after(at + 12, FIN, false, b""), Err(JUMPED));
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert_eq!(c.after(at + 12, FIN, false, b""), Err(XDP_DROP));
    assert_eq!(c.after(at + 12, FIN, true, b"end"), Ok(at + 16), "FIN counts");
    assert_eq!(pieces(&f), [c.piece(at + 12, true, b"end", start)]);
    assert_eq!(c.after(at + 15, FIN, true, b""), Ok(at + 16), "FIN repeated");
    assert_eq!(pieces(&f), []);
}

#[test]
fn without_room_nothing_is_acknowledged_and_without_any_the_flow_ends_as_ever() {
    let f = fixture();
    let mut c = Client::at_a(&f, "10.1.1.1:4000", &plain("1"));
    c.end(&mqtt::publish(b"sensor/b", 0, b"1"));
    let mut offset = c.sent;
    let chunk = [0x55; 1400];
    for length in [1400, 100, 1] {
        loop {
            match c.after(offset, FIN, false, &chunk[..length]) {
                Ok(acked) if acked == offset + length as u32 => offset = acked,
                other => break assert_eq!(other, Ok(offset), "what came before, again"),
            }
        }
    }
    assert!(offset > 3 << 20, "{offset}");
    assert!(counter(&f, "rescue_full") >= 3);
    let before = counter(&f, "flow_rescued");
    let mut lost = Client::at_a(&f, "10.1.1.2:4000", &plain("2"));
    lost.end(&mqtt::publish(b"sensor/b", 0, b"1"));
    assert_eq!((counter(&f, "flow_rescued") - before, counter(&f, "publish_lost")), (0, 1));
    let taken: usize = pieces(&f).iter().map(|p| p.bytes.len()).sum();
    assert_eq!(taken as u32, offset - c.sent + 13);
    assert_eq!(c.after(offset, FIN, false, &chunk), Ok(offset + 1400));
}

/// Nobody else would notice: the sidecar's connections are others'.
#[test]
fn a_damaged_segment_ends_nothing() {
    let f = fixture();
    let mut c = Client::at_a(&f, "10.1.1.1:4000", &plain("1"));
    let publish = mqtt::publish(b"sensor/b", 0, b"1");
    let mut damaged = c.packet(c.sent, CONNACK, false, &publish);
    *damaged.last_mut().unwrap() ^= 1;
    assert_eq!(f.send(&damaged).verdict, XDP_DROP);
    assert_eq!(pieces(&f), []);
    let start = c.sent;
    c.end(&publish);
    assert_eq!(pieces(&f), [c.piece(start, false, &publish, start)]);
}

/// lwIP, say, repeats all that is outstanding.
#[test]
fn what_its_broker_has_already_is_neither_cut_nor_published_again() {
    let f = fixture();
    let mut c = Client::at_a(&f, "10.1.1.1:4000", &plain("1"));
    c.data(CONNACK, &[0xc0, 0]);
    let lost = mqtt::publish(b"sensor/a", 0, b"lost on the way here");
    let publish = mqtt::publish(b"sensor/b", 0, b"1");
    let at = c.sent + lost.len() as u32;
    let (begin, end) = publish.split_at(6);
    let (begin, end) = ((at, begin), (at + 6, end));
    let send = |offset: u32, bytes: &[u8]| {
        let outcome = f.send(&c.packet(offset, CONNACK, false, bytes));
        assert_eq!(outcome.verdict, JUMPED);
        assert!(outcome.packet.ends_with(bytes), "as it was");
    };
    for (offset, bytes) in [begin, end, (c.sent, &lost[..]), begin, end] {
        send(offset, bytes);
    }
    assert_eq!(pieces(&f), []);
    assert_eq!(counter(&f, "mispredicted"), 1);
    assert_eq!(counter(&f, "flow_ended"), 0);
    // The next one ends it.
    c.sent = at + publish.len() as u32;
    c.end(&publish);
}

#[test]
fn a_client_of_a_sidecar_that_is_gone_is_told_so() {
    let f = fixture();
    let mut c = Client::at_a(&f, "10.1.1.1:4000", &plain("1"));
    c.end(&mqtt::publish(b"sensor/b", 0, b"1"));
    pieces(&f);
    for (instance, alive) in [(1, false), (2, true)] {
        sign_of_life(&f, instance, alive, false);
        let tcp = answered(&f.send(&c.packet(c.sent, FIN, false, b"more")));
        assert!(tcp.rst, "{tcp:?}");
        assert_eq!(tcp.sequence_number, c.server.wrapping_add(FIN));
        assert_eq!(pieces(&f), []);
    }
    // A new one is as welcome as ever, unless the sidecar has enough of them.
    for (addr, full, rescued) in [("10.1.1.2:4000", false, 1), ("10.1.1.3:4000", true, 0)] {
        sign_of_life(&f, 2, true, full);
        let mut c = Client::at_a(&f, addr, &plain(addr));
        c.end(&mqtt::publish(b"sensor/b", 0, b"1"));
        assert_eq!(pieces(&f).len(), rescued);
    }
    assert_eq!(counter(&f, "not_rescued"), 1);
}

#[test]
fn only_what_surely_has_no_credentials_is_handed_over() {
    let f = fixture();
    let with = |level: u8, flags: u8, properties: &[u8]| {
        let mut body = [b"\x00\x04MQTT", &[level, flags, 0, 60][..]].concat();
        if level == 5 {
            body.push(properties.len() as u8);
            body.extend(properties);
        }
        let id = format!("{level}-{flags}-{properties:02x?}");
        body.extend((id.len() as u16).to_be_bytes());
        body.extend(id.as_bytes());
        [&[0x10, body.len() as u8], &body[..]].concat()
    };
    let v5 = |properties: &[u8]| with(5, 2, properties);
    let cases: Vec<(Vec<u8>, Option<bool>)> = vec![
        (plain("plain"), Some(false)),
        (mqtt::connect_as(4, 0x82, b"user", &[b"user"]), None),
        (mqtt::connect_as(4, 0xc2, b"password", &[b"user", b"password"]), None),
        (v5(b""), Some(true)),
        (v5(b"\x11\0\0\0\x05\x21\0\x09\x27\0\0\xff\xff\x22\0\x02\x17\x01\x19\x01"), Some(true)),
        (v5(b"\x15\x00\x01m"), None),
        (v5(b"\x22\0\x02\x15\x00\x01m"), None),
        (v5(b"\x26\x00\x01k\x00\x01v"), None), // not looked into
        // What brokers refuse is nothing to publish for.
        (with(9, 2, b""), None),
        (with(4, 3, b""), None),
        (with(4, 0x1a, b""), None),
    ];
    for (n, (connect, expected)) in cases.iter().enumerate() {
        let addr = format!("10.1.2.{n}:4000");
        let mut c = Client::at_a(&f, &addr, connect);
        let publish = if connect.get(8) == Some(&5) {
            mqtt::publish5(b"sensor/b", b"1")
        } else {
            mqtt::publish(b"sensor/b", 0, b"1")
        };
        let before = (counter(&f, "flow_rescued"), counter(&f, "not_rescued"));
        c.end(&publish);
        let handed = pieces(&f);
        assert_eq!(handed.first().map(|p| p.v5), *expected, "{connect:02x?}");
        let rescued = u64::from(expected.is_some());
        let after = (counter(&f, "flow_rescued"), counter(&f, "not_rescued"));
        assert_eq!(after, (before.0 + rescued, before.1 + 1 - rescued), "{connect:02x?}");
    }
    // All in one segment.
    let mut c = Client::open(&f, "10.1.3.1:4000");
    let (a, b) = (mqtt::publish(b"sensor/a", 0, b"1"), mqtt::publish(b"sensor/b", 0, b"2"));
    c.data(NOTHING, &[&plain("at once")[..], &a, &b].concat());
    assert_eq!(pieces(&f).into_iter().map(|p| p.bytes).collect::<Vec<_>>(), [b]);
}

/// Bound by its address, without a cookie, a client may be anywhere.
#[test]
fn a_flow_without_a_handshake_from_here_is_not_rescued() {
    let f = fixture();
    // No key yet: as with predicted binding.
    f.datapath.handover_keys.put(&0, &handover_keys::default()).unwrap();
    let addr: SocketAddr = "10.1.1.1:4000".parse().unwrap();
    let send = |seq: u32, syn: bool, payload: &[u8]| {
        let shape = |h: &mut TcpHeader| h.syn = syn;
        f.send(&packet::tcp(addr, SERVICE.parse().unwrap(), seq, 77, shape, payload))
    };
    send(1000, true, &[]);
    let mut seq = 1001;
    for bytes in
        [mqtt::connect(4), mqtt::publish(b"sensor/a", 0, b"1"), mqtt::publish(b"sensor/b", 0, b"1")]
    {
        send(seq, false, &bytes);
        seq += bytes.len() as u32;
    }
    assert_eq!(pieces(&f), []);
    assert_eq!(counter(&f, "flow_rescued"), 0);
}

#[test]
fn an_address_has_no_more_than_its_share_of_rescues() {
    let f = fixture();
    let ended = |client: &str| {
        let connect = mqtt::connect_as(4, 2, client.as_bytes(), &[]);
        let mut c = Client::at_a(&f, client, &connect);
        let before = f.counters().get("flow_rescued").copied().unwrap_or(0);
        c.data(CONNACK, &mqtt::publish(b"sensor/b", 0, b"2"));
        f.counters().get("flow_rescued").copied().unwrap_or(0) - before
    };
    // Those that begin in one window, whenever the test does: the second window's are as many at most.
    let rescued: u64 = (0..200)
        .map(|i| {
            if i % 40 == 39 {
                // All together have 50 in 0.1 s.
                std::thread::sleep(Duration::from_millis(110));
            }
            ended(&format!("10.1.1.1:{}", 5000 + i))
        })
        .sum();
    let share = u64::from(rescue_limits::RESCUES_PER_ADDRESS.0);
    assert!(rescued == share || rescued == 2 * share, "{rescued}");
    assert_eq!(f.counters()["not_rescued"], 200 - rescued);
    assert_eq!(ended("10.1.1.2:5000"), 1, "somebody else's is his own");
}
