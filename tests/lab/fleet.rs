//! Several balancers as one: connections move, and who cannot have them says so.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::lab::{Lab, ONE_REAL_EACH, config};
use crate::support::net::{assert_within, wait_for};

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

/// A client that publishes over one connection, at QoS 1, until [`Publisher::sent`] ends it: how
/// fast what happens meanwhile is noticed is the machine's.
struct Publisher {
    process: std::process::Child,
    enough: String,
}

impl Publisher {
    fn start(lab: &Lab, host: &str, topic: &str) -> Self {
        let enough = format!("/run/mqtt-fwd-lab/{}/enough-{host}", lab.name);
        let mut command = lab.script("publish");
        command.args([host, "--topic", topic, "--until", &enough]);
        command.args(["--interval", "0.05", "--qos", "1"]);
        let process = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
        Self { process, enough }
    }

    /// How many messages, over one connection from first to last.
    fn sent(self) -> usize {
        std::fs::write(&self.enough, "").unwrap();
        let output = self.process.wait_with_output().unwrap();
        let summary: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(summary["connections"].as_array().unwrap().len(), 1, "{summary}");
        summary["sent"].as_u64().unwrap() as usize
    }
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
    let events = ["move", "swap", "die", "sidecars", "stop", "upgrade", "restart"];
    all_arrives("d", &[&["--seconds", "32"][..], &events].concat());
}

#[test]
fn connections_that_are_bound_at_the_syn_move_too() {
    all_arrives("p", &["--seconds", "18", "--predicted", "move", "swap", "die", "sidecars"]);
}

#[test]
fn by_ipv6_it_is_the_same() {
    all_arrives("v", &["--seconds", "14", "--v6", "move", "swap", "die"]);
}

#[test]
fn what_differs_between_members_is_named() {
    let lab = fleet();
    wait_for("lb2 is a member", || {
        lab.ok("lb", &["mqtt-fwd", "fleet"]).contains("lb2").then_some(())
    });
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
    assert_within(after, Duration::from_secs(3));
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
    sent_through(&lab, &["lb"]);
    let clients =
        [("c1", "a/1"), ("c2", "b/1")].map(|(host, topic)| Publisher::start(&lab, host, topic));
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
    assert!(named.contains("10.1.3.201"), "{named}");
    assert_within(after, Duration::from_secs(10));
    sent_through(&lab, &["lb2"]);
    let at = |real: u32| lab.received().get(&real).map_or(0, Vec::len);
    let before = at(2);
    wait_for("r2's connection goes on", || (at(2) > before + 20).then_some(()));
    assert_eq!(
        counter(&lab, "lb2", "nobody_has_it"),
        0,
        "no connection is reset while a host has not answered"
    );
    // It answers again: its own go on, too.
    let key = format!("/run/mqtt-fwd-lab/{}/handover.key", lab.name);
    lab.ok("r1", &[&up[..], &["--fleet-key", &key]].concat());
    let before = at(1);
    wait_for("r1's connection goes on", || (at(1) > before + 20).then_some(()));
    assert_eq!(clients.map(Publisher::sent), [at(1), at(2)]);
    no_problem(&lab, "lb2");
}

#[test]
fn a_store_that_is_lost_is_named_and_costs_no_established_connection() {
    let lab = fleet();
    sent_through(&lab, &["lb"]);
    let client = Publisher::start(&lab, "c1", "a/1");
    wait_for("messages", || (!lab.received().is_empty()).then_some(()));
    assert!(lab.script("store").arg("kill").output().unwrap().status.success());
    let (_, after) = problem(&lab, "lb2", "store_unreachable");
    assert_within(after, Duration::from_secs(5));
    sent_through(&lab, &["lb2"]);
    let at = || lab.received()[&1].len();
    let before = at();
    wait_for("messages go on", || (at() > before + 20).then_some(()));
    assert_eq!(client.sent(), at());
    assert_eq!(counter(&lab, "lb2", "adopted_from_real"), 1);
    assert!(lab.script("store").arg("start").output().unwrap().status.success());
    no_problem(&lab, "lb2");
}

/// A client, by its host's last digit, whose CONNECT is answered, and that publishes its only message when it is told to.
struct Waiting {
    process: std::process::Child,
    go: String,
    port: u16,
}

impl Waiting {
    fn start(lab: &Lab, host: &str) -> Self {
        let script = "import os, socket, sys, time
s = socket.create_connection(('10.1.50.200', 1883)); s.settimeout(40)
s.sendall(b'\\x10\\x0d\\0\\4MQTT\\4\\2\\0\\x3c\\0\\1' + sys.argv[3][-1:].encode()); s.recv(4)
open(sys.argv[1], 'w').write(str(s.getsockname()[1]))
while not os.path.exists(sys.argv[2]): time.sleep(0.01)
s.sendall(b'\\x32\\x0b\\0\\3a/1\\0\\1late'); print(s.recv(4).hex())";
        let file = |what| format!("/run/mqtt-fwd-lab/{}/{what}-{host}", lab.name);
        let (ready, go) = (file("ready"), file("go"));
        let mut command = lab.script("exec");
        command.args([host, "python3", "-c", script, &ready, &go, host]);
        let process = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
        let port = wait_for("CONNACK", || std::fs::read_to_string(&ready).ok()?.parse().ok());
        Self { process, go, port }
    }

    fn publish(&self) {
        std::fs::write(&self.go, "").unwrap();
    }

    /// What it was answered: PUBACK, over the connection that it had.
    fn answer(self) -> String {
        String::from_utf8(self.process.wait_with_output().unwrap().stdout).unwrap()
    }
}

#[test]
fn what_only_a_dead_sidecar_can_tell_is_waited_for() {
    let lab = fleet();
    wait_for("lb is a member", || {
        lab.ok("lb2", &["mqtt-fwd", "fleet", "--json"]).contains("\"lb\"").then_some(())
    });
    sent_through(&lab, &["lb"]);
    let sidecar = |action: &str| {
        assert!(lab.script("sidecar").args([action, "lb"]).output().unwrap().status.success());
    };
    sidecar("kill");
    // After that long lb2 knows of it.
    std::thread::sleep(Duration::from_millis(3500));
    // Its program answers, and no sidecar writes that to the store.
    let client = Waiting::start(&lab, "c1");
    sent_through(&lab, &["lb2"]);
    client.publish();
    wait_for("lb2 has asked for it", || (counter(&lab, "lb2", "missed") > 0).then_some(()));
    std::thread::sleep(Duration::from_millis(500));
    sidecar("start");
    assert_eq!(client.answer().trim(), "40020001");
    assert_eq!(lab.received()[&1], ["a/1 late"]);
}

#[test]
fn what_waits_at_a_balancer_that_is_unloaded_goes_on_at_another() {
    let lab = fleet();
    sent_through(&lab, &["lb"]);
    assert!(lab.script("sidecar").args(["kill", "lb"]).output().unwrap().status.success());
    // Its program answers, and no sidecar writes that to the store.
    let client = Waiting::start(&lab, "c1");
    // Of an earlier connection on that port, which was given to a broker when nobody could tell the store.
    let key = format!("mqtt-fwd:waiting:mqtt:10.1.1.1:{}", client.port);
    let old = r#"{"start":1,"server":2,"timestamps":null,"client_id":[0,0],"will_group":null,"connect":"1000","connect_sum":0}"#;
    lab.ok("gw", &["redis-cli", "set", &key, old, "ex", "30"]);
    let said = lab.ok("lb", &["mqtt-fwd", "unload"]);
    assert!(said.contains("left to the fleet's other balancers: 1 connections"), "{said}");
    sent_through(&lab, &["lb2"]);
    client.publish();
    assert_eq!(client.answer().trim(), "40020001");
    assert_eq!(lab.received()[&1], ["a/1 late"]);
    assert_eq!(counter(&lab, "lb2", "adopted_from_store"), 1);

    // Without the store, it says so.
    assert!(lab.script("sidecar").args(["kill", "lb2"]).output().unwrap().status.success());
    let _lost = Waiting::start(&lab, "c2");
    assert!(lab.script("store").arg("kill").output().unwrap().status.success());
    let said = lab.ok("lb2", &["mqtt-fwd", "unload"]);
    assert!(said.contains("lost: 1 connections that no broker has yet"), "{said}");
}

#[test]
fn who_spoke_while_sidecars_were_stopped_was_not_silent() {
    let lab = fleet();
    sent_through(&lab, &["lb"]);
    let all = |signal: &str| {
        for file in ["sidecar.pid", "sidecar-lb2.pid"] {
            let file = format!("/run/mqtt-fwd-lab/{}/{file}", lab.name);
            let pid = std::fs::read_to_string(file).unwrap();
            assert!(Command::new("kill").args([signal, pid.trim()]).status().unwrap().success());
        }
    };
    let client = Waiting::start(&lab, "c1");
    all("-STOP");
    sent_through(&lab, &["lb2"]);
    client.publish();
    // Longer than a client may be silent.
    std::thread::sleep(Duration::from_millis(4500));
    all("-CONT");
    assert_eq!(client.answer().trim(), "40020001");
    assert_eq!(lab.received()[&1], ["a/1 late"]);
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
    let client = Publisher::start(&lab, "c2", "b/1");
    let sent: u64 = lab.ok("c1", &["python3", "-c", flood]).trim().parse().unwrap();
    // One that moves into the flood is found all the same.
    sent_through(&lab, &["lb2"]);
    let at = || lab.received()[&2].len();
    let before = at();
    wait_for("messages go on", || (at() > before + 20).then_some(()));
    assert_eq!(client.sent(), at());
    let count = |name| counter(&lab, "lb", name);
    assert!(count("missed") + count("miss_dropped") > sent / 2, "{sent} sent");
    assert_eq!(count("adopted_from_real"), 0);
    let flows = lab.ok("lb", &["mqtt-fwd", "flows", "--json"]);
    // Of 11 million segments without timestamps, chance gives one a cookie (lib/cookie.h).
    assert!(
        flows.matches("\"client\"").count() <= 2,
        "a stranger's segment leaves no flow: {flows}"
    );
    println!("{sent} segments: {} asked for, {} nowhere", count("missed"), count("nobody_has_it"));
}

/// A block of the guide, by what it begins with.
fn guide(begins: &str) -> String {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/fleet.md")).unwrap();
    let blocks = text.split("```").skip(1).step_by(2);
    let found = blocks.map(|block| block.trim_start_matches('\n')).find(|b| b.starts_with(begins));
    found.unwrap_or_else(|| panic!("no block {begins:?}")).to_owned()
}

#[test]
fn the_guides_keepalived_moves_the_address_and_no_connection_is_lost() {
    let text =
        config(ONE_REAL_EACH, &[("a/#", "a"), ("b/#", "b")]).replace("vips = 16", "vips = 32");
    let text = format!("metrics = \"127.0.0.1:9469\"\n{text}");
    let lab = Lab::up(&text, &["--balancers", "2", "--delayed", "--store", "--one-net"]);
    let keepalived = guide("global_defs");
    let dir = format!("/run/mqtt-fwd-lab/{}", lab.name);
    let mut daemons = Vec::new();
    for (balancer, priority) in [("lb", "100"), ("lb2", "90")] {
        let file = format!("{dir}/{balancer}.keepalived.conf");
        std::fs::write(&file, keepalived.replace("priority 100", &format!("priority {priority}")))
            .unwrap();
        let pid = |what: &str| format!("{dir}/{balancer}.{what}.pid");
        let mut daemon = lab.script("exec");
        daemon.args([balancer, "keepalived", "-n", "-l", "-P", "-f", &file]);
        daemon.args(["-p", &pid("keepalived"), "-r", &pid("vrrp")]);
        daemons.push(
            daemon
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .spawn()
                .unwrap(),
        );
    }
    let has = |balancer: &str| {
        lab.ok(balancer, &["ip", "addr", "show", "dev", "eth0"]).contains("10.1.2.100/24")
    };
    wait_for("one of them has the address", || (has("lb") || has("lb2")).then_some(()));
    lab.ok("gw", &["ip", "route", "replace", "10.1.50.0/24", "via", "10.1.2.100"]);
    let client = Publisher::start(&lab, "c1", "a/1");
    let at = || lab.received().get(&1).map_or(0, Vec::len);
    wait_for("messages", || (at() > 10).then_some(()));

    let (first, second) = if has("lb") { ("lb", "lb2") } else { ("lb2", "lb") };
    let sidecar = |action: &str, name: &str| {
        assert!(lab.script("sidecar").args([action, name]).output().unwrap().status.success());
    };
    sidecar("kill", first);
    wait_for("the other has the address", || (has(second) && !has(first)).then_some(()));
    let before = at();
    wait_for("messages go on", || (at() > before + 20).then_some(()));
    // It comes back, and takes nothing away; then the other host dies.
    sidecar("start", first);
    no_problem(&lab, first);
    assert!(has(second));
    lab.ok(second, &["ip", "link", "set", "eth0", "down"]);
    wait_for("the first has the address again", || has(first).then_some(()));

    let before = at();
    wait_for("messages go on", || (at() > before + 20).then_some(()));
    assert_eq!(client.sent(), at());
    assert!(
        counter(&lab, first, "adopted_from_real") + counter(&lab, second, "adopted_from_real") >= 1
    );
    for mut daemon in daemons {
        let _ = daemon.kill();
        let _ = daemon.wait();
    }
}

/// FRR with a configuration of the guide's, in a host of the lab; what it leaves on this one is removed with the value.
struct Frr {
    name: String,
}

impl Frr {
    fn start(lab: &Lab, host: &str, config: &str) -> Self {
        let frr = Self { name: format!("{}-{host}", lab.name) };
        for dir in frr.dirs() {
            std::fs::create_dir_all(&dir).unwrap();
        }
        let [etc, run] = frr.dirs();
        std::fs::write(format!("{etc}/bgpd.conf"), config).unwrap();
        let owned = Command::new("chown").args(["-R", "frr:frr", &etc, &run]).status().unwrap();
        assert!(owned.success(), "FRR is installed");
        for daemon in ["zebra", "bfdd", "bgpd"] {
            let program = format!("/usr/lib/frr/{daemon}");
            lab.ok(host, &[&program, "-d", "-N", &frr.name, "-f", &format!("{etc}/{daemon}.conf")]);
        }
        frr
    }

    fn dirs(&self) -> [String; 2] {
        ["/etc/frr", "/var/run/frr"].map(|dir| format!("{dir}/{}", self.name))
    }

    /// A command line of the guide's.
    fn vtysh(&self, line: &str) {
        let line = line.replace("vtysh", &format!("vtysh -N {}", self.name));
        assert!(Command::new("sh").args(["-c", &line]).status().unwrap().success(), "{line}");
    }
}

impl Drop for Frr {
    fn drop(&mut self) {
        for dir in self.dirs() {
            let _ = std::fs::remove_dir_all(dir);
        }
    }
}

#[test]
fn the_guides_bgp_spreads_flows_and_no_connection_is_lost() {
    let text =
        config(ONE_REAL_EACH, &[("a/#", "a"), ("b/#", "b")]).replace("vips = 16", "vips = 32");
    let lab = Lab::up(&text, &["--balancers", "2", "--delayed", "--store", "--one-net"]);
    lab.ok("gw", &["ip", "route", "del", "10.1.50.0/24"]);
    let (balancer, router) = (guide("router bgp 65010"), guide("router bgp 65000"));
    let _router = Frr::start(&lab, "gw", &router);
    let first = Frr::start(&lab, "lb", &balancer);
    let _second = Frr::start(&lab, "lb2", &balancer.replace("10.1.2.102", "10.1.2.103"));
    let hops = || lab.ok("gw", &["ip", "route", "show", "10.1.50.200"]).matches("via").count();
    wait_for("a route by both", || (hops() == 2).then_some(()));

    let clients = [("c1", "a/1"), ("c2", "a/1"), ("c3", "b/1"), ("c4", "b/1")]
        .map(|(host, topic)| Publisher::start(&lab, host, topic));
    let at = || lab.received().values().map(Vec::len).sum::<usize>();
    wait_for("messages", || (at() > 40).then_some(()));
    first.vtysh(&guide("sh\nvtysh").replace("sh\nvtysh", "vtysh"));
    wait_for("one withdraws", || (hops() == 1).then_some(()));
    let before = at();
    wait_for("messages go on", || (at() > before + 80).then_some(()));
    first.vtysh(&guide("sh\nvtysh").replace("sh\nvtysh", "vtysh").replace("no network", "network"));
    wait_for("it is back", || (hops() == 2).then_some(()));
    // The other host dies: BFD tells.
    lab.ok("lb2", &["ip", "link", "set", "eth0", "down"]);
    wait_for("its route is gone", || (hops() == 1).then_some(()));

    let before = at();
    wait_for("messages go on", || (at() > before + 80).then_some(()));
    let sent: usize = clients.map(Publisher::sent).iter().sum();
    assert_eq!(sent, at());
    // Wherever the router's hash had put them: each balancer was the only one for a while.
    let adopted = ["lb", "lb2"].map(|balancer| counter(&lab, balancer, "adopted_from_real"));
    assert!(adopted.iter().sum::<u64>() >= 1, "{adopted:?}");
}

#[test]
fn a_subscriber_at_the_relay_moves_as_any_other_client() {
    let text =
        config(ONE_REAL_EACH, &[("a/#", "a"), ("b/#", "b")]).replace("vips = 16", "vips = 32");
    // The relay is a group like any other.
    let mut text = text.replace("default_group", "relay = \"relay\"\ndefault_group");
    for (at, vip, real) in
        [("[[service]]\nname = \"mqtt6\"", "10.1.50.", "10.1.3."), ("", "fd01:50::", "fd01:3::")]
    {
        let group = format!(
            "[[service.group]]\nname = \"relay\"\nvip = \"{vip}251\"\n[[service.group.reals]]\naddress = \"{real}207\"\n"
        );
        let place = if at.is_empty() { text.len() } else { text.find(at).unwrap() };
        text.insert_str(place, &group);
    }
    let lab = Lab::up(&text, &["--balancers", "2", "--delayed", "--store", "--relay"]);
    sent_through(&lab, &["lb"]);
    let mut subscriber = lab.script("exec");
    subscriber.args([
        "c1",
        "timeout",
        "60",
        "mosquitto_sub",
        "-h",
        "10.1.50.200",
        "-t",
        "#",
        "-C",
        "60",
        "-q",
        "1",
    ]);
    let subscriber = subscriber.stdout(std::process::Stdio::piped()).spawn().unwrap();
    wait_for("the subscription at all brokers", || {
        lab.publish_once("c2", "a/0", "hello");
        let flows = lab.ok("lb", &["mqtt-fwd", "flows"]);
        flows.contains("relay").then_some(())
    });
    let client = Publisher::start(&lab, "c3", "a/1");
    for balancer in ["lb2", "lb", "lb2"] {
        std::thread::sleep(Duration::from_secs(1));
        sent_through(&lab, &[balancer]);
    }
    let output = subscriber.wait_with_output().unwrap();
    assert!(output.status.success(), "all 60 messages, over one connection");
    assert!(client.sent() >= 50);
    assert_eq!(counter(&lab, "lb2", "nobody_has_it"), 0);
    assert!(counter(&lab, "lb2", "adopted_from_real") >= 2);
}
