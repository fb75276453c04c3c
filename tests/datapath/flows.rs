//! Binding, learning, routes and their changes, on the real program in this kernel.

use std::time::Instant;

use crate::support::conn::{Conn, predicted, seen};
use crate::support::datapath::{CONFIG, Fixture, JUMPED, SMALL};
use crate::support::{mqtt, packet};
use libbpf_rs::{MapCore as _, MapFlags};
use mqtt_fwd::config::MapSizes;
use mqtt_fwd::domain::Target;
use mqtt_fwd::kernel::abi::{Pod as _, flow_flags};
use mqtt_fwd::kernel::flow_table::candidates;

/// A connection of the client's that teaches a topic.
fn teach(f: &Fixture, client: &str, topic: &[u8]) {
    let mut c = Conn::open(f, client);
    c.data(&mqtt::connect(4));
    f.send(&c.segment(&mqtt::publish(topic, 0, b"1")));
}

#[test]
fn an_unknown_client_goes_to_the_default_group_and_is_learned_from_its_publish() {
    for client in ["10.1.1.1:4000", "[fd01:1::1]:4000"] {
        let f = Fixture::new();
        let mut c = Conn::new(&f, client);
        assert_eq!(c.syn(), seen("default", &["flow_new 1"]));
        assert_eq!(c.data(&mqtt::connect(4)), seen("default", &["data 1"]));
        assert_eq!(c.prediction(), None);
        // Its flow is with the wrong brokers: these get DISCONNECT and FIN instead.
        assert_eq!(
            c.ended(&mqtt::publish(b"sensor/a", 0, b"21.5")),
            seen(
                "default",
                &["data 1", "flow_ended 1", "learned 1", "mispredicted 1", "publish_lost 1"]
            )
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
        f.send(&c.segment(&mqtt::publish(topic, 0, b"1")));
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
    neighbour.ended(&mqtt::publish(b"sensor/a", 0, b"1"));
    assert_eq!(c.prediction(), predicted("sensor/a", "a"));
    assert_eq!(c.flagged(|_| {}), seen("default", &["no_data 1"]));
    assert_eq!(
        c.data(&mqtt::publish(b"sensor/c", 0, b"1")),
        seen("default", &["data 1", "publish 1"])
    );
}

#[test]
fn a_repeated_syn_stays_bound() {
    let f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    teach(&f, "10.1.1.1:5000", b"sensor/a");
    assert_eq!(c.syn(), seen("default", &["syn_again 1"]));
}

#[test]
fn a_spoofed_syn_on_an_established_flow_moves_nothing() {
    for client in ["10.1.1.1:4000", "[fd01:1::1]:4000"] {
        let f = Fixture::new();
        let mut c = Conn::open(&f, client);
        c.data(&mqtt::connect(4));
        c.data(&mqtt::publish(b"sensor/c", 0, b"1"));
        assert_eq!(c.flagged(|_| {}).group, "default");
        // The client is now predicted otherwise, so a new flow of it would be a's.
        teach(&f, &client.replace("4000", "5000"), b"sensor/a");
        for isn in [1, 77, 1 << 31] {
            let mut spoofed = Conn { isn, ..Conn::new(&f, client) };
            assert_eq!(spoofed.syn(), seen("a", &["syn_reused_port 1"]));
            assert_eq!(spoofed.syn(), seen("a", &["syn_again 1"]));
            assert_eq!(c.flagged(|_| {}).group, "default", "not even what only acknowledges");
            let publish = mqtt::publish(b"sensor/c", 0, b"1");
            assert_eq!(c.data(&publish), seen("default", &["data 1", "publish 1"]));
        }
        // With ACKs of its own numbers the stranger gets the flow, and the client gets it back
        // with its next segment.
        let mut spoofed = Conn { isn: 4242, ..Conn::new(&f, client) };
        spoofed.syn();
        assert_eq!(spoofed.flagged(|_| {}), seen("a", &["flow_replaced 1", "no_data 1"]));
        assert_eq!(spoofed.flagged(|_| {}), seen("a", &["no_data 1"]));
        let publish = mqtt::publish(b"sensor/c", 0, b"1");
        assert_eq!(c.data(&publish), seen("default", &["data 1", "flow_replaced 1", "resynced 1"]));
        assert_eq!(c.data(&publish).group, "default");
    }
}

#[test]
fn a_client_that_uses_its_port_again_is_bound_again_at_once() {
    // TIME_WAIT, or a client that crashed: no FIN was seen.
    for first_is_ack in [true, false] {
        let f = Fixture::new();
        let mut c = Conn::open(&f, "10.1.1.1:4000");
        c.data(&mqtt::connect(4));
        teach(&f, "10.1.1.1:5000", b"sensor/a");
        let mut again = Conn { isn: 123_456, ..Conn::new(&f, "10.1.1.1:4000") };
        assert_eq!(again.syn(), seen("a", &["syn_reused_port 1"]));
        if first_is_ack {
            assert_eq!(again.flagged(|_| {}), seen("a", &["flow_replaced 1", "no_data 1"]));
        }
        assert_eq!(again.data(&mqtt::connect(4)).group, "a");
        let publish = mqtt::publish(b"sensor/a", 0, b"1");
        assert_eq!(again.data(&publish), seen("a", &["data 1", "publish 1"]));
        assert_eq!(again.flagged(|h| h.fin = true), seen("a", &["flow_closed 1", "no_data 1"]));
    }
}

#[test]
fn a_closed_flow_still_forwards_late_segments() {
    let f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    c.ended(&mqtt::publish(b"sensor/a", 0, b"1"));
    let mut c = Conn::open(&f, "10.1.1.1:4001");
    c.data(&mqtt::connect(4));
    assert_eq!(c.flagged(|h| h.fin = true), seen("a", &["flow_closed 1", "no_data 1"]));
    c.sent += 1;
    assert_eq!(c.flagged(|_| {}), seen("a", &["no_data 1"]));
    assert_eq!(f.flow(c.client).unwrap().state, "closing");
    assert_eq!(standing(&f), 1, "only the first flow is left in the main map");
}

#[test]
fn a_route_changed_and_changed_back_moves_a_connected_publisher_each_time() {
    let mut f = Fixture::new();
    let set = |f: &mut Fixture, group: &str| {
        for route in std::sync::Arc::make_mut(&mut f.config.services[0].routes) {
            if route.filter.to_string() == "sensor/a" {
                route.target = Target::Group(group.to_owned());
            }
        }
        f.apply();
    };
    let publish = mqtt::publish(b"sensor/a", 0, b"1");
    teach(&f, "10.1.1.1:4000", b"sensor/a");
    let mut port = 4001;
    let mut before = "a";
    for group in ["b", "a", "b", "b", "a", "a"] {
        let mut c = Conn::open(&f, &format!("10.1.1.1:{port}"));
        c.data(&mqtt::connect(4));
        assert_eq!(c.data(&publish).group, before, "before the change");
        let (isn, sent, client) = (c.isn, c.sent, c.client);
        set(&mut f, group);
        let mut c = Conn { isn, sent, ..Conn::new(&f, &client.to_string()) };
        if group == before {
            assert!(c.data(&publish).counters.contains(&"publish 1".to_owned()));
        } else {
            let counters = c.ended(&publish).counters;
            assert!(counters.contains(&"flow_ended 1".to_owned()), "to {group}: {counters:?}");
        }
        assert!(!f.client("10.1.1.1").unwrap().multi_group, "that was not the client's doing");
        (port, before) = (port + 1, group);
    }
}

#[test]
fn a_change_of_routes_moves_predictions_but_not_flows() {
    let mut f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    c.data(&mqtt::publish(b"sensor/c", 0, b"1"));
    let (isn, sent) = (c.isn, c.sent);

    for route in std::sync::Arc::make_mut(&mut f.config.services[0].routes) {
        if route.filter.to_string() == "sensor/a" {
            route.filter = "sensor/c".parse().unwrap();
        }
    }
    f.apply();
    assert_eq!(f.datapath.generation().unwrap(), 2);
    let mut c = Conn { isn, sent, ..Conn::new(&f, "10.1.1.1:4000") };
    assert_eq!(c.flagged(|_| {}), seen("default", &["no_data 1"]));
    // The topic is the flow's old one, but its group has to be found again.
    let counters = c.ended(&mqtt::publish(b"sensor/c", 0, b"1")).counters;
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
    c.ended(&mqtt::publish(b"sensor/a", 0, b"1"));
    let mut c = Conn::open(&f, "10.1.1.1:4001");
    let (isn, sent) = (c.isn, c.sent);
    assert_eq!(c.data(&mqtt::connect(4)).group, "a");
    let service = &mut f.config.services[0];
    service.groups.retain(|g| g.name != "a");
    service.routes = service.routes.iter().filter(|r| r.target.name() != "a").cloned().collect();
    f.apply();
    let c = Conn { isn, sent, ..Conn::new(&f, "10.1.1.1:4001") };
    assert_eq!(c.flagged(|_| {}), seen("default", &["group_gone 1", "no_data 1"]));
}

#[test]
fn segments_without_data_follow_their_flow() {
    for client in ["10.1.1.1:4000", "[fd01:1::1]:4000"] {
        let f = Fixture::new();
        teach(&f, client, b"sensor/a");

        // Another flow of the client, which is then predicted to be b's.
        let other = Conn::open(&f, &client.replace("4000", "4001"));
        assert_eq!(other.flagged(|_| {}), seen("a", &["no_data 1"]));
        teach(&f, &client.replace("4000", "4002"), b"sensor/b");
        assert_eq!(other.flagged(|_| {}), seen("a", &["no_data 1"]));

        // Evicted from `flows`, as if it were full: the flow still is where it was.
        let flows = f.datapath.flows.mapped().unwrap();
        for (_, flow) in flows.entries() {
            assert!(flows.places().remove(flow.id));
        }
        assert_eq!(other.flagged(|_| {}), seen("a", &["no_data 1"]));
        assert_eq!(other.data_at(0, &mqtt::connect(4)).group, "a");

        // A new flow of the same addresses is predicted again.
        let mut again = Conn { isn: 77, ..Conn::new(&f, &client.replace("4000", "4001")) };
        assert_eq!(again.syn().group, "b");
        assert_eq!(again.flagged(|_| {}).group, "b");
        assert_eq!(again.flagged(|_| {}).group, "b");
    }
}

#[test]
fn a_flow_that_ends_leaves_its_place_in_the_cache() {
    let f = Fixture::new();
    let cached = || {
        let bindings = &f.skel.maps.binding_cache;
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

/// Packets of this test come in on one CPU.
fn stay_on_this_cpu() {
    let here = nix::sched::sched_getcpu().unwrap();
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(here).unwrap();
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus).unwrap();
}

fn places_taken(f: &Fixture) -> usize {
    f.datapath.flows.mapped().unwrap().entries().count()
}

fn standing(f: &Fixture) -> usize {
    let mut count = 0;
    f.datapath.for_each_standing(|_, _| count += 1).unwrap();
    count
}

/// As if so many units of `flow.seen` had passed.
fn let_time_pass(f: &Fixture, units: u16) {
    let flows = f.datapath.flows.mapped().unwrap();
    for (_, mut flow) in flows.entries() {
        flow.seen = flow.seen.wrapping_sub(units);
        assert!(flows.places().replace(flow.id, |_| true, flow.bytes()));
    }
}

#[test]
fn a_flow_that_only_acknowledges_or_only_publishes_is_not_forgotten_for_idle() {
    let f = Fixture::loaded(CONFIG, &MapSizes { flows: 1024, ..SMALL }, |rodata| {
        rodata.flows_per_window = u32::MAX;
    });
    let connected = |client: &str| {
        let mut c = Conn::open(&f, client);
        c.data(&mqtt::connect(4));
        c
    };
    let (subscriber, idle) = (connected("10.1.1.1:4000"), connected("10.1.1.2:4000"));
    let mut publisher = connected("10.1.1.3:4000");
    for round in 0..40u32 {
        for i in 0..125u32 {
            let n = round * 125 + i;
            connected(&format!("10.{}.{}.{}:4000", 2 + (n >> 16), (n >> 8) & 255, n & 255));
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
        publisher.data(&mqtt::publish(b"other", 0, b"1"));
        let_time_pass(&f, 4);
    }
    assert!(f.flow(publisher.client).is_some());
    assert!(f.flow(idle.client).is_none(), "5,000 flows through 2,048 places push it out");
    assert!(f.flow(subscriber.client).is_some());
    assert_eq!(f.counters().get("flow_adopted"), None);
}

#[test]
fn neither_syns_nor_segments_of_no_flow_push_out_a_flow_that_has_sent_connect() {
    let f = Fixture::loaded(CONFIG, &MapSizes { flows: 256, ..SMALL }, |rodata| {
        rodata.flows_per_window = u32::MAX;
        // However slow the machine is.
        rodata.flow_idle = 1000;
    });
    let standing: Vec<_> = (0..256u32)
        .map(|i| {
            let mut c = Conn::open(&f, &format!("10.1.1.{i}:4000"));
            c.data(&mqtt::connect(4));
            c.client
        })
        .collect();
    let_time_pass(&f, 900);
    for i in 0..10_000u32 {
        let c = Conn::new(&f, &format!("10.{}.{}.1:4000", 2 + (i >> 8), i & 255));
        let syn = packet::tcp(c.client, c.service, 1, 0, |h| h.syn = true, &[]);
        f.send(&if i % 2 == 0 { syn } else { c.segment(b"of no flow") });
    }
    let gone = standing.iter().filter(|client| f.flow(**client).is_none()).count();
    assert_eq!(places_taken(&f), 512, "the table is full");
    assert_eq!(gone, 0, "of 256");
    assert!(f.counters()["flow_not_stored"] > 0, "{:?}", f.counters());
}

/// Nobody frees the places of closed flows: a table that was full of them once has new flows where they are found soonest.
#[test]
fn places_of_closed_flows_are_as_good_as_free() {
    let f = Fixture::loaded(CONFIG, &MapSizes { flows: 256, ..SMALL }, |rodata| {
        rodata.flows_per_window = u32::MAX;
    });
    let connected = |n: u32| {
        let mut c = Conn::open(&f, &format!("10.{}.{}.1:4000", 2 + (n >> 8), n & 255));
        c.data(&mqtt::connect(4));
        c
    };
    for round in 0..20 {
        for i in 0..200 {
            connected(round * 200 + i).flagged(|h| h.fin = true);
        }
        let_time_pass(&f, 2);
    }
    assert!(places_taken(&f) > 500, "of 512");
    let standing: Vec<_> = (5000..5128).map(|n| connected(n).client).collect();
    assert!(standing.iter().all(|client| f.flow(*client).is_some()));
    let table = &f.datapath.flows;
    let mapped = table.mapped().unwrap();
    let soon = mapped.entries().filter(|(place, flow)| {
        u32::from(flow.flags) & flow_flags::FLOW_CLOSING.0 == 0
            && candidates(table.places(), flow.id).take(2).any(|p| p == *place)
    });
    let soon = soon.count();
    assert!(soon > 100, "{soon} of 128 are in the first or second of their places");
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
fn untracked_segments_make_no_live_flow_and_close_none() {
    let f = Fixture::new();
    let stranger = Conn::new(&f, "10.1.1.9:4000");
    assert_eq!(stranger.flagged(|h| h.rst = true), seen("default", &["untracked 1"]));
    assert_eq!(stranger.flagged(|h| h.fin = true), seen("default", &["untracked 1"]));
    assert!(f.flow(stranger.client).is_none());
    stranger.data_at(0, b"data of no flow");
    assert_eq!(standing(&f), 0, "not among those that count");
    assert_eq!(places_taken(&f), 1);

    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    for offset in [-1000i32, -1, 1, 2, 1000] {
        let seq = c.next_seq().wrapping_add_signed(offset);
        for rst in [true, false] {
            let shape = |h: &mut etherparse::TcpHeader| (h.rst, h.fin) = (rst, !rst);
            let sent = packet::tcp(c.client, c.service, seq, 77, shape, &[]);
            assert_eq!(c.seen(&sent), seen("default", &["no_data 1"]), "{offset}");
        }
    }
    assert_eq!(f.flow(c.client).unwrap().state, "connected");
    assert_eq!(c.flagged(|h| h.rst = true), seen("default", &["flow_closed 1", "no_data 1"]));
}

#[test]
fn a_flow_seen_from_its_middle_counts_once_it_has_shown_that_it_is_mqtt() {
    let f = Fixture::new();
    let mut c = Conn::new(&f, "10.1.1.1:4000");
    c.data(b"half a payload");
    assert_eq!(standing(&f), 0);
    c.data(&mqtt::publish(b"sensor/c", 0, b"1"));
    assert_eq!(standing(&f), 1);
}

#[test]
fn a_flow_that_is_found_to_be_mqtt_by_its_last_segment_is_closing() {
    let f = Fixture::new();
    let mut c = Conn::new(&f, "10.1.1.1:4000");
    c.data(b"half a payload");
    let last = mqtt::publish(b"sensor/c", 0, b"1");
    f.send(&packet::tcp(c.client, c.service, c.next_seq(), 77, |h| h.fin = true, &last));
    assert_eq!(f.flow(c.client).unwrap().state, "closing");
    assert_eq!(standing(&f), 0);
}

#[test]
fn above_the_rate_of_new_flows_no_standing_flow_is_evicted() {
    let sizes = MapSizes { flows: 256, ..SMALL };
    let f = Fixture::loaded(CONFIG, &sizes, |rodata| {
        rodata.flows_per_window = 10;
        rodata.topics_per_window = u32::MAX;
    });
    let standing = Conn::open(&f, "10.1.1.1:4000");
    let start = std::time::Instant::now();
    let mut sent = 0u64;
    while sent < 20_000 {
        let client = format!("10.7.{}.{}:4000", sent / 250 % 250, sent % 250);
        let spoofed = Conn::new(&f, &client);
        let syn = packet::tcp(spoofed.client, spoofed.service, 1, 0, |h| h.syn = true, &[]);
        assert_eq!(f.send(&syn).verdict, JUMPED, "forwarded nevertheless");
        sent += 1;
    }
    let counters = f.counters();
    let windows = start.elapsed().as_millis() as u64 / 100 + 2;
    let cpus = libbpf_rs::num_possible_cpus().unwrap() as u64;
    let stored = sent - counters["flow_not_stored"];
    assert!(stored <= 10 * windows * cpus, "{stored} stored in {windows} windows");
    if stored < 128 {
        assert!(f.flow(standing.client).is_some());
    }
}

#[test]
fn evictions_can_be_told_from_what_was_added_and_removed() {
    let f = Fixture::loaded(CONFIG, &MapSizes { flows: 1024, ..SMALL }, |rodata| {
        rodata.flows_per_window = u32::MAX;
        rodata.flow_idle = 0;
    });
    for i in 0..5_000u32 {
        let client = format!("10.{}.{}.{}:4000", 2 + (i >> 16), (i >> 8) & 255, i & 255);
        Conn::open(&f, &client).data(&mqtt::connect(4));
    }
    let uses = f.datapath.map_uses().unwrap();
    let flows = uses.iter().find(|u| u.map == "flows").unwrap();
    assert_eq!(flows.used, standing(&f) as u64);
    assert!(flows.used <= 2048 && flows.used > 1750, "{flows:?}");
    assert_eq!(flows.evicted, 5_000 - flows.used, "{flows:?}");
}

/// How many a CPU's budget of so many a window of 0.1 s may have let through since then. In an
/// emulator (scripts/kernels) that is more.
fn in_budget(a_window: u64, begun: Instant) -> u64 {
    a_window * (begun.elapsed().as_millis() as u64 / 100 + 2)
}

#[test]
fn new_topics_are_stored_at_a_bounded_rate_and_routed_all_the_same() {
    let f = Fixture::loaded(CONFIG, &SMALL, |rodata| {
        rodata.flows_per_window = u32::MAX;
        rodata.topics_per_window = 3;
    });
    stay_on_this_cpu();
    let begun = Instant::now();
    for i in 0..100 {
        let mut c = Conn::open(&f, &format!("10.1.2.{i}:4000"));
        c.data(&mqtt::connect(4));
        let topic = format!("tree/{i}");
        c.ended(&mqtt::publish(topic.as_bytes(), 0, b"1"));
        assert_eq!(c.prediction().unwrap().1, "b");
    }
    let least = 100_u64.saturating_sub(in_budget(3, begun));
    assert!(f.counters()["topic_not_stored"] >= least.max(1), "{least}: {:?}", f.counters());
}

#[test]
fn a_kind_of_event_that_is_frequent_does_not_silence_another() {
    let f = Fixture::loaded(CONFIG, &SMALL, |rodata| {
        rodata.flows_per_window = u32::MAX;
        rodata.topics_per_window = u32::MAX;
        rodata.events_per_window = 5;
    });
    stay_on_this_cpu();
    let begun = Instant::now();
    for i in 0..200 {
        Conn::open(&f, &format!("10.1.2.{i}:4000"));
    }
    let least = 200_u64.saturating_sub(in_budget(5, begun));
    assert!(f.counters()["event_lost_bound"] >= least.max(1), "{least}: {:?}", f.counters());
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    c.ended(&mqtt::publish(b"sensor/a", 0, b"1"));
    for name in ["event_lost_learned", "event_lost_mispredicted"] {
        assert_eq!(f.counters().get(name), None);
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
    assert!(f.flow(c.client).unwrap().misrouted);
}

#[test]
fn a_syn_on_a_closed_flow_is_a_new_flow() {
    let f = Fixture::new();
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.flagged(|h| h.rst = true);
    c.isn = 4711;
    assert_eq!(c.syn(), seen("default", &["syn_reused_port 1"]));
    assert_eq!(c.flagged(|_| {}), seen("default", &["flow_replaced 1", "no_data 1"]));
    assert_eq!(f.flow(c.client).unwrap().state, "opening");
    assert_eq!(standing(&f), 1, "it is not closing any more");
}

/// What a broker's TCP makes of the segments that it gets: the stream up to the first gap, and whether FIN ends it.
#[derive(Default)]
struct Received {
    bytes: std::collections::BTreeMap<u32, u8>,
    fin: Option<u32>,
}

impl Received {
    fn take(&mut self, frame: &[u8], isn: u32) {
        let sliced = etherparse::SlicedPacket::from_ethernet(frame).unwrap();
        let Some(etherparse::TransportSlice::Tcp(tcp)) = sliced.transport else { panic!() };
        let at = tcp.sequence_number().wrapping_sub(isn).wrapping_sub(1);
        // What is behind FIN is none of the application's.
        for (at, byte) in (at..).zip(tcp.payload()) {
            if self.fin.is_none_or(|fin| at < fin) {
                self.bytes.entry(at).or_insert(*byte);
            }
        }
        if tcp.fin() {
            self.fin.get_or_insert(at + tcp.payload().len() as u32);
        }
    }

    fn stream(&self) -> (Vec<u8>, bool) {
        let whole = (0..).map_while(|at| self.bytes.get(&at)).copied().collect::<Vec<u8>>();
        let ended = self.fin == Some(whole.len() as u32);
        (whole, ended)
    }
}

#[test]
fn a_flow_ends_however_small_its_segments_are() {
    let f = Fixture::new();
    for v6 in [false, true] {
        for qos in [0, 1] {
            for first in 1..=16 {
                for size in 1..=16 {
                    let addr = if v6 {
                        format!("[fd01:1::{first}:{size}:{qos}]:4000")
                    } else {
                        format!("10.{}.{first}.{size}:4000", 2 + qos)
                    };
                    let mut c = Conn::open(&f, &addr);
                    let isn = c.isn;
                    let mut got = Received::default();
                    let connect = mqtt::connect(4);
                    let mut send = |bytes: &[u8]| {
                        got.take(&f.send(&c.segment(bytes)).packet, isn);
                        c.sent += bytes.len() as u32;
                    };
                    send(&connect);
                    let publish = mqtt::publish(b"sensor/a", qos, b"value");
                    // Written in pieces; and the client goes on, as it does not know yet.
                    let more =
                        [publish, mqtt::pingreq(), mqtt::publish(b"sensor/a", 0, b"2")].concat();
                    let (begin, rest) = more.split_at(first);
                    for piece in std::iter::once(begin).chain(rest.chunks(size)) {
                        send(piece);
                    }
                    let (stream, ended) = got.stream();
                    assert!(ended, "first {first}, then {size}: {stream:02x?}, FIN {:?}", got.fin);
                    let behind = stream.strip_prefix(&connect[..]).unwrap();
                    let goodbye = behind == mqtt::disconnect();
                    // Its first bytes may be there already: then FIN alone.
                    assert!(goodbye || more.starts_with(behind), "{behind:02x?}");
                    assert!(behind.len() < 2 + 2 + 8 + 2 * usize::from(qos) + 5, "{behind:02x?}");
                }
            }
        }
    }
}

#[test]
fn topics_of_tests_lead_only_where_other_topics_do() {
    // A group of certain clients: no topic leads there.
    let group = "{ name = \"own\", vip = \"10.1.50.3\", reals = [{ address = \"10.1.3.9\" }] },\n";
    let f = Fixture::with(&CONFIG.replacen("group = [\n", &format!("group = [\n{group}"), 1));
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    c.data(&mqtt::connect(4));
    let to_own = c.data(&mqtt::publish(b"mqtt-fwd/test/own/1", 0, b"x"));
    assert_eq!(to_own.group, "default");
    assert!(to_own.counters.contains(&"publish 1".to_owned()), "{to_own:?}");
    let to_a = c.ended(&mqtt::publish(b"mqtt-fwd/test/a/1", 0, b"x"));
    assert!(to_a.counters.contains(&"flow_ended 1".to_owned()), "{to_a:?}");
}
