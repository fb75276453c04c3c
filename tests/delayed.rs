//! Delayed binding in the lab: real TCP stacks, real brokers, and a wire that loses, doubles and
//! delays what it is told to.

mod support;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mqtt_fwd::broker_host::takeover;
use support::lab::{Lab, ONE_REAL_EACH, config};
use support::mqtt;
use support::net::wait_for;
use support::session::{SERVICE, SERVICE6, STYLES, Session, run_all};
use support::wire::{Fate, Kind, Seen, Wire};

/// A lab whose services bind late; `None` where this kernel cannot take connections over.
fn delayed(routes: &[(&str, &str)]) -> Option<Lab> {
    if !takeover::supported() {
        eprintln!("skipped: this kernel has no bpf_sk_assign_tcp_reqsk (Linux 6.9)");
        return None;
    }
    let text = config(ONE_REAL_EACH, routes).replace("flows = 1000", "flows = 10000");
    Some(Lab::up(&text, &["--delayed"]))
}

const ROUTES: &[(&str, &str)] = &[("m/temp", "a"), ("m/hum", "b"), ("birth/#", "any")];
/// Topics and the reals of their groups.
const TOPICS: [(&str, u32); 3] = [("m/temp", 1), ("m/hum", 2), ("m/other", 3)];

fn bpffs(lab: &Lab, real: u32) -> String {
    format!("/run/mqtt-fwd-lab/{}/bpf/r{real}", lab.name)
}

/// How often each payload arrived, and where.
fn arrivals(lab: &Lab) -> BTreeMap<String, Vec<u32>> {
    let mut all: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for (real, lines) in lab.received() {
        for line in lines {
            let (_, payload) = line.split_once(' ').unwrap_or((&line, ""));
            all.entry(payload.to_owned()).or_default().push(real);
        }
    }
    all
}

/// Each message of these sessions is where its topic belongs: once, or with QoS 1 at least once.
fn all_right(lab: &Lab, sessions: &[Session]) {
    let wanted: usize = sessions.iter().map(|s| s.messages.len()).sum();
    let all = wait_for(&format!("{wanted} messages at the brokers"), || {
        let all = arrivals(lab);
        let there = sessions.iter().flat_map(|s| &s.messages).filter(|m| all.contains_key(*m));
        (there.count() == wanted).then_some(all)
    });
    for session in sessions {
        let real = TOPICS.iter().find(|(topic, _)| *topic == session.topic).unwrap().1;
        for message in &session.messages {
            let at = &all[message];
            assert!(at.iter().all(|r| *r == real), "{message}: {at:?} instead of {real}");
            assert!(session.qos == 1 || at.len() == 1, "{message} {} times", at.len());
        }
    }
}

/// Sessions of all styles and topics, IPv4 and IPv6, with and without client ids.
fn sessions(tag: &str, count: usize, messages: usize, qos: u8) -> Vec<Session> {
    (0..count)
        .map(|i| {
            let service = if i % 2 == 0 { SERVICE } else { SERVICE6 };
            let (topic, _) = TOPICS[i % TOPICS.len()];
            // A third has no id; the others are known the next time.
            let id = if i % 3 == 2 { String::new() } else { format!("d{qos}-{i}") };
            Session {
                style: STYLES[(i / 3) % 3],
                topic: topic.to_owned(),
                messages: (0..messages).map(|m| format!("{tag}-{i}-{m}")).collect(),
                qos,
                ..Session::new("c1", service, &id)
            }
        })
        .collect()
}

fn expect_all(results: &[std::io::Result<()>]) {
    let failed: Vec<_> =
        results.iter().enumerate().filter_map(|(i, r)| r.as_ref().err().map(|e| (i, e))).collect();
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn every_message_of_every_kind_of_client_is_where_its_topic_belongs_once() {
    let Some(lab) = delayed(ROUTES) else { return };
    for (tag, qos) in [("zero", 0), ("one", 1), ("zero-again", 0), ("one-again", 1)] {
        let sessions = sessions(tag, 150, 5, qos);
        expect_all(&run_all(&lab, &sessions, 8));
        all_right(&lab, &sessions);
    }
    let counters = lab.mqtt_fwd(&["counters"]);
    for way in ["bound_message", "bound_client_id", "bound_answered"] {
        assert!(counters.contains(way), "{counters}");
    }
    assert!(!counters.contains("mispredicted"), "{counters}");
}

/// The nth segment of a kind of each connection.
fn nth_of_kind(
    kind: Kind,
    wrapped: bool,
    fate: Fate,
) -> Box<dyn FnMut(Option<Seen>) -> Fate + Send> {
    let mut met = HashSet::new();
    Box::new(move |seen| match seen {
        Some(s) if s.kind == kind && s.wrapped == wrapped && met.insert(s.port) => fate,
        _ => Fate::Pass,
    })
}

#[test]
fn each_step_may_be_lost_doubled_or_late() {
    let Some(lab) = delayed(ROUTES) else { return };
    type Rule = Box<dyn FnMut(Option<Seen>) -> Fate + Send>;
    let rules: [Arc<Mutex<Rule>>; 2] =
        std::array::from_fn(|_| Arc::new(Mutex::new(Box::new(|_| Fate::Pass) as Rule)));
    let by = |rule: &Arc<Mutex<Rule>>| -> Rule {
        let rule = rule.clone();
        Box::new(move |seen| (rule.lock().unwrap())(seen))
    };
    let _client = Wire::of_client(&lab, "c1", by(&rules[0]));
    let _balancer = Wire::of_balancer(&lab, by(&rules[1]));
    let steps = [
        ("SYN", 0, Kind::Syn, false),
        ("SYN-ACK", 0, Kind::SynAck, false),
        ("ACK", 0, Kind::Ack, false),
        ("CONNECT", 0, Kind::Connect, false),
        ("CONNECT and more", 0, Kind::ConnectAndMore, false),
        ("CONNACK", 0, Kind::Connack, false),
        ("PUBLISH", 0, Kind::Publish, false),
        ("PUBACK", 0, Kind::Puback, false),
        ("FIN", 0, Kind::Fin, false),
        ("CONNECT to the broker", 1, Kind::Connect, true),
        ("hand-over", 1, Kind::ConnectAndMore, true),
        ("PUBLISH to the broker", 1, Kind::Publish, true),
        ("ACK to the broker", 1, Kind::Ack, true),
    ];
    let fates = [
        ("lost", Fate::Lost),
        ("doubled", Fate::Twice),
        ("late", Fate::Late(Duration::from_millis(40))),
    ];
    for (step, wire, kind, wrapped) in steps {
        for (what, fate) in fates {
            *rules[wire].lock().unwrap() = nth_of_kind(kind, wrapped, fate);
            let mut all = Vec::new();
            for qos in [0, 1] {
                all.extend(sessions(&format!("{kind:?}{wrapped}{what}{qos}"), 18, 3, qos));
            }
            let results = run_all(&lab, &all, 36);
            *rules[wire].lock().unwrap() = Box::new(|_| Fate::Pass);
            for (session, result) in all.iter().zip(&results) {
                assert!(result.is_ok(), "{step} {what}: {result:?} {session:?}");
            }
            all_right(&lab, &all);
        }
    }
}

#[test]
fn a_thousand_connections_through_random_loss() {
    let Some(lab) = delayed(ROUTES) else { return };
    let percent = Arc::new(Mutex::new(0u32));
    // What happened, should something go wrong.
    type History = Arc<Mutex<Vec<(Instant, u64, Seen, Fate)>>>;
    let history = History::default();
    let rule = |percent: &Arc<Mutex<u32>>, mut state: u64| {
        let (percent, history, wire) = (percent.clone(), history.clone(), state);
        let mut fate = move || {
            // xorshift (Marsaglia): the same losses each time.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            match state % 300 {
                n if n < u64::from(*percent.lock().unwrap()) * 3 => {
                    [Fate::Lost, Fate::Lost, Fate::Twice, Fate::Late(Duration::from_millis(20))]
                        [(state >> 32) as usize % 4]
                }
                _ => Fate::Pass,
            }
        };
        Box::new(move |seen: Option<Seen>| {
            let fate = fate();
            if let Some(seen) = seen {
                history.lock().unwrap().push((Instant::now(), wire, seen, fate));
            }
            fate
        })
    };
    let _client = Wire::of_client(&lab, "c1", rule(&percent, 1883));
    let _balancer = Wire::of_balancer(&lab, rule(&percent, 8883));
    for (share, count) in [(1, 1000), (5, 400), (10, 200)] {
        for round in 0..2 {
            *percent.lock().unwrap() = share;
            let mut all = sessions(&format!("loss{share}q1r{round}"), count / 4, 3, 1);
            all.extend(sessions(&format!("loss{share}q0r{round}"), count / 4, 3, 0));
            let results = run_all(&lab, &all, 64);
            *percent.lock().unwrap() = 0;
            for error in results.iter().filter_map(|r| r.as_ref().err()) {
                let text = error.to_string();
                let port = text.strip_prefix("port ").and_then(|t| t.split(':').next());
                for (at, wire, seen, fate) in history.lock().unwrap().iter() {
                    if port.is_some_and(|port| port == seen.port.to_string()) {
                        println!("{:?} {wire} {fate:?} {seen:?}", at.elapsed());
                    }
                }
            }
            expect_all(&results);
            all_right(&lab, &all);
            history.lock().unwrap().clear();
        }
        println!("{share} %: {count} connections, all messages right");
    }
}

#[test]
fn clients_that_say_nothing_after_connect_get_a_broker_and_their_will_is_published() {
    let Some(lab) = delayed(&[("m/temp", "a"), ("will/#", "default")]) else { return };
    let connect = mqtt::connect_as(4, 0x06, b"silent", &[b"will/silent", b"gone"]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use std::io::{Read as _, Write as _};
            support::session::enter(&lab, "c1");
            let mut stream = std::net::TcpStream::connect(SERVICE).unwrap();
            stream.write_all(&connect).unwrap();
            let mut answer = [0; 4];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer, [0x20, 2, 0, 0]);
            wait_for("the silent client's broker", || {
                lab.mqtt_fwd(&["flows"]).contains("silent").then_some(())
            });
            // The broker's own CONNACK is what the balancer said: TCP takes it for a repetition.
            stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            assert!(stream.read(&mut answer).is_err());
            stream.write_all(&mqtt::pingreq()).unwrap();
            stream.read_exact(&mut answer[..2]).unwrap();
            assert_eq!(answer[..2], [0xd0, 0]);
            drop(stream); // without DISCONNECT: its will
        });
    });
    assert_eq!(lab.wait_received("will/silent gone"), 3);
    // And one that hangs up while nobody has it.
    let hung_up = mqtt::connect_as(4, 0x06, b"hung-up", &[b"will/hung-up", b"gone"]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use std::io::{Read as _, Write as _};
            support::session::enter(&lab, "c1");
            let mut stream = std::net::TcpStream::connect(SERVICE6).unwrap();
            stream.write_all(&hung_up).unwrap();
            stream.read_exact(&mut [0; 4]).unwrap();
        });
    });
    assert_eq!(lab.wait_received("will/hung-up gone"), 3);
}

#[test]
fn a_refusal_is_not_hidden() {
    let Some(lab) = delayed(ROUTES) else { return };
    // A broker that lets nobody in, on the host of group a.
    let conf = format!("/run/mqtt-fwd-lab/{}/closed.conf", lab.name);
    std::fs::write(&conf, "listener 1883\nallow_anonymous false\nuser root\n").unwrap();
    let pid =
        lab.ok("r1", &["sh", "-c", "ss -Hltnp | grep -o 'pid=[0-9]*' | head -n1 | cut -d= -f2"]);
    lab.ok("r1", &["kill", pid.trim()]);
    wait_for("the open broker's end", || {
        let there = lab.exec("r1", &["sh", "-c", "ss -Hltn | grep -q :1883"]);
        (!there.status.success()).then_some(())
    });
    // Nobody listens: the client is told at once, though the balancer has answered its CONNECT.
    let session = Session {
        topic: "m/temp".to_owned(),
        messages: vec!["nobody".to_owned()],
        ..Session::new("c1", SERVICE, "")
    };
    let started = Instant::now();
    let error = run_all(&lab, std::slice::from_ref(&session), 1).remove(0).unwrap_err();
    assert!(error.to_string().contains("reset"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    lab.ok("r1", &["mosquitto", "-d", "-c", &conf]);
    wait_for("the closed broker", || {
        let there = lab.exec("r1", &["sh", "-c", "ss -Hltn | grep -q :1883"]);
        there.status.success().then_some(())
    });
    let session = Session {
        topic: "m/temp".to_owned(),
        messages: vec!["refused".to_owned()],
        ..Session::new("c1", SERVICE, "intruder")
    };
    // The first time the balancer answered; from then on it knows the client's group.
    for expected in ["reset", "[20, 02, 00, 05]"] {
        let error = run_all(&lab, std::slice::from_ref(&session), 1).remove(0).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    assert!(arrivals(&lab).is_empty());
    let status = lab.ok(
        "r1",
        &["mqtt-fwd", "real", "status", "--interface", "eth0", "--bpffs", &bpffs(&lab, 1)],
    );
    assert!(status.contains("1  CONNACKs that differed"), "{status}");
}

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
        let lab = Lab::up(&with_affinity(affinity), &["--delayed"]);
        let mut all = Vec::new();
        for round in 0..4 {
            for i in 0..30 {
                all.push(Session {
                    style: STYLES[(i + round) % 3],
                    topic: format!("m/{}", (i + round) % 7),
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
            let at = arrivals(&lab);
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
        let used: HashSet<u32> = reals.values().flatten().copied().collect();
        assert_eq!(used.len(), 3, "{affinity}: all brokers of the group are used: {used:?}");
        assert!(!lab.mqtt_fwd(&["counters"]).contains("mispredicted"));
    }
}

#[test]
fn another_tcp_than_linux_with_small_windows_and_late_acknowledgements() {
    use support::other_stack::{Shape, converse};
    let Some(lab) = delayed(ROUTES) else { return };
    let connect = mqtt::connect_as(4, 2, b"smol", &[]);
    let known = mqtt::connect_as(4, 2, b"smol-again", &[]);
    let mut port = 20_000;
    let mut wanted = Vec::new();
    for window in [200, 600, 4096, 100_000] {
        for (ack_delay, nagle) in [(None, false), (Some(40), true), (Some(200), false)] {
            for v6 in [false, true] {
                let own: (std::net::IpAddr, std::net::IpAddr) = if v6 {
                    ("fd01:1::77".parse().unwrap(), "fd01:1::101".parse().unwrap())
                } else {
                    ("10.1.1.77".parse().unwrap(), "10.1.1.101".parse().unwrap())
                };
                let service: std::net::SocketAddr =
                    if v6 { SERVICE6 } else { SERVICE }.parse().unwrap();
                for (style, first) in [&connect, &known].into_iter().enumerate() {
                    port += 1;
                    let payloads = [format!("{port}-0"), format!("{port}-1")];
                    let publish = |p: &String| mqtt::publish(b"m/hum", 1, p.as_bytes());
                    let (one, two) = (publish(&payloads[0]), publish(&payloads[1]));
                    let together = [&first[..], &one].concat();
                    let bye = mqtt::disconnect();
                    // Waiting for CONNACK, or all at once.
                    let pieces: &[(&[u8], usize)] = if style == 0 {
                        &[(first, 4), (&one, 4), (&two, 4), (&bye, 0)]
                    } else {
                        &[(&together, 8), (&two, 4), (&bye, 0)]
                    };
                    let shape = Shape { window, ack_delay, nagle };
                    let service = (service.ip(), service.port());
                    let got = std::thread::scope(|scope| {
                        let talk = || converse(&lab, "c1", own, service, port, shape, pieces);
                        scope.spawn(talk).join().unwrap()
                    });
                    let expected =
                        [&[0x20, 2, 0, 0], [0x40, 2, 0, 7].repeat(2).as_slice()].concat();
                    assert_eq!(got.as_deref(), Ok(&expected[..]), "{shape:?} {service:?}");
                    wanted.extend(payloads);
                }
            }
        }
    }
    let all = arrivals(&lab);
    for payload in wanted {
        assert!(
            all.get(&payload).is_some_and(|at| at.iter().all(|r| *r == 2)),
            "{payload}: {all:?}"
        );
    }
}

/// A session from a port of its own; `n` makes its message another's.
fn from_port(n: usize, service: &str, port: u16, style: support::session::Style) -> Session {
    Session {
        style,
        topic: TOPICS[n % 3].0.to_owned(),
        messages: vec![format!("port-{n}")],
        port: Some(port),
        ..Session::new("c1", service, "")
    }
}

#[test]
fn old_ports_are_used_again_over_time_wait_and_dead_connections() {
    let Some(lab) = delayed(ROUTES) else { return };
    let mut all = Vec::new();
    // The broker closes first and keeps TIME_WAIT; then the same port, at once.
    for n in 0..24 {
        let service = if n % 2 == 0 { SERVICE } else { SERVICE6 };
        all.push(from_port(n, service, 30_001, STYLES[(n / 2) % 3]));
    }
    // Where the topic, and with it the broker, stays the same.
    for n in 0..12 {
        let service = if n % 2 == 0 { SERVICE } else { SERVICE6 };
        all.push(from_port(100 + 3 * n, service, 30_002, STYLES[(n / 2) % 3]));
    }
    expect_all(&run_all(&lab, &all, 1));
    all_right(&lab, &all);

    // The client vanishes: its broker has a connection that nobody is at the other end of.
    let _wire = Wire::of_client(
        &lab,
        "c1",
        Box::new(|seen| match seen {
            Some(s) if s.kind == Kind::Rst && s.from_client => Fate::Lost,
            _ => Fate::Pass,
        }),
    );
    let mut again = Vec::new();
    for n in 0..18 {
        let service = if n % 2 == 0 { SERVICE } else { SERVICE6 };
        let vanishes = n % 4 < 2;
        let port = 30_003;
        again.push(Session {
            vanishes,
            ..from_port(200 + 3 * n, service, port, STYLES[(n / 2) % 3])
        });
    }
    expect_all(&run_all(&lab, &again, 1));
    all_right(&lab, &again);
    let status = lab.exec(
        "r3",
        &["mqtt-fwd", "real", "status", "--interface", "eth0", "--bpffs", &bpffs(&lab, 3)],
    );
    println!("{}", String::from_utf8_lossy(&status.stdout));
}

#[test]
fn programs_may_be_replaced_and_the_sidecar_killed_while_connections_open() {
    let Some(lab) = delayed(ROUTES) else { return };
    let loads = std::sync::atomic::AtomicU32::new(0);
    let loaded = || loads.load(std::sync::atomic::Ordering::Relaxed);
    let done = std::sync::atomic::AtomicBool::new(false);
    let mut all = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                lab.mqtt_fwd(&["load"]);
                loads.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        });
        scope.spawn(|| {
            let sidecar = |what: &str| {
                let output = lab.script("sidecar").arg(what).output().unwrap();
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            };
            sidecar("kill");
            sidecar("start");
        });
        // Loading through a Katran takes its time.
        for batch in 0..30 {
            if batch >= 3 && loaded() >= 3 {
                break;
            }
            let sessions = sessions(&format!("replaced{batch}"), 300, 3, 1);
            expect_all(&run_all(&lab, &sessions, 8));
            all.extend(sessions);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert!(loaded() >= 3, "replaced {} times only", loaded());
    all_right(&lab, &all);
}

#[test]
fn a_full_accept_queue_delays_connections_and_loses_nothing() {
    let Some(lab) = delayed(ROUTES) else { return };
    let pid =
        lab.ok("r1", &["sh", "-c", "ss -Hltnp | grep -o 'pid=[0-9]*' | head -n1 | cut -d= -f2"]);
    lab.ok("r1", &["kill", pid.trim()]);
    // A listener that takes nobody for a while; then it answers as a broker would, and writes down.
    let script = format!(
        "import socket,threading,time\n\
         s=socket.create_server(('',1883),backlog=1)\n\
         open('/run/mqtt-fwd-lab/{name}/listens','w')\n\
         time.sleep(2)\n\
         def serve(c):\n    \
           got=b''\n    \
           while b'queue-' not in got: got+=c.recv(1000)\n    \
           c.sendall(bytes([0x20,2,0,0,0x40,2,0,7])); c.recv(100); c.close()\n    \
           open('/run/mqtt-fwd-lab/{name}/took','a').write(str(got.count(b'queue-'))+'\\n')\n\
         while True:\n    c,_=s.accept()\n    threading.Thread(target=serve,args=(c,)).start()\n",
        name = lab.name
    );
    let file = format!("/run/mqtt-fwd-lab/{}/slow.py", lab.name);
    std::fs::write(&file, script).unwrap();
    lab.ok("r1", &["sh", "-c", &format!("python3 {file} >/dev/null 2>&1 &")]);
    wait_for("the slow listener", || {
        std::fs::exists(format!("/run/mqtt-fwd-lab/{}/listens", lab.name)).unwrap().then_some(())
    });
    let all: Vec<Session> = (0..6)
        .map(|i| Session {
            style: STYLES[i % 3],
            topic: "m/temp".to_owned(),
            messages: vec![format!("queue-{i}")],
            ..Session::new("c1", SERVICE, "")
        })
        .collect();
    expect_all(&run_all(&lab, &all, 6));
    let took = wait_for("all of them", || {
        let took = std::fs::read_to_string(format!("/run/mqtt-fwd-lab/{}/took", lab.name)).ok()?;
        (took.lines().count() >= 6).then_some(took)
    });
    assert!(took.lines().all(|n| n == "1") && took.lines().count() == 6, "{took}");
}

#[test]
fn a_balancer_that_forgot_its_client_lets_it_be_told() {
    let Some(lab) = delayed(ROUTES) else { return };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use std::io::{Read as _, Write as _};
            support::session::enter(&lab, "c1");
            let mut stream = std::net::TcpStream::connect(SERVICE).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            stream.write_all(&mqtt::connect_as(4, 2, b"", &[])).unwrap();
            stream.read_exact(&mut [0; 4]).unwrap();
            // What was kept of its CONNECT is lost.
            let map =
                format!("/run/mqtt-fwd-lab/{}/bpf/lb/mqtt_fwd/eth0/mqtt_fwd/handovers", lab.name);
            let dump = lab.ok("lb", &["bpftool", "-j", "map", "dump", "pinned", &map]);
            let dump: serde_json::Value = serde_json::from_str(&dump).unwrap();
            for entry in dump.as_array().unwrap() {
                let key: Vec<&str> =
                    entry["key"].as_array().unwrap().iter().map(|b| b.as_str().unwrap()).collect();
                let delete =
                    [&["bpftool", "map", "delete", "pinned", &map, "key", "hex"][..], &key];
                let hex: Vec<String> =
                    delete.concat().iter().map(|w| w.trim_start_matches("0x").to_owned()).collect();
                let hex: Vec<&str> = hex.iter().map(String::as_str).collect();
                lab.ok("lb", &hex);
            }
            let started = Instant::now();
            stream.write_all(&mqtt::publish(b"m/temp", 1, b"forgotten")).unwrap();
            let error = stream.read_exact(&mut [0; 4]).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "so it connects anew");
            assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
        });
    });
    assert!(arrivals(&lab).is_empty());
}

#[test]
fn an_old_flow_does_not_take_what_overtakes_connect_on_its_ports() {
    let Some(lab) = delayed(ROUTES) else { return };
    let first: Vec<Session> =
        (0..6).map(|n| from_port(n, SERVICE, 31_000 + n as u16, STYLES[0])).collect();
    expect_all(&run_all(&lab, &first, 1));
    // The same ports again; each CONNECT is lost once, and what was written behind it is not.
    let _wire = Wire::of_balancer(&lab, nth_of_kind(Kind::Connect, false, Fate::Lost));
    let again: Vec<Session> = (0..6)
        .map(|n| Session {
            messages: (0..4).map(|m| format!("again-{n}-{m}")).collect(),
            ..from_port(n, SERVICE, 31_000 + n as u16, STYLES[1])
        })
        .collect();
    expect_all(&run_all(&lab, &again, 1));
    all_right(&lab, &again);
}

#[test]
fn every_set_of_tcp_options() {
    let Some(lab) = delayed(ROUTES) else { return };
    for n in 0..8 {
        let on = |bit: u32| u32::from(n >> bit & 1 == 1);
        let settings = format!(
            "sysctl -qw net.ipv4.tcp_timestamps={} net.ipv4.tcp_sack={} \
             net.ipv4.tcp_window_scaling={}",
            on(0),
            on(1),
            on(2)
        );
        lab.ok("c1", &["sh", "-c", &settings]);
        let all: Vec<Session> =
            [sessions(&format!("o{n}q0"), 18, 3, 0), sessions(&format!("o{n}q1"), 18, 3, 1)]
                .concat();
        expect_all(&run_all(&lab, &all, 4));
        all_right(&lab, &all);
    }
}

#[test]
fn the_key_is_rotated_while_connections_open() {
    let Some(lab) = delayed(ROUTES) else { return };
    let file = format!("/run/mqtt-fwd-lab/{}/handover.key", lab.name);
    let all = sessions("rotated", 2400, 2, 1);
    let results = std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..2 {
                lab.mqtt_fwd(&["keys", "rotate", "--file", &file, "--after", "2"]);
                for real in 1..=3 {
                    let (host, bpffs) = (format!("r{real}"), bpffs(&lab, real));
                    let up = [
                        "mqtt-fwd",
                        "--log",
                        "warn",
                        "real",
                        "up",
                        "--interface",
                        "eth0",
                        "--bpffs",
                        &bpffs,
                        "--vip",
                        "10.1.50.200",
                        "--vip",
                        "fd01:50::200",
                        "--handover-key",
                        &file,
                    ];
                    lab.ok(&host, &up);
                }
                std::thread::sleep(Duration::from_millis(3500));
            }
        });
        let mut results = Vec::new();
        for part in all.chunks(60) {
            results.extend(run_all(&lab, part, 4));
            std::thread::sleep(Duration::from_millis(120));
        }
        results
    });
    expect_all(&results);
    all_right(&lab, &all);
    let shown = lab.mqtt_fwd(&["keys", "show", "--file", &file]);
    assert!(shown.contains("in use") && shown.contains('3'), "{shown}");
}

#[test]
fn connect_in_pieces_and_connect_of_two_kilobytes() {
    let Some(lab) = delayed(ROUTES) else { return };
    let will = vec![b'w'; 1800];
    let large = mqtt::connect_as(4, 0x06, b"large", &[b"m/other", &will]);
    let small = mqtt::connect_as(4, 2, b"dribble", &[]);
    for service in [SERVICE, SERVICE6] {
        for (connect, piece) in [(&large, 4000), (&large, 100), (&small, 1)] {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    use std::io::{Read as _, Write as _};
                    support::session::enter(&lab, "c1");
                    let mut stream = std::net::TcpStream::connect(service).unwrap();
                    stream.set_nodelay(true).unwrap();
                    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                    for part in connect.chunks(piece) {
                        stream.write_all(part).unwrap();
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    let mut answer = [0; 4];
                    stream.read_exact(&mut answer).unwrap();
                    assert_eq!(answer, [0x20, 2, 0, 0]);
                    // Of the default group, where it is.
                    stream.write_all(&mqtt::publish(b"m/other", 1, b"pieces")).unwrap();
                    stream.read_exact(&mut answer).unwrap();
                    assert_eq!(answer, [0x40, 2, 0, 7]);
                    stream.write_all(&mqtt::disconnect()).unwrap();
                });
            });
        }
    }
    wait_for("all of them", || (arrivals(&lab).get("pieces")? == &vec![3; 6]).then_some(()));
    let why = lab.mqtt_fwd(&["counters"]);
    assert!(why.contains("why_cut"), "{why}");
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
            let at = arrivals(&lab);
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
