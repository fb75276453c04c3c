//! Connections before they have a flow: the state machine of delayed binding, packet by packet.

mod connection;
mod model;
mod strangers;

use crate::support::datapath::{Fixture, JUMPED};
use crate::support::{datapath, mqtt, packet};
use connection::{Client, Offer, delayed, kept, reply, timestamps};
use etherparse::TcpOptionElement;
use mqtt_fwd::kernel::abi::handover_keys;
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
