//! What the worst segment costs: its sender chooses what is in it, so there must be a bound.
//!
//! The target is 5 µs on a quiet machine of today: `COST_BOUND_NS=5000`. By default four times that fails,
//! since tests run on machines that are neither: what took 4.5 µs has taken 10.4 on one. `COST_ROUNDS` sets how long the search goes on
//! (default 60), `COST_SEED` where it begins.

use crate::support::conn::Conn;
use crate::support::datapath::{Fixture, test_run};
use crate::support::{datapath, mqtt};

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;

use mqtt_fwd::config::MapSizes;

/// A segment's payload: 1,460 B with headers of 40 and an MTU of 1,500.
const SEGMENT: usize = 1460;
const BOUND_NS: u32 = 20_000;

/// Routes that make matching as dear as a configuration can: deep, wild, with long levels.
fn config() -> String {
    let deep = |last: &str| format!("{}{last}", "+/".repeat(15));
    let routes = [
        deep("a"),
        deep("b"),
        // Literal edges beside the wildcards, all the way down: a look-up for each level.
        "/".repeat(14),
        format!("{}y", "/".repeat(13)),
        format!("{}/#", "x/".repeat(15).trim_end_matches('/')),
        format!("{}/y", "l".repeat(200)),
    ];
    let routes: Vec<_> =
        routes.iter().map(|r| format!("{{ topic = \"{r}\", group = \"a\" }},")).collect();
    let config = datapath::CONFIG.replace("max_packet = 1480", "max_packet = 1500");
    config.replacen("route = [", &format!("route = [{}", routes.join("\n")), 1)
}

struct Costs {
    fixture: Fixture,
    next: u32,
}

impl Costs {
    fn new() -> Self {
        let sizes = MapSizes { ..MapSizes::default() };
        Self { fixture: Fixture::sized(&config(), &sizes), next: 0x0c00_0000 }
    }

    /// Nanoseconds of a segment on a new flow of a new client, behind CONNECT and `before`: the
    /// least of some, for what else the machine does is not the segment's.
    fn of(&mut self, before: &[u8], segment: &dyn Fn(u32) -> Vec<u8>, times: u32) -> u32 {
        let program = self.fixture.skel.progs.mqtt_fwd.as_fd();
        (0..times)
            .map(|_| {
                self.next += 1;
                let client = SocketAddr::new(IpAddr::V4(Ipv4Addr::from(self.next)), 4000);
                let mut c = Conn::new(&self.fixture, &client.to_string());
                c.syn();
                for part in [mqtt::connect(4), before.to_vec()].iter().filter(|p| !p.is_empty()) {
                    self.fixture.send(&c.segment(part));
                    c.sent += part.len() as u32;
                }
                let payload = segment(self.next);
                assert!(payload.len() <= SEGMENT);
                test_run(&program, &c.segment(&payload), 1).1
            })
            .min()
            .unwrap()
    }
}

/// Repeats what `part` makes of a number, up to a segment.
fn filled(part: impl Fn(u32) -> Vec<u8>) -> Vec<u8> {
    let mut payload = Vec::new();
    for i in 0.. {
        let next = part(i);
        if payload.len() + next.len() > SEGMENT {
            return payload;
        }
        payload.extend(next);
    }
    payload
}

/// A topic of four bytes that nobody has published before.
fn fresh(client: u32, i: u32) -> Vec<u8> {
    let n = client.wrapping_mul(300).wrapping_add(i);
    [n, n >> 6, n >> 12, n >> 18]
        .map(|n| b'A' + (n & 31) as u8 % 26 + if n & 32 > 0 { 32 } else { 0 })
        .to_vec()
}

type Payload = Box<dyn Fn(u32) -> Vec<u8>>;

fn worst() -> Vec<(&'static str, Vec<u8>, Payload)> {
    let publish = |topic: &[u8]| mqtt::publish(topic, 0, b"");
    let slashes = |n: usize| mqtt::publish(&vec![b'/'; n], 0, b"");
    let long = vec![b'l'; 1450];
    let split = mqtt::publish(&vec![b'/'; 60_000], 0, b"");
    vec![
        (
            "one PUBLISH, topic of 24 B",
            vec![],
            Box::new(move |_| publish(b"site/building/room/12345")),
        ),
        ("the same topic again and again", vec![], Box::new(move |_| filled(|_| publish(b"a/bc")))),
        ("180 fresh topics of 4 B", vec![], Box::new(move |c| filled(|i| publish(&fresh(c, i))))),
        (
            "two topics in turn",
            publish(b"b"),
            Box::new(move |_| filled(|i| publish(if i % 2 == 0 { b"a" } else { b"b" }))),
        ),
        (
            "40 known topics in turn",
            vec![],
            Box::new(move |_| {
                filled(|i| publish(&[b'a' + (i % 26) as u8, b'0' + (i % 40 / 26) as u8]))
            }),
        ),
        ("1,430 slashes", vec![], Box::new(move |_| slashes(1430))),
        ("five topics of 256 slashes", vec![], Box::new(move |_| filled(|_| slashes(256)))),
        ("five topics of 257 slashes", vec![], Box::new(move |_| filled(|_| slashes(257)))),
        ("one level of 1,450 B", vec![], Box::new(move |_| mqtt::publish(&long, 0, b""))),
        ("730 PINGREQs", vec![], Box::new(|_| filled(|_| mqtt::pingreq()))),
        (
            "730 times DISCONNECT and AUTH",
            vec![],
            Box::new(|_| filled(|i| vec![if i % 2 == 0 { 0xe0 } else { 0xf0 }, 0])),
        ),
        (
            "a piece of a topic of 60,000 slashes",
            split[..1000].to_vec(),
            Box::new(move |_| split[1000..2460].to_vec()),
        ),
        ("behind a gap", vec![], Box::new(|_| filled(|_| mqtt::pingreq()))),
    ]
}

fn bound() -> u32 {
    std::env::var("COST_BOUND_NS")
        .map_or(BOUND_NS, |n| n.parse().expect("COST_BOUND_NS is a number"))
}

#[test]
fn no_segment_that_we_could_devise_costs_more_than_the_bound() {
    let mut costs = Costs::new();
    for (name, before, payload) in worst() {
        let ns = costs.of(&before, &payload, 25);
        println!("{name:40} {ns:6} ns");
        assert!(ns <= bound(), "{name}: {ns} ns");
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A recipe for a segment: kinds of control packets, and how long their topics are.
#[derive(Debug, Clone)]
struct Recipe(Vec<(u8, u16)>);

impl Recipe {
    fn random(state: &mut u64) -> Self {
        let length = 1 + next(state) % 12;
        Self((0..length).map(|_| Self::item(state)).collect())
    }

    fn item(state: &mut u64) -> (u8, u16) {
        let longest = [4, 16, 64, 300, 1450][(next(state) % 5) as usize];
        ((next(state) % 7) as u8, 1 + (next(state) % longest) as u16)
    }

    fn changed(&self, state: &mut u64) -> Self {
        let mut items = self.0.clone();
        let at = (next(state) % items.len() as u64) as usize;
        match next(state) % 4 {
            0 => items[at] = Self::item(state),
            1 => items.insert(at, Self::item(state)),
            2 if items.len() > 1 => drop(items.remove(at)),
            _ => items[at].1 = 1 + (next(state) % 1450) as u16,
        }
        Self(items)
    }

    fn payload(&self, client: u32) -> Vec<u8> {
        let mut payload = filled(|i| {
            let (kind, length) = self.0[i as usize % self.0.len()];
            let length = usize::from(length);
            let new = fresh(client, i);
            let cycle =
                |text: &[u8]| text.iter().copied().cycle().take(length).collect::<Vec<u8>>();
            match kind {
                0 => mqtt::publish(&cycle(b"/"), 0, b""),
                1 => mqtt::publish(&cycle(&new), 1, b""),
                2 => mqtt::publish(&[&new[..], &cycle(b"x/")].concat(), 0, b""),
                3 => mqtt::pingreq(),
                4 => mqtt::publish(&cycle(b"l"), 0, b""),
                5 => mqtt::publish_alias(b"", 1, b""),
                _ => mqtt::publish(&[&cycle(b"x/")[..], &new].concat(), 2, b""),
            }
        });
        // What is cut off is the next segment's.
        let (kind, length) = self.0[0];
        let rest = mqtt::publish(&vec![b'/'; usize::from(length) + 2000], kind % 3, b"");
        let room = SEGMENT - payload.len();
        payload.extend(&rest[..room.min(rest.len())]);
        payload
    }
}

#[test]
fn a_search_finds_no_segment_beyond_the_bound() {
    let number =
        |name: &str, default| std::env::var(name).map_or(default, |n| n.parse().expect("a number"));
    let (rounds, mut state) = (number("COST_ROUNDS", 60), number("COST_SEED", 1883));
    let mut costs = Costs::new();
    let mut worst = (0, Recipe(vec![(0, 1)]));
    for _ in 0..4 {
        let mut here = (0, Recipe::random(&mut state));
        for _ in 0..rounds {
            let candidate = here.1.changed(&mut state);
            let quick = costs.of(&[], &|client| candidate.payload(client), 3);
            // Only what looks worse is looked at again, for it may have been the machine.
            let ns = if quick > here.0 {
                costs.of(&[], &|client| candidate.payload(client), 25)
            } else {
                quick
            };
            if ns > here.0 {
                here = (ns, candidate);
            }
        }
        println!("{} ns: {:?}", here.0, here.1);
        if here.0 > worst.0 {
            worst = here;
        }
    }
    // What a segment really costs, it costs each time.
    for _ in 0..5 {
        if worst.0 > bound() {
            worst.0 = worst.0.min(costs.of(&[], &|client| worst.1.payload(client), 25));
        }
    }
    assert!(worst.0 <= bound(), "{} ns: {:?}", worst.0, worst.1);
}

#[test]
#[ignore = "prints what single things cost"]
fn parts() {
    let mut costs = Costs::new();
    let p = |t: &[u8]| mqtt::publish(t, 0, b"");
    let rows: Vec<(&str, Vec<u8>, Payload)> = vec![
        ("one PINGREQ", vec![], Box::new(|_| mqtt::pingreq())),
        ("one known, first of client", vec![], Box::new(move |_| p(b"kn/own"))),
        ("one known, second", p(b"kn/own"), Box::new(move |_| p(b"kn/own"))),
        ("one known, other topic same group", p(b"kn/own"), Box::new(move |_| p(b"kn/owm"))),
        ("one new, second", p(b"kn/own"), Box::new(move |c| p(&fresh(c, 0)))),
        ("two new", p(b"kn/own"), Box::new(move |c| [p(&fresh(c, 0)), p(&fresh(c, 1))].concat())),
        (
            "three new",
            p(b"kn/own"),
            Box::new(move |c| [p(&fresh(c, 0)), p(&fresh(c, 1)), p(&fresh(c, 2))].concat()),
        ),
        ("one long 1254 l", p(b"kn/own"), Box::new(move |_| p(&vec![b'l'; 1254]))),
        ("one long 1254 x/", p(b"kn/own"), Box::new(move |_| p(&b"x/".repeat(627)))),
        ("one 168 x/", p(b"kn/own"), Box::new(move |_| p(&b"x/".repeat(84)))),
        ("one 254 l", p(b"kn/own"), Box::new(move |_| p(&vec![b'l'; 254]))),
        (
            "100 alias",
            p(b"kn/own"),
            Box::new(move |_| mqtt::publish_alias(b"", 1, b"").repeat(100)),
        ),
        (
            "100 unjudged",
            p(b"kn/own"),
            Box::new(move |c| (0..102).flat_map(|i| p(&fresh(c, i))).collect()),
        ),
    ];
    for (name, before, payload) in rows {
        println!("{name:40} {:6} ns", costs.of(&before, &payload, 40));
    }
}
