//! TLS: connections that are bound by their ClientHello.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd as _;

use mqtt_fwd::datapath::clients::GroupNumbers;
use mqtt_fwd::domain::MapSizes;
use proptest::prelude::*;

use crate::handshake::connection::{Client, delayed, delayed_of, kept, reply};
use crate::support::datapath::{self, Fixture, JUMPED, Outcome, XDP_DROP, XDP_TX, test_run};
use crate::support::packet;
use crate::support::tls::Hello;

/// Groups a, b and default of both services, by these routes.
fn config(routes: &str, more: &str) -> String {
    let begin = |text: &str| text.find("route = [").unwrap();
    let mut text = datapath::CONFIG.to_owned();
    for _ in 0..2 {
        let at = begin(&text);
        let end = at + text[at..].find("\n]").unwrap() + 2;
        text.replace_range(at..end, &format!("rout = [\n{routes}]\nprotocol = \"tls\"\n{more}"));
    }
    text.replace("rout = [", "route = [")
}

const ROUTES: &str = r#"
    { sni = "tenant-a.example.net", group = "a" },
    { sni = "*.b.example.net", group = "b" },
    { alpn = "x-b", group = "b" },
"#;

fn tls(more: &str) -> Fixture {
    delayed_of(&config(ROUTES, more), &datapath::SMALL, |_| {})
}

fn group_of(outcome: &Outcome) -> &'static str {
    assert_eq!(outcome.verdict, JUMPED);
    assert!(packet::ip_checksum_right(&outcome.packet), "IP checksum");
    match packet::dst(&outcome.packet).to_string().as_str() {
        "10.1.50.1" | "fd01:50::1" => "a",
        "10.1.50.2" | "fd01:50::2" => "b",
        _ => "default",
    }
}

/// The group of a connection that begins with this segment.
fn bound(f: &Fixture, addr: &str, first: &[u8]) -> &'static str {
    let client = Client::open(f, addr, 1 << 31);
    group_of(&f.send(&client.segment(0, first, |h| h.psh = true)))
}

#[test]
fn a_server_name_leads_to_its_group_and_what_follows_is_not_read() {
    let f = tls("");
    for (addr, name, group) in [
        ("10.1.1.1:4000", "tenant-a.example.net", "a"),
        ("10.1.1.1:4001", "Tenant-A.Example.NET", "a"),
        ("10.1.1.1:4002", "x.b.example.net", "b"),
        ("10.1.1.1:4003", "y.x.B.example.net", "b"),
        ("[fd01:1::1]:4000", "tenant-a.example.net", "a"),
        ("[fd01:1::1]:4001", "x.b.example.net", "b"),
        // Not what a suffix means, nor what is exact.
        ("10.1.1.1:4004", "b.example.net", "default"),
        ("10.1.1.1:4005", "xb.example.net", "default"),
        ("10.1.1.1:4006", "x.tenant-a.example.net", "default"),
        ("10.1.1.1:4007", "tenant-a.example.ne", "default"),
    ] {
        let client = Client::open(&f, addr, 1 << 31);
        let hello = Hello { behind: 200, ..Hello::named(name) }.bytes();
        let (outcome, rose) = f.send_counting(&client.segment(0, &hello, |h| h.psh = true));
        assert_eq!(group_of(&outcome), group, "{name}: {rose:?}");
        let flow = f.flow(client.addr).unwrap();
        assert_eq!((&*flow.group, &*flow.server_name, &*flow.state), (group, name, "encrypted"));
        assert_eq!(flow.client_id, "");
        if group == "default" {
            assert_eq!(flow.fallback_reason.as_deref(), Some("no_server_name"));
            assert_eq!(rose.get("fallback_no_server_name"), Some(&1));
        } else {
            assert_eq!((&*flow.bound_by, rose.get("bound_server_name")), ("server_name", Some(&1)));
        }
        // What looks like PUBLISH for another group, in what only its broker can read.
        let data = [&[23, 3, 3, 0, 40][..], &crate::support::mqtt::publish(b"sensor/b", 0, b"x")];
        let next = client.segment(hello.len() as u32, &data.concat(), |_| {});
        let (outcome, rose) = f.send_counting(&next);
        assert_eq!(group_of(&outcome), group);
        assert_eq!(rose.keys().collect::<Vec<_>>(), [&"data"], "{rose:?}");
    }
}

#[test]
fn routes_by_client_hello_follow_one_rule() {
    let label = "[ab]";
    let name = proptest::collection::vec(label, 1..4).prop_map(|labels| labels.join("."));
    let suffix = (any::<bool>(), name.clone())
        .prop_map(|(open, name)| if open { format!("*.{name}") } else { name });
    let pattern = prop_oneof![8 => suffix, 1 => Just("*".to_owned())];
    let protocol = "[pq]{1,2}";
    let key =
        prop_oneof![pattern.prop_map(|p| ("sni", p)), protocol.prop_map(|p: String| ("alpn", p)),];
    let groups = prop_oneof![Just("a"), Just("b")];
    let routes = proptest::collection::btree_map(key, groups, 1..8);
    let asked = proptest::option::of(proptest::collection::vec("[aAbc]", 1..5));
    let offered = proptest::collection::vec(protocol, 0..4);
    let clients = proptest::collection::vec((asked, offered, any::<bool>(), 0..3usize), 20);
    let next = std::cell::Cell::new(0u32);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 20,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let checked = runner.run(&(routes, clients), |(routes, clients)| {
        let lines: Vec<String> = routes
            .iter()
            .map(|((key, pattern), group)| {
                format!("{{ {key} = \"{pattern}\", group = \"{group}\" }},\n")
            })
            .collect();
        let f = delayed_of(&config(&lines.concat(), ""), &datapath::SMALL, |_| {});
        for (asked, offered, protocols_first, record) in clients {
            next.set(next.get() + 1);
            let addr = format!("{}:4000", Ipv4Addr::from(0x0c00_0000 + next.get()));
            let name = asked.map(|labels| labels.join("."));
            let hello = Hello {
                name: name.clone().map(String::into_bytes),
                protocols: offered.iter().map(|p| p.clone().into_bytes()).collect(),
                protocols_first,
                record: [0, 30, 90][record],
                ..Hello::default()
            };
            let offered: Vec<&str> = offered.iter().map(String::as_str).collect();
            let service = &f.config.services[0];
            let rule = service.group_of_hello(name.as_deref().unwrap_or(""), &offered);
            let expected = rule.map_or("default", |route| &route.group).to_owned();
            let group = bound(&f, &addr, &hello.bytes());
            prop_assert_eq!(group, expected, "{:?} {:?} under {:?}", name, offered, lines);
        }
        Ok(())
    });
    if let Err(error) = checked {
        panic!("{error}");
    }
}

/// What each of tests/hellos/ comes to, sent in segments of so many bytes.
fn captured(most: usize) {
    let f = tls("");
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hellos");
    let name = b"tenant-a.example.net";
    let mut port = 1000;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.extension().is_none_or(|extension| extension != "bin") {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let first = &bytes[..bytes.len().min(most)];
        let has_name = first.windows(name.len()).any(|part| part == name);
        for addr in ["10.1.1.7", "[fd01:1::7]"] {
            port += 1;
            let client = Client::open(&f, &format!("{addr}:{port}"), 7);
            let (outcome, rose) = f.send_counting(&client.segment(0, first, |_| {}));
            let straddles = file.contains("straddle");
            if has_name || straddles {
                assert_eq!(outcome.verdict, JUMPED, "{file}: {rose:?}");
                assert_eq!(group_of(&outcome), "a", "{file}: {rose:?}");
                let flow = f.flow(client.addr).unwrap();
                assert_eq!(flow.server_name, "tenant-a.example.net", "{file}");
            } else if file.contains("noname") {
                assert_eq!(outcome.verdict, JUMPED, "{file}: {rose:?}");
                assert_eq!(group_of(&outcome), "default");
            } else {
                // Left to the sidecar; see the lab.
                assert_eq!(outcome.verdict, XDP_DROP, "{file}: {rose:?}");
                assert_eq!(rose.get("hello_held"), Some(&1), "{file}: {rose:?}");
            }
        }
    }
    assert!(port > 1060);
}

#[test]
fn what_real_stacks_send_leads_to_its_group() {
    captured(1388);
    // A path of 1,280 B, as IPv6 must have.
    captured(1220);
}

#[test]
fn who_names_no_server_that_is_here_is_refused_if_that_is_configured() {
    let f = tls("unknown_server_name = \"refuse\"\n");
    let mut port = 5000;
    for addr in ["10.1.1.7", "[fd01:1::7]"] {
        for timestamps in [true, false] {
            for name in [Some("nobody.example.net"), None] {
                port += 1;
                let mut client = Client::new(&format!("{addr}:{port}"), 77);
                client.offer.timestamps = timestamps;
                client.opened(&reply(&f.send(&client.syn())));
                let hello = Hello {
                    name: name.map(|n| n.as_bytes().to_vec()),
                    behind: 90,
                    ..Hello::default()
                };
                let sent = client.segment(0, &hello.bytes(), |_| {});
                for _ in 0..2 {
                    let before = kept(&f);
                    let (outcome, rose) = f.send_counting(&sent);
                    assert!(outcome.packet.len() <= sent.len(), "no amplification");
                    let answer = reply(&outcome);
                    // Fatal, unrecognized_name (RFC 8446 §6, RFC 6066 §3).
                    assert_eq!(answer.payload, [21, 3, 3, 0, 2, 2, 112]);
                    assert!(answer.tcp.fin && answer.tcp.ack && !answer.tcp.rst);
                    assert_eq!(answer.tcp.sequence_number, client.ack);
                    let behind = client.isn.wrapping_add(1 + hello.bytes().len() as u32);
                    assert_eq!(answer.tcp.acknowledgment_number, behind);
                    assert_eq!(rose.get("name_refused"), Some(&1));
                    assert_eq!(kept(&f), before, "nothing is kept");
                }
            }
        }
        port += 1;
        let client = Client::open(&f, &format!("{addr}:{port}"), 77);
        let outcome = f.send(&client.segment(0, &crate::support::mqtt::connect(4), |_| {}));
        assert!(reply(&outcome).tcp.rst, "what is not TLS gets no alert");
        port += 1;
        let name = Hello::named("tenant-a.example.net").bytes();
        assert_eq!(bound(&f, &format!("{addr}:{port}"), &name), "a");
    }
}

#[test]
fn what_was_imported_of_an_address_comes_before_the_default() {
    let text = config(
        r#"
        { sni = "tenant-a.example.net", group = "a" },
        { topic = "sensor/b", group = "b" },
        "#,
        "unknown_server_name = \"refuse\"\n",
    );
    let f = delayed_of(&text, &datapath::SMALL, |_| {});
    let record = mqtt_fwd::domain::client_record::ClientRecord {
        service: "mqtt".to_owned(),
        by: mqtt_fwd::domain::client_record::IdentifiedBy::Address,
        client: "10.1.1.9".to_owned(),
        topic: "sensor/b".to_owned(),
        groups: std::collections::BTreeMap::from([("b".to_owned(), 64)]),
        multi_group: false,
        for_relay: false,
        misjudged: false,
        group_changes: 0,
        age_s: 0,
    };
    f.datapath.put_client(&f.config, &record).unwrap();
    assert_eq!(bound(&f, "10.1.1.9:1000", &Hello::default().bytes()), "b");
    assert_eq!(bound(&f, "10.1.1.9:1001", &Hello::named("x.example.net").bytes()), "b");
    assert_eq!(bound(&f, "10.1.1.9:1002", &Hello::named("tenant-a.example.net").bytes()), "a");
    assert_eq!(f.flow("10.1.1.9:1000".parse().unwrap()).unwrap().bound_by, "prediction");
    // Another group's messages would not be seen, and end nothing.
    let client = Client::open(&f, "10.1.1.9:1003", 5);
    let hello = Hello::default().bytes();
    f.send(&client.segment(0, &hello, |_| {}));
    let next = crate::support::mqtt::publish(b"sensor/a", 0, b"x");
    let outcome = f.send(&client.segment(hello.len() as u32, &next, |_| {}));
    assert_eq!(group_of(&outcome), "b");
    assert_eq!(f.counters().get("mispredicted"), None);
}

#[test]
fn a_hello_in_pieces_is_put_together_or_bound_without_its_name() {
    let f = tls("");
    let mut port = 10_000;
    for addr in ["10.1.1.7", "[fd01:1::7]"] {
        for record in [0, 20] {
            let hello = Hello { record, behind: 40, ..Hello::named("tenant-a.example.net") };
            let bytes = hello.bytes();
            // Behind this byte, the name is there.
            let enough = (1..=bytes.len())
                .find(|n| {
                    port += 1;
                    let client = Client::open(&f, &format!("{addr}:{port}"), 7);
                    f.send(&client.segment(0, &bytes[..*n], |_| {})).verdict == JUMPED
                })
                .unwrap();
            assert!((100..176).contains(&enough), "{enough}");
            let mut all: Vec<Vec<usize>> = (1..enough).map(|cut| vec![cut]).collect();
            all.push((1..enough).collect());
            for cuts in all {
                port += 1;
                let client = Client::open(&f, &format!("{addr}:{port}"), 7);
                let mut at = 0;
                for cut in &cuts {
                    for _ in 0..2 {
                        let sent = client.segment(at as u32, &bytes[at..*cut], |_| {});
                        let answer = reply(&f.send(&sent));
                        let behind = client.isn.wrapping_add(1 + *cut as u32);
                        assert_eq!(answer.tcp.acknowledgment_number, behind, "{cuts:?}");
                        assert!(answer.payload.is_empty());
                    }
                    at = *cut;
                }
                for _ in 0..2 {
                    let sent = client.segment(at as u32, &bytes[at..], |_| {});
                    let outcome = f.send(&sent);
                    assert_eq!(group_of(&outcome), "a", "{cuts:?}");
                    assert!(packet::tcp_checksum_right(&with_service(&outcome, client.service)));
                    assert!(outcome.packet.ends_with(&bytes), "{cuts:?}");
                }
            }
        }
    }
}

/// The packet as the balancer would put it right: its TCP checksum is that of the service's address.
fn with_service(outcome: &Outcome, service: std::net::SocketAddr) -> Vec<u8> {
    let mut packet = outcome.packet.clone();
    match service.ip() {
        IpAddr::V4(addr) => packet[30..34].copy_from_slice(&addr.octets()),
        IpAddr::V6(addr) => packet[38..54].copy_from_slice(&addr.octets()),
    }
    packet
}

#[test]
fn what_lies_about_its_lengths_is_bound_like_what_names_nobody() {
    let f = tls("");
    let good = Hello { protocols: vec![b"mqtt".to_vec()], ..Hello::named("tenant-a.example.net") };
    let good = good.bytes();
    let mut port = 1000;
    let mut send = |bytes: &[u8]| {
        port += 1;
        let client = Client::open(&f, &format!("10.1.1.7:{port}"), 7);
        f.send(&client.segment(0, bytes, |_| {}))
    };
    for at in 0..good.len() {
        for value in [0, 1, 0x7f, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = value;
            let outcome = send(&bytes);
            // To some group, or kept as a piece of a longer one.
            assert!([JUMPED, XDP_TX].contains(&outcome.verdict), "{at} {value}");
        }
    }
    // A name of 64 KiB, of which a segment shows the beginning.
    let huge = Hello { name: Some(vec![b'x'; 60_000]), ..Hello::default() };
    assert_eq!(group_of(&send(&huge.bytes()[..1400])), "default");
    let long = Hello {
        name: Some([vec![b'x'; 300], b".b.example.net".to_vec()].concat()),
        ..Hello::default()
    };
    assert_eq!(group_of(&send(&long.bytes())), "b", "its end is what counts");
    // The exact name, behind a byte that no name has: "a.b" is not "a.b\0x".
    let zero = Hello { name: Some(b"x\0tenant-a.example.net".to_vec()), ..Hello::default() };
    assert_eq!(group_of(&send(&zero.bytes())), "default");
    let ended = Hello { name: Some(b"x.b.example.net\0".to_vec()), ..Hello::default() };
    assert_eq!(group_of(&send(&ended.bytes())), "default");
}

#[test]
fn hellos_without_a_handshake_leave_nothing() {
    let f = tls("");
    let real = Client::open(&f, "10.1.1.7:4000", 7);
    let hello = Hello::named("tenant-a.example.net").bytes();
    let recorded = real.segment(0, &hello, |_| {});
    let before = kept(&f);
    for port in 5000..5200 {
        // Guessed, and recorded of another connection.
        let guessed = Client { ack: port, ..Client::new(&format!("10.1.1.8:{port}"), 7) };
        let replayed = Client { addr: guessed.addr, ..real.clone() };
        for client in [guessed, replayed] {
            let outcome = f.send(&client.segment(0, &hello, |_| {}));
            assert_eq!(outcome.verdict, XDP_DROP);
        }
    }
    assert_eq!(kept(&f), before);
    assert_eq!(f.datapath.server_names.keys().unwrap().len(), 0);
    assert_eq!(group_of(&f.send(&recorded)), "a", "its own connection's");
}

#[test]
fn a_hello_that_is_never_whole_is_bound_in_the_end() {
    let f = tls("");
    let hello = Hello { before: 1600, ..Hello::named("tenant-a.example.net") }.bytes();
    let client = Client::open(&f, "10.1.1.7:4000", 7);
    let first = client.segment(0, &hello[..1388], |_| {});
    // Nobody reads here: it is left to the sidecar as often as TCP repeats it in three seconds.
    for _ in 0..4 {
        let (outcome, rose) = f.send_counting(&first);
        assert_eq!((outcome.verdict, rose.get("hello_held")), (XDP_DROP, Some(&1)), "{rose:?}");
        // What comes behind it, too, and nothing far off.
        let next = client.segment(1388, &hello[1388..], |_| {});
        assert_eq!(f.send_counting(&next).1.get("hello_held"), Some(&1));
        let far = client.segment(20_000, b"x", |_| {});
        assert_eq!(f.send(&far).verdict, XDP_DROP);
    }
    let (outcome, rose) = f.send_counting(&first);
    assert_eq!(group_of(&outcome), "default", "{rose:?}");
    assert_eq!(rose.get("fallback_hello_cut"), Some(&1));
    let next = client.segment(1388, &hello[1388..], |_| {});
    assert_eq!(group_of(&f.send(&next)), "default");
}

#[test]
fn a_flood_of_hellos_makes_nobody_s_first_segment_go_without_its_name() {
    let f = tls("");
    let hello = Hello { before: 1600, ..Hello::named("tenant-a.example.net") }.bytes();
    let first = |addr: &str| Client::open(&f, addr, 7).segment(0, &hello[..1388], |_| {});
    // More than there is room for, as nobody reads here.
    let full = (0..1000).any(|n| {
        let flood = first(&format!("10.2.{}.{}:4000", n / 250, n % 250 + 1));
        f.send_counting(&flood).1.contains_key("wait_dropped")
    });
    assert!(full);
    let other = first("10.1.1.7:4000");
    for _ in 0..4 {
        let (outcome, rose) = f.send_counting(&other);
        assert_eq!((outcome.verdict, rose.get("wait_dropped")), (XDP_DROP, Some(&1)), "{rose:?}");
    }
}

#[test]
fn what_the_sidecar_has_read_decides_and_what_it_acknowledged_is_its_own_to_repeat() {
    for acknowledged in [false, true] {
        for addr in ["10.1.1.7:4000", "[fd01:1::7]:4000"] {
            let f = tls("");
            let hello = Hello { before: 1600, ..Hello::named("tenant-a.example.net") }.bytes();
            let client = Client::open(&f, addr, 7);
            let first = client.segment(0, &hello[..1200], |_| {});
            let next = client.segment(1200, &hello[1200..], |_| {});
            assert_eq!(f.send(&first).verdict, XDP_DROP);
            let names = f.datapath.service_numbers().unwrap();
            let held = f.datapath.hello(client.addr, names[&client.service]).unwrap().unwrap();
            assert_eq!((held.start, held.acknowledged, held.is_bound), (8, 0, false));
            if acknowledged {
                assert!(f.datapath.acknowledge_hello(&held, 1200).unwrap());
                let answer = reply(&f.send(&first));
                assert_eq!(answer.tcp.acknowledgment_number, 8 + 1200);
                assert_eq!(
                    (answer.tcp.sequence_number, &answer.payload[..]),
                    (client.ack, &b""[..])
                );
            }
            let service = f.config.services.iter().find(|s| s.addr == client.service.ip()).unwrap();
            let route = service.group_of_hello("tenant-a.example.net", &[]);
            assert!(f.datapath.decide_hello(&held, route, &mut GroupNumbers::default()).unwrap());
            // Not before its first byte: its broker would not know it.
            assert_eq!(f.send(&next).verdict, XDP_DROP);
            assert_eq!(group_of(&f.send(&first)), "a");
            assert_eq!(f.flow(client.addr).unwrap().bound_by, "server_name");
            let (outcome, rose) = f.send_counting(&next);
            if acknowledged {
                // The sidecar puts in front of it what the client does not repeat.
                assert_eq!((outcome.verdict, rose.get("hello_held")), (XDP_DROP, Some(&1)));
                let again = f.datapath.hello(client.addr, names[&client.service]).unwrap().unwrap();
                assert!(again.is_bound);
                // It costs the sidecar a whole ClientHello: as often as TCP repeats, and no more.
                let held = (0..40).filter(|_| f.send_counting(&next).1.contains_key("hello_held"));
                assert_eq!(held.count(), 14);
                let overlapping = client.segment(1199, &hello[1199..], |_| {});
                assert_eq!(group_of(&f.send(&overlapping)), "a");
            } else {
                assert_eq!(group_of(&outcome), "a");
            }
            // The broker has answered: no more of that.
            let mut answered = client.clone();
            answered.ack = client.ack.wrapping_add(100);
            let later = answered.segment(1200, &hello[1200..], |_| {});
            assert_eq!(group_of(&f.send(&later)), "a");
            assert_eq!(group_of(&f.send(&next)), "a");
        }
    }
}

#[test]
fn a_hello_where_plain_mqtt_is_spoken_is_counted() {
    let f = delayed();
    let client = Client::open(&f, "10.1.1.7:4000", 7);
    let hello = Hello::named("tenant-a.example.net").bytes();
    let (outcome, rose) = f.send_counting(&client.segment(0, &hello, |_| {}));
    assert_eq!((outcome.verdict, rose.get("tls_on_plain")), (JUMPED, Some(&1)), "{rose:?}");
}

#[test]
fn what_is_predicted_is_bound_at_its_syn_and_not_read_either() {
    let text = config("{ topic = \"sensor/b\", group = \"b\" },", "");
    let f = Fixture::with(&text);
    let client = Client { ack: 1, ..Client::new("10.1.1.7:4000", 7) };
    assert_eq!(group_of(&f.send(&client.syn())), "default");
    let hello = Hello::named("x.example.net").bytes();
    let mut at = 0;
    for bytes in [&hello[..], b"\x17\x03\x03\x00\x05xxxxx", &crate::support::mqtt::connect(4)] {
        let (outcome, rose) = f.send_counting(&client.segment(at, bytes, |_| {}));
        at += bytes.len() as u32;
        assert_eq!(group_of(&outcome), "default");
        assert_eq!(rose.keys().collect::<Vec<_>>(), [&"data"], "{rose:?}");
    }
    assert_eq!(f.flow(client.addr).unwrap().state, "encrypted");
}

#[test]
fn the_dearest_hello_stays_within_the_bound() {
    let f = delayed_of(&config(ROUTES, ""), &MapSizes::default(), |_| {});
    let program = f.skel.progs.mqtt_fwd.as_fd();
    let extensions = |n: usize| -> Vec<u8> { [0x5a, 0x5a, 0, 0].repeat(n) };
    let raw = |extensions: &[u8], record: usize| {
        let mut hello = Hello { record, ..Hello::default() };
        hello.before = 0;
        let mut message = hello.message();
        let at = message.len() - 2;
        message.truncate(at);
        message.extend(crate::support::tls::sized(extensions));
        let length = (message.len() as u32 - 4).to_be_bytes();
        message[1..4].copy_from_slice(&length[1..]);
        let record = if record == 0 { message.len() } else { record };
        let part = |part: &[u8]| [&[22, 3, 1][..], &crate::support::tls::sized(part)].concat();
        message.chunks(record).flat_map(part).collect::<Vec<u8>>()
    };
    let long = |n: usize, record| Hello { record, ..Hello::named(&"x".repeat(n)) }.bytes();
    let many = Hello { protocols: vec![vec![b'p'; 120]; 9], ..Hello::default() };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("a usual one", Hello { behind: 250, ..Hello::named("tenant-a.example.net") }.bytes()),
        ("300 empty extensions", raw(&extensions(300), 0)),
        ("records of one byte", raw(&extensions(30), 1)),
        ("records of 20 bytes", raw(&extensions(60), 20)),
        ("a name of 128 B", long(128, 0)),
        ("a name of 128 B in records of 20", long(128, 20)),
        ("a name of 1,200 B", long(1200, 0)),
        ("9 protocols of 120 B", many.bytes()),
        ("9 protocols of 120 B in records of 90", Hello { record: 90, ..many }.bytes()),
    ];
    let bound =
        std::env::var("COST_BOUND_NS").ok().and_then(|ns| ns.parse().ok()).unwrap_or(20_000);
    let mut next = 0x0c00_0000;
    for (what, bytes) in cases {
        assert!(bytes.len() <= 1440, "{what}: {}", bytes.len());
        let least = (0..200)
            .map(|_| {
                next += 1;
                let client = Client::open(&f, &format!("{}:4000", Ipv4Addr::from(next)), 7);
                let (outcome, ns) = test_run(&program, &client.segment(0, &bytes, |_| {}), 1);
                assert_ne!(outcome.verdict, XDP_DROP, "{what}");
                ns
            })
            .min()
            .unwrap();
        println!("{least:6} ns  {what}");
        assert!(least < bound, "{what}: {least} ns");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_bytes_go_somewhere(all in proptest::collection::vec(
        (proptest::collection::vec(any::<u8>(), 1..600), any::<bool>(), 1..1400usize), 100)) {
        let f = tls("");
        let mut held = 0;
        for (port, (mut bytes, is_hello, cut)) in (2000..).zip(all) {
            if is_hello {
                let mut hello = Hello { behind: 500, ..Hello::named("tenant-a.example.net") }.bytes();
                for (i, byte) in bytes.iter().enumerate() {
                    let at = (i * 31 + usize::from(*byte)) % hello.len();
                    if i % 97 == 0 { hello[at] = *byte; }
                }
                bytes = hello;
            }
            bytes.truncate(cut);
            let client = Client::open(&f, &format!("10.1.1.7:{port}"), 7);
            let outcome = f.send(&client.segment(0, &bytes, |_| {}));
            prop_assert!([JUMPED, XDP_TX, XDP_DROP].contains(&outcome.verdict));
            held += u64::from(outcome.verdict == XDP_DROP);
        }
        prop_assert_eq!(f.counters().get("hello_held").copied().unwrap_or(0), held);
    }
}

#[test]
fn a_group_that_has_moved_or_gone_is_not_taken_for_another() {
    let mut f = Fixture::new();
    let with_a = f.config.clone();
    let service = *f.datapath.service_numbers().unwrap().values().next().unwrap();
    let mut numbers = GroupNumbers::default();
    let mut of_a = |f: &Fixture| {
        let found = f.datapath.binding_of(&mut numbers, service, "a").unwrap();
        let mut none = GroupNumbers::default();
        assert_eq!(found, f.datapath.binding_of(&mut none, service, "a").unwrap());
        found
    };
    let before = of_a(&f);
    assert!(before.is_some());
    for service in &mut f.config.services {
        service.groups.retain(|g| g.name != "a");
        let routes = service.routes.iter().filter(|r| r.target.name() != "a");
        service.routes = routes.cloned().collect();
    }
    f.apply();
    assert_eq!(of_a(&f), None);
    f.config = with_a;
    f.apply();
    // Another epoch: what was bound to the old one is not bound to this.
    assert!(of_a(&f).is_some_and(|found| Some(found) != before));
}
