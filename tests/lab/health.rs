//! Health checks, draining and metrics, with real brokers and numbered messages.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::lab::{Lab, config};
use crate::support::net::{assert_within, wait_for};

/// So many that they are at both of two brokers, but for once in 2,000 times.
const PUBLISHERS: usize = 12;

const CHECK: &str = "health_check = { type = \"mqtt\", interval = \"300ms\", timeout = \"200ms\", rise = 2, \
                     fall = 2 }";

fn lab() -> Lab {
    lab_with(CHECK)
}

fn lab_with(check: &str) -> Lab {
    let text = config(&[("a", 1, &[201, 202]), ("default", 250, &[203])], &[("sensor/a", "a")]);
    let text = text
        .replace("default_group = \"default\"", &format!("default_group = \"default\"\n{check}"));
    let text = format!("metrics = \"127.0.0.1:9469\"\n{text}");
    let lab = Lab::up(&text, &[]);
    // So that the connections below are right from the start.
    lab.publish("c1", &["--topic", "sensor/a", "--qos", "1", "--count", "2"]);
    wait_state(&lab, "10.1.3.201", "up");
    lab
}

fn states(lab: &Lab) -> BTreeMap<String, String> {
    let rows: serde_json::Value =
        serde_json::from_str(&lab.mqtt_fwd(&["reals", "--json"])).unwrap();
    let text = |row: &serde_json::Value, key: &str| row[key].as_str().unwrap().to_owned();
    rows["reals"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| (text(row, "real"), text(row, "state")))
        .collect()
}

fn wait_state(lab: &Lab, real: &str, state: &str) {
    wait_for(&format!("{real} to be {state}: {:?}", states(lab)), || {
        (states(lab)[real] == state).then_some(())
    });
}

/// Waits until the balancer gives a real of group a no new connections: `reals` has what checks find, before that.
fn wait_out_of_use(lab: &Lab, real: &str) {
    wait_for(&format!("{real} to be out of use"), || {
        let groups: serde_json::Value =
            serde_json::from_str(&lab.mqtt_fwd(&["groups", "--json"])).unwrap();
        let group =
            groups["groups"].as_array().unwrap().iter().find(|g| {
                g["group"] == "a" && g["vip"].as_str().unwrap().starts_with("10.1.50.1:")
            });
        let reals = group.expect("group a")["reals"].as_array().unwrap();
        reals.iter().all(|r| r["address"] != real || r["weight"] == 0).then_some(())
    });
}

fn wait_status(lab: &Lab, text: &str) {
    wait_for(&format!("status to say {text:?}"), || {
        let status = lab.exec("lb", &["mqtt-fwd", "status"]);
        let status = String::from_utf8(status.stdout).unwrap();
        (status.contains(text) && status.contains("as configured")).then_some(())
    });
}

fn broker(lab: &Lab, real: u32, signal: &str) {
    let pattern = format!("mosquitto -c /run/mqtt-fwd-lab/{}/r{real}.conf", lab.name);
    Command::new("pkill").args([signal, "-f", &pattern]).status().unwrap();
}

/// Opens `count` connections with a message each. Returns how many arrived at each real.
fn spread(lab: &Lab, name: &str, count: usize) -> BTreeMap<u32, usize> {
    for i in 0..count {
        let id = format!("{name}{i}");
        lab.publish("c1", &["--id", &id, "--topic", "sensor/a", "--qos", "1", "--count", "1"]);
    }
    let mut went = BTreeMap::new();
    wait_for("the messages", || {
        let arrivals = lab.arrivals();
        let of: Vec<_> = (0..count).map(|i| arrivals.get(&format!("{name}{i} 0"))).collect();
        let all = of.iter().flatten().count() == count;
        if all {
            for reals in of.into_iter().flatten() {
                assert_eq!(reals.len(), 1, "{arrivals:?}");
                *went.entry(reals[0]).or_default() += 1;
            }
        }
        all.then_some(())
    });
    went
}

fn metric(lab: &Lab, line: &str) -> Option<String> {
    let text = lab.ok("lb", &["curl", "-s", "http://127.0.0.1:9469/metrics"]);
    text.lines().find_map(|l| l.strip_prefix(line)).map(|value| value.trim().to_owned())
}

#[test]
fn a_dead_broker_gets_no_connections_and_one_that_is_back_does() {
    let lab = lab();
    let before = spread(&lab, "before", 12);
    assert_eq!(before.keys().copied().collect::<Vec<_>>(), [1, 2], "{before:?}");

    // It still accepts connections, as a broker that hangs does: only an MQTT check notices.
    broker(&lab, 1, "-STOP");
    let died = Instant::now();
    wait_state(&lab, "10.1.3.201", "down");
    wait_out_of_use(&lab, "10.1.3.201");
    // interval × fall + 1 s
    assert_within(died.elapsed(), Duration::from_millis(1600));
    wait_status(&lab, "real 10.1.3.201 of group a (mqtt) is down: no answer from");
    let during = spread(&lab, "during", 12);
    assert_eq!(during, BTreeMap::from([(2, 12)]));
    let up = "mqtt_fwd_real_up{service=\"mqtt\",group=\"a\",real=\"10.1.3.201\"}";
    wait_for("the metric", || (metric(&lab, up).as_deref() == Some("0.0")).then_some(()));

    broker(&lab, 1, "-CONT");
    wait_state(&lab, "10.1.3.201", "up");
    let after = spread(&lab, "after", 12);
    assert_eq!(after.keys().copied().collect::<Vec<_>>(), [1, 2], "{after:?}");

    // All of a group at once: it keeps them, since checks may be wrong.
    broker(&lab, 1, "-STOP");
    broker(&lab, 2, "-STOP");
    wait_for("both to be down", || {
        let now = states(&lab);
        let both = ["10.1.3.201", "10.1.3.202"];
        both.iter().all(|real| now[*real] == "down_in_use").then_some(())
    });
    broker(&lab, 1, "-CONT");
    broker(&lab, 2, "-CONT");
    wait_state(&lab, "10.1.3.202", "up");
}

#[test]
fn draining_loses_no_message_and_moves_no_established_connection() {
    let lab = lab();
    let enough = format!("/run/mqtt-fwd-lab/{}/enough", lab.name);
    let sent = std::thread::scope(|scope| {
        let running: Vec<_> = (0..PUBLISHERS)
            .map(|i| {
                let (lab, enough) = (&lab, enough.clone());
                scope.spawn(move || {
                    let id = format!("steady{i}");
                    let args = ["--id", &id, "--topic", "sensor/a", "--until", &enough];
                    lab.publish_counted("c1", &args)
                })
            })
            .collect();
        // However the test ends, the publishers do.
        let ended = scopeguard::guard((), |()| std::fs::write(&enough, "").unwrap());
        wait_for("both brokers", || {
            let received = lab.received();
            let of = |real| received.get(&real).map_or(0, Vec::len);
            (of(1) > 20 && of(2) > 20).then_some(())
        });
        // It answers once the balancer has it.
        lab.mqtt_fwd(&["drain", "10.1.3.201"]);
        assert_eq!(spread(&lab, "drained", 8), BTreeMap::from([(2, 8)]));
        let before = lab.received()[&1].len();
        wait_for("what is established to go on", || {
            (lab.received()[&1].len() > before + 20).then_some(())
        });
        // A restart of `run` does not undrain.
        for what in ["stop", "start"] {
            assert!(lab.script("sidecar").arg(what).status().unwrap().success());
        }
        wait_for("the state to be kept", || {
            let reals = lab.exec("lb", &["mqtt-fwd", "reals"]);
            String::from_utf8(reals.stdout).unwrap().contains("drained").then_some(())
        });
        let refused = lab.exec("lb", &["mqtt-fwd", "drain", "10.1.3.202"]);
        let text = String::from_utf8(refused.stderr).unwrap();
        assert!(text.contains("group a (mqtt) has no other real"), "{text}");
        lab.mqtt_fwd(&["undrain", "10.1.3.201"]);
        // Of eight, all may go to one of the two by chance; each round has names of its own.
        let mut round = 0;
        wait_for("connections to both", || {
            round += 1;
            (spread(&lab, &format!("undrained{round}-"), 8).len() == 2).then_some(())
        });
        drop(ended);
        running.into_iter().map(|p| p.join().unwrap()).collect::<Vec<_>>()
    });
    let arrivals = lab.arrivals();
    for (i, (connections, count)) in sent.into_iter().enumerate() {
        assert_eq!(connections, 1);
        for n in 0..count {
            let reals = &arrivals[&format!("steady{i} {n}")];
            assert_eq!(reals.len(), 1, "steady{i} {n}: {reals:?}");
        }
    }
}

/// Publishers, QoS 1, over what happens meanwhile. Returns messages and connections of each, once all arrived.
fn publish_while(lab: &Lab, happens: impl FnOnce()) -> Vec<(usize, u64)> {
    let enough = format!("/run/mqtt-fwd-lab/{}/enough", lab.name);
    let published: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..PUBLISHERS)
            .map(|i| {
                let (lab, enough) = (&lab, enough.clone());
                scope.spawn(move || {
                    let id = format!("steady{i}");
                    let qos = ["--qos", "1", "--timeout", "60"];
                    let args = ["--id", &id, "--topic", "sensor/a", "--until", &enough];
                    lab.publish_counted("c1", &[&args[..], &qos].concat())
                })
            })
            .collect();
        // However the test ends, the publishers do.
        let ended = scopeguard::guard((), |()| std::fs::write(&enough, "").unwrap());
        wait_for("both brokers", || {
            let received = lab.received();
            let of = |real| received.get(&real).map_or(0, Vec::len);
            (of(1) > 20 && of(2) > 20).then_some(())
        });
        happens();
        drop(ended);
        running.into_iter().map(|p| p.join().unwrap()).collect()
    });
    let arrivals = lab.arrivals();
    for (i, (_, count)) in published.iter().enumerate() {
        for n in 0..*count {
            assert!(arrivals.contains_key(&format!("steady{i} {n}")), "steady{i} {n} of {count}");
        }
    }
    published
}

/// How many connections a real's broker has.
fn established(lab: &Lab, real: u32) -> usize {
    let sockets = ["ss", "-Htn", "state", "established", "sport = :1883"];
    let of_clients = |line: &&str| line.contains("10.1.50.200");
    lab.ok(&format!("r{real}"), &sockets).lines().filter(of_clients).count()
}

#[test]
fn clients_of_a_dead_host_are_reset_and_come_to_another() {
    let lab = lab_with(&CHECK.replace("fall = 2", "fall = 2, on_down = \"reset\""));
    let mut at_2 = 0;
    let published = publish_while(&lab, || {
        // Not a word from it any more: without this, its clients would wait for as long as TCP repeats.
        lab.ok("r1", &["ip", "link", "set", "eth0", "down"]);
        at_2 = lab.received()[&2].len();
        let died = Instant::now();
        wait_for("all publishers at the other", || {
            (established(&lab, 2) == PUBLISHERS).then_some(())
        });
        assert_within(died.elapsed(), Duration::from_secs(8));
        wait_for("their messages", || (lab.received()[&2].len() > at_2 + 60).then_some(()));
    });
    // Those that were at the other one from the beginning were not touched.
    let moved = published.iter().filter(|(connections, _)| *connections > 1).count();
    assert!((1..PUBLISHERS).contains(&moved), "{published:?}");
}

#[test]
fn a_broker_that_is_back_gets_its_share_step_by_step() {
    let lab = lab_with(&CHECK.replace("fall = 2", "fall = 2, slow_start = \"12s\""));
    let groups = || lab.mqtt_fwd(&["groups"]);
    assert!(!groups().contains("weight"), "{}", groups());
    broker(&lab, 1, "-STOP");
    wait_state(&lab, "10.1.3.201", "down");
    broker(&lab, 1, "-CONT");
    wait_state(&lab, "10.1.3.201", "up");
    wait_for("a first step", || groups().contains("10.1.3.202 (weight 10)").then_some(()));
    wait_state(&lab, "fd01:3::201", "up");
    // Meanwhile the balancer is what it should be, and can be told something else.
    lab.mqtt_fwd(&["status", "--check"]);
    lab.mqtt_fwd(&["change", "add-route", "x", "a", "--service", "mqtt"]);
    wait_for("a later one", || {
        let now = groups();
        ["3", "4", "5", "6", "7", "8", "9"]
            .iter()
            .any(|n| now.contains(&format!("10.1.3.201 (weight {n})")))
            .then_some(())
    });
    wait_for("all of it", || (!groups().contains("weight")).then_some(()));
    lab.mqtt_fwd(&["status", "--check"]);
}

#[test]
fn a_drain_that_is_taken_back_ends_no_more_connections() {
    let lab = lab();
    let published = publish_while(&lab, || {
        assert!(established(&lab, 1) > 2 || established(&lab, 2) > 2);
        let of = if established(&lab, 1) > 2 { "10.1.3.201" } else { "10.1.3.202" };
        lab.mqtt_fwd(&["drain", of, "--end-per-second", "1"]);
        std::thread::sleep(Duration::from_millis(1500));
        lab.mqtt_fwd(&["undrain", of]);
        std::thread::sleep(Duration::from_secs(4));
    });
    let moved = published.iter().filter(|(connections, _)| *connections > 1).count();
    assert!((1..=2).contains(&moved), "{published:?}");
}

#[test]
fn a_drain_that_ends_connections_empties_a_broker_and_fires_no_will() {
    let lab = lab();
    // Those that only keep alive, and have wills.
    lab.publish("c2", &["--topic", "sensor/a", "--qos", "1", "--count", "2"]);
    let idle: Vec<_> = (0..4)
        .map(|i| {
            let id = format!("idle{i}");
            lab.script("exec")
                .args(["c2", "mosquitto_pub", "-h", "10.1.50.200", "-k", "5", "-i", &id, "-l"])
                .args(["-t", "sensor/a", "--will-topic", "wills", "--will-payload", &id])
                .stdin(std::process::Stdio::piped())
                .stderr(std::process::Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    wait_for("the idle ones", || (established(&lab, 1) + established(&lab, 2) == 4).then_some(()));
    let published = publish_while(&lab, || {
        let before = established(&lab, 1);
        assert!(before > 0);
        let drained = Instant::now();
        let said = lab.mqtt_fwd(&["drain", "10.1.3.201", "--end-per-second", "100"]);
        assert!(said.contains(" end as their clients send, 100 per second"), "{said}");
        wait_for("the broker to be empty", || (established(&lab, 1) == 0).then_some(()));
        // Those that only ping, too, and at their next one: they notice at once.
        assert_within(drained.elapsed(), Duration::from_secs(9));
        wait_for("all publishers at the other", || {
            (established(&lab, 2) >= PUBLISHERS).then_some(())
        });
    });
    let moved = published.iter().filter(|(connections, _)| *connections > 1).count();
    assert!((1..PUBLISHERS).contains(&moved), "{published:?}");
    wait_for("the idle ones at the other", || (established(&lab, 2) == 4).then_some(()));
    let wills = |all: &BTreeMap<u32, Vec<String>>| {
        all.values().flatten().filter(|line| line.starts_with("wills")).count()
    };
    assert_eq!(wills(&lab.received()), 0, "{:?}", lab.received());
    for mut one in idle {
        let _ = one.kill();
        let _ = one.wait();
    }
}

#[test]
fn metrics_are_valid_and_count_what_passed() {
    let lab = lab();
    lab.publish("c1", &["--id", "m", "--topic", "sensor/a", "--qos", "1", "--count", "50"]);
    wait_for("the count", || {
        let count = metric(&lab, "mqtt_fwd_events_total{reason=\"publish\"}")?;
        (count.parse::<f64>().unwrap() >= 50.0).then_some(())
    });
    let text = lab.ok("lb", &["curl", "-s", "http://127.0.0.1:9469/metrics"]);
    assert!(text.ends_with("# EOF\n"));
    let mut names: Vec<_> = text
        .lines()
        .filter(|l| !l.starts_with('#'))
        .map(|l| l.split(' ').next().unwrap())
        .collect();
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all, "a series twice");
    for name in
        ["map_entries", "driver_xdp_total", "group_packets_total", "real_in_use", "problems"]
    {
        assert!(text.contains(&format!("\nmqtt_fwd_{name}")), "{name}\n{text}");
    }
    let health = |lab: &Lab| {
        lab.ok("lb", &["curl", "-s", "-w", "%{http_code}", "http://127.0.0.1:9469/health"])
    };
    assert_eq!(health(&lab), "healthy\n200");
    broker(&lab, 3, "-STOP");
    // Any other balancer would find the same: this one is no reason to go there.
    wait_for("the problem", || {
        let answer = health(&lab);
        (answer.contains("real 10.1.3.203") && answer.ends_with("\n200")).then_some(())
    });
    broker(&lab, 3, "-CONT");
}

#[test]
fn misrouting_is_not_healthy() {
    let lab = lab();
    assert!(lab.exec("lb", &["mqtt-fwd", "status", "--check"]).status.success());
    // Topics of two groups in turn, over one connection after the other, from an address that nothing is
    // known of.
    let args = ["--topic", "sensor/a", "--topic", "other", "--count", "60", "--interval", "0.01"];
    lab.publish("c2", &args);
    let status = || -> serde_json::Value {
        serde_json::from_str(&lab.mqtt_fwd(&["status", "--json"])).unwrap()
    };
    wait_for("the problem", || {
        let now = status();
        let problems = now["problems"].as_array().unwrap();
        problems.iter().any(|p| p["code"] == "misrouted").then_some(())
    });
    let now = status();
    assert_eq!((&now["healthy"], &now["schema"]), (&false.into(), &1.into()));
    let up = "mqtt_fwd_problem{code=\"misrouted\"}";
    wait_for("the metric", || (metric(&lab, up).as_deref() == Some("1.0")).then_some(()));
}

#[test]
fn a_real_that_does_not_unwrap_is_down_though_its_port_is_open() {
    let lab = lab_with(
        "health_check = { type = \"mqtt\", path = \"encapsulated\", interval = \"300ms\", timeout = \"200ms\", \
         rise = 2, fall = 2 }",
    );
    // Both families, whose checks differ in every header.
    let both = |at: &str, state: &str| {
        for real in [format!("10.1.3.{at}"), format!("fd01:3::{at}")] {
            wait_state(&lab, &real, state);
        }
    };
    for real in ["201", "202", "203"] {
        both(real, "up");
    }
    lab.ok("r1", &["ip", "link", "set", "eth0", "xdp", "off"]);
    let broken = Instant::now();
    both("201", "down");
    wait_out_of_use(&lab, "10.1.3.201");
    // interval × fall + 1 s, twice: two families are waited for one after the other.
    assert_within(broken.elapsed(), Duration::from_millis(3200));
    lab.ok("lb", &["mosquitto_pub", "-h", "10.1.3.201", "-t", "direct", "-m", "is open"]);
    wait_status(&lab, "is down: wrapped, as clients' packets are: no answer");
    assert_eq!(spread(&lab, "during", 12), BTreeMap::from([(2, 12)]));

    let bpffs = format!("/run/mqtt-fwd-lab/{}/bpf/r1", lab.name);
    let vips = ["--vip", "10.1.50.200", "--vip", "fd01:50::200"];
    let up = ["mqtt-fwd", "host", "up", "--interface", "eth0", "--bpffs", &bpffs];
    lab.ok("r1", &[&up[..], &vips].concat());
    both("201", "up");

    // An interface that is made again has no program that wraps.
    assert!(lab.script("exec").args(["gw", "ip", "link", "del", "lb"]).status().unwrap().success());
    let ns = |name| format!("{}-{name}", lab.name);
    let ip = |args: &[&str]| {
        assert!(Command::new("ip").args(args).status().unwrap().success(), "{args:?}");
    };
    let (gw, lb) = (ns("gw"), ns("lb"));
    ip(&[
        "-n",
        &gw,
        "link",
        "add",
        "lb",
        "address",
        "02:4d:51:54:54:01",
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        &lb,
    ]);
    for address in ["10.1.2.101/24", "fd01:2::101/64"] {
        ip(&["-n", &gw, "addr", "add", address, "dev", "lb"]);
    }
    for address in ["10.1.2.102/24", "fd01:2::102/64"] {
        ip(&["-n", &lb, "addr", "add", address, "dev", "eth0"]);
    }
    ip(&["-n", &gw, "link", "set", "lb", "up"]);
    ip(&["-n", &lb, "link", "set", "eth0", "up"]);
    for (net, via) in [("10.1.50.0/24", "10.1.2.102"), ("fd01:50::/64", "fd01:2::102")] {
        ip(&["-n", &gw, "route", "add", net, "via", via]);
    }
    for via in ["10.1.2.101", "fd01:2::101"] {
        ip(&["-n", &lb, "route", "add", "default", "via", via]);
    }
    lab.ok("lb", &["ethtool", "-K", "eth0", "tx", "off"]);
    lab.ok("gw", &["mqtt-fwd", "veth-peer", "--interface", "lb"]);
    both("202", "up");
    wait_for("all to be up", || states(&lab).values().all(|state| state == "up").then_some(()));
}

/// A `run` with this configuration in place of the lab's, which ends with the value.
struct Run(std::process::Child);

impl Drop for Run {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Beside a balancer that is not its own, as beside a Katran, whose packets may be GUE.
#[test]
fn checks_are_wrapped_as_the_balancer_wraps() {
    let groups = [("a", 1, &[201, 202][..]), ("default", 250, &[203])];
    let lab = Lab::up(&config(&groups, &[("sensor/a", "a")]), &[]);
    let dir = format!("/run/mqtt-fwd-lab/{}", lab.name);
    assert!(lab.script("sidecar").arg("kill").status().unwrap().success());
    let start = |args: &[&str]| Run(lab.script("exec").arg("lb").args(args).spawn().unwrap());
    let socket = format!("{dir}/balancer.sock");
    std::fs::remove_file(&socket).unwrap();
    let _balancer = start(&["mqtt-fwd", "balancer"]);
    wait_for("the balancer", || std::path::Path::new(&socket).exists().then_some(()));
    let text = std::fs::read_to_string(format!("{dir}/config.toml")).unwrap();
    let text = text
        .replace("balancer = \"embedded\"", "balancer = \"katran\"\nencapsulation = \"gue\"")
        .replace("default_group", "health_check = { type = \"tcp\", path = \"encapsulated\", interval = \"300ms\", timeout = \"200ms\" }\ndefault_group");
    std::fs::write(format!("{dir}/config.toml"), text).unwrap();
    // With GUE, from the balancer's own addresses.
    for real in ["r1", "r2", "r3"] {
        let bpffs = format!("{dir}/bpf/{real}");
        let up =
            ["mqtt-fwd", "host", "up", "--interface", "eth0", "--bpffs", &bpffs, "--advmss", "0"];
        let vips = ["--vip", "10.1.50.200", "--vip", "fd01:50::200"];
        let from = ["--from", "10.1.2.0/24", "--from", "fd01:2::/64"];
        lab.ok(real, &[&up[..], &vips, &from].concat());
    }
    let _run = start(&["mqtt-fwd", "run"]);
    wait_for("`run`", || lab.exec("lb", &["mqtt-fwd", "reals"]).status.success().then_some(()));
    for real in ["10.1.3.201", "10.1.3.203", "fd01:3::202"] {
        wait_state(&lab, real, "up");
    }
    // On the wire, too: at the gateway, since the broker host's program comes before its tcpdump.
    let seen =
        lab.ok("gw", &["timeout", "5", "tcpdump", "-nc1", "-i", "lb", "udp", "port", "6080"]);
    assert!(seen.contains(".6080: UDP"), "{seen}");
}

#[test]
fn relays_are_checked_on_the_way_that_clients_take() {
    let text = std::fs::read_to_string("scripts/lab.toml").unwrap();
    let check = "health_check = { type = \"mqtt\", path = \"encapsulated\", interval = \"300ms\", timeout = \"250ms\" }";
    let text = text.replace("\n[[service]]", &format!("\n[[service]]\n{check}"));
    let lab = Lab::up(&text, &["--relay"]);
    for relay in ["10.1.3.207", "10.1.3.208"] {
        wait_state(&lab, relay, "up");
    }
    assert!(lab.script("relay").args(["kill", "r7"]).status().unwrap().success());
    wait_state(&lab, "10.1.3.207", "down");
    wait_state(&lab, "fd01:3::207", "down");
    assert!(lab.script("relay").args(["start", "r7"]).status().unwrap().success());
    wait_state(&lab, "10.1.3.207", "up");
}
