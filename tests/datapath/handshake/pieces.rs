//! CONNECT that comes in pieces: devices that write its fields one by one.

use etherparse::{SlicedPacket, TransportSlice};

use super::connection::{Client, delayed, kept, reply};
use crate::support::datapath::{Fixture, JUMPED, Outcome, XDP_DROP, XDP_TX};
use crate::support::{mqtt, packet};

/// Sequence number and payload of what goes to a group, and its VIP.
fn forwarded(outcome: &Outcome) -> (u32, Vec<u8>, String) {
    assert_eq!(outcome.verdict, JUMPED);
    assert!(packet::ip_checksum_right(&outcome.packet), "IP checksum");
    let vip = packet::dst(&outcome.packet).to_string();
    let sliced = SlicedPacket::from_ethernet(&outcome.packet).unwrap();
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("not TCP") };
    (tcp.sequence_number(), tcp.payload().to_vec(), vip)
}

/// Sends pieces up to the last byte but those of the last one: each is acknowledged.
fn send_pieces(f: &Fixture, client: &Client, bytes: &[u8], cuts: &[usize]) -> u32 {
    let mut at = 0;
    for cut in cuts {
        for _ in 0..2 {
            // Twice, as if the acknowledgement had been lost.
            let sent = client.segment(at as u32, &bytes[at..*cut], |_| {});
            let outcome = f.send(&sent);
            let answer = reply(&outcome);
            assert!(outcome.packet.len() <= sent.len(), "no amplification");
            assert_eq!(answer.payload, b"");
            assert_eq!(answer.tcp.sequence_number, client.ack);
            let behind = client.isn.wrapping_add(1 + *cut as u32);
            assert_eq!(answer.tcp.acknowledgment_number, behind, "{cuts:?} at {at}");
        }
        at = *cut;
    }
    at as u32
}

#[test]
fn however_it_is_cut_the_first_message_decides() {
    let f = delayed();
    let mut port = 10_000;
    for addr in ["10.1.1.7", "[fd01:1::7]"] {
        let connect = mqtt::connect_as(4, 2, b"umqtt-01", &[]);
        let publish = mqtt::publish(b"sensor/b", 0, b"payload");
        let n = connect.len();
        let mut all: Vec<Vec<usize>> = (1..n).map(|cut| vec![cut]).collect();
        all.push((1..n).collect());
        // Fixed header, variable header, client id.
        all.push(vec![2, 12, 14]);
        for cuts in &all {
            for behind in [&b""[..], &publish] {
                port += 1;
                // A client that is not known.
                let mut connect = connect.clone();
                connect[n - 4..].copy_from_slice(format!("{:04}", port % 10_000).as_bytes());
                let mut client = Client::new(&format!("{addr}:{port}"), u32::MAX - 10);
                client.offer.timestamps = port % 3 != 0;
                client.opened(&reply(&f.send(&client.syn())));
                let at = send_pieces(&f, &client, &connect, cuts) as usize;
                let last = [&connect[at..], behind].concat();
                let sent = client.segment(at as u32, &last, |h| h.psh = true);
                let first = client.isn.wrapping_add(1);
                if behind.is_empty() {
                    // Whole: answered like any other.
                    assert_eq!(reply(&f.send(&sent)).payload, [0x20, 2, 0, 0], "{cuts:?}");
                    let message = client.segment(n as u32, &publish, |_| {});
                    let (seq, payload, vip) = forwarded(&f.send(&message));
                    assert_eq!((seq, payload), (first, [&connect[..], &publish].concat()));
                    assert!(vip.ends_with("50.2") || vip.ends_with("50::2"), "{cuts:?}: {vip}");
                } else {
                    // Bound at once; and what may be lost on the way to the broker is whole again when it is repeated.
                    for _ in 0..2 {
                        let (seq, payload, vip) = forwarded(&f.send(&sent));
                        assert_eq!((seq, payload), (first, [&connect[..], &publish].concat()));
                        assert!(vip.ends_with("50.2") || vip.ends_with("50::2"), "{cuts:?}: {vip}");
                    }
                }
            }
        }
    }
}

#[test]
fn pieces_that_are_damaged_or_never_whole_do_no_harm() {
    let f = delayed();
    let connect = mqtt::connect_as(4, 2, b"damaged", &[]);
    let client = Client::open(&f, "10.1.1.8:5000", 7);
    let at = send_pieces(&f, &client, &connect, &[5]);
    // Nobody else would find out that it is damaged.
    let mut wrong = client.segment(at, &connect[5..9], |_| {});
    let end = wrong.len() - 1;
    wrong[end] ^= 1;
    assert_eq!(f.send(&wrong).verdict, XDP_DROP);
    // Behind a gap.
    assert_eq!(f.send(&client.segment(12, &connect[12..], |_| {})).verdict, XDP_DROP);
    let last = client.segment(at, &connect[5..], |_| {});
    assert_eq!(reply(&f.send(&last)).payload, [0x20, 2, 0, 0]);
    // Too long to be kept: bound without.
    let long = mqtt::connect_as(4, 2, &[b'x'; 300], &[]);
    let client = Client::open(&f, "10.1.1.8:5001", 7);
    let (outcome, counted) = f.send_counting(&client.segment(0, &long[..100], |_| {}));
    assert_eq!((outcome.verdict, counted.get("fallback_cut")), (JUMPED, Some(&1)));
    // What is not CONNECT is not kept.
    let before = kept(&f);
    let client = Client::open(&f, "10.1.1.8:5002", 7);
    f.send(&client.segment(0, b"\x16\x03\x01", |_| {}));
    assert!(kept(&f) > before, "it has a flow, as ever");
    let client = Client::open(&f, "10.1.1.8:5003", 7);
    let gone = client.segment(0, &connect[..3], |_| {});
    assert_eq!(f.send(&gone).verdict, XDP_TX);
    // Another connection from its port, with numbers near or far, and whole.
    for isn in [7, 8, 9, 12, 1 << 20, 1 << 31] {
        let client = Client::open(&f, "10.1.1.8:5003", isn);
        let whole = client.segment(0, &connect, |_| {});
        assert_eq!(reply(&f.send(&whole)).payload, [0x20, 2, 0, 0], "{isn}");
        let client = Client::open(&f, "10.1.1.8:5003", isn + 1);
        assert_eq!(f.send(&client.segment(0, &connect[..3], |_| {})).verdict, XDP_TX, "{isn}");
    }
}
