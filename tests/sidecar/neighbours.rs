//! Two instances on one host, each at an interface of its own.

use std::collections::BTreeSet;
use std::fs;

use libbpf_rs::{MapCore as _, MapHandle};

use crate::support::datapath::XDP_DROP;
use crate::support::net::{Background, CONFIG, Net, wait_for};

/// The second instance's configuration: eth1, and group VIPs of its own.
fn second(net: &Net) -> String {
    let text = CONFIG.replace("\"eth0\"", "\"eth1\"").replace("balancer.sock", "second.sock");
    text.replace("10.1.50.", "10.1.60.").replace("@DIR@", net.dir.to_str().unwrap())
}

fn at(net: &Net, config: &str, args: &[&str]) -> std::process::Output {
    let mut command = net.command(env!("CARGO_BIN_EXE_mqtt-fwd"));
    command.env("MQTT_FWD_CONFIG", net.dir.join(config)).args(args).output().unwrap()
}

fn healthy(net: &Net, config: &str) -> bool {
    at(net, config, &["status", "--check"]).status.success()
}

fn run(net: &Net, config: &str) -> Background {
    let mut command = net.command(env!("CARGO_BIN_EXE_mqtt-fwd"));
    command.env("MQTT_FWD_CONFIG", net.dir.join(config)).args(["--log", "info", "run"]);
    let run = net.spawn_command(command);
    wait_for(&format!("{config}: {}", run.log()), || healthy(net, config).then_some(()));
    run
}

/// The group VIPs that a balancer would put a service's address back for.
fn vips(net: &Net, interface: &str) -> BTreeSet<String> {
    let map = MapHandle::from_pinned_path(net.bpf(&format!("jmp_{interface}_inner_dst"))).unwrap();
    map.keys().map(|key| format!("{}.{}.{}.{}", key[0], key[1], key[2], key[3])).collect()
}

fn set(all: &[&str]) -> BTreeSet<String> {
    all.iter().map(|vip| (*vip).to_owned()).collect()
}

#[test]
fn two_instances_have_group_vips_of_their_own() {
    let net = Net::new();
    net.sh("ip link add eth1 type veth peer name peer1; ip link set eth1 up; ip link set peer1 up");
    fs::write(net.dir.join("second.toml"), second(&net)).unwrap();
    let _first = run(&net, "config.toml");
    let mut other = run(&net, "second.toml");
    let all = ["10.1.50.1", "10.1.50.250"];
    assert_eq!(vips(&net, "eth0"), set(&all));
    assert_eq!(vips(&net, "eth1"), set(&["10.1.60.1", "10.1.60.250"]));
    assert!(healthy(&net, "config.toml"));
    // What is taken from the map is back.
    let map = MapHandle::from_pinned_path(net.bpf("jmp_eth0_inner_dst")).unwrap();
    for key in map.keys().collect::<Vec<_>>() {
        map.delete(&key).unwrap();
    }
    // Its broker would not know the address.
    assert_eq!(net.through_root(&Net::syn("10.1.1.1", 4000)).verdict, XDP_DROP);
    wait_for("all VIPs", || (vips(&net, "eth0") == set(&all)).then_some(()));
    wait_for("the balancer's drop to be told", || {
        let status = at(&net, "config.toml", &["status", "--json"]).stdout;
        String::from_utf8(status).unwrap().contains("\"balancer_misses\"").then_some(())
    });
    // A group less at one of them.
    let text = fs::read_to_string(net.dir.join("second.toml")).unwrap();
    let start = text.find("    { name = \"a\"").unwrap();
    let end = text.find("    { name = \"default\"").unwrap();
    let fewer = format!("{}{}", &text[..start], &text[end..]);
    let fewer = fewer.replace("route = [{ topic = \"sensor/a\", group = \"a\" }]", "");
    fs::write(net.dir.join("second.toml"), fewer).unwrap();
    other.signal("HUP");
    wait_for(&format!("one less: {:?} {}", vips(&net, "eth1"), other.log()), || {
        (vips(&net, "eth1") == set(&["10.1.60.250"])).then_some(())
    });
    assert_eq!(vips(&net, "eth0"), set(&all));
    assert!(healthy(&net, "second.toml"));
    // The second goes, and takes what was its own.
    other.signal("TERM");
    other.wait();
    let gone = at(&net, "second.toml", &["unload"]);
    let said = String::from_utf8([gone.stdout, gone.stderr].concat()).unwrap();
    assert!(gone.status.success(), "{said}");
    assert!(said.contains("jmp_eth1_inner_dst") && !said.contains("eth0"), "{said}");
    assert!(!net.bpf("jmp_eth1_inner_dst").exists());
    assert_eq!(vips(&net, "eth0"), set(&all));
}
