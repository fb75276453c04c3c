//! The sidecar beside a balancer that is as silent as Katran, and as forgetful: the double,
//! and a real Katran where there is one (see support/server.rs).

use std::time::{Duration, Instant};

use crate::support::net::{Background, CONFIG, Net, PATIENCE, assert_within, wait_for};
use crate::support::server::Kind;

/// In the namespace of the test.
const ENDPOINT: &str = "127.0.0.1:50051";

fn prepare(kind: Kind) -> Net {
    let net = Net::new();
    let config = CONFIG.replace("unix:@DIR@/balancer.sock", ENDPOINT);
    net.write_config(&kind.config(&config));
    net
}

fn sidecar(net: &Net) -> Background {
    let mut command = net.command(env!("CARGO_BIN_EXE_mqtt-fwd"));
    command.args(["--log", "info", "run"]);
    net.spawn_command(command)
}

fn status(net: &Net) -> serde_json::Value {
    serde_json::from_str(&net.ok(&["status", "--json"])).unwrap()
}

fn wait_healthy(net: &Net, sidecar: &Background) {
    let deadline = Instant::now() + PATIENCE;
    while !status(net)["healthy"].as_bool().unwrap() {
        assert!(Instant::now() < deadline, "{:#}\n{}", status(net), sidecar.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_balancer_that_is_down_at_start_is_waited_for() {
    for kind in Kind::silent() {
        let net = prepare(kind);
        let sidecar = sidecar(&net);
        wait_for("the log to say so", || {
            let log = sidecar.log();
            (log.contains("not reachable") && log.contains("trying again")).then_some(())
        });
        let status = status(&net);
        assert_eq!(status["healthy"], false);
        assert!(status["balancer"].as_str().unwrap().contains("is it running"), "{status}");
        // What has no balancer goes to the stack as it came.
        assert_eq!(
            net.through_root(&Net::syn("10.1.1.1", 1)).verdict,
            crate::support::datapath::XDP_PASS
        );
        let _server = kind.start(&net, ENDPOINT);
        wait_healthy(&net, &sidecar);
        assert_eq!(
            net.through_root(&Net::syn("10.1.1.1", 1)).verdict,
            crate::support::datapath::XDP_TX
        );
        // The same is said once; something else is, that there is a program whose server does not listen yet.
        let log = sidecar.log();
        let said = log.lines().filter(|line| line.contains("not reachable"));
        let mut said: Vec<_> = said.map(|line| line.split_once("WARN").unwrap().1).collect();
        said.sort_unstable();
        assert!(said.windows(2).all(|two| two[0] != two[1]), "{log}");
    }
}

#[test]
fn what_a_restarted_balancer_forgot_is_put_back() {
    for kind in Kind::silent() {
        let net = prepare(kind);
        net.ok(&["load"]);
        let mut server = kind.start(&net, ENDPOINT);
        let sidecar = sidecar(&net);
        wait_healthy(&net, &sidecar);
        for signal in ["KILL", "TERM"] {
            server.signal(signal);
            server.wait();
            // Killed, it leaves its program running; told to end, it takes it along.
            let verdict = net.through_root(&Net::syn("10.1.1.1", 1)).verdict;
            let expected = if signal == "KILL" {
                crate::support::datapath::XDP_TX
            } else {
                crate::support::datapath::XDP_PASS
            };
            assert_eq!(verdict, expected, "{kind:?} after SIG{signal}");
            server = kind.start(&net, ENDPOINT);
            let started = Instant::now();
            wait_healthy(&net, &sidecar);
            // Noticed within 2 s, and put back within one more; a loaded machine gets a little more.
            assert_within(started.elapsed(), Duration::from_secs(5));
            let verdict = net.through_root(&Net::syn("10.1.1.1", 1)).verdict;
            assert_eq!(verdict, crate::support::datapath::XDP_TX);
        }
        assert!(sidecar.log().contains("put back what was missing"), "{}", sidecar.log());
        assert!(sidecar.log().contains("as after a restart"), "{}", sidecar.log());
    }
}

#[test]
fn a_second_server_at_the_same_address_is_named_and_configured() {
    for kind in Kind::silent() {
        let net = prepare(kind);
        net.ok(&["load"]);
        let mut first = kind.start(&net, ENDPOINT);
        let sidecar = sidecar(&net);
        wait_healthy(&net, &sidecar);
        let mut second = kind.start(&net, ENDPOINT);
        wait_for(&format!("the state on the second; {}", sidecar.log()), || {
            sidecar.log().contains("on a second server at the same address").then_some(())
        });
        wait_for("a word about both", || {
            sidecar.log().contains("2 servers listen at 127.0.0.1:50051").then_some(())
        });
        let now = status(&net);
        assert_eq!(now["healthy"], false);
        assert!(now["problems"].to_string().contains("(SIGTERM "), "{now}");
        // The position is the second's, and packets are forwarded again.
        wait_for("forwarding", || {
            let verdict = net.through_root(&Net::syn("10.1.1.1", 1)).verdict;
            (verdict == crate::support::datapath::XDP_TX).then_some(())
        });
        // The other way round, the position keeps a program that nobody looks after any more.
        // (Two doubles have their maps in common.)
        second.signal("KILL");
        second.wait();
        if kind == Kind::Katran {
            wait_for("the log to say so", || {
                let problems = status(&net)["problems"].to_string();
                problems.contains("left by a server that is gone").then_some(())
            });
        }
        first.signal("KILL");
        first.wait();
        let _third = kind.start(&net, ENDPOINT);
        wait_healthy(&net, &sidecar);
    }
}

#[test]
fn a_server_that_ends_does_not_take_the_others_program_with_it() {
    for kind in Kind::silent() {
        // Whichever of the two is ended, as an operator would.
        for second_ends in [true, false] {
            let net = prepare(kind);
            net.ok(&["load"]);
            let mut first = kind.start(&net, ENDPOINT);
            let sidecar = sidecar(&net);
            wait_healthy(&net, &sidecar);
            let mut second = kind.start(&net, ENDPOINT);
            // All of it: the doubles have their maps in common, so what one has half done is missing at the other.
            wait_for(&format!("the state on the second: {}", sidecar.log()), || {
                let log = sidecar.log();
                let (_, since) = log.split_once("on a second server at the same address")?;
                since.contains("put back what was missing").then_some(())
            });
            let (ends, stays) =
                if second_ends { (&mut second, &mut first) } else { (&mut first, &mut second) };
            ends.signal("TERM");
            ends.wait();
            // What the sidecar has not noticed yet may still look healthy.
            wait_for(&format!("{kind:?}: the position; {}", sidecar.log()), || {
                sidecar.log().contains("put back into the balancer's position").then_some(())
            });
            wait_for(&format!("{kind:?}: forwarding; {}", sidecar.log()), || {
                let verdict = net.through_root(&Net::syn("10.1.1.1", 1)).verdict;
                (verdict == crate::support::datapath::XDP_TX).then_some(())
            });
            wait_healthy(&net, &sidecar);
            assert!(!stays.ended());
        }
    }
}

#[test]
fn a_group_written_another_way_is_refused_with_the_command_that_removes_it() {
    let config = CONFIG
        .replace("unix:@DIR@/balancer.sock", ENDPOINT)
        .replace("10.1.50.200", "fd01:50::200")
        .replace("10.1.50.250", "fd01:50::250")
        .replace("10.1.50.1", "fd01:50::1")
        .replace("10.1.3.", "fd01:3::");
    for kind in Kind::silent() {
        let net = prepare(kind);
        net.write_config(&kind.config(&config));
        net.ok(&["load"]);
        let _server = kind.start(&net, ENDPOINT);
        crate::support::server::add_vip_verbatim(&net, ENDPOINT, "FD01:50::1", 1883);
        let error = net.fails(1, &["apply"]);
        assert!(
            error.contains("balancer has [fd01:50::1]:1883/tcp as [FD01:50::1]:1883"),
            "{error}"
        );
        let command = error.split("mqtt-fwd katran ").nth(1).expect("a command");
        assert_eq!(command, "del-vip [FD01:50::1]:1883/tcp");
        let listed = net.ok(&["katran", "list"]);
        assert!(listed.contains("[FD01:50::1]:1883/tcp (not canonical)"), "{listed}");
        net.ok(&["katran", "del-vip", "[FD01:50::1]:1883/tcp"]);
        assert!(net.ok(&["apply"]).contains("read back"));

        // Onto one that is in use: the datapath has one entry for the two, and it is gone with
        // the deletion. Whoever deletes, the group's is written again.
        let sidecar = sidecar(&net);
        wait_healthy(&net, &sidecar);
        let syn = crate::support::packet::tcp(
            "[fd01:1::1]:4000".parse().unwrap(),
            "[fd01:50::200]:1883".parse().unwrap(),
            1,
            0,
            |h| h.syn = true,
            &[],
        );
        let forwarded = || net.through_root(&syn).verdict == crate::support::datapath::XDP_TX;
        assert!(forwarded());
        for ours in [true, false] {
            let said = |text: &str| sidecar.log().matches(text).count();
            let (another, well) = ("which to Katran is another", "all is as configured");
            let (before, well_before) = (said(another), said(well));
            crate::support::server::add_vip_verbatim(&net, ENDPOINT, "FD01:50::250", 1883);
            assert!(!forwarded(), "{kind:?} sends to the other one's reals: none");
            wait_for("the log to say so", || {
                let status = status(&net)["balancer"].to_string();
                (said(another) > before && status.contains("another")).then_some(())
            });
            if ours {
                net.ok(&["katran", "del-vip", "[FD01:50::250]:1883/tcp"]);
                assert!(forwarded());
            } else {
                crate::support::server::del_vip_verbatim(&net, ENDPOINT, "FD01:50::250", 1883);
            }
            wait_for(&format!("forwarding; {}", sidecar.log()), || forwarded().then_some(()));
            // What it says once it says again only after it was well.
            wait_for("the log to say so", || (said(well) > well_before).then_some(()));
            wait_healthy(&net, &sidecar);
        }
    }
}

#[test]
fn what_happened_to_the_interface_or_the_balancer_s_position_is_said() {
    for kind in Kind::silent() {
        let net = prepare(kind);
        net.ok(&["load"]);
        let mut server = kind.start(&net, ENDPOINT);
        let sidecar = sidecar(&net);
        wait_healthy(&net, &sidecar);
        net.sh("ip link set eth0 xdp off");
        wait_for("the log to say so", || {
            sidecar.log().contains("put back xdp_root on eth0").then_some(())
        });
        wait_healthy(&net, &sidecar);
        server.signal("TERM");
        server.wait();
        wait_for("the log to say so", || {
            let log = sidecar.log();
            let last = log.lines().last().unwrap();
            (last.contains("not reachable") && last.contains("this host's own stack")).then_some(())
        });
        assert!(!sidecar.log().contains("forwarding goes on"), "{}", sidecar.log());
    }
}

#[test]
fn unloading_in_two_steps_leaves_nothing() {
    for kind in Kind::silent() {
        let net = prepare(kind);
        net.ok(&["load"]);
        let mut server = kind.start(&net, ENDPOINT);
        if kind == Kind::Katran {
            let first = net.ok(&["unload"]);
            assert!(first.contains("kept xdp_root and its chain"), "{first}");
        }
        server.signal("TERM");
        server.wait();
        net.ok(&["unload"]);
        assert!(!net.bpf("jmp_eth0").exists());
        let output = net.command("ip").args(["link", "show", "eth0"]).output().unwrap();
        assert!(!String::from_utf8(output.stdout).unwrap().contains("xdp"));
    }
}

#[test]
fn what_the_balancer_pretends_to_have_done_is_found_by_reading_back() {
    // The double has room for 8 reals, and says yes to the ninth.
    let net = prepare(Kind::Silent);
    net.ok(&["load"]);
    let _server = Kind::Silent.start(&net, ENDPOINT);
    net.ok(&["katran", "add-vip", "10.1.60.1:80"]);
    for i in 1..=7 {
        net.ok(&["katran", "add-real", "10.1.60.1:80", &format!("10.1.3.{i}")]);
    }
    let error = net.fails(1, &["apply"]);
    assert!(
        error.contains("does not hold what was written to it") && error.contains("as many reals"),
        "{error}"
    );
    let error = net.fails(1, &["katran", "add-real", "10.1.60.1:80", "10.1.3.11"]);
    assert!(error.contains("does not hold what was written to it"), "{error}");
}

#[test]
fn an_operator_sees_and_changes_vips_of_others_only() {
    for kind in Kind::silent() {
        let net = prepare(kind);
        net.ok(&["load"]);
        let _server = kind.start(&net, ENDPOINT);
        net.ok(&["apply"]);
        let katran = |args: &[&str]| net.ok(&[&["katran"], args].concat());
        assert_eq!(
            katran(&["add-vip", "10.1.60.1:80", "--flag", "no_lru"]),
            "10.1.60.1:80/tcp has flags NO_LRU\n"
        );
        // On one that is there, they are added.
        katran(&["add-vip", "10.1.60.1:80", "--flag", "0x8"]);
        assert_eq!(
            katran(&["clear-flags", "10.1.60.1:80", "--flag", "NO_LRU"]),
            "10.1.60.1:80/tcp has flags DPORT_HASH\n"
        );
        katran(&["add-real", "10.1.60.1:80", "10.1.3.1", "--weight", "3"]);
        katran(&["add-real", "10.1.60.1:80", "10.1.3.2"]);
        assert_eq!(
            katran(&["list"]),
            "VIP                   FLAGS       REAL         WEIGHT\n\
             10.1.50.1:1883/tcp    INNER_DST   10.1.3.201        1\n\
             \x20                                 10.1.3.202        2\n\
             10.1.50.250:1883/tcp  INNER_DST   fd01:3::203       1\n\
             10.1.60.1:80/tcp      DPORT_HASH  10.1.3.1          3\n\
             \x20                                 10.1.3.2          1\n"
        );
        katran(&["del-real", "10.1.60.1:80", "10.1.3.1"]);
        let refused = |args: &[&str]| net.fails(2, &[&["katran"], args].concat());
        let last = refused(&["del-real", "10.1.60.1:80", "10.1.3.2"]);
        assert!(last.contains("is its only real, and would go on getting its packets"), "{last}");
        let group = refused(&["del-vip", "10.1.50.1:1883"]);
        assert!(group.contains("is a group of @DIR@/config.toml; change it there"), "{group}");
        let mixed = refused(&["add-real", "[fd01:60::1]:80", "10.1.3.1"]);
        assert!(mixed.contains("IPv6 packets cannot go to the IPv4 real"), "{mixed}");
        katran(&["del-vip", "10.1.60.1:80"]);
        let gone = net.fails(1, &["katran", "del-vip", "10.1.60.1:80"]);
        assert!(gone.contains("balancer refused delVip 10.1.60.1:80/tcp; likely cause"), "{gone}");

        assert_eq!(katran(&["mac"]), "02:00:00:00:00:09\n");
        katran(&["mac", "02:00:00:00:00:0a"]);
        assert_eq!(katran(&["mac"]), "02:00:00:00:00:0a\n");
        net.through_root(&Net::syn("10.1.1.1", 1));
        let stats: serde_json::Value = serde_json::from_str(&katran(&["stats", "--json"])).unwrap();
        assert_eq!(stats["packets"], 1);
        assert_eq!(stats["misses_syn"], 1);
    }
}

#[test]
fn unloading_leaves_a_running_balancer_the_map_that_it_uses() {
    for kind in Kind::silent() {
        let net = prepare(kind);
        net.ok(&["load"]);
        let mut server = kind.start(&net, ENDPOINT);
        net.ok(&["apply"]);
        assert_eq!(status(&net)["healthy"], true);
        if kind == Kind::Katran {
            let unloaded = net.ok(&["unload"]);
            assert!(unloaded.contains("jmp_eth0_inner_dst: balancer_ingres (id"), "{unloaded}");
            net.ok(&["load"]);
            net.ok(&["apply"]);
            assert_eq!(status(&net)["healthy"], true, "the map is still the same");
        }
        // Somebody removes the pin, and the next load makes another map of that name.
        net.ok(&["unload", "--keep-state"]);
        std::fs::remove_file(net.bpf("jmp_eth0_inner_dst")).unwrap();
        net.ok(&["load"]);
        net.ok(&["apply"]);
        let problem = status(&net)["problems"][0].to_string();
        assert!(
            problem.contains("does not use") && problem.contains("katran-patches/"),
            "{problem}"
        );
        server.signal("KILL");
        server.wait();
        let mut server = kind.start(&net, ENDPOINT);
        net.ok(&["apply"]);
        assert_eq!(status(&net)["healthy"], true);
        // A balancer that comes first pins a map, which the next load takes.
        server.signal("KILL");
        server.wait();
        net.ok(&["unload", "--keep-state"]);
        std::fs::remove_file(net.bpf("jmp_eth0_inner_dst")).unwrap();
        let _server = kind.start(&net, ENDPOINT);
        assert!(net.bpf("jmp_eth0_inner_dst").exists(), "{kind:?}");
        net.ok(&["load"]);
        net.ok(&["apply"]);
        assert_eq!(status(&net)["healthy"], true);
    }
}

#[test]
fn apply_beside_run_is_not_undone() {
    let kind = Kind::Silent;
    let net = prepare(kind);
    net.ok(&["load"]);
    let _server = kind.start(&net, ENDPOINT);
    let sidecar = sidecar(&net);
    wait_healthy(&net, &sidecar);
    let config = std::fs::read_to_string(net.config()).unwrap();
    std::fs::write(net.config(), config.replace("fd01:3::203", "fd01:3::204")).unwrap();
    let said = net.ok(&["apply"]);
    assert!(said.contains("add fd01:3::204") && said.contains("read back"), "{said}");
    assert!(sidecar.log().contains("configuration reloaded"), "{}", sidecar.log());
    // Two looks later.
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(net.ok(&["apply"]), "all is as configured\n");
    assert!(net.ok(&["katran", "list"]).contains("fd01:3::204"));

    // What `run` cannot take over is said, and left.
    std::fs::write(net.config(), format!("{config}\nnonsense = 1\n")).unwrap();
    net.fails(2, &["apply"]);
    let other = net.dir.join("other.toml");
    std::fs::write(&other, &config).unwrap();
    let error = net.fails(1, &["--config", other.to_str().unwrap(), "apply"]);
    assert!(error.contains("works by @DIR@/config.toml and would undo this"), "{error}");
    std::fs::write(net.config(), config).unwrap();
    let error = net.fails(1, &["run"]);
    assert!(error.contains("another `run` already manages eth0 (pid "), "{error}");
}

#[test]
fn what_is_taken_away_under_run_comes_back() {
    let kind = Kind::Silent;
    let net = prepare(kind);
    net.ok(&["load"]);
    let server = kind.start(&net, ENDPOINT);
    let sidecar = sidecar(&net);
    wait_healthy(&net, &sidecar);
    let error = net.fails(1, &["unload"]);
    assert!(
        error.contains("would put back what is removed; stop it first, or use --force"),
        "{error}"
    );
    // `run` holds the array, so it does not empty itself: nothing has to be started again.
    std::fs::remove_file(net.bpf("jmp_eth0")).unwrap();
    wait_for("the pin", || net.bpf("jmp_eth0").exists().then_some(()));
    wait_healthy(&net, &sidecar);
    net.sh("ip link set eth0 xdp off");
    wait_for("the log to say so", || {
        sidecar.log().contains("put back xdp_root on eth0").then_some(())
    });
    drop(server);
    net.ok(&["unload", "--force"]);
    let mut sidecar = sidecar;
    assert_eq!(sidecar.wait(), Some(0), "{}", sidecar.log());
    let output = net.command("ip").args(["link", "show", "eth0"]).output().unwrap();
    assert!(!String::from_utf8(output.stdout).unwrap().contains("xdp"));
}
