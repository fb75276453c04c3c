//! Connections before they have a flow: the state machine of delayed binding, against a plain model
//! of it, packet by packet; and what strangers can cost.

mod support;

use std::collections::HashMap;
use std::net::SocketAddr;

use etherparse::{SlicedPacket, TcpHeader, TcpOptionElement, TransportSlice};
use mqtt_fwd::kernel::abi::handover_keys;
use proptest::prelude::*;
use support::datapath::{self, Fixture, JUMPED, Outcome, SERVICE, SERVICE6, XDP_DROP, XDP_TX};
use support::{mqtt, packet};

fn delayed() -> Fixture {
    delayed_at(u32::MAX)
}

/// Delayed binding, with so many new flows in a window of time.
fn delayed_at(flows_per_window: u32) -> Fixture {
    let text = datapath::CONFIG.replace("max_packet", "binding = \"delayed\"\nmax_packet");
    let f = Fixture::loaded(&text, &datapath::SMALL, |rodata| {
        rodata.flows_per_window = flows_per_window;
        rodata.topics_per_window = u32::MAX;
    });
    let keys = handover_keys { key: [[1, 2], [3, 4]], epoch: 1, pad: 0 };
    f.datapath.handover_keys.put(&0, &keys).unwrap();
    f
}

/// What is kept of connections, in entries.
fn kept(f: &Fixture) -> usize {
    let d = &f.datapath;
    let counts = [
        d.flows.keys().unwrap().len(),
        d.flows6.keys().unwrap().len(),
        d.flows_weak.keys().unwrap().len(),
        d.flows6_weak.keys().unwrap().len(),
        d.handovers.keys().unwrap().len(),
        d.client_ids.keys().unwrap().len(),
        d.clients.keys().unwrap().len(),
        d.clients6.keys().unwrap().len(),
    ];
    counts.iter().sum()
}

/// A TCP header and payload, without addresses.
struct Reply {
    tcp: TcpHeader,
    payload: Vec<u8>,
}

fn reply(outcome: &Outcome) -> Reply {
    assert_eq!(outcome.verdict, XDP_TX);
    assert!(packet::ip_checksum_right(&outcome.packet), "IP checksum");
    assert!(packet::tcp_checksum_right(&outcome.packet), "TCP checksum");
    let sliced = SlicedPacket::from_ethernet(&outcome.packet).unwrap();
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("not TCP") };
    Reply { tcp: tcp.to_header(), payload: tcp.payload().to_vec() }
}

/// Which options a client offers.
#[derive(Debug, Clone, Copy)]
#[allow(clippy::struct_excessive_bools)] // they are four independent options
struct Offer {
    mss: bool,
    sack: bool,
    timestamps: bool,
    wscale: bool,
}

impl Offer {
    fn all() -> impl Iterator<Item = Self> {
        (0..16).map(|n| Self {
            mss: n & 1 != 0,
            sack: n & 2 != 0,
            timestamps: n & 4 != 0,
            wscale: n & 8 != 0,
        })
    }

    fn elements(self, tsval: u32) -> Vec<TcpOptionElement> {
        let mut all = Vec::new();
        if self.mss {
            all.push(TcpOptionElement::MaximumSegmentSize(1400));
        }
        if self.sack {
            all.push(TcpOptionElement::SelectiveAcknowledgementPermitted);
        }
        if self.timestamps {
            all.push(TcpOptionElement::Timestamp(tsval, 0));
        }
        if self.wscale {
            all.push(TcpOptionElement::WindowScale(9));
        }
        all
    }
}

/// A client's end of a connection.
#[derive(Clone)]
struct Client {
    addr: SocketAddr,
    service: SocketAddr,
    isn: u32,
    /// What it acknowledges.
    ack: u32,
    offer: Offer,
    tsecr: u32,
}

impl Client {
    fn new(addr: &str, isn: u32) -> Self {
        let addr: SocketAddr = addr.parse().unwrap();
        let service = if addr.is_ipv4() { SERVICE } else { SERVICE6 };
        let offer = Offer { mss: true, sack: true, timestamps: true, wscale: true };
        Self { addr, service: service.parse().unwrap(), isn, ack: 0, offer, tsecr: 0 }
    }

    fn syn(&self) -> Vec<u8> {
        let options = self.offer.elements(500);
        let shape = |h: &mut TcpHeader| {
            h.syn = true;
            h.set_options(&options).unwrap();
        };
        packet::tcp(self.addr, self.service, self.isn, 0, shape, &[])
    }

    /// A segment `offset` bytes behind the first.
    fn segment(&self, offset: u32, payload: &[u8], shape: impl FnOnce(&mut TcpHeader)) -> Vec<u8> {
        let seq = self.isn.wrapping_add(1).wrapping_add(offset);
        let with_options = |h: &mut TcpHeader| {
            if self.offer.timestamps {
                h.set_options(&[TcpOptionElement::Timestamp(501, self.tsecr)]).unwrap();
            }
            shape(h);
        };
        packet::tcp(self.addr, self.service, seq, self.ack, with_options, payload)
    }

    /// Takes a SYN-ACK.
    fn opened(&mut self, reply: &Reply) {
        assert!(reply.tcp.syn && reply.tcp.ack);
        assert_eq!(reply.tcp.acknowledgment_number, self.isn.wrapping_add(1));
        self.ack = reply.tcp.sequence_number.wrapping_add(1);
        self.tsecr = timestamps(&reply.tcp).map_or(0, |(tsval, _)| tsval);
    }

    fn open(f: &Fixture, addr: &str, isn: u32) -> Self {
        let mut client = Self::new(addr, isn);
        let outcome = f.send(&client.syn());
        client.opened(&reply(&outcome));
        client
    }
}

fn timestamps(tcp: &TcpHeader) -> Option<(u32, u32)> {
    tcp.options_iterator().flatten().find_map(|option| match option {
        TcpOptionElement::Timestamp(value, echo) => Some((value, echo)),
        _ => None,
    })
}

#[test]
fn syn_acks_offer_what_was_offered_and_remember_it_in_the_sequence_number() {
    let f = delayed();
    for addr in ["10.1.1.7:4000", "[fd01:1::7]:4000"] {
        for offer in Offer::all() {
            let client = Client { offer, ..Client::new(addr, 1 << 31) };
            let sent = client.syn();
            let outcome = f.send(&sent);
            assert!(outcome.packet.len() <= sent.len(), "{offer:?}: no amplification");
            let tcp = reply(&outcome).tcp;
            let options: Vec<_> = tcp.options_iterator().flatten().collect();
            let room = if client.addr.is_ipv4() { 1480 - 40 } else { 1460 - 60 };
            let has = |option: &TcpOptionElement| options.contains(option);
            assert_eq!(has(&TcpOptionElement::MaximumSegmentSize(room)), offer.mss);
            assert_eq!(has(&TcpOptionElement::SelectiveAcknowledgementPermitted), offer.sack);
            assert_eq!(has(&TcpOptionElement::WindowScale(7)), offer.wscale);
            assert_eq!(timestamps(&tcp).map(|(_, echo)| echo), offer.timestamps.then_some(500));
            let cookie = tcp.sequence_number;
            assert_eq!(cookie & 0xf, if offer.wscale { 9 } else { 15 });
            assert_eq!(cookie >> 4 & 1, u32::from(offer.sack));
            assert_eq!(cookie >> 5 & 1, 1, "the epoch's parity");
            assert_eq!(cookie >> 6 & 3, u32::from(offer.mss), "1400 is above 1300 and below 1440");
            // Twice the same question, twice the same answer: nothing is remembered.
            assert_eq!(reply(&f.send(&client.syn())).tcp.sequence_number, cookie);
        }
    }
    assert_eq!(kept(&f), 0);
}

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

/// A connection as the model knows it.
#[derive(Debug, Clone, PartialEq)]
enum State {
    /// Nothing is kept.
    Nothing,
    /// CONNECT was answered.
    Wait,
    /// It has a flow.
    Bound { group: &'static str },
}

/// What a test sends.
#[derive(Debug, Clone, Copy)]
enum Step {
    Syn,
    Ack,
    Fin,
    Connect,
    ConnectV5,
    ConnectAndPublish { b: bool },
    Publish { b: bool },
    Subscribe { b: bool },
    Ping,
    Beyond,
    Probe,
    Rst,
    Stray,
}

fn steps() -> impl Strategy<Value = Vec<(usize, Step)>> {
    let step = prop_oneof![
        3 => Just(Step::Syn),
        2 => Just(Step::Ack),
        1 => Just(Step::Fin),
        4 => Just(Step::Connect),
        1 => Just(Step::ConnectV5),
        2 => any::<bool>().prop_map(|b| Step::ConnectAndPublish { b }),
        4 => any::<bool>().prop_map(|b| Step::Publish { b }),
        1 => any::<bool>().prop_map(|b| Step::Subscribe { b }),
        1 => Just(Step::Ping),
        1 => Just(Step::Beyond),
        1 => Just(Step::Probe),
        1 => Just(Step::Rst),
        1 => Just(Step::Stray),
    ];
    proptest::collection::vec((0usize..4, step), 1..60)
}

/// What came out, in the model's words.
#[derive(Debug, PartialEq)]
enum Out {
    Dropped,
    SynAck,
    Connack,
    Ack,
    Rst,
    /// To a group's VIP, as it came.
    Forwarded(&'static str),
    /// The same, with CONNECT in front.
    HandedOver(&'static str),
}

fn out_of(outcome: &Outcome, sent: &[u8]) -> Out {
    match outcome.verdict {
        XDP_DROP => Out::Dropped,
        XDP_TX => {
            assert!(outcome.packet.len() <= sent.len(), "an answer longer than what it answers");
            let reply = reply(outcome);
            match (reply.tcp.syn, reply.tcp.rst, &reply.payload[..]) {
                (true, false, []) => Out::SynAck,
                (false, true, []) => Out::Rst,
                (false, false, [0x20, 2, 0, 0]) => Out::Connack,
                (false, false, []) => Out::Ack,
                other => panic!("{other:?}"),
            }
        }
        JUMPED => {
            let group = match packet::dst(&outcome.packet).to_string().as_str() {
                "10.1.50.1" | "fd01:50::1" => "a",
                "10.1.50.2" | "fd01:50::2" => "b",
                "10.1.50.250" | "fd01:50::250" => "default",
                other => panic!("to {other}"),
            };
            assert!(packet::ip_checksum_right(&outcome.packet));
            if outcome.packet.len() > sent.len() {
                Out::HandedOver(group)
            } else {
                Out::Forwarded(group)
            }
        }
        other => panic!("verdict {other}"),
    }
}

/// A connection and what the model says of it.
struct Modelled {
    client: Client,
    opened: bool,
    state: State,
    connect: Vec<u8>,
    /// Bytes sent since CONNECT began, in order.
    sent: u32,
    strayed: bool,
}

impl Modelled {
    /// What to send, what has to come out, and the state after.
    fn expect(&self, step: Step) -> Option<(Vec<u8>, Out, State)> {
        let connect = &self.connect;
        let n = connect.len() as u32;
        let topic = |b: bool| if b { (&b"sensor/b"[..], "b") } else { (&b"sensor/a"[..], "a") };
        let plain = |offset: u32, payload: &[u8]| self.client.segment(offset, payload, |_| {});
        let stay = self.state.clone();
        if let Step::Syn = step {
            return Some((self.client.syn(), Out::SynAck, stay));
        }
        if let Step::Stray = step {
            // Of no connection: another acknowledgement, far away.
            if stay != State::Nothing || self.strayed {
                return None;
            }
            let mut stranger = self.client.clone();
            stranger.ack = stranger.ack.wrapping_add(77_777);
            return Some((stranger.segment(5000, b"xyz", |_| {}), Out::Dropped, stay));
        }
        if !self.opened {
            return None;
        }
        let (out, state);
        let sent = match (&self.state, step) {
            (State::Nothing, Step::Ack) => {
                (out, state) = (Out::Dropped, stay);
                plain(0, &[])
            }
            (State::Nothing, Step::Fin) => {
                (out, state) = (Out::Rst, stay);
                self.client.segment(0, &[], |h| h.fin = true)
            }
            (State::Nothing, Step::Connect) => {
                (out, state) = (Out::Connack, State::Wait);
                plain(0, connect)
            }
            (State::Nothing, Step::ConnectV5) => {
                let group = "default";
                (out, state) = (Out::Forwarded(group), State::Bound { group });
                plain(0, &mqtt::connect_as(5, 2, b"", &[]))
            }
            (State::Wait, Step::Connect) => {
                (out, state) = (Out::Connack, stay);
                plain(0, connect)
            }
            (State::Wait, Step::Ack) => {
                (out, state) = (Out::Dropped, stay);
                plain(n, &[])
            }
            (State::Wait, Step::Probe) => {
                (out, state) = (Out::Ack, stay);
                plain(n - 1, &[])
            }
            (State::Wait, Step::Beyond) => {
                (out, state) = (Out::Dropped, stay);
                plain(n + 10, b"behind a gap")
            }
            (State::Wait, Step::Rst) => {
                (out, state) = (Out::Dropped, State::Nothing);
                self.client.segment(n, &[], |h| h.rst = true)
            }
            (State::Wait, Step::Publish { b }) => {
                let (topic, group) = topic(b);
                (out, state) = (Out::HandedOver(group), State::Bound { group });
                plain(n, &mqtt::publish(topic, 0, b"payload"))
            }
            (State::Wait, Step::Subscribe { b }) => {
                let (topic, group) = topic(b);
                (out, state) = (Out::HandedOver(group), State::Bound { group });
                plain(n, &mqtt::subscribe(topic))
            }
            (State::Nothing | State::Wait, Step::ConnectAndPublish { b }) => {
                let (topic, group) = topic(b);
                (out, state) = (Out::Forwarded(group), State::Bound { group });
                plain(0, &[&connect[..], &mqtt::publish(topic, 1, b"x")].concat())
            }
            (State::Wait, Step::Ping) => {
                let group = "default";
                (out, state) = (Out::HandedOver(group), State::Bound { group });
                plain(n, &mqtt::pingreq())
            }
            (State::Wait, Step::Fin) => {
                let group = "default";
                (out, state) = (Out::HandedOver(group), State::Bound { group });
                self.client.segment(n, &[], |h| h.fin = true)
            }
            (State::Bound { group }, Step::Ping) => {
                (out, state) = (Out::Forwarded(group), stay.clone());
                plain(self.sent, &mqtt::pingreq())
            }
            (State::Bound { group }, Step::Ack) => {
                (out, state) = (Out::Forwarded(group), stay.clone());
                plain(self.sent, &[])
            }
            _ => return None,
        };
        Some((sent, out, state))
    }
}

#[test]
fn random_packets_meet_what_the_model_says() {
    let f = delayed();
    let next = std::cell::Cell::new(0u32);
    let seed = std::env::var("PROPTEST_RNG_SEED").map_or(1883, |s| s.parse().expect("a number"));
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: std::env::var("GREETINGS").map_or(1500, |n| n.parse().expect("a number")),
        failure_persistence: None,
        rng_seed: proptest::test_runner::RngSeed::Fixed(seed),
        ..ProptestConfig::default()
    });
    let met = std::cell::RefCell::new(HashMap::<String, u32>::new());
    let checked = runner.run(&steps(), |steps| {
        let mut all: Vec<Modelled> = (0..4)
            .map(|i| {
                let n = next.get();
                next.set(n + 1);
                // Each its own address, which others teach nothing about.
                let addr = if i % 2 == 0 {
                    format!("{}:4000", std::net::Ipv4Addr::from(0x0b00_0000 + n))
                } else {
                    format!("[fd01:7::{n:x}]:4000")
                };
                let mut client = Client::new(&addr, n.wrapping_mul(0x9e37_79b9));
                client.offer.timestamps = !n.is_multiple_of(3);
                client.offer.wscale = !n.is_multiple_of(5);
                // No client id: the model need not know what clients are known for.
                let connect = mqtt::connect_as(4, 2, b"", &[]);
                let state = State::Nothing;
                Modelled { client, opened: false, state, connect, sent: 0, strayed: false }
            })
            .collect();
        for (which, step) in steps {
            let m = &mut all[which];
            let Some((sent, expected, state)) = m.expect(step) else { continue };
            let outcome = f.send(&sent);
            let out = out_of(&outcome, &sent);
            prop_assert_eq!(&out, &expected, "{:?} in {:?}", step, m.state);
            *met.borrow_mut().entry(format!("{:?} {out:?}", m.state)).or_default() += 1;
            if out == Out::SynAck {
                let answer = reply(&outcome);
                if m.state == State::Nothing {
                    m.client.opened(&answer);
                    m.opened = true;
                }
            }
            if let Out::HandedOver(_) = out {
                // CONNECT, then what was sent; acknowledging the SYN-ACK and no more.
                let sliced = SlicedPacket::from_ethernet(&outcome.packet).unwrap();
                let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!() };
                prop_assert!(tcp.payload().starts_with(&m.connect));
                prop_assert_eq!(tcp.sequence_number(), m.client.isn.wrapping_add(1));
                prop_assert_eq!(tcp.acknowledgment_number(), m.client.ack);
                let mut restored = outcome.packet.clone();
                let service = m.client.service.ip();
                match service {
                    std::net::IpAddr::V4(a) => restored[30..34].copy_from_slice(&a.octets()),
                    std::net::IpAddr::V6(a) => restored[38..54].copy_from_slice(&a.octets()),
                }
                prop_assert!(packet::tcp_checksum_right(&restored), "{:?}", step);
            }
            if let (State::Bound { .. }, true) = (&state, state != m.state) {
                let payload = SlicedPacket::from_ethernet(&sent).unwrap();
                let Some(TransportSlice::Tcp(tcp)) = payload.transport else { panic!() };
                let offset = tcp.sequence_number().wrapping_sub(m.client.isn.wrapping_add(1));
                m.sent = offset + tcp.payload().len() as u32 + u32::from(tcp.fin());
                if tcp.fin() {
                    // Over: nothing more is asked of it.
                    m.opened = false;
                }
            } else if matches!(step, Step::Ping) {
                m.sent += mqtt::pingreq().len() as u32;
            }
            m.strayed |= matches!(step, Step::Stray);
            m.state = state;
        }
        Ok(())
    });
    if let Err(error) = checked {
        panic!("{error}");
    }
    let met = met.into_inner();
    for (state, out) in [
        ("Nothing", "SynAck"),
        ("Nothing", "Dropped"),
        ("Nothing", "Rst"),
        ("Nothing", "Connack"),
        ("Nothing", "Forwarded"),
        ("Wait", "Connack"),
        ("Wait", "Ack"),
        ("Wait", "Dropped"),
        ("Wait", "Forwarded"),
        ("Wait", "HandedOver"),
        ("Bound", "Forwarded"),
    ] {
        assert!(
            met.keys().any(|key| key.starts_with(state) && key.contains(out)),
            "{state} → {out} was never tried: {met:?}"
        );
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

#[test]
fn routes_by_connect_follow_one_rule() {
    let pattern = "[ab]{1,3}\\*?|\\*";
    let text = "[abc]{0,4}";
    let groups = prop_oneof![Just("a"), Just("b")];
    let routes = proptest::collection::btree_map((any::<bool>(), pattern), groups, 1..8);
    let clients = proptest::collection::vec((text, proptest::option::of(text)), 20);
    let next = std::cell::Cell::new(0u32);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 40,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let checked = runner.run(&(routes, clients), |(routes, clients)| {
        let lines: Vec<String> = routes
            .iter()
            .map(|((by_id, pattern), group)| {
                let key = if *by_id { "client_id" } else { "username" };
                format!("{{ {key} = \"{pattern}\", group = \"{group}\" }},\n")
            })
            .collect();
        let config = datapath::CONFIG
            .replace("max_packet", "binding = \"delayed\"\nmax_packet")
            .replacen("route = [\n", &format!("route = [\n{}", lines.concat()), 1);
        let f = Fixture::with(&config);
        let keys = handover_keys { key: [[1, 2], [3, 4]], epoch: 1, pad: 0 };
        f.datapath.handover_keys.put(&0, &keys).unwrap();
        for (id, user) in clients {
            let n = next.get();
            next.set(n + 1);
            let addr = format!("{}:4000", std::net::Ipv4Addr::from(0x0c00_0000 + n));
            let client = Client::open(&f, &addr, n);
            let flags = if user.is_some() { 0x82 } else { 0x02 };
            let texts: Vec<&[u8]> = user.iter().map(String::as_bytes).collect();
            // With a message of group b's: only what no route names is bound by that.
            let connect = mqtt::connect_as(4, flags, id.as_bytes(), &texts);
            let all = [&connect[..], &mqtt::publish(b"sensor/b", 0, b"x")].concat();
            let sent = client.segment(0, &all, |_| {});
            let rule = f.config.services[0].group_of_client(&id, user.as_deref().unwrap_or(""));
            let expected = rule.map_or("b", |route| &route.group).to_owned();
            let outcome = f.send(&sent);
            prop_assert_eq!(outcome.verdict, JUMPED);
            let group = match packet::dst(&outcome.packet).to_string().as_str() {
                "10.1.50.1" => "a",
                "10.1.50.2" => "b",
                _ => "default",
            };
            prop_assert_eq!(group, expected, "{:?} {:?} under {:?}", id, user, lines);
        }
        Ok(())
    });
    if let Err(error) = checked {
        panic!("{error}");
    }
}
