//! What an operator's bad day does to a chain under `run`, and to the files and sockets around it.

use std::fs;
use std::time::{Duration, Instant};

use crate::support::datapath::XDP_TX;
use crate::support::net::{Background, CONFIG, Net, assert_within, wait_for};
use serde_json::Value;

pub fn healthy(net: &Net) -> bool {
    net.mqtt_fwd(&["status", "--check"]).status.success()
}

pub fn running(net: &Net) -> Background {
    let run = net.spawn(&["--log", "info", "run"]);
    wait_for("the sidecar", || healthy(net).then_some(()));
    run
}

fn forwards(net: &Net) -> bool {
    net.through_root(&Net::syn("10.1.1.1", 1)).verdict == XDP_TX
}

/// Waits until a packet is forwarded from eth0 on, and says how long that took.
fn until_forwarding(net: &Net) -> Duration {
    let started = Instant::now();
    wait_for("forwarding", || {
        let attached = net.command("ip").args(["link", "show", "eth0"]).output().unwrap();
        let attached = String::from_utf8(attached.stdout).unwrap().contains("xdp");
        (attached && net.bpf("mqtt_fwd/eth0/prog_xdp_root").exists() && forwards(net)).then_some(())
    });
    started.elapsed()
}

#[test]
fn each_part_of_the_chain_that_is_taken_from_run_is_back_within_a_second() {
    let net = Net::new();
    let run = running(&net);
    let own = net.bpf("mqtt_fwd/eth0");
    type Harm<'a> = (&'a str, Box<dyn Fn() + 'a>);
    let harm: [Harm<'_>; 7] = [
        ("the array's pin", Box::new(|| fs::remove_file(net.bpf("jmp_eth0")).unwrap())),
        ("xdp off", Box::new(|| net.sh("ip link set eth0 xdp off"))),
        ("all pins", Box::new(|| net.sh(&format!("rm -rf {}", own.display())))),
        ("a program's pin", Box::new(|| fs::remove_file(own.join("prog_mqtt_fwd")).unwrap())),
        ("position 1", Box::new(|| empty(&net, 1))),
        ("position 2", Box::new(|| empty(&net, 2))),
        (
            "the interface",
            Box::new(|| {
                net.sh("ip link del eth0; ip link add eth0 type veth peer name eth0p; \
                        ip link set eth0 up; ip link set eth0p up");
            }),
        ),
    ];
    for (what, harm) in harm {
        harm();
        let took = until_forwarding(&net);
        println!("{what}: {took:?}\n{}", run.log());
        assert_within(took, Duration::from_millis(1500));
        wait_for(&format!("{what}: healthy; {}", run.log()), || healthy(&net).then_some(()));
        assert!(own.join("mqtt_fwd/flows").exists(), "{what}");
    }
    assert!(net.bpf("jmp_eth0").exists());
}

fn empty(net: &Net, position: u32) {
    use libbpf_rs::MapCore as _;
    let chain = libbpf_rs::MapHandle::from_pinned_path(net.bpf("jmp_eth0")).unwrap();
    chain.delete(&position.to_ne_bytes()).unwrap();
}

#[test]
fn unload_beside_run_takes_force() {
    let net = Net::new();
    let mut run = running(&net);
    let error = net.fails(1, &["unload"]);
    assert!(error.contains("and would put back what is removed"), "{error}");
    assert!(forwards(&net));
    net.ok(&["unload", "--force"]);
    assert_eq!(run.wait(), Some(0));
    assert!(!net.bpf("jmp_eth0").exists());
}

#[test]
fn pins_that_were_removed_are_adopted_by_one_command() {
    let net = Net::new();
    let mut run = running(&net);
    run.signal("KILL");
    run.wait();
    assert!(forwards(&net));
    net.sh(&format!("rm -rf {}", net.bpf("mqtt_fwd/eth0").display()));
    let error = net.fails(1, &["load"]);
    assert!(error.contains("`mqtt-fwd load --adopt` takes it over"), "{error}");
    let kept = net.ok(&["unload"]);
    assert!(kept.contains("`mqtt-fwd load --adopt` takes it over"), "{kept}");
    let said = net.ok(&["load", "--adopt"]);
    assert!(said.contains("adopted "), "{said}");
    assert!(forwards(&net), "{said}");
    // What was known is still known: the same client, the same flow.
    assert!(net.ok(&["flows", "--json"]).contains("10.1.1.1"), "{said}");
    net.ok(&["unload"]);
    assert!(!net.bpf("jmp_eth0").exists());
}

#[test]
fn the_gateway_is_compared_and_put_back() {
    let net = Net::new();
    let run = running(&net);
    let text = fs::read_to_string(net.config()).unwrap();
    fs::write(net.config(), text.replace("02:00:00:00:00:09", "02:00:00:00:00:0a")).unwrap();
    run.signal("HUP");
    wait_for("the new gateway", || {
        (net.through_root(&Net::syn("10.1.1.1", 1)).packet[5] == 0x0a).then_some(())
    });
    net.ok(&["katran", "mac", "02:00:00:00:00:01"]);
    let who = "peer=uid 0, pid ";
    wait_for("the log to name the peer", || {
        let log = run.log();
        (log.contains("changeMac 02:00:00:00:00:01") && log.contains(who)).then_some(())
    });
    wait_for("the configured gateway", || {
        (net.through_root(&Net::syn("10.1.1.1", 1)).packet[5] == 0x0a).then_some(())
    });
    assert!(run.log().contains("sends to gateway 02:00:00:00:00:01 instead of"), "{}", run.log());
}

#[test]
fn without_a_key_the_gateway_is_learned_and_followed() {
    let net = Net::new();
    net.write_config(&CONFIG.replace("gateway_mac = \"02:00:00:00:00:09\"\n", ""));
    let run = net.spawn(&["--log", "info", "run"]);
    wait_for("the log to say so", || {
        run.log()
            .contains("no gateway towards the reals was found: there is no route")
            .then_some(())
    });
    net.sh("ip addr add 10.1.3.101/24 dev eth0; ip -6 addr add fd01:3::101/64 dev eth0 nodad; \
            ip route add default via 10.1.3.1; ip -6 route add default via fd01:3::1; \
            for a in 10.1.3.201 10.1.3.202 10.1.3.203 10.1.3.1 fd01:3::203 fd01:3::1 fd01:3::201 \
            fd01:3::202; do \
            ip neigh replace $a lladdr 02:00:00:00:00:0b dev eth0 nud permanent; done");
    let gateway = |last: u8| {
        wait_for(&format!("the gateway; {}", run.log()), || {
            let packet = net.through_root(&Net::syn("10.1.1.1", 1)).packet;
            (packet[5] == last).then_some(())
        });
    };
    gateway(0x0b);
    wait_for("health", || healthy(&net).then_some(()));
    net.sh("ip neigh show dev eth0 | while read a rest; do \
            ip neigh replace $a lladdr 02:00:00:00:00:0c dev eth0 nud permanent; done");
    gateway(0x0c);
}

#[test]
fn of_two_applies_at_once_the_last_one_is_in_force() {
    let net = Net::new();
    net.ok(&["load"]);
    let _balancer = net.spawn(&["balancer"]);
    wait_for("the balancer", || net.mqtt_fwd(&["katran", "list"]).status.success().then_some(()));
    let configs: Vec<_> = ["10.1.3.201", "10.1.3.211"]
        .iter()
        .map(|real| {
            let path = net.dir.join(format!("{real}.toml"));
            let text = fs::read_to_string(net.config()).unwrap();
            fs::write(&path, text.replace("10.1.3.201", real)).unwrap();
            path.to_str().unwrap().to_owned()
        })
        .collect();
    for _ in 0..8 {
        let both: Vec<_> =
            configs.iter().map(|config| net.spawn(&["--config", config, "apply"])).collect();
        for mut apply in both {
            assert_eq!(apply.wait(), Some(0), "{}", apply.log());
        }
        let in_force = configs
            .iter()
            .filter(|config| {
                let said = net.ok(&["--config", config, "apply", "--dry-run"]);
                said.contains("all is as configured")
            })
            .count();
        assert_eq!(in_force, 1);
    }
}

#[test]
fn apply_just_after_a_reload_succeeds() {
    let net = Net::new();
    let run = running(&net);
    let text = fs::read_to_string(net.config()).unwrap();
    for i in 0..14 {
        fs::write(net.config(), text.replace("10.1.3.201", &format!("10.1.3.{}", 210 + i)))
            .unwrap();
        run.signal("HUP");
        std::thread::sleep(Duration::from_millis(7 * i));
        net.ok(&["apply"]);
    }
    assert!(healthy(&net));
}

#[test]
fn three_capabilities_are_enough_and_what_is_missing_is_named() {
    let net = Net::new();
    let with = |caps: &str, command: &str| {
        let mut setpriv = net.command("setpriv");
        let set = format!("-all,{caps}");
        setpriv.args(["--bounding-set", &set, "--inh-caps", "-all"]);
        setpriv.arg(env!("CARGO_BIN_EXE_mqtt-fwd")).args(["--log", "info", command]);
        setpriv
    };
    let output = with("+bpf,+net_admin", "load").output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("this process lacks CAP_PERFMON"), "{error} {:?}", output.status);
    let run = net.spawn_command(with("+bpf,+net_admin,+perfmon", "run"));
    wait_for(&format!("the sidecar; {}", run.log()), || healthy(&net).then_some(()));
    assert!(forwards(&net));
    std::thread::sleep(Duration::from_millis(1500));
    assert!(!run.log().contains("WARN"), "{}", run.log());
    net.sh("ip link set eth0 xdp off");
    until_forwarding(&net);
}

#[test]
fn privileges_that_only_loading_takes_are_given_up() {
    let net = Net::new();
    let run = running(&net);
    let status = fs::read_to_string(format!("/proc/{}/status", run.id())).unwrap();
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:")).unwrap().trim();
    let effective = u64::from_str_radix(effective, 16).unwrap();
    // DAC_READ_SEARCH 2, NET_ADMIN 12, PERFMON 38, BPF 39 (linux/capability.h).
    assert_eq!(effective, 1 << 2 | 1 << 12 | 1 << 38 | 1 << 39);
}

#[test]
fn the_same_interface_in_another_namespace_does_not_take_the_chain() {
    let net = Net::new();
    let _run = running(&net);
    let other = Net::new();
    let text = fs::read_to_string(net.config()).unwrap();
    fs::write(other.config(), text.replace("balancer.sock", "other.sock")).unwrap();
    for command in [&["load"][..], &["unload"], &["balancer"], &["load", "--adopt"]] {
        let error = other.fails(1, command);
        assert!(error.contains("of that name in another network namespace"), "{error}");
    }
    assert!(healthy(&net));
}

#[test]
fn what_cannot_change_at_a_reload_is_refused_by_name() {
    let net = Net::new();
    let run = running(&net);
    let text = fs::read_to_string(net.config()).unwrap();
    let changed = format!("root_array = \"{}\"\n{text}", net.bpf("other").display());
    fs::write(net.config(), changed.replace("clients = 100\n", "clients = 200\n")).unwrap();
    run.signal("HUP");
    wait_for("the refusal", || {
        let expected = "stays in force: root_array, [maps] (without CAP_SYS_ADMIN) cannot";
        run.log().contains(expected).then_some(())
    });
    fs::write(net.config(), format!("new_flows_per_second = 77\n{text}")).unwrap();
    run.signal("HUP");
    wait_for("the reload", || run.log().contains("configuration reloaded").then_some(()));
    wait_for("health", || healthy(&net).then_some(()));
}

#[test]
fn sigterm_does_not_wait_for_a_balancer_that_hangs() {
    let net = Net::new();
    net.write_config(&CONFIG.replace("balancer = \"embedded\"", "balancer = \"katran\""));
    // Accepts, and never says anything.
    let _hung = std::os::unix::net::UnixListener::bind(net.dir.join("balancer.sock")).unwrap();
    let mut run = net.spawn(&["--log", "info", "run"]);
    wait_for("the chain", || run.log().contains("is in the chain").then_some(()));
    std::thread::sleep(Duration::from_millis(300));
    let started = Instant::now();
    run.signal("TERM");
    assert_eq!(run.wait(), Some(0));
    assert_within(started.elapsed(), Duration::from_secs(1));
}

#[test]
fn configurations_that_no_network_has_are_refused() {
    let net = Net::new();
    for (from, to, says) in [
        ("02:00:00:00:00:09", "+2:00:00:00:00:09", "not a MAC address"),
        ("10.1.3.201", "255.255.255.255", "not an address that a host can have"),
        ("fd01:3::203", "fe80::1", "not an address that a host can have"),
    ] {
        assert!(CONFIG.contains(from), "{from}");
        net.write_config(&CONFIG.replace(from, to));
        let error = net.fails(2, &["check"]);
        assert!(error.contains(says), "{to}: {error}");
    }
    fs::remove_file(net.config()).unwrap();
    nix::unistd::mkfifo(&net.config(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let error = net.fails(2, &["check"]);
    assert!(error.contains("it is not a regular file"), "{error}");
}

#[test]
fn more_groups_than_fit_beside_those_in_force_are_refused_before_anything_changes() {
    let net = Net::new();
    let run = running(&net);
    let before = net.ok(&["katran", "list"]);
    let groups = |first: u32, n: u32| -> String {
        let group = |i| {
            format!(
                "{{ name = \"g{i}\", vip = \"10.1.51.{i}\", reals = [{{ address = \"10.1.3.9\" }}] }}"
            )
        };
        (first..first + n).map(group).collect::<Vec<_>>().join(",\n")
    };
    // 8 VIPs fit: two are in force, so at most 6 new ones.
    let text = fs::read_to_string(net.config()).unwrap();
    let with = |list: &str| {
        let from = text.find("    { name = \"a\"").unwrap();
        let to = text.find("]\nroute").unwrap();
        text[..from].to_owned() + list + &text[to..]
    };
    let of = |list: String| {
        with(&list)
            .replace("group = \"a\" }", "group = \"g1\" }")
            .replace("default_group = \"default\"", "default_group = \"g1\"")
    };
    fs::write(net.config(), of(groups(1, 9))).unwrap();
    let error = net.fails(2, &["check"]);
    assert!(error.contains("need 9 VIPs of the embedded balancer; raise it"), "{error}");

    fs::write(net.config(), of(groups(1, 7))).unwrap();
    for command in [&["check"][..], &["apply", "--dry-run"]] {
        let error = net.fails(2, command);
        assert!(error.contains("room for 8 VIPs, and for a moment 9 are needed"), "{error}");
    }
    run.signal("HUP");
    wait_for("the refusal", || run.log().contains("for a moment 9 are needed").then_some(()));
    let lines = run.log().lines().count();
    std::thread::sleep(Duration::from_secs(3));
    assert!(run.log().lines().count() <= lines + 1, "{}", run.log());
    assert_eq!(net.ok(&["katran", "list"]), before);

    fs::write(net.config(), of(groups(1, 6))).unwrap();
    net.ok(&["apply"]);
    assert!(healthy(&net));
}

#[test]
fn doctor_names_each_fault_with_its_remedy() {
    let net = Net::new();
    let mut run = running(&net);
    let said = net.ok(&["doctor"]);
    for part in [
        "ok        chain           root, mqtt_fwd and balancer are in their places",
        "ok        configuration   ",
        "warning   health checks   service mqtt: a broker that is dead",
        "→ health_check = { type = \"mqtt\" } in the service",
        "warning   brokers         10.1.3.201:1883 does not accept connections",
        "warning   traffic         no packet for a service has come so far",
    ] {
        assert!(said.contains(part), "{part}\n{said}");
    }
    assert!(!said.contains("FAULT"), "{said}");

    run.signal("KILL");
    run.wait();
    net.through_root(&Net::syn("10.1.1.1", 1));
    net.sh("ip link set eth0 xdp off; ip addr add 10.1.50.200/32 dev lo");
    let output = net.mqtt_fwd(&["doctor", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let found = found["findings"].as_array().unwrap();
    let is = |severity: &str, text: &str| {
        found.iter().any(|finding| {
            finding["severity"] == severity && finding["text"].as_str().unwrap().contains(text)
        })
    };
    assert!(is("fault", "no XDP program is on eth0"), "{found:?}");
    assert!(is("fault", "not reachable"), "{found:?}");
    assert!(is("warning", "`mqtt-fwd run` is not running"), "{found:?}");
    assert!(is("warning", "10.1.50.200, of service mqtt, is an address of this host"), "{found:?}");
    assert!(!is("warning", "no packet for a service"), "{found:?}");
}

#[test]
fn the_service_manager_is_told_what_happens() {
    let net = Net::new();
    let path = net.dir.join("notify.sock");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let next = |wanted: &str| {
        let mut buffer = [0; 4096];
        loop {
            let n = socket.recv(&mut buffer).unwrap_or_else(|e| panic!("{wanted}: {e}"));
            let text = String::from_utf8_lossy(&buffer[..n]).into_owned();
            if text.contains(wanted) {
                return text;
            }
        }
    };
    let mut command = net.command(env!("CARGO_BIN_EXE_mqtt-fwd"));
    command.arg("run").env("NOTIFY_SOCKET", &path);
    let mut run = net.spawn_command(command);
    next("READY=1");
    assert!(next("WATCHDOG=1").contains("STATUS=all is as configured"));
    run.signal("HUP");
    assert!(next("RELOADING=1").contains("MONOTONIC_USEC="));
    next("READY=1");
    run.signal("TERM");
    next("STOPPING=1");
    assert_eq!(run.wait(), Some(0));
}

#[test]
fn another_mtu_is_followed() {
    let net = Net::new();
    let _run = running(&net);
    let largest = || {
        let status: serde_json::Value =
            serde_json::from_str(&net.ok(&["status", "--json"])).unwrap();
        status["services"][0]["max_packet"].as_u64().unwrap()
    };
    // A real is IPv6: 40 bytes are put in front.
    assert_eq!(largest(), 1460);
    net.sh("ip link set eth0 mtu 1400");
    wait_for("the new limit", || (largest() == 1360).then_some(()));
}

#[test]
fn the_log_can_be_json() {
    let net = Net::new();
    let run = net.spawn(&["--log", "info", "--log-format", "json", "run"]);
    wait_for("the sidecar", || healthy(&net).then_some(()));
    for line in run.log().lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(line["timestamp"].is_string() && line["level"].is_string(), "{line}");
    }
}

#[test]
fn run_leaves_nothing_behind_when_it_ends() {
    let net = Net::new();
    let mut run = running(&net);
    let namespace = fs::read_link(format!("/proc/{}/ns/net", run.id())).unwrap();
    let inode = namespace.to_str().unwrap().trim_matches(|c: char| !c.is_ascii_digit()).to_owned();
    let left = || {
        let all = fs::read_dir("/run/mqtt-fwd").into_iter().flatten().flatten();
        all.map(|entry| entry.file_name().into_string().unwrap())
            // A namespace that is gone may have had this number, and what was drained in it.
            .filter(|name| name.starts_with(&format!("run-{inode}-")))
            .collect::<Vec<_>>()
    };
    assert_eq!(left().len(), 2, "{:?}", left());
    run.signal("TERM");
    assert_eq!(run.wait(), Some(0));
    assert_eq!(left(), Vec::<String>::new());
    assert!(!net.dir.join("balancer.sock").exists());
}
