//! `mqtt-fwd test` in the lab: what arrives, what is lost, and that nothing is left of it.

use serde_json::Value;

use crate::support::lab::{Lab, config};
use crate::support::net::wait_for;
use mqtt_fwd::kernel::takeover;

/// Exit code, and what was printed.
fn test(lab: &Lab, host: &str, args: &[&str]) -> (Option<i32>, Value) {
    let output = lab.exec(host, &[&["mqtt-fwd", "test", "--json"], args].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    let json = serde_json::from_str(&text).unwrap_or_else(|e| {
        panic!("{e}: {text}{}", String::from_utf8_lossy(&output.stderr));
    });
    (output.status.code(), json)
}

/// Real (or "-"), message and outcome of each row.
fn rows(tested: &Value) -> Vec<(String, String, String)> {
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or("-").to_owned();
    let messages = tested["messages"].as_array().unwrap();
    messages
        .iter()
        .map(|row| (text(row, "real"), text(row, "message"), text(row, "outcome")))
        .collect()
}

/// Every real got each message, by its service's way.
fn all_arrived(lab: &Lab, reals: &[&str], messages: usize) {
    let (code, tested) = test(lab, "lb", &[]);
    assert_eq!(
        (code, &tested["lost"], &tested["not_sent"]),
        (Some(0), &0.into(), &0.into()),
        "{tested:#}"
    );
    let rows = rows(&tested);
    for real in reals {
        let of_real = rows.iter().filter(|(it, ..)| it == real).count();
        assert_eq!(of_real, messages, "{real}: {tested:#}");
    }
    // What the test taught is gone, and nothing of it counts as misrouted.
    let clients =
        || -> Value { serde_json::from_str(&lab.mqtt_fwd(&["clients", "--json"])).unwrap() };
    // A test of `run` may be going on.
    wait_for(&format!("nothing to be known of clients: {}", clients()), || {
        (clients()["clients"] == Value::Array(Vec::new())).then_some(())
    });
    for counter in ["mispredicted", "publish_lost"] {
        assert_eq!(lab.counter(counter), 0, "{counter}");
    }
    // Nor does it look as if a map were too small.
    let status: Value = serde_json::from_str(&lab.mqtt_fwd(&["status", "--json"])).unwrap();
    let maps = status["maps"].as_array().unwrap();
    assert!(maps.len() > 3 && maps.iter().all(|map| map["evicted"] == 0), "{maps:?}");
}

const REALS: [&str; 6] =
    ["10.1.3.201", "10.1.3.202", "10.1.3.203", "fd01:3::201", "fd01:3::202", "fd01:3::203"];

fn two_groups() -> String {
    config(&[("a", 1, &[201, 202]), ("default", 250, &[203])], &[("sensor/a", "a")])
}

#[test]
fn with_predicted_binding_each_real_gets_every_message() {
    let text = format!("metrics = \"127.0.0.1:9469\"\ntest_interval = \"10s\"\n{}", two_groups());
    let lab = Lab::up(&text, &[]);
    all_arrived(&lab, &REALS, 3);
    // By `run`, too, which has given up most of its privileges.
    let metrics = || lab.ok("lb", &["curl", "-s", "http://127.0.0.1:9469/metrics"]);
    wait_for("the test of `run`", || {
        metrics().contains("mqtt_fwd_test_messages{outcome=\"arrived\"} 18.0").then_some(())
    });
    // They were really sent.
    let at = |real: u32| {
        let all = lab.received();
        all.get(&real).into_iter().flatten().filter(|l| l.starts_with("mqtt-fwd/test/")).count()
    };
    let sent = [at(1), at(2), at(3)];
    assert!(sent.iter().all(|n| *n >= 12 && *n % 6 == 0), "{:?}", lab.received());

    // Over the network, as any client.
    let (code, tested) = test(&lab, "c1", &["--from", "10.1.1.1"]);
    assert_eq!(code, Some(0), "{tested:#}");
    assert!(tested["arrived"].as_u64().unwrap() >= 12, "{tested:#}");

    // A host that does not unwrap, and one that gets nothing.
    lab.ok("r1", &["ip", "link", "set", "eth0", "xdp", "off"]);
    lab.mqtt_fwd(&["drain", "10.1.3.202"]);
    let (code, tested) = test(&lab, "lb", &["--service", "mqtt"]);
    assert_eq!(code, Some(1), "{tested:#}");
    let all = rows(&tested);
    let row = |real: &str, message: &str, outcome: &str| {
        all.contains(&(real.to_owned(), message.to_owned(), outcome.to_owned()))
    };
    assert!(row("10.1.3.201", "CONNECT", "lost"), "{tested:#}");
    assert!(row("10.1.3.202", "none", "not_sent"), "{tested:#}");
    assert!(row("10.1.3.203", "QoS 1", "arrived"), "{tested:#}");
    assert!(tested.to_string().contains("does its host unwrap"), "{tested:#}");
}

#[test]
fn with_delayed_binding_and_relays_too() {
    if !takeover::supported() {
        return;
    }
    // Brokers by client id: the test finds ids that lead to each.
    let text = std::fs::read_to_string("scripts/lab.toml").unwrap();
    let text = (1..=6).fold(text, |text, n| {
        let real = format!("{{ address = \"10.1.3.20{n}\" }}");
        text.replace(&real, &format!("{{ address = \"10.1.3.20{n}\", vip = \"10.1.50.1{n}\" }}"))
    });
    let lab = Lab::up(&text, &["--delayed", "--relay"]);
    let brokers: Vec<String> = (1..=6).map(|n| format!("10.1.3.20{n}")).collect();
    let brokers: Vec<&str> = brokers.iter().map(String::as_str).collect();
    all_arrived(&lab, &brokers, 3);
    all_arrived(&lab, &["10.1.3.207", "10.1.3.208", "fd01:3::207", "fd01:3::208"], 3);

    assert!(lab.script("relay").args(["kill", "r8"]).status().unwrap().success());
    let (code, tested) = test(&lab, "lb", &["--service", "mqtt"]);
    assert_eq!(code, Some(1), "{tested:#}");
    let lost: Vec<_> =
        rows(&tested).into_iter().filter(|(.., outcome)| outcome == "lost").collect();
    assert!(lost.iter().all(|(real, ..)| real == "10.1.3.208") && !lost.is_empty(), "{lost:?}");
    let doctor = lab.exec("lb", &["mqtt-fwd", "doctor", "--deep"]);
    let doctor = String::from_utf8(doctor.stdout).unwrap();
    assert!(
        doctor.contains("FAULT     test            lost: to 10.1.3.208 of group relay"),
        "{doctor}"
    );
}
