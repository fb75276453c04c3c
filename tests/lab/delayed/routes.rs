//! What decides beside the topic: routes by CONNECT, and what finds the same broker again.

use std::collections::{BTreeMap, HashSet};

use mqtt_fwd::brokers::router::Router;
use mqtt_fwd::config::Config;
use mqtt_fwd::kernel::takeover;

use super::{ROUTES, expect_all};
use crate::support::lab::{Lab, ONE_REAL_EACH, config};
use crate::support::mqtt;
use crate::support::net::wait_for;
use crate::support::session::{SERVICE, SERVICE6, STYLES, Session, run_all};

#[test]
fn routes_by_connect_come_before_topics() {
    if !takeover::supported() {
        return;
    }
    let text = config(ONE_REAL_EACH, ROUTES)
        + "[[service.route]]\nclient_id = \"plant7-*\"\ngroup = \"b\"\n\
           [[service.route]]\nclient_id = \"plant7-pump\"\ngroup = \"a\"\n\
           [[service.route]]\nusername = \"meter*\"\ngroup = \"default\"\n";
    let lab = Lab::up(&text, &["--delayed"]);
    let named = |id: &str, user: Option<&str>, message: &str| {
        let connect = match user {
            Some(user) => mqtt::connect_as(4, 0x82, id.as_bytes(), &[user.as_bytes()]),
            None => mqtt::connect_as(4, 0x02, id.as_bytes(), &[]),
        };
        Session {
            connect,
            topic: "m/temp".to_owned(),
            messages: vec![message.to_owned()],
            ..Session::new("c1", SERVICE6, id)
        }
    };
    let sessions = [
        (named("plant7-fan", None, "prefix"), 2),
        (named("plant7-pump", None, "exact"), 1),
        (named("plant7-pump2", None, "longer"), 2),
        (named("x", Some("meter-1"), "user"), 3),
        (named("plant7-fan", Some("meter-1"), "id first"), 2),
        (named("y", Some("me"), "topic"), 1),
    ];
    for (session, real) in &sessions {
        // A topic that nobody routed for is unknown with credentials: bound by default, and moved.
        for _ in 0..2 {
            let result = run_all(&lab, std::slice::from_ref(session), 1).remove(0);
            if result.is_ok() {
                break;
            }
        }
        assert_eq!(
            lab.wait_received(&format!("m/temp {}", session.messages[0])),
            *real,
            "{session:?}"
        );
    }
    let flows = lab.mqtt_fwd(&["counters"]);
    assert!(flows.contains("bound_route"), "{flows}");
}

/// Group a has three reals, each with a VIP of its own; the affinity decides among them.
fn with_affinity(affinity: &str) -> String {
    let mut text = String::new();
    for line in
        config(&[("a", 1, &[201, 202, 203]), ("default", 250, &[204])], &[("m/#", "a")]).lines()
    {
        text += line;
        text += "\n";
        if line.starts_with("name = \"a\"") {
            text += &format!("affinity = \"{affinity}\"\n");
        }
        for (host, prefix, vip) in
            [("10.1.3.", "\"10.1.3.", "10.1.50."), ("fd01:3::", "\"fd01:3::", "fd01:50::")]
        {
            let real =
                line.strip_prefix(&format!("address = {prefix}")).map(|r| r.trim_end_matches('"'));
            if let Some(real @ ("201" | "202" | "203")) = real {
                assert!(line.contains(host));
                text += &format!("vip = \"{vip}1{}\"\n", &real[1..]);
            }
        }
    }
    text
}

#[test]
fn a_client_id_finds_the_same_broker_again_and_a_topic_has_one() {
    if !takeover::supported() {
        return;
    }
    for affinity in ["client_id", "topic"] {
        let text = with_affinity(affinity);
        let lab = Lab::up(&text, &["--delayed"]);
        let config =
            std::fs::read_to_string(format!("/run/mqtt-fwd-lab/{}/config.toml", lab.name)).unwrap();
        let config = Config::parse(std::path::Path::new("lab.toml"), &config).unwrap();
        let mut all = Vec::new();
        for round in 0..4 {
            for i in 0..30 {
                all.push(Session {
                    style: STYLES[(i + round) % 3],
                    // As many topics as clients: with fewer, a broker may get none by chance.
                    topic: format!("m/{}", (i + round) % 30),
                    messages: vec![format!("{round}-{i}")],
                    ..Session::new(
                        "c1",
                        if i % 2 == 0 { SERVICE } else { SERVICE6 },
                        &format!("id{i}"),
                    )
                });
            }
        }
        expect_all(&run_all(&lab, &all, 1));
        let at = wait_for("all messages", || {
            let at = lab.arrivals();
            (at.len() == all.len()).then_some(at)
        });
        let mut reals: BTreeMap<String, HashSet<u32>> = BTreeMap::new();
        for session in &all {
            let (_, i) = session.messages[0].split_once('-').unwrap();
            let v6 = session.service.is_ipv6();
            let key = match affinity {
                "client_id" => format!("id{i}"),
                _ => format!("{} {v6}", session.topic),
            };
            reals.entry(key).or_default().extend(&at[&session.messages[0]]);
        }
        for (key, reals) in &reals {
            assert_eq!(reals.len(), 1, "{affinity}: {key} at {reals:?}");
        }
        if affinity == "topic" {
            // The broker that the relay has for the topic, too.
            let relay = Router::new(&config, &config.services[0]).unwrap();
            for (topic, reals) in
                reals.iter().filter_map(|(k, r)| Some((k.strip_suffix(" false")?, r)))
            {
                let broker = relay.broker_of(topic, |_| false).unwrap();
                let expected = format!("10.1.3.20{}", reals.iter().next().unwrap());
                assert_eq!(relay.broker(broker).addr.ip().to_string(), expected, "{topic}");
            }
        }
        let used: HashSet<u32> = reals.values().flatten().copied().collect();
        assert_eq!(used.len(), 3, "{affinity}: all brokers of the group are used: {used:?}");
        assert!(!lab.mqtt_fwd(&["counters"]).contains("mispredicted"));
    }
}

#[test]
fn an_address_finds_the_same_broker_again() {
    let text = config(&[("a", 1, &[201, 202, 203]), ("default", 250, &[204])], &[("m/#", "a")])
        .replace("name = \"a\"\n", "name = \"a\"\naffinity = \"client_ip\"\n");
    // The default group has one real, so what is unknown says nothing.
    let lab = Lab::up(&text, &[]);
    let mut used = HashSet::new();
    for host in ["c1", "c2", "c3", "c4", "c5", "c6"] {
        for (i, service) in [SERVICE, SERVICE6].into_iter().cycle().take(14).enumerate() {
            let session = Session {
                topic: "m/x".to_owned(),
                messages: vec![format!("{host}-{i}")],
                ..Session::new(host, service, &format!("{host}{i}"))
            };
            // The first of each family teaches, and is ended for it.
            let result = run_all(&lab, &[session], 1).remove(0);
            assert!(result.is_ok() || i < 2, "{host} {i}: {result:?}");
        }
        let at = wait_for("all but what taught", || {
            let at = lab.arrivals();
            (2..14).all(|i| at.contains_key(&format!("{host}-{i}"))).then_some(at)
        });
        for family in 0..2 {
            let reals: HashSet<u32> = (2..14)
                .filter(|i| i % 2 == family)
                .flat_map(|i| at[&format!("{host}-{i}")].clone())
                .collect();
            assert_eq!(reals.len(), 1, "{host}: {reals:?}");
            used.extend(reals);
        }
    }
    assert!(used.len() > 1 && !used.contains(&4), "{used:?}");
}
