//! Connections before they have a flow: the state machine of delayed binding, packet by packet.

pub mod connection;
mod model;
mod pieces;
mod strangers;

use std::os::fd::{AsFd as _, AsRawFd as _};

use crate::support::datapath::{Fixture, JUMPED, XDP_DROP};
use crate::support::{datapath, mqtt, packet};
use connection::{Client, Offer, delayed, delayed_where, kept, reply, timestamps};
use etherparse::TcpOptionElement;
use libbpf_rs::{MapCore as _, MapFlags};
use mqtt_fwd::kernel::abi::{Pod as _, flow_flags, handover_keys};
use mqtt_fwd::kernel::flow_table::flow_tag;
use proptest::prelude::*;

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

/// Opens a connection with CONNECT and a message in one segment. Returns the client as its next segment needs it, and
/// how far it is.
fn open(f: &Fixture, client: Client, topic: &[u8]) -> (Client, u32) {
    let mut client = client;
    client.opened(&reply(&f.send(&client.syn())));
    let first = [mqtt::connect(4), mqtt::publish(topic, 0, b"1")].concat();
    let (outcome, rose) = f.send_counting(&client.segment(0, &first, |h| h.psh = true));
    assert_eq!(outcome.verdict, JUMPED, "{rose:?}");
    assert_eq!(rose.get("bound_message"), Some(&1), "isn {:#x}: {rose:?}", client.isn);
    (client, first.len() as u32)
}

#[test]
fn a_device_that_is_back_on_its_port_is_served_whatever_its_numbers() {
    let f = delayed();
    let mut port = 5000;
    for addr in ["10.1.1.7", "[fd01:1::7]"] {
        // After a power cut, and after FIN or RST.
        for ending in ["", "fin", "rst"] {
            for distance in
                [-1_048_577i32, -1_048_575, -70_000, -1000, -40, -1, 1, 40, 1000, 1 << 20, 1 << 30]
            {
                port += 1;
                let at = format!("{addr}:{port}");
                let (old, length) = open(&f, Client::new(&at, 1 << 31), b"sensor/a");
                if !ending.is_empty() {
                    let end = |h: &mut etherparse::TcpHeader| {
                        (h.fin, h.rst) = (ending == "fin", ending == "rst");
                    };
                    f.send(&old.segment(length, &[], end));
                }
                // Its first byte is that far from the old connection's end.
                let isn = old.isn.wrapping_add(length).wrapping_add_signed(distance);
                let (new, _) = open(&f, Client::new(&at, isn), b"sensor/b");
                let bound = f.flow(new.addr).unwrap();
                assert_eq!(bound.group, "b", "{at} {ending} {distance}");
            }
        }
    }
}

/// What is remembered of a flow that is not in the table any more must not send the next one's handshake to its broker,
/// which would answer RST (and in a fleet, nobody has it yet).
#[test]
fn a_device_is_served_whose_last_flow_only_the_cache_remembers() {
    let f = delayed();
    for (addr, isn) in [("10.1.1.7:5000", 1u32 << 31), ("[fd01:1::7]:5000", 1 << 30)] {
        let (mut old, length) = open(&f, Client::new(addr, isn), b"sensor/a");
        // Its broker has it, and it acknowledges what that sends.
        let acknowledged = |c: &Client, i: u32| {
            let more = Client { ack: c.ack.wrapping_add(20 + i), ..c.clone() };
            f.send(&more.segment(length, &[], |_| {}))
        };
        assert!((0..9).all(|i| acknowledged(&old, i).verdict == JUMPED));
        let flows = f.datapath.flows.mapped().unwrap();
        let all: Vec<u64> = flows.entries().map(|(_, flow)| flow.id).collect();
        assert!(all.iter().all(|id| flows.places().remove(*id)), "evicted");
        assert!((0..9).any(|i| acknowledged(&old, i).verdict == JUMPED), "the cache has it");

        old.isn = old.isn.wrapping_add(80_000_000);
        old.opened(&reply(&f.send(&old.syn())));
        let (outcome, rose) = f.send_counting(&old.segment(0, &[], |_| {}));
        assert_eq!((outcome.verdict, rose.get("handshake")), (XDP_DROP, Some(&1)), "{rose:?}");
        open(&f, Client::new(addr, isn.wrapping_add(160_000_000)), b"sensor/b");
        assert_eq!(f.flow(old.addr).unwrap().group, "b");
    }
}

#[test]
fn during_an_upgrade_a_flow_that_has_not_moved_yet_hears_of_a_syn_on_its_addresses() {
    let (old, new) =
        (delayed(), delayed_where(&datapath::SMALL, |rodata| rodata.has_predecessor = 1));
    let program = old.skel.progs.mqtt_fwd.as_fd().as_raw_fd();
    new.skel.maps.predecessor.update(0u32.bytes(), program.bytes(), MapFlags::ANY).unwrap();
    for addr in ["10.1.1.7:5000", "[fd01:1::7]:5000"] {
        let (mut client, _) = open(&old, Client::new(addr, 1 << 31), b"sensor/a");
        client.isn = client.isn.wrapping_add(80_000_000);
        client.opened(&reply(&new.send(&client.syn())));
    }
    let flows = old.datapath.flows.mapped().unwrap();
    let told =
        flows.entries().filter(|(_, f)| f.flags & flow_flags::FLOW_REUSED_PORT.0 as u16 != 0);
    assert_eq!(told.count(), 2);
    assert_eq!(kept(&new), 0);
    // As upgrades make them.
    assert!(flows.entries().all(|(_, f)| (f.bound >> 32) as u32 == flow_tag(f.id)));
}

#[test]
fn a_first_segment_that_is_lost_twice_from_one_port_ends_nobody() {
    let f = delayed();
    let publish = mqtt::publish(b"sensor/a", 0, b"1");
    for isn in [1000, 1 << 30] {
        let mut client = Client::new("10.1.1.9:4000", isn);
        client.opened(&reply(&f.send(&client.syn())));
        let connect = mqtt::connect(4);
        let second = client.segment(connect.len() as u32, &publish, |_| {});
        // What comes behind it is nobody's yet: a broker would answer RST.
        let (outcome, rose) = f.send_counting(&second);
        assert_eq!((outcome.verdict, rose.get("untracked_dropped")), (XDP_DROP, Some(&1)), "{isn}");
        let first = [&connect[..], &publish].concat();
        let outcome = f.send(&client.segment(0, &first, |h| h.psh = true));
        assert_eq!(outcome.verdict, JUMPED);
        f.send(&client.segment(first.len() as u32, &[], |h| h.fin = true));
        // As long as it takes until what is repeated is believed.
        std::thread::sleep(std::time::Duration::from_millis(3100));
    }
}

#[test]
fn a_connect_that_the_network_doubles_is_still_its_connections() {
    let f = delayed();
    let (client, length) = open(&f, Client::new("10.1.1.8:4000", 1 << 31), b"sensor/a");
    // The SYN is doubled, too, and comes late.
    f.send(&client.syn());
    let first = [mqtt::connect(4), mqtt::publish(b"sensor/a", 0, b"1")].concat();
    let (outcome, rose) = f.send_counting(&client.segment(0, &first, |h| h.psh = true));
    assert_eq!(outcome.verdict, JUMPED);
    assert_eq!((rose.get("bound_message"), rose.get("segment_old")), (None, Some(&1)), "{rose:?}");
    let (_, rose) =
        f.send_counting(&client.segment(length, &mqtt::publish(b"sensor/a", 0, b"2"), |_| {}));
    assert_eq!(rose.get("publish"), Some(&1), "{rose:?}");
}
