//! Readers of maps see everything, however large a map is and whatever packets do to it meanwhile;
//! and flows that compete for room do not end up in each other's place.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::conn::Conn;
use crate::support::datapath::{CONFIG, Fixture, JUMPED, SMALL};
use crate::support::{mqtt, packet};
use libbpf_rs::{MapCore as _, MapFlags, MapHandle, MapType};
use mqtt_fwd::config::MapSizes;
use mqtt_fwd::kernel::abi::{
    Pod, client, client4, client6, route_edge, topic, vip_definition, vip_key,
};
use mqtt_fwd::kernel::maps::{Table, for_each_batch};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

const MANY: u32 = 100_000;

/// Fills a map, and reads it while packets go on.
fn check<K: Pod, V: Pod>(table: &Table<K, V>, key: impl Fn(u32) -> K, many: u32) {
    for i in 0..many {
        table.put(&key(i), &bytemuck::Zeroable::zeroed()).unwrap();
    }
    let start = Instant::now();
    let entries = table.entries().unwrap();
    let took = start.elapsed();
    let keys: HashSet<Vec<u8>> = entries.iter().map(|(k, _)| k.bytes().to_vec()).collect();
    let name = table.name().to_string_lossy();
    assert_eq!(keys.len(), entries.len(), "{name}: an entry twice");
    let missing = (0..many).filter(|i| !keys.contains(key(*i).bytes())).count();
    assert_eq!(missing, 0, "{name}: of {many}, {} were read", entries.len());
    assert!(took < Duration::from_secs(30), "{name}: {took:?}");
}

#[test]
fn every_entry_of_a_large_map_is_read_while_packets_change_it() {
    // LRU maps need room, or the kernel evicts before they are full.
    let sizes = MapSizes {
        clients: 1 << 18,
        flows: 1 << 18,
        topics: 1 << 18,
        route_states: 1 << 18,
        ..MapSizes::default()
    };
    let f = Fixture::sized(CONFIG, &sizes);
    let d = &f.datapath;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // However the test ends, the packets do.
        scopeguard::defer!(done.store(true, Ordering::Relaxed));
        scope.spawn(|| {
            let mut i = 0u32;
            while !done.load(Ordering::Relaxed) {
                // New flows and topics, and some that end; never more than there is room for.
                i = (i + 1) % 20_000;
                let mut c = Conn::new(&f, &format!("11.{}.{}.1:4000", i >> 8 & 255, i & 255));
                c.isn = i;
                let syn = packet::tcp(c.client, c.service, c.isn, 0, |h| h.syn = true, &[]);
                f.send(&syn);
                f.send(&c.segment(&mqtt::connect(4)));
                c.sent = mqtt::connect(4).len() as u32;
                f.send(&c.segment(&mqtt::publish(format!("tree/{}", i % 1000).as_bytes(), 0, b"")));
            }
        });
        let service = 77;
        check::<_, client>(&d.clients, |i| client4 { addr: i, service, pad: 0 }, MANY);
        check::<_, client>(&d.clients6, |i| client6 { addr: [i, 1, 2, 3], service, pad: 0 }, MANY);
        check::<_, topic>(&d.topics, |i| u64::from(i) << 20 | 1, MANY);
        check(&d.route_edges, |i| route_edge { level: i.into(), state: 1 << 30, pad: 0 }, MANY);
        let vip = |i: u32| -> vip_definition { vip_key(std::net::Ipv4Addr::from(i).into(), 1) };
        check(&d.service_vips, vip, 4000);
    });
    assert_eq!(d.route_states.entries().unwrap().len(), 1 << 19, "an array, whole");
}

#[test]
fn a_change_of_routes_reaches_every_known_topic() {
    const TOPICS: u32 = 30_000;
    let sizes = MapSizes { clients: 1 << 16, flows: 1 << 16, topics: 1 << 16, ..SMALL };
    let mut f = Fixture::sized(CONFIG, &sizes);
    let mut c = Conn::open(&f, "10.1.1.1:4000");
    f.send(&c.segment(&mqtt::connect(4)));
    c.sent += mqtt::connect(4).len() as u32;
    for i in 0..TOPICS {
        let publish = mqtt::publish(format!("tree/{i}").as_bytes(), 0, b"");
        f.send(&c.segment(&publish));
        c.sent += publish.len() as u32;
    }
    let route = |group: &str| {
        let id = f.datapath.groups().unwrap();
        let id = id.iter().find(|(_, g)| mqtt_fwd::kernel::abi::name_text(&g.name) == group);
        u32::from(id.unwrap().0)
    };
    let (a, b) = (route("a"), route("b"));
    let of = |f: &Fixture, generation: usize, group: u32| {
        let topics = f.datapath.topics.entries().unwrap();
        topics.iter().filter(|(_, t)| t.verdict[generation].binding & 0xffff == group).count()
    };
    assert_eq!(of(&f, 1, b), TOPICS as usize);
    for route in std::sync::Arc::make_mut(&mut f.config.services[0].routes) {
        if route.filter.to_string() == "tree/#" {
            route.target = mqtt_fwd::domain::Target::Group("a".to_owned());
        }
    }
    f.apply();
    assert_eq!(of(&f, 0, a), TOPICS as usize, "each of them");
}

/// Runs on one CPU from here on.
fn stay_on(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(0), &set).unwrap();
}

#[test]
fn flows_that_evict_each_other_on_two_cpus_keep_their_groups() {
    // 32 places for 400 flows: whatever a program holds a pointer to is another's soon.
    let sizes = MapSizes { flows: 16, clients: 4096, topics: 4096, ..SMALL };
    let f = Fixture::loaded(CONFIG, &sizes, |rodata| {
        rodata.flow_idle = 0;
        rodata.topics_per_window = u32::MAX;
        rodata.flows_per_window = u32::MAX;
    });
    let address = |i: u32| format!("10.1.{}.{}", 1 + i / 200, 1 + i % 200);
    // Half of the clients publish to a, half to b.
    let topic = |i: u32| if i.is_multiple_of(2) { &b"sensor/a"[..] } else { &b"sensor/b"[..] };
    for i in 0..400 {
        let mut c = Conn::open(&f, &format!("{}:3000", address(i)));
        for part in [mqtt::connect(4), mqtt::publish(topic(i), 0, b"1")] {
            c.write(&part);
        }
    }
    let packets: u32 = std::env::var("STRESS_PACKETS").map_or(60_000, |n| n.parse().unwrap());
    let wrong: u32 = std::thread::scope(|scope| {
        let cpus: Vec<_> = (0..2usize)
            .map(|cpu| {
                let f = &f;
                scope.spawn(move || {
                    stay_on(cpu % libbpf_rs::num_possible_cpus().unwrap());
                    let (mut wrong, mut n) = (0, 7 + cpu as u32);
                    for _ in 0..packets {
                        n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        let i = n >> 8 & 255;
                        let c = Conn::new(f, &format!("{}:4000", address(i)));
                        let publish = mqtt::publish(topic(i), 0, b"1");
                        let sent = match n >> 20 & 7 {
                            0 => packet::tcp(c.client, c.service, c.isn, 0, |h| h.syn = true, &[]),
                            1 | 2 => c.segment(&[]),
                            3 => c.segment(&mqtt::connect(4)),
                            4 => packet::tcp(
                                c.client,
                                c.service,
                                c.next_seq(),
                                7,
                                |h| h.fin = true,
                                &[],
                            ),
                            _ => {
                                let seq = c.next_seq().wrapping_add(mqtt::connect(4).len() as u32);
                                packet::tcp(c.client, c.service, seq, 77, |_| {}, &publish)
                            }
                        };
                        let outcome = f.send(&sent);
                        assert_eq!(outcome.verdict, JUMPED);
                        let to = if i.is_multiple_of(2) { [10, 1, 50, 1] } else { [10, 1, 50, 2] };
                        wrong += u32::from(outcome.packet[30..34] != to);
                    }
                    wrong
                })
            })
            .collect();
        cpus.into_iter().map(|cpu| cpu.join().unwrap()).sum()
    });
    println!("{} packets, {wrong} to another group: {:?}", 2 * packets, f.counters());
    assert_eq!(wrong, 0);
    let counters = f.counters();
    let opened: u64 = ["flow_new", "flow_predicted", "flow_adopted"]
        .iter()
        .filter_map(|name| counters.get(name))
        .sum();
    assert!(opened > u64::from(packets) / 10, "{opened} took places of others");
}

/// Of a trie, the kernel's position is a key, however long.
#[test]
fn a_trie_is_read_in_batches_too() {
    let options = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as _,
        map_flags: libbpf_sys::BPF_F_NO_PREALLOC,
        ..Default::default()
    };
    let trie = MapHandle::create(MapType::LpmTrie, Some("trie"), 20, 1, 10_000, &options).unwrap();
    let key = |i: u32| [&128u32.to_ne_bytes()[..], &[0; 12], &i.to_be_bytes()].concat();
    for i in 0..10_000 {
        trie.update(&key(i), &[i as u8], MapFlags::ANY).unwrap();
    }
    let mut read = BTreeMap::new();
    for_each_batch(&trie, |keys, values| {
        read.extend(keys.map(<[u8]>::to_vec).zip(values.map(<[u8]>::to_vec)));
        Ok(())
    })
    .unwrap();
    assert!(read.into_iter().eq((0..10_000).map(|i| (key(i), vec![i as u8]))));
}
