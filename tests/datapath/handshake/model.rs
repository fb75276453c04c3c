//! The state machine against a plain model of it.

use std::collections::HashMap;

use etherparse::{SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::connection::{Client, delayed, reply};
use crate::support::datapath::{JUMPED, Outcome, XDP_DROP, XDP_TX};
use crate::support::{mqtt, packet};

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
