//! Binding, learning, routes and their changes, on the real program in this kernel.

mod support;

use libbpf_rs::{MapCore as _, MapFlags};
use mqtt_fwd::bpf::types::client4;
use support::conn::{Conn, predicted, seen};
use support::datapath::{CONFIG, Fixture, JUMPED};
use support::{mqtt, packet};

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
fn segments_without_data_follow_their_flow_wherever_it_is_moved() {
    for client in ["10.1.1.1:4000", "[fd01:1::1]:4000"] {
        let f = Fixture::new();
        let mut c = Conn::open(&f, client);
        assert_eq!(c.flagged(|_| {}), seen("default", &["no_data 1"]));
        c.data(&mqtt::connect(4));
        assert_eq!(c.data(&mqtt::publish(b"sensor/a", 0, b"1")).group, "a");
        assert_eq!(c.flagged(|_| {}), seen("a", &["no_data 1"]));

        // Another flow of the client, which is then predicted to be b's.
        let other = Conn::open(&f, &client.replace("4000", "4001"));
        let mut b = Conn::open(&f, &client.replace("4000", "4002"));
        b.data(&mqtt::connect(4));
        b.data(&mqtt::publish(b"sensor/b", 0, b"1"));
        assert_eq!(other.flagged(|_| {}), seen("a", &["no_data 1"]));

        // Forgotten by `flows`, as if it were full: the flow still is where it was.
        for key in f.datapath.flows.keys() {
            f.datapath.flows.remove(&key).unwrap();
        }
        for key in f.datapath.flows6.keys() {
            f.datapath.flows6.remove(&key).unwrap();
        }
        assert_eq!(other.flagged(|_| {}), seen("a", &["no_data 1"]));
        assert_eq!(other.data_at(0, &mqtt::connect(4)).group, "a");

        // A new flow of the same addresses is predicted anew.
        let mut again = Conn { isn: 77, ..Conn::new(&f, &client.replace("4000", "4001")) };
        assert_eq!(again.syn(), seen("b", &["flow_predicted 1"]));
        assert_eq!(again.flagged(|_| {}), seen("b", &["no_data 1"]));
    }
}

#[test]
fn a_flow_that_ends_leaves_its_place_in_the_cache() {
    let f = Fixture::new();
    let cached = || {
        let bindings = &f.skel.maps.bindings;
        let sets = bindings.lookup_batch(4096, MapFlags::ANY, MapFlags::ANY).unwrap();
        sets.filter(|(_, set)| set.iter().any(|byte| *byte != 0)).count()
    };
    for client in ["10.1.1.1:4000", "[fd01:1::1]:4000"] {
        let c = Conn::open(&f, client);
        assert_eq!(cached(), 0, "a SYN adds nothing");
        c.flagged(|_| {});
        assert_eq!(cached(), 1);
        c.flagged(|h| h.fin = true);
        assert_eq!(cached(), 0);
        c.flagged(|_| {});
        assert_eq!(cached(), 0, "a late segment does not bring it back");
    }
}

#[test]
fn a_flow_that_only_acknowledges_is_not_forgotten_for_idle() {
    let f = Fixture::new();
    let subscriber = Conn::open(&f, "10.1.1.1:4000");
    let idle = Conn::open(&f, "10.1.1.2:4000");
    for round in 0..40u32 {
        for i in 0..500u32 {
            let n = round * 500 + i;
            let stranger = format!("10.{}.{}.{}:4000", 2 + (n >> 16), (n >> 8) & 255, n & 255);
            Conn::open(&f, &stranger);
        }
        for i in 1..=256 {
            subscriber.seen(&packet::tcp(
                subscriber.client,
                subscriber.service,
                subscriber.next_seq(),
                round * 256 + i,
                |_| {},
                &[],
            ));
        }
    }
    assert!(f.flow(idle.client).is_none(), "20,000 flows through 4,096 places push it out");
    assert!(f.flow(subscriber.client).is_some());
    assert_eq!(f.counters().get("flow_adopted"), None);
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
    assert_eq!(f.datapath.flows_closing.keys().count(), 0, "it is not closing any more");
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
