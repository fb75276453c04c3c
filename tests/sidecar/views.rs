//! What the command line shows, and lets people change, of clients and flows: from `run`, and without one.

use std::fs;
use std::net::SocketAddr;

use crate::support::datapath::SERVICE;
use crate::support::net::{Background, Net, wait_for};
use crate::support::{mqtt, packet};
use serde_json::Value;

fn running(net: &Net) -> Background {
    let run = net.spawn(&["--log", "info", "run"]);
    wait_for("the sidecar", || net.mqtt_fwd(&["status", "--check"]).status.success().then_some(()));
    run
}

/// A client that publishes.
fn publisher(net: &Net, client: &str, topic: &[u8]) {
    let (client, service): (SocketAddr, SocketAddr) =
        (client.parse().unwrap(), SERVICE.parse().unwrap());
    let (connect, publish) = (mqtt::connect(4), mqtt::publish(topic, 0, b"x"));
    net.through_root(&packet::tcp(client, service, 1, 0, |h| h.syn = true, &[]));
    net.through_root(&packet::tcp(client, service, 2, 7, |h| h.psh = true, &connect));
    // It has its CONNACK.
    let next = 2 + connect.len() as u32;
    net.through_root(&packet::tcp(client, service, next, 11, |h| h.psh = true, &publish));
}

#[test]
fn a_client_that_has_only_connected_is_told_from_one_that_nobody_saw() {
    let net = Net::new();
    let _run = running(&net);
    let (client, service): (SocketAddr, SocketAddr) =
        ("10.1.1.7:4000".parse().unwrap(), SERVICE.parse().unwrap());
    net.through_root(&packet::tcp(client, service, 1, 0, |h| h.syn = true, &[]));
    let connected = net.fails(2, &["explain", "client", "10.1.1.7"]);
    assert!(connected.contains("has published nothing yet"), "{connected}");
    assert!(connected.contains("`mqtt-fwd explain flow 10.1.1.7:4000`"), "{connected}");
    net.ok(&["explain", "flow", "10.1.1.7:4000"]);
    let unseen = net.fails(2, &["explain", "client", "10.1.1.8"]);
    assert!(unseen.contains("never seen before"), "{unseen}");
}

#[test]
fn run_shows_others_what_the_maps_hold() {
    let net = Net::new();
    let mut run = running(&net);
    for n in 0..40 {
        publisher(
            &net,
            &format!("10.1.1.{n}:4000"),
            if n % 3 == 0 { b"sensor/a" } else { b"else" },
        );
    }
    let views = [
        &["flows", "--json"][..],
        &["clients", "--json"],
        &["clients", "export", "--format", "json"],
        &["counters", "--json"],
        &["groups", "--json"],
        &["status", "--json"],
        &["explain", "--json", "topic", "sensor/a"],
        &["explain", "--json", "client", "10.1.1.3"],
        &["explain", "--json", "flow", "10.1.1.3:4000"],
    ];
    // Ages go on, programs may be others, and the host's own packets come in between.
    let passing = ["age_s\": ", "\"id\": ", "\"not_service\"", "\"ipv6_extension\"", "\"not_ip\""];
    let stable = |text: &str| -> Vec<String> {
        let kept = |line: &&str| !passing.iter().any(|word| line.contains(word));
        let lines = text.lines().filter(kept);
        lines.map(|line| line.split("\"age_s\"").next().unwrap().to_owned()).collect()
    };
    // Who cannot see the pins can still ask.
    let blind = |args: &[&str]| {
        let hidden = format!(
            "umount -l {} && exec {} {}",
            net.bpf("").display(),
            env!("CARGO_BIN_EXE_mqtt-fwd"),
            args.join(" ")
        );
        let output = net.command("unshare").args(["-m", "sh", "-ec", &hidden]).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        stable(&String::from_utf8(output.stdout).unwrap())
    };
    let from_run: Vec<_> = views.iter().map(|args| blind(args)).collect();
    assert!(from_run[0].iter().filter(|line| line.contains("10.1.1.")).count() == 40);
    assert!(blind(&["doctor", "--json"]).iter().any(|line| line.contains("running, pid")));
    let seen = blind(&["top", "-n", "1"]).join("\n");
    assert!(seen.contains("else") && seen.contains("10.1.3.201"), "{seen}");
    assert!(blind(&["diff"]).concat().contains("all is as configured"));

    run.signal("KILL");
    run.wait();
    for (args, from_run) in views.iter().zip(from_run) {
        let output = net.mqtt_fwd(args);
        let here = stable(&String::from_utf8(output.stdout).unwrap());
        // The embedded balancer has ended with `run`.
        if !matches!(args[0], "groups" | "status") && !args.contains(&"flow") {
            assert_eq!(here, from_run, "{args:?}");
        }
    }
}

#[test]
fn events_come_from_run_too() {
    let net = Net::new();
    let _run = running(&net);
    publisher(&net, "10.1.1.1:4000", b"sensor/a");
    let events = net.ok(&["events", "--backlog", "--json", "--seconds", "5", "-n", "1"]);
    let event: Value = serde_json::from_str(&events).unwrap();
    assert_eq!(event["client"], "10.1.1.1:4000", "{events}");
    // Nothing comes, and the time is over.
    assert_eq!(net.ok(&["events", "--seconds", "1"]), "");
}

#[test]
fn what_is_known_of_clients_survives_a_reboot() {
    let net = Net::new();
    let file = net.dir.join("clients.jsonl");
    let with_file = |net: &Net| {
        let text = fs::read_to_string(net.config()).unwrap();
        fs::write(net.config(), format!("clients_file = {:?}\n{text}", file.to_str().unwrap()))
            .unwrap();
    };
    with_file(&net);
    let mut run = running(&net);
    let csv = net.dir.join("known.csv");
    let rows =
        "service,by,client,topic\nmqtt,address,10.1.1.7,sensor/a\nmqtt,address,10.1.1.8,else\n";
    fs::write(&csv, rows).unwrap();
    let import = |net: &Net, text: &str| {
        fs::write(&csv, text).unwrap();
        net.mqtt_fwd(&["clients", "import", csv.to_str().unwrap()])
    };
    assert!(import(&net, rows).status.success());
    let known = |net: &Net| -> Vec<String> {
        let rows: Value =
            serde_json::from_slice(&net.mqtt_fwd(&["clients", "--json"]).stdout).unwrap();
        let row = |r: &Value| format!("{} {} {}", r["client"], r["topic"], r["group"]);
        rows["clients"].as_array().unwrap().iter().map(row).collect()
    };
    let before = known(&net);
    assert_eq!(before.len(), 2, "{before:?}");

    // One wrong line, and nothing is imported.
    for (line, why) in [
        ("mqtt,address,10.1.1.9,sensor/#", "is no topic name"),
        ("mqtt,address,device-7,x", "is no IP address"),
        ("mqtt,address,fd01::1,x", "another IP version"),
        ("nosuch,address,10.1.1.9,x", "no service \"nosuch\""),
        ("mqtt,client_id,id,x", "by address"),
        ("mqtt,address,10.1.1.9,", "neither a topic nor groups"),
        ("mqtt,address", "record 2"),
    ] {
        let output =
            import(&net, &format!("service,by,client,topic\nmqtt,address,10.1.1.10,x\n{line}\n"));
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(why) && error.contains("record 2"), "{line}: {error}");
        assert!(error.contains("nothing was imported"), "{error}");
    }
    assert_eq!(known(&net), before);

    run.signal("TERM");
    assert_eq!(run.wait(), Some(0));
    net.ok(&["unload"]);
    let run = running(&net);
    wait_for("the clients", || (!known(&net).is_empty()).then_some(()));
    assert_eq!(known(&net), before, "{}", run.log());
    assert!(run.log().contains("clients restored"), "{}", run.log());
    drop(run);

    // A file that is cut short is not taken up, and not overwritten with nothing.
    net.ok(&["unload", "--force"]);
    let whole = fs::read_to_string(&file).unwrap();
    let cut = &whole[..whole.len() - 10];
    fs::write(&file, cut).unwrap();
    let mut run = running(&net);
    wait_for("the warning", || run.log().contains("clients not restored").then_some(()));
    assert_eq!(known(&net), Vec::<String>::new());
    run.signal("TERM");
    assert_eq!(run.wait(), Some(0));
    assert_eq!(fs::read_to_string(&file).unwrap(), cut);
}
