//! Several balancers as one: connections move, and who cannot have them says so.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::lab::{Lab, ONE_REAL_EACH, config};
use crate::support::net::wait_for;

const DELAYED: &[&str] = &["--balancers", "2", "--delayed", "--store"];

fn fleet() -> Lab {
    Lab::up(
        &config(ONE_REAL_EACH, &[("a/#", "a"), ("b/#", "b")]).replace("vips = 16", "vips = 32"),
        DELAYED,
    )
}

/// What `status` of a balancer names within ten seconds; after how long.
fn problem(lab: &Lab, balancer: &str, code: &str) -> (String, Duration) {
    let begun = Instant::now();
    let text = wait_for(&format!("{code} on {balancer}"), || {
        let status: serde_json::Value =
            serde_json::from_str(&lab.ok(balancer, &["mqtt-fwd", "status", "--json"])).ok()?;
        let problems = status["problems"].as_array()?;
        let found = problems.iter().find(|problem| problem["code"] == code)?;
        Some(found["text"].as_str()?.to_owned())
    });
    (text, begun.elapsed())
}

fn no_problem(lab: &Lab, balancer: &str) {
    wait_for(&format!("{balancer} without problems"), || {
        lab.exec(balancer, &["mqtt-fwd", "status", "--check"]).status.success().then_some(())
    });
}

fn counter(lab: &Lab, balancer: &str, name: &str) -> u64 {
    let counters: serde_json::Value =
        serde_json::from_str(&lab.ok(balancer, &["mqtt-fwd", "counters", "--json"])).unwrap();
    counters["counters"][name].as_u64().unwrap()
}

fn sent_through(lab: &Lab, balancers: &[&str]) {
    let output = lab.script("route").args(balancers).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The whole: whatever becomes of balancers, sidecars and the store, all that 60 publishers send arrives.
fn all_arrives(name: &str, options: &[&str]) {
    let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/fleet"))
        .args(["--publishers", "60", "--store", "--every", "4"])
        .args(options)
        .env("LAB", format!("t{}{name}", std::process::id()))
        .env("MQTT_FWD", env!("CARGO_BIN_EXE_mqtt-fwd"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    println!("{text}");
}

#[test]
fn connections_move_whatever_becomes_of_balancers_and_store() {
    let events = ["move", "swap", "die", "sidecars", "stop", "upgrade", "restart", "store"];
    all_arrives("d", &[&["--seconds", "45"][..], &events].concat());
}

#[test]
fn connections_that_are_bound_at_the_syn_move_too() {
    all_arrives("p", &["--seconds", "22", "--predicted", "move", "swap", "die", "sidecars"]);
}

#[test]
fn by_ipv6_it_is_the_same() {
    all_arrives("v", &["--seconds", "16", "--v6", "move", "swap", "die"]);
}

#[test]
fn what_differs_between_members_is_named() {
    let lab = fleet();
    let members = lab.ok("lb", &["mqtt-fwd", "fleet"]);
    assert!(members.contains("lb2"), "{members}");
    for balancer in ["lb", "lb2"] {
        no_problem(&lab, balancer);
    }

    // A route, on one of them.
    let file = format!("/run/mqtt-fwd-lab/{}/lb2.toml", lab.name);
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("a/#", "a/+")).unwrap();
    lab.ok("lb2", &["mqtt-fwd", "apply"]);
    let (named, after) = problem(&lab, "lb", "fleet_differs");
    assert!(
        named.contains("lb2") && named.contains("a/# → a") && named.contains("a/+ → a"),
        "{named}"
    );
    assert!(after < Duration::from_secs(3), "{after:?}");
    println!("named after {after:?}: {named}");
    std::fs::write(&file, &text).unwrap();
    lab.ok("lb2", &["mqtt-fwd", "apply"]);
    no_problem(&lab, "lb");

    // A key that only one has, and uses: before any connection finds out.
    let key = format!("/run/mqtt-fwd-lab/{}/other.key", lab.name);
    lab.ok("lb2", &["mqtt-fwd", "keys", "new", "--file", &key]);
    std::fs::write(&file, text.replace("handover.key", "other.key")).unwrap();
    lab.ok("lb2", &["mqtt-fwd", "apply"]);
    let (named, after) = problem(&lab, "lb", "fleet_key_missing");
    println!("named after {after:?}: {named}");
    // And its questions are not answered.
    let (named, _) = problem(&lab, "lb2", "real_not_answering");
    assert!(named.contains("10.1.3.20"), "{named}");
}

#[test]
fn a_host_that_does_not_answer_delays_only_its_own_connections() {
    let lab = fleet();
    let publish = |topic: &str, host: &'static str| {
        let mut publisher = lab.script("publish");
        publisher.args([
            host,
            "--topic",
            topic,
            "--count",
            "120",
            "--interval",
            "0.05",
            "--qos",
            "1",
        ]);
        publisher.stdout(std::process::Stdio::null()).spawn().unwrap()
    };
    sent_through(&lab, &["lb"]);
    let mut clients = [publish("a/1", "c1"), publish("b/1", "c2")];
    wait_for("messages at both", || (lab.received().len() == 2).then_some(()));
    // r1 has another key.
    let other = format!("/run/mqtt-fwd-lab/{}/other.key", lab.name);
    lab.ok("r1", &["mqtt-fwd", "keys", "new", "--file", &other]);
    let bpffs = format!("/run/mqtt-fwd-lab/{}/bpf/r1", lab.name);
    let up = [
        "mqtt-fwd",
        "host",
        "up",
        "--interface",
        "eth0",
        "--vip",
        "10.1.50.200",
        "--bpffs",
        &bpffs,
    ];
    lab.ok("r1", &[&up[..], &["--fleet-key", &other]].concat());
    let (named, after) = problem(&lab, "lb", "real_not_answering");
    assert!(named.contains("10.1.3.201") && after < Duration::from_secs(10), "{after:?} {named}");
    sent_through(&lab, &["lb2"]);
    let at = |real: u32| lab.received().get(&real).map_or(0, Vec::len);
    let before = at(2);
    wait_for("r2's connection goes on", || (at(2) > before + 20).then_some(()));
    assert_eq!(
        counter(&lab, "lb2", "nobody_has_it"),
        0,
        "nobody is reset while one has not answered"
    );
    // It answers again: its own go on, too.
    let key = format!("/run/mqtt-fwd-lab/{}/handover.key", lab.name);
    lab.ok("r1", &[&up[..], &["--fleet-key", &key]].concat());
    for client in &mut clients {
        assert!(client.wait().unwrap().success());
    }
    assert_eq!((at(1), at(2)), (120, 120));
    no_problem(&lab, "lb2");
}

#[test]
fn a_store_that_is_lost_is_named_and_costs_no_established_connection() {
    let lab = fleet();
    sent_through(&lab, &["lb"]);
    let mut publisher = lab.script("publish");
    publisher.args(["c1", "--topic", "a/1", "--count", "100", "--interval", "0.05", "--qos", "1"]);
    let mut client = publisher.stdout(std::process::Stdio::null()).spawn().unwrap();
    wait_for("messages", || (!lab.received().is_empty()).then_some(()));
    assert!(lab.script("store").arg("kill").output().unwrap().status.success());
    let (named, after) = problem(&lab, "lb2", "store_unreachable");
    assert!(after < Duration::from_secs(5), "{after:?} {named}");
    sent_through(&lab, &["lb2"]);
    assert!(client.wait().unwrap().success());
    assert_eq!(lab.received()[&1].len(), 100);
    assert_eq!(counter(&lab, "lb2", "adopted_from_real"), 1);
    assert!(lab.script("store").arg("start").output().unwrap().status.success());
    no_problem(&lab, "lb2");
}

#[test]
fn a_flood_of_strangers_segments_leaves_nothing_and_hides_nothing() {
    let lab = fleet();
    sent_through(&lab, &["lb"]);
    let flood = "import random, socket, struct, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
def checksum(b):
    t = sum(struct.unpack('>%dH' % (len(b) // 2), b)); t = (t >> 16) + (t & 65535); return ~(t + (t >> 16)) & 65535
vip = socket.inet_aton('10.1.50.200'); end = time.monotonic() + 4; n = 0
while time.monotonic() < end:
    src = struct.pack('>I', 0x0b000000 + random.getrandbits(20)); port = random.randrange(1024, 65535)
    tcp = struct.pack('>HHIIBBHHH', port, 1883, random.getrandbits(32), random.getrandbits(32), 0x50, 0x18, 512, 0, 0) + b'xx'
    tcp = tcp[:16] + struct.pack('>H', checksum(src + vip + struct.pack('>HH', 6, len(tcp)) + tcp)) + tcp[18:]
    ip = struct.pack('>BBHHHBBH', 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, 6, 0) + src + vip
    s.sendto(ip + tcp, ('10.1.50.200', 0)); n += 1
print(n)";
    let mut publisher = lab.script("publish");
    publisher.args(["c2", "--topic", "b/1", "--count", "80", "--interval", "0.05", "--qos", "1"]);
    let mut client = publisher.stdout(std::process::Stdio::null()).spawn().unwrap();
    let sent: u64 = lab.ok("c1", &["python3", "-c", flood]).trim().parse().unwrap();
    // One that moves into the flood is found all the same.
    sent_through(&lab, &["lb2"]);
    assert!(client.wait().unwrap().success());
    assert_eq!(lab.received()[&2].len(), 80);
    let count = |name| counter(&lab, "lb", name);
    assert!(count("missed") + count("miss_dropped") > sent / 2, "{sent} sent");
    assert_eq!(count("adopted_from_real"), 0);
    let flows = lab.ok("lb", &["mqtt-fwd", "flows", "--json"]);
    assert!(
        flows.matches("\"client\"").count() <= 1,
        "a stranger's segment leaves no flow: {flows}"
    );
    println!("{sent} segments: {} asked for, {} nowhere", count("missed"), count("nobody_has_it"));
}
