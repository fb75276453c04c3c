//! Random MQTT streams, cut, reordered, repeated and lost, through the real program and through
//! the model: groups, predictions and counters have to be the same, packet by packet.
//!
//! `DIFFERENTIAL_STREAMS` sets how many (default 2000), `PROPTEST_RNG_SEED` which ones.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::support::datapath::{Fixture, JUMPED, SERVICE};
use crate::support::model::{Model, Segment};
use crate::support::{datapath, mqtt, packet};
use mqtt_fwd::config::MapSizes;
use mqtt_fwd::datapath::image::keys_of;
use mqtt_fwd::kernel::abi::{client_flags, client4, flow_binding};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};

/// What a client does in its stream.
#[derive(Debug, Clone)]
enum Op {
    Publish { topic: String, qos: u8, payload: usize },
    Burst { topic: String, count: usize },
    Alias { topic: String, known: bool },
    Subscribe,
    Ping,
    Ack,
    Disconnect,
    Junk(Vec<u8>),
}

/// What the network does to a segment.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Arrives,
    Twice,
    /// Only after so many later ones.
    Late(u8),
    /// Lost, and sent again together with what follows it.
    Again,
    Lost,
}

#[derive(Debug, Clone)]
struct Stream {
    client: u8,
    /// Streams may share their addresses: one after the other, or at once, as a stranger would.
    port: u16,
    level: u8,
    ops: Vec<Op>,
    isn: u32,
    /// How many segments of others' come first.
    start: usize,
    /// Not CONNECT first, but this.
    instead: Option<Vec<u8>>,
    /// Lengths of segments, used in turn: control packets, or bytes.
    by_packets: bool,
    cuts: Vec<usize>,
    fates: Vec<Fate>,
    syn: bool,
    fin: bool,
}

fn short_topic() -> impl Strategy<Value = String> {
    let known = prop::sample::select(vec![
        "sensor/a",
        "sensor/b",
        "sensor/c",
        "sensor/c",
        "sensor/c",
        "wild/x/a",
        "wild//a",
        "tree",
        "tree/leaf",
        "tree/leaf/x",
        "$SYS/x",
        "$other",
        "/",
        "a",
    ]);
    let of_length = (1usize..300, "[a-c]").prop_map(|(n, c)| format!("tree/{}", c.repeat(n)));
    prop_oneof![4 => known.prop_map(str::to_owned), 2 => "[a-z/+0-9äß水]{1,24}", 1 => of_length]
}

fn long_topic() -> impl Strategy<Value = String> {
    prop_oneof![1000usize..3000, Just(65_530)].prop_map(|n| format!("tree/{}", "y".repeat(n)))
}

fn op() -> impl Strategy<Value = Op> {
    let payload = prop_oneof![6 => 0usize..40, 2 => 100usize..4000, 1 => 100_000usize..1 << 20];
    prop_oneof![
        // Long payloads and topics seldom, or there is little else.
        30 => (short_topic(), 0u8..3, 0usize..40)
            .prop_map(|(topic, qos, payload)| Op::Publish { topic, qos, payload }),
        2 => (prop_oneof![short_topic(), long_topic()], 0u8..3, payload)
            .prop_map(|(topic, qos, payload)| Op::Publish { topic, qos, payload }),
        1 => (short_topic(), 20usize..80).prop_map(|(topic, count)| Op::Burst { topic, count }),
        3 => (short_topic(), any::<bool>())
            .prop_map(|(topic, known)| Op::Alias { topic, known }),
        2 => Just(Op::Subscribe),
        3 => Just(Op::Ping),
        3 => Just(Op::Ack),
        1 => Just(Op::Disconnect),
        1 => prop::collection::vec(any::<u8>(), 1..12).prop_map(Op::Junk),
    ]
}

fn stream() -> impl Strategy<Value = Stream> {
    let fate = prop_oneof![
        30 => Just(Fate::Arrives),
        2 => Just(Fate::Twice),
        3 => (1u8..4).prop_map(Fate::Late),
        2 => Just(Fate::Again),
        1 => Just(Fate::Lost),
    ];
    // Clients write whole packets, mostly; the network cuts as it likes.
    let cuts = prop_oneof![
        prop::collection::vec(1usize..4, 1..6).prop_map(|cuts| (true, cuts)),
        prop::collection::vec(
            prop_oneof![3 => 1usize..8, 3 => 8usize..64, 4 => 1000usize..1400],
            1..6
        )
        .prop_map(|cuts| (false, cuts)),
    ];
    let junk = prop::collection::vec(any::<u8>(), 1..12);
    (
        (0u8..3, prop_oneof![3 => 4000u16..4100, 1 => Just(3999)]),
        prop::sample::select(vec![3u8, 4, 5]),
        prop::collection::vec(op(), 0..16),
        any::<u32>(),
        (prop_oneof![Just(0), 0usize..60], prop::option::weighted(0.03, junk)),
        cuts,
        prop::collection::vec(fate, 1..24),
        prop::bool::weighted(0.9),
        any::<bool>(),
    )
        .prop_map(|(client, level, ops, isn, start, cuts, fates, syn, fin)| Stream {
            client: client.0,
            port: client.1,
            level,
            ops,
            isn,
            start: start.0,
            instead: start.1,
            by_packets: cuts.0,
            cuts: cuts.1,
            fates,
            syn,
            fin,
        })
}

/// What the client writes, a control packet each.
fn writes(stream: &Stream) -> Vec<Vec<u8>> {
    let first = stream.instead.clone().unwrap_or_else(|| mqtt::connect(stream.level));
    let rest = stream.ops.iter().map(|op| match op {
        Op::Publish { topic, qos, payload } => {
            // Digits: what a sensor sends, and what PUBLISH headers look like.
            let payload: Vec<u8> = b"0123456789".iter().copied().cycle().take(*payload).collect();
            mqtt::publish(topic.as_bytes(), *qos, &payload)
        }
        Op::Burst { topic, count } => mqtt::publish(topic.as_bytes(), 0, b"1").repeat(*count),
        Op::Alias { topic, known: false } => mqtt::publish_alias(topic.as_bytes(), 1, b"1"),
        Op::Alias { known: true, .. } => mqtt::publish_alias(b"", 1, b"2"),
        Op::Subscribe => mqtt::subscribe(b"news/#"),
        Op::Ping => mqtt::pingreq(),
        Op::Ack => mqtt::puback(),
        Op::Disconnect => mqtt::disconnect(),
        Op::Junk(junk) => junk.clone(),
    });
    std::iter::once(first).chain(rest).collect()
}

/// Where the stream is cut into segments.
fn ends(stream: &Stream, writes: &[Vec<u8>]) -> Vec<usize> {
    const MSS: usize = 1400;
    let total: usize = writes.iter().map(Vec::len).sum();
    let mut ends = Vec::new();
    let mut cuts = stream.cuts.iter().cycle();
    let (mut at, mut packet) = (0, 0);
    while at < total {
        if stream.by_packets {
            let count = *cuts.next().unwrap();
            let write: usize = writes.iter().skip(packet).take(count).map(Vec::len).sum();
            packet += count;
            for part in (0..write).step_by(MSS) {
                ends.push(at + write.min(part + MSS));
            }
            at += write;
        } else {
            // Small cuts for the beginning, or a megabyte takes a million packets.
            let cut = if ends.len() < 64 { *cuts.next().unwrap() } else { MSS };
            at = total.min(at + cut);
            ends.push(at);
        }
    }
    ends
}

/// The segments in the order in which they arrive.
fn segments(stream: &Stream) -> Vec<Segment> {
    let writes = writes(stream);
    let ends = ends(stream, &writes);
    let bytes = writes.concat();
    let segment = |from: usize, to: usize| Segment {
        seq: stream.isn.wrapping_add(1).wrapping_add(from as u32),
        ack: 1000 + (from as u32 >> 8),
        syn: false,
        fin: false,
        payload: bytes[from..to].to_vec(),
    };
    let mut arriving: Vec<(usize, Segment)> = Vec::new();
    let mut at = 0;
    for (turn, end) in ends.into_iter().enumerate() {
        let order = 10 * turn;
        match stream.fates[turn % stream.fates.len()] {
            Fate::Arrives => arriving.push((order, segment(at, end))),
            Fate::Twice => {
                arriving.push((order, segment(at, end)));
                arriving.push((order + 15, segment(at, end)));
            }
            Fate::Late(by) => arriving.push((order + 10 * usize::from(by) + 5, segment(at, end))),
            Fate::Again => {
                arriving.push((order + 25, segment(at, bytes.len().min(at + 1400))));
            }
            Fate::Lost => {}
        }
        at = end;
    }
    arriving.sort_by_key(|(order, _)| *order);
    let control = |seq: u32, syn, fin| Segment { seq, ack: 0, syn, fin, payload: Vec::new() };
    let mut all = Vec::new();
    if stream.syn {
        all.push(control(stream.isn, true, false));
        all.push(control(stream.isn.wrapping_add(1), false, false));
    }
    all.extend(arriving.into_iter().map(|(_, s)| s));
    if stream.fin {
        all.push(control(stream.isn.wrapping_add(1).wrapping_add(bytes.len() as u32), false, true));
    }
    all
}

struct Lane<'a> {
    fixture: &'a Fixture,
    /// Topics that the fixture has stored.
    known: &'a RefCell<HashSet<Vec<u8>>>,
    /// Clients of their own for every case, so that cases do not depend on each other.
    first_client: u32,
}

impl Lane<'_> {
    /// Runs streams, interleaved, through both; the first difference.
    fn compare(&self, streams: &[Stream]) -> Result<(), String> {
        let f = self.fixture;
        let before = f.counters();
        let mut known = self.known.borrow_mut();
        let mut model = Model::new(&f.config.services[0], &mut known);
        let queues: Vec<Vec<Segment>> = streams.iter().map(segments).collect();
        let longest = queues.iter().zip(streams).map(|(q, s)| s.start + q.len()).max().unwrap_or(0);
        for turn in 0..longest {
            for (i, queue) in queues.iter().enumerate() {
                if let Some(s) = turn.checked_sub(streams[i].start).and_then(|t| queue.get(t)) {
                    self.step(&mut model, &streams[i], s)
                        .map_err(|e| format!("stream {i}, segment {turn}: {e}"))?;
                }
            }
        }
        self.compare_end(&model, streams, &before)
    }

    fn step(&self, model: &mut Model<'_>, stream: &Stream, s: &Segment) -> Result<(), String> {
        let (addr, port) = (self.first_client + u32::from(stream.client), stream.port);
        let src = SocketAddr::new(IpAddr::V4(Ipv4Addr::from(addr)), port);
        let shape = |h: &mut etherparse::TcpHeader| (h.syn, h.fin) = (s.syn, s.fin);
        let sent = packet::tcp(src, SERVICE.parse().unwrap(), s.seq, s.ack, shape, &s.payload);
        let out = self.fixture.send(&sent);
        let expected = model.segment(addr, port, s);
        let service = &self.fixture.config.services[0];
        let vip = service.group(&expected.group).unwrap().vip;
        if out.verdict != JUMPED {
            return Err(format!("verdict {}", out.verdict));
        }
        if packet::dst(&out.packet) != vip {
            let dst = packet::dst(&out.packet);
            return Err(format!("sent to {dst}, expected {}", expected.group));
        }
        if !packet::ip_checksum_right(&out.packet) {
            return Err("wrong IP checksum".to_owned());
        }
        // What the broker gets, once the balancer has put the service's address back.
        let mut arrives = out.packet;
        arrives[30..34].copy_from_slice(&sent[30..34]);
        let shape = |h: &mut etherparse::TcpHeader| (h.syn, h.fin) = (s.syn, expected.fin);
        let service = SERVICE.parse().unwrap();
        let wanted = packet::tcp(src, service, s.seq, s.ack, shape, &expected.payload);
        if arrives[34..] != wanted[34..] {
            return Err(format!("{:02x?}\nexpected {:02x?}", &arrives[34..], &wanted[34..]));
        }
        Ok(())
    }

    fn compare_end(
        &self,
        model: &Model,
        streams: &[Stream],
        before: &BTreeMap<&'static str, u64>,
    ) -> Result<(), String> {
        let f = self.fixture;
        let mut rose = f.counters();
        for (name, n) in before {
            *rose.get_mut(name).unwrap() -= n;
        }
        rose.retain(|name, n| *n > 0 && !name.starts_with("event_lost"));
        if rose != model.counters {
            return Err(format!("counters {rose:?}\nexpected {:?}", model.counters));
        }
        let table = f.datapath.service_table().unwrap();
        let (keys, service) = (keys_of(&table), table.service[0].id);
        let group_name = |binding: u32| f.names().bound(binding);
        for (i, stream) in streams.iter().enumerate() {
            let (addr, port) = (self.first_client + u32::from(stream.client), stream.port);
            let client = SocketAddr::new(Ipv4Addr::from(addr).into(), port);
            let flow = f.datapath.flow(client, service).unwrap().map(|(_, flow)| flow);
            let expected = model.flows.get(&(u64::from(addr) << 16 | u64::from(port)));
            let (topic, group) = match flow {
                Some(flow) => (flow.topic, Some(group_name(flow_binding(&flow)))),
                None => (0, None),
            };
            let expected_topic = expected
                .and_then(|e| e.topic.as_ref())
                .map_or(0, |topic| keys.topic(service, topic));
            if topic != expected_topic || group != expected.map(|e| e.group.clone()) {
                return Err(format!("flow {i}: {flow:?}\nexpected {expected:?}"));
            }

            let key = client4 { addr: addr.to_be(), service, pad: 0 };
            let client = f.datapath.clients.get(&key).unwrap();
            let is = client.map(|c| {
                let groups: Vec<_> =
                    c.group.iter().map(|b| (*b != 0).then(|| group_name(*b))).collect();
                let multi = u32::from(c.flags) & client_flags::CLIENT_MULTI_GROUP.0 != 0;
                let weights = c.weight.map(u32::from).to_vec();
                (
                    c.topic,
                    groups,
                    weights,
                    usize::from(c.best),
                    c.hits,
                    c.misses,
                    c.group_changes,
                    multi,
                )
            });
            let should_be = model.clients.get(&addr).map(|c| {
                let topic = keys.topic(service, &c.topic);
                let (groups, weights) = (c.groups.to_vec(), c.weights.to_vec());
                (topic, groups, weights, c.best, c.hits, c.misses, c.group_changes, c.multi_group)
            });
            if is != should_be {
                return Err(format!("client {addr:x}: {is:?}\nexpected {should_be:?}"));
            }
        }
        Ok(())
    }
}

#[test]
fn random_streams_are_framed_routed_and_learned_as_the_rules_say() {
    let streams: u32 = std::env::var("DIFFERENTIAL_STREAMS")
        .map_or(2000, |n| n.parse().expect("DIFFERENTIAL_STREAMS is a number"));
    let seed = std::env::var("PROPTEST_RNG_SEED").map_or(1883, |s| s.parse().expect("a number"));
    let sizes = MapSizes { clients: 1 << 16, flows: 1 << 16, topics: 1 << 18, ..datapath::SMALL };
    let keep = datapath::CONFIG.replace("max_packet", "on_misprediction = \"keep\"\nmax_packet");
    let fixtures =
        RefCell::new([Fixture::sized(datapath::CONFIG, &sizes), Fixture::sized(&keep, &sizes)]);
    let known = [RefCell::default(), RefCell::default()];
    let next_client = Cell::new(0x0b00_0000u32);
    let done = Cell::new(0u32);
    // Two streams a case on average.
    let mut runner = TestRunner::new(Config {
        cases: streams.div_ceil(2),
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        ..Config::default()
    });
    let cases = (any::<bool>(), prop::collection::vec(stream(), 1..4));
    let result = runner.run(&cases, |(keep, streams)| {
        next_client.set(next_client.get() + 4);
        done.set(done.get() + streams.len() as u32);
        let fixture = &fixtures.borrow()[usize::from(keep)];
        let known = &known[usize::from(keep)];
        let lane = Lane { fixture, known, first_client: next_client.get() };
        lane.compare(&streams).map_err(TestCaseError::fail)
    });
    if let Err(e) = result {
        panic!("seed {seed}: {e}");
    }
    let mut counters = BTreeMap::new();
    for fixture in fixtures.borrow().iter() {
        for (name, n) in fixture.counters() {
            *counters.entry(name).or_insert(0) += n;
        }
    }
    println!("{} streams, seed {seed}: no difference\n{counters:?}", done.get());
    assert!(done.get() >= streams * 9 / 10);
    // Streams that never get anywhere would be compared just as well.
    for name in [
        "flow_new",
        "flow_predicted",
        "flow_adopted",
        "publish",
        "mispredicted",
        "flow_ended",
        "publish_lost",
        "unjudged",
        "learned",
        "multi_group",
        "syn_reused_port",
        "flow_replaced",
        "prediction_hit",
        "prediction_miss",
        "segment_old",
        "segment_ahead",
        "resynced",
        "malformed",
        "not_mqtt",
        "flow_closed",
    ] {
        assert!(counters.contains_key(name), "no stream led to {name}: {counters:?}");
    }
}
