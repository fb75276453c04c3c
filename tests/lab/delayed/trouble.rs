//! Hosts, brokers and programs that come and go while connections are opened.

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use mqtt_fwd::kernel::{tcx, test_run};

use super::loss::nth_of_kind;
use super::{ROUTES, TOPICS, all_right, delayed, expect_all, sessions};
use crate::support::lab::Lab;
use crate::support::mqtt;
use crate::support::net::{assert_within, wait_for};
use crate::support::session::{SERVICE, SERVICE6, STYLES, Session, Style, enter, run_all};
use crate::support::wire::{Fate, Kind, Wire};

fn bpffs(lab: &Lab, real: u32) -> String {
    format!("/run/mqtt-fwd-lab/{}/bpf/r{real}", lab.name)
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
    assert_within(started.elapsed(), Duration::from_secs(1));
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
    assert!(lab.arrivals().is_empty());
    let status = lab.ok(
        "r1",
        &["mqtt-fwd", "host", "status", "--interface", "eth0", "--bpffs", &bpffs(&lab, 1)],
    );
    assert!(status.contains("1  CONNACKs that differed"), "{status}");
}

#[test]
fn a_broker_that_hangs_up_without_a_word_is_not_tried_again_and_again() {
    let Some(lab) = delayed(ROUTES) else { return };
    let pid =
        lab.ok("r1", &["sh", "-c", "ss -Hltnp | grep -o 'pid=[0-9]*' | head -n1 | cut -d= -f2"]);
    lab.ok("r1", &["kill", pid.trim()]);
    wait_for("the broker's end", || {
        let there = lab.exec("r1", &["sh", "-c", "ss -Hltn | grep -q :1883"]);
        (!there.status.success()).then_some(())
    });
    // What it has not read makes its end RST, what it has, FIN.
    for reads in [true, false] {
        let (lab, up) = (&lab, &std::sync::Barrier::new(2));
        let seen = std::thread::scope(|scope| {
            let broker = scope.spawn(move || {
                use std::io::Read as _;
                enter(lab, "r1");
                let listener = std::net::TcpListener::bind("0.0.0.0:1883").unwrap();
                up.wait();
                listener.set_nonblocking(true).unwrap();
                let (mut connections, end) = (0, Instant::now() + Duration::from_secs(4));
                while Instant::now() < end {
                    let Ok((mut stream, client)) = listener.accept() else {
                        std::thread::sleep(Duration::from_millis(5));
                        continue;
                    };
                    // The lab's own subscriber comes from here.
                    connections += usize::from(!client.ip().is_loopback());
                    if reads {
                        stream.set_nonblocking(false).unwrap();
                        let _ = stream.read(&mut [0; 1500]);
                    }
                }
                connections
            });
            up.wait();
            let session = Session {
                topic: "m/temp".to_owned(),
                messages: vec!["hung-up".to_owned()],
                ..Session::new("c1", SERVICE, "")
            };
            let started = Instant::now();
            let error = run_all(lab, std::slice::from_ref(&session), 1).remove(0).unwrap_err();
            assert!(error.to_string().contains("reset"), "{error}");
            assert_within(started.elapsed(), Duration::from_secs(1));
            broker.join().unwrap()
        });
        assert_eq!(seen, 1, "reads: {reads}");
    }
}

/// A session from a port of its own; `n` makes its message another's.
fn from_port(n: usize, service: &str, port: u16, style: Style) -> Session {
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

    // The client vanishes, which leaves a half-open connection at its broker.
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
        &["mqtt-fwd", "host", "status", "--interface", "eth0", "--bpffs", &bpffs(&lab, 3)],
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
        // However the test ends, the loads do.
        scopeguard::defer!(done.store(true, std::sync::atomic::Ordering::Relaxed));
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                // On a busy machine, `run` may be loading for longer than `load` waits for it.
                let output = lab.exec("lb", &["mqtt-fwd", "load"]);
                let said = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success() || said.contains("another mqtt-fwd is"), "{said}");
                let done = u32::from(output.status.success());
                loads.fetch_add(done, std::sync::atomic::Ordering::Relaxed);
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
        // Loading takes its time, through a Katran or on a busy machine.
        let begun = std::time::Instant::now();
        for batch in 0.. {
            if batch >= 3 && (loaded() >= 3 || begun.elapsed().as_secs() > 120) {
                break;
            }
            let sessions = sessions(&format!("replaced{batch}"), 300, 3, 1);
            let results = run_all(&lab, &sessions, 8);
            if results.iter().any(Result::is_err) {
                println!("{}", lab.mqtt_fwd(&["counters"]));
                println!("{}", lab.mqtt_fwd(&["events"]));
            }
            expect_all(&results);
            all.extend(sessions);
        }
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
            enter(&lab, "c1");
            let mut stream = std::net::TcpStream::connect(SERVICE).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            stream.write_all(&mqtt::connect_as(4, 2, b"", &[])).unwrap();
            stream.read_exact(&mut [0; 4]).unwrap();
            // What was kept of its CONNECT is lost.
            let map =
                format!("/run/mqtt-fwd-lab/{}/bpf/lb/mqtt_fwd/eth0/mqtt_fwd/handovers", lab.name);
            use libbpf_rs::MapCore as _;
            let map = libbpf_rs::MapHandle::from_pinned_path(map).unwrap();
            let all: Vec<_> = map.keys().collect();
            assert_eq!(all.len(), 1);
            map.delete(&all[0]).unwrap();
            let started = Instant::now();
            stream.write_all(&mqtt::publish(b"m/temp", 1, b"forgotten")).unwrap();
            let error = stream.read_exact(&mut [0; 4]).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "so it connects again");
            assert_within(started.elapsed(), Duration::from_secs(10));
        });
    });
    assert!(lab.arrivals().is_empty());
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
fn the_key_is_rotated_while_connections_open() {
    let Some(lab) = delayed(ROUTES) else { return };
    let file = format!("/run/mqtt-fwd-lab/{}/handover.key", lab.name);
    let all = sessions("rotated", 2400, 2, 1);
    let results = std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..2 {
                lab.mqtt_fwd(&["keys", "rotate", "--file", &file, "--after", "4"]);
                for real in 1..=3 {
                    let (host, bpffs) = (format!("r{real}"), bpffs(&lab, real));
                    let up = [
                        "mqtt-fwd",
                        "--log",
                        "warn",
                        "host",
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
                std::thread::sleep(Duration::from_millis(5500));
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

/// All was green while nobody new got through.
#[test]
fn a_broker_host_that_takes_no_connection_over_is_named() {
    let Some(lab) = delayed(ROUTES) else { return };
    let file = format!("/run/mqtt-fwd-lab/{}/other.key", lab.name);
    lab.mqtt_fwd(&["keys", "new", "--file", &file]);
    let bpffs = bpffs(&lab, 1);
    let up = ["mqtt-fwd", "--log", "warn", "host", "up", "--interface", "eth0", "--bpffs", &bpffs];
    let vips = ["--vip", "10.1.50.200", "--vip", "fd01:50::200", "--handover-key", &file];
    lab.ok("r1", &[&up[..], &vips].concat());
    let codes = || {
        let status = lab.exec("lb", &["mqtt-fwd", "status", "--json"]);
        let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
        let problems = status["problems"].as_array().unwrap().clone();
        problems
            .into_iter()
            .map(|p| (p["code"].as_str().unwrap().to_owned(), p["text"].to_string()))
    };
    assert_eq!(codes().count(), 0);
    std::thread::scope(|scope| {
        // Answered here, and with a CONNECT that only its broker can answer.
        for connect in [
            mqtt::connect_as(4, 2, b"stuck", &[]),
            mqtt::connect_as(4, 0xc2, b"stuck-too", &[b"user", b"password"]),
        ] {
            let lab = &lab;
            scope.spawn(move || {
                enter(lab, "c1");
                let mut stream = std::net::TcpStream::connect(SERVICE).unwrap();
                let publish = mqtt::publish(b"m/temp", 0, b"stuck");
                stream.write_all(&[connect, publish].concat()).unwrap();
                std::thread::sleep(Duration::from_secs(9));
            });
        }
        let since = Instant::now();
        let (_, text) =
            wait_for("the problem", || codes().find(|(code, _)| code == "handover_stuck"));
        assert_within(since.elapsed(), Duration::from_secs(10));
        assert!(text.contains("group a (mqtt)") && text.contains("10.1.3.201"), "{text}");
    });
    // Once the host has the key, it is over.
    let file = format!("/run/mqtt-fwd-lab/{}/handover.key", lab.name);
    let vips = ["--vip", "10.1.50.200", "--vip", "fd01:50::200", "--handover-key", &file];
    lab.ok("r1", &[&up[..], &vips].concat());
    lab.publish("c2", &["--topic", "m/temp", "--count", "1", "--qos", "1"]);
    lab.wait_received("m/temp c2 0");
}

/// What takes connections over is not the only one that looks at packets: a firewall behind it is still asked.
#[test]
fn filters_behind_the_takeover_are_asked() {
    let Some(lab) = delayed(ROUTES) else { return };
    lab.publish("c1", &["--topic", "m/hum", "--count", "1", "--qos", "1"]);
    lab.wait_received("m/hum c1 0");
    // Drops all that gets past the takeover, as a filter of the interface may.
    const SHOT: u32 = 2;
    let kind = libbpf_sys::BPF_PROG_TYPE_SCHED_CLS;
    let firewall = test_run::constant(SHOT, kind, libbpf_sys::BPF_TCX_INGRESS).unwrap();
    let attach = || {
        std::thread::scope(|scope| {
            let attach = || {
                enter(&lab, "r2");
                tcx::attach(firewall.as_fd(), "eth0", tcx::Direction::Ingress).unwrap()
            };
            scope.spawn(attach).join().unwrap()
        })
    };
    let before = lab.counter("handover");
    let link = attach();
    let connect = mqtt::connect_as(4, 2, b"walled", &[]);
    let publish = mqtt::publish(b"m/hum", 1, b"walled");
    let mut stream = std::thread::scope(|scope| {
        let open = || {
            enter(&lab, "c2");
            std::net::TcpStream::connect(SERVICE).unwrap()
        };
        scope.spawn(open).join().unwrap()
    });
    stream.write_all(&[connect, publish].concat()).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert!(lab.counter("handover") >= before);
    assert!(!lab.arrivals().contains_key("walled"), "the filter was not asked");
    drop(link);
    wait_for("the message", || lab.arrivals().contains_key("walled").then_some(()));
}
