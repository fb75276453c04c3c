//! Faults with which everything was lost for new clients while all was green: each is named within ten seconds, alike by
//! `status`, `doctor`, `/health`, the metric and `test`.

use std::process::Command;
use std::time::{Duration, Instant};

use super::expect_all;
use crate::support::lab::{Lab, config};
use crate::support::net::{assert_within, wait_for};
use crate::support::server::example;
use crate::support::session::{SERVICE, SERVICE6, STYLES, Session, run_all};
use mqtt_fwd::kernel::takeover;

/// Faster than by default, with which it takes 5 to 7 s.
const CHECK: &str = "health_check = { type = \"mqtt\", path = \"encapsulated\", interval = \"700ms\", timeout = \"500ms\" }";

/// What docs/delayed-binding.md says of NAT on broker hosts.
const NOTRACK: &str = "table inet mqtt_fwd { \
    chain in { type filter hook prerouting priority raw; \
        ip daddr 10.1.50.200 meta l4proto tcp notrack; ip6 daddr fd01:50::200 meta l4proto tcp notrack; }; \
    chain out { type filter hook output priority raw; \
        ip saddr 10.1.50.200 meta l4proto tcp notrack; ip6 saddr fd01:50::200 meta l4proto tcp notrack; }; }";

fn lab() -> Option<Lab> {
    if !takeover::supported() {
        return None;
    }
    let groups = [("a", 1, &[201][..]), ("default", 250, &[203][..])];
    let text = config(&groups, &[("sensor/a", "a")])
        .replace("default_group", &format!("{CHECK}\ndefault_group"));
    let text = format!("metrics = \"127.0.0.1:9469\"\n{text}");
    Some(Lab::up(&text, &["--delayed"]))
}

fn output(lab: &Lab, args: &[&str]) -> String {
    let output = lab.exec("lb", args);
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

/// Waits until `status` says so, and then asks all others. Says how long it took.
fn named(lab: &Lab, fault: &str, code: &str, text: &str) -> Duration {
    let since = Instant::now();
    wait_for(&format!("{fault}: {text}"), || {
        let status = output(lab, &["mqtt-fwd", "status"]);
        (status.starts_with("eth0: NOT HEALTHY") && status.contains(text)).then_some(())
    });
    let took = since.elapsed();
    assert!(!lab.exec("lb", &["mqtt-fwd", "status", "--check"]).status.success(), "{fault}");
    let curl = |path: &str| lab.ok("lb", &["curl", "-s", &format!("http://127.0.0.1:9469/{path}")]);
    assert!(curl("health").contains(text), "{fault}: {}", curl("health"));
    let metric = format!("mqtt_fwd_problem{{code=\"{code}\"}} 1");
    assert!(curl("metrics").contains(&metric), "{fault}");
    let doctor = output(lab, &["mqtt-fwd", "doctor"]);
    let about = if code == "real_down" { "health checks" } else { "gateway" };
    assert!(doctor.contains(&format!("warning   {about}")), "{fault}: {doctor}");
    assert_within(took, Duration::from_secs(10));
    let tested = lab.exec("lb", &["mqtt-fwd", "test", "--service", "mqtt"]);
    let tested_text = String::from_utf8_lossy(&tested.stdout);
    assert_eq!(tested.status.code(), Some(1), "{fault}: {tested_text}");
    assert!(tested_text.contains("LOST"), "{fault}: {tested_text}");
    took
}

/// A client that nobody knows.
fn late(minutes: &str, i: usize) -> Session {
    Session {
        style: STYLES[i % 3],
        topic: "sensor/a".to_owned(),
        messages: (0..3).map(|m| format!("clock{minutes}-{i}-{m}")).collect(),
        ..Session::new(
            "c1",
            if i.is_multiple_of(2) { SERVICE } else { SERVICE6 },
            &format!("clock{minutes}-{i}"),
        )
    }
}

/// NAT, as Docker's: the kernel takes the connection from its segment again. Without connection tracking, all is well.
fn behind_nat(lab: &Lab, bpffs: &str, not_taken_over: &str) -> Duration {
    let nat = "table inet docker { chain out { type nat hook output priority -100; \
        ip daddr 127.0.0.11 tcp dport 53 dnat ip to 127.0.0.11:5353; }; }";
    lab.ok("r1", &["nft", nat]);
    let took = named(lab, "NAT", "real_down", not_taken_over);
    let args = ["mqtt-fwd", "host", "status", "--interface", "eth0", "--bpffs", bpffs];
    let forgotten = || {
        let text = lab.ok("r1", &args);
        let line = text.lines().find(|line| line.contains("dropped before TCP got them")).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
    };
    let lost = forgotten();
    assert!(lost > 0);
    lab.ok("r1", &["nft", NOTRACK]);
    let arrives = || !output(lab, &["mqtt-fwd", "test", "--service", "mqtt"]).contains("LOST");
    wait_for("all to arrive", || arrives().then_some(()));
    let before = forgotten();
    assert!(arrives());
    assert_eq!(forgotten(), before);
    lab.ok("r1", &["nft", "flush ruleset"]);
    took
}

#[test]
fn what_loses_every_message_of_new_clients_is_named_within_ten_seconds() {
    let Some(lab) = lab() else { return };
    let dir = format!("/run/mqtt-fwd-lab/{}", lab.name);
    let healthy = || {
        let status = || output(&lab, &["mqtt-fwd", "status"]);
        // The test's own connections that nobody took over are a problem for half a minute.
        let well =
            |text: &str| text.starts_with("eth0: healthy") || text.contains("are not taken over");
        wait_for(&format!("all to be well: {}", status()), || {
            let text = status();
            (well(&text) && !text.contains(" is down")).then_some(())
        });
    };
    let bpffs = format!("{dir}/bpf/r1");
    let host = |what: &str, more: &[&str]| {
        let args = ["mqtt-fwd", "host", what, "--interface", "eth0", "--bpffs", &bpffs];
        lab.ok("r1", &[&args[..], more].concat());
    };
    let vips = ["--vip", "10.1.50.200", "--vip", "fd01:50::200"];
    let with_key = |file: &str| host("up", &[&vips[..], &["--handover-key", file]].concat());
    let own_key = format!("{dir}/handover.key");
    let not_taken_over =
        "real 10.1.3.201 of group a (mqtt) is down: it does not take connections over";
    healthy();
    let mut took = Vec::new();

    host("down", &[]);
    host("up", &vips);
    took.push(("no key", named(&lab, "no key", "real_down", not_taken_over)));
    with_key(&own_key);
    healthy();

    let other_key = format!("{dir}/other.key");
    lab.mqtt_fwd(&["keys", "new", "--file", &other_key]);
    with_key(&other_key);
    took.push(("wrong key", named(&lab, "wrong key", "real_down", not_taken_over)));
    with_key(&own_key);
    healthy();

    // A key of before two rotations: the balancer takes new ones over by itself.
    let old_key = format!("{dir}/old.key");
    std::fs::copy(&own_key, &old_key).unwrap();
    for _ in 0..2 {
        lab.mqtt_fwd(&["keys", "rotate", "--file", &own_key, "--after", "0"]);
    }
    took.push(("old key", named(&lab, "old key", "real_down", not_taken_over)));
    for real in ["r1", "r3"] {
        let bpffs = format!("{dir}/bpf/{real}");
        let up = ["mqtt-fwd", "host", "up", "--interface", "eth0", "--bpffs", &bpffs];
        lab.ok(real, &[&up[..], &vips, &["--handover-key", &own_key]].concat());
    }
    healthy();

    // A clock that is 20 minutes off, ahead or behind, costs nothing; one that is 25 minutes off, all new connections.
    let clock = |minutes: &str| {
        let output = Command::new(example("other-clock")).args([&bpffs, minutes]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    for minutes in ["20", "-20"] {
        clock(minutes);
        let tested = output(&lab, &["mqtt-fwd", "test", "--service", "mqtt"]);
        assert!(!tested.contains("LOST"), "{minutes} minutes: {tested}");
        let sessions: Vec<_> = (0..12).map(|i| late(minutes, i)).collect();
        expect_all(&run_all(&lab, &sessions, 4));
        let messages: Vec<_> = sessions.iter().flat_map(|s| &s.messages).collect();
        let arrived = lab.arrivals_of(&messages);
        assert!(messages.iter().all(|m| arrived[*m] == [1]), "{minutes} minutes: {arrived:?}");
        healthy();
    }
    for minutes in ["25", "-25"] {
        clock(minutes);
        took.push((minutes, named(&lab, "clock", "real_down", not_taken_over)));
        clock("0");
        healthy();
    }

    // The commonest rule of a host: nothing that is new and no SYN.
    let rule = "add table inet host; add chain inet host input { type filter hook input priority 0; }; \
                add rule inet host input ct state new tcp flags & (syn|rst|ack) != syn drop";
    lab.ok("r1", &["nft", rule]);
    took.push(("firewall", named(&lab, "firewall", "real_down", not_taken_over)));
    lab.ok("r1", &["nft", "delete table inet host"]);
    healthy();

    took.push(("NAT", behind_nat(&lab, &bpffs, not_taken_over)));
    healthy();

    lab.ok("gw", &["ip", "link", "set", "r1", "mtu", "1499"]);
    let too_large = "small packets arrive, and segments of 1440 bytes do not";
    took.push(("path MTU", named(&lab, "path MTU", "real_down", too_large)));
    lab.ok("gw", &["ip", "link", "set", "r1", "mtu", "1500"]);
    healthy();

    let file = format!("{dir}/config.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("02:4d:51:54:54:01", "02:00:00:00:00:99")).unwrap();
    lab.mqtt_fwd(&["apply"]);
    let differs =
        "the balancer sends to gateway 02:00:00:00:00:99, and this host's next hop to the reals is";
    took.push(("gateway", named(&lab, "gateway", "gateway_differs", differs)));
    std::fs::write(&file, text).unwrap();
    lab.mqtt_fwd(&["apply"]);
    healthy();
    eprintln!("named after: {took:?}");
}
