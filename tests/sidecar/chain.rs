//! Loading, the chain, and what is in the way: with the real command line, in namespaces.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd as _;

use libbpf_rs::{MapCore as _, MapHandle, Program};
use mqtt_fwd::kernel::xdp::ProgramInfo;

use crate::support::datapath::{XDP_PASS, XDP_TX};
use crate::support::net::{Net, wait_for};
use crate::support::packet;

fn healthy(net: &Net) -> bool {
    net.ok(&["status", "--json"]).contains("\"healthy\": true")
}

#[test]
fn load_is_repeatable_and_unload_leaves_nothing() {
    let net = Net::new();
    assert!(net.ok(&["load"]).contains("with its own xdp_root"));
    let again = net.ok(&["load"]);
    assert!(again.contains("with the root that was there"), "{again}");
    assert!(again.contains("taken over: "), "{again}");
    assert!(net.bpf("jmp_eth0").exists());
    assert!(net.bpf("jmp_eth0_inner_dst").exists());

    let removed = net.ok(&["unload"]);
    assert!(removed.contains("removed mqtt_fwd (id "), "{removed}");
    assert!(removed.contains("removed xdp_root (id "), "{removed}");
    // The kernel's own maps.debug and progs.debug aside.
    let left = fs::read_dir(net.bpf("")).unwrap().flatten();
    let left: Vec<_> = left.filter(|e| !e.path().ends_with("mqtt_fwd")).collect();
    assert!(left.iter().all(|e| e.path().extension().is_some_and(|x| x == "debug")), "{left:?}");
    assert_eq!(fs::read_dir(net.bpf("mqtt_fwd")).unwrap().count(), 0);
    net.sh("! ip link show eth0 | grep -q xdp");
    assert!(net.ok(&["unload"]).contains("nothing of mqtt-fwd is on eth0"));
}

/// For a moment, and in `run` for longer, the last load's programs call the next one's stages: they have all maps in
/// common, and so what one notes for the other.
#[test]
fn a_load_of_the_same_build_takes_over_every_map() {
    let net = Net::new();
    let maps = || -> BTreeMap<String, u32> {
        let path = net.bpf("mqtt_fwd/eth0/prog_mqtt_fwd");
        let program = ProgramInfo::by_fd(Program::fd_from_pinned_path(path).unwrap().as_fd());
        let ids = program.unwrap().map_ids.unwrap().into_iter();
        let named = |id| (MapHandle::from_map_id(id).unwrap().name().to_str().unwrap().into(), id);
        ids.map(named).filter(|(name, _): &(String, _)| !name.contains('.')).collect()
    };
    net.ok(&["load"]);
    let before = maps();
    assert!(before.contains_key("scratch_area") && before.contains_key("stages"), "{before:?}");
    net.ok(&["load"]);
    assert_eq!(maps(), before);
}

#[test]
fn packets_go_root_mqtt_fwd_balancer_and_are_wrapped_for_a_real() {
    let net = Net::new();
    net.ok(&["load"]);
    let syn = Net::syn("10.1.1.1", 4000);
    // There is nothing at position 2: the stack gets the packet as it came.
    let outcome = net.through_root(&syn);
    assert_eq!((outcome.verdict, outcome.packet), (XDP_PASS, syn.clone()));

    let _run = net.spawn(&["run"]);
    wait_for("the sidecar", || healthy(&net).then_some(()));
    let outcome = net.through_root(&syn);
    assert_eq!(outcome.verdict, XDP_TX);
    // The default group's real is IPv6: 40 bytes, and the client's packet as it was sent.
    let out = outcome.packet;
    assert_eq!(out.len(), syn.len() + 40);
    assert_eq!(packet::dst(&out).to_string(), "fd01:3::203");
    assert_eq!(out[..6], [2, 0, 0, 0, 0, 9], "to the gateway");
    assert_eq!(out[20], 4, "IPv4 inside (RFC 2473)");
    assert_eq!(out[54..], syn[14..], "inner packet");
    assert_eq!(u16::from_be_bytes([out[18], out[19]]) as usize, syn.len() - 14);
    let counters = net.ok(&["counters", "--json"]);
    assert!(counters.contains("\"flow_new\": 1"), "{counters}");
    // The kernel's own IPv6 messages may have come through, too.
    assert!(!counters.contains("\"no_balancer\": 0"), "{counters}");
}

#[test]
fn the_sidecar_may_die_and_come_back_and_forwarding_goes_on() {
    let net = Net::new();
    let syn = Net::syn("10.1.1.1", 4000);
    {
        let mut run = net.spawn(&["run"]);
        wait_for("the sidecar", || net.mqtt_fwd(&["status"]).status.success().then_some(()));
        wait_for("the sidecar", || healthy(&net).then_some(()));
        assert_eq!(net.through_root(&syn).verdict, XDP_TX);
        run.signal("KILL");
        run.wait();
    }
    assert_eq!(net.through_root(&syn).verdict, XDP_TX, "after kill -9");
    let mut run = net.spawn(&["run"]);
    wait_for("the sidecar again", || healthy(&net).then_some(()));
    assert_eq!(net.through_root(&syn).verdict, XDP_TX);
    run.signal("TERM");
    assert_eq!(run.wait(), Some(0), "{}", run.log());
    assert_eq!(net.through_root(&syn).verdict, XDP_TX, "after SIGTERM");
    // The maps were taken over: it is still the same flow.
    assert!(net.ok(&["counters", "--json"]).contains("\"syn_again\": 3"));
}

#[test]
fn a_root_that_is_there_already_is_used_and_left() {
    let net = Net::new();
    // As Katran's install_xdproot.sh leaves it: a root on the interface, its array pinned.
    net.ok(&["load"]);
    let pin = net.bpf("mqtt_fwd/eth0/prog_xdp_root");
    fs::remove_file(&pin).unwrap();
    net.ok(&["load"]);
    assert!(!pin.exists(), "another's root is not ours to pin");
    net.ok(&["unload"]);
    assert!(net.bpf("jmp_eth0").exists());
    net.sh("ip link show eth0 | grep -q xdp");
}

#[test]
fn another_program_on_the_interface_is_named_and_left() {
    let net = Net::new();
    net.ok(&["veth-peer", "--interface", "eth0"]);
    let error = net.fails(1, &["load"]);
    assert!(
        error.starts_with("mqtt-fwd: interface eth0: XDP program \"xdp_root\" (id "),
        "{error}"
    );
    assert!(error.contains("ip link set dev eth0 xdp off"), "{error}");
    assert!(!net.bpf("jmp_eth0").exists(), "nothing half done");
    net.sh("ip link show eth0 | grep -q xdp");
}

#[test]
fn another_program_at_our_position_is_named_and_left() {
    let net = Net::new();
    net.ok(&["load"]);
    let id = {
        let chain = libbpf_rs::MapHandle::from_pinned_path(net.bpf("jmp_eth0")).unwrap();
        let foreign = crate::support::datapath::sentinel(XDP_PASS);
        use libbpf_rs::MapCore as _;
        use std::os::fd::AsRawFd as _;
        chain
            .update(
                &1u32.to_ne_bytes(),
                &foreign.as_raw_fd().to_ne_bytes(),
                libbpf_rs::MapFlags::ANY,
            )
            .unwrap();
        chain.lookup(&1u32.to_ne_bytes(), libbpf_rs::MapFlags::ANY).unwrap().unwrap()
    };
    let error = net.fails(1, &["load"]);
    assert!(error.contains("@DIR@/bpf/jmp_eth0 position 1 holds program \"sentinel\""), "{error}");
    let kept = net.ok(&["unload"]);
    assert!(kept.contains("kept "), "{kept}");
    let chain = libbpf_rs::MapHandle::from_pinned_path(net.bpf("jmp_eth0")).unwrap();
    use libbpf_rs::MapCore as _;
    let now = chain.lookup(&1u32.to_ne_bytes(), libbpf_rs::MapFlags::ANY).unwrap().unwrap();
    assert_eq!(now, id);
}

#[test]
fn maps_of_another_size_take_over_what_the_old_ones_hold() {
    let net = Net::new();
    net.ok(&["load"]);
    let dir = |name: &str| fs::read_link(net.bpf("mqtt_fwd/eth0").join(name)).unwrap();
    let before = dir("mqtt_fwd");
    net.ok(&["load"]);
    assert_eq!(dir("mqtt_fwd"), before, "nothing to move");
    net.write_config(&crate::support::net::CONFIG.replace("flows = 100\n", "flows = 200\n"));
    let text = net.ok(&["load"]);
    assert!(text.contains("moved to maps of other layout or sizes"), "{text}");
    assert_ne!(dir("mqtt_fwd"), before);
    assert!(!net.bpf("mqtt_fwd/eth0").join(before).exists(), "the old ones are gone");
    net.ok(&["unload"]);
    assert!(!net.bpf("mqtt_fwd/eth0").exists());
}

#[test]
fn a_real_is_prepared_and_put_back() {
    let net = Net::new();
    // Notes of a namespace that is gone, and whose number this one has now.
    net.sh("mkdir -p /run/mqtt-fwd; \
            echo '{\"net/ipv4/conf/eth0/rp_filter\": \"0\"}' \
            > /run/mqtt-fwd/real-$(stat -Lc %i /proc/self/ns/net)-eth0.json");
    let up = |net: &Net| {
        net.ok(&[
            "host",
            "up",
            "--interface",
            "eth0",
            "--vip",
            "10.1.50.200",
            "--vip",
            "fd01:50::200",
            "--bpffs",
            net.bpf("").to_str().unwrap(),
        ])
    };
    net.sh("ip addr add 10.1.3.201/24 dev eth0; ip route add default via 10.1.3.101; \
            echo 1 > /proc/sys/net/ipv4/conf/eth0/rp_filter");
    let done = up(&net);
    assert!(done.contains("route default advmss 1412"), "{done}");
    net.sh(
        "ip addr show lo | grep -q 10.1.50.200/32; ip addr show lo | grep -q fd01:50::200/128; \
            ip route | grep -q 'default via 10.1.3.101 dev eth0 advmss 1412'; \
            ip link show eth0 | grep -q xdp; \
            test $(cat /proc/sys/net/ipv4/conf/eth0/rp_filter) = 2",
    );
    assert_eq!(up(&net).trim(), "nothing to do");
    net.ok(&["host", "down", "--interface", "eth0", "--bpffs", net.bpf("").to_str().unwrap()]);
    net.sh("! ip addr show lo | grep -q 10.1.50.200; ! ip route | grep -q advmss; \
            ! ip link show eth0 | grep -q xdp; \
            test $(cat /proc/sys/net/ipv4/conf/eth0/rp_filter) = 1");
}

#[test]
fn a_second_sidecar_or_reader_is_told_of_the_first_and_changes_nothing() {
    let net = Net::new();
    let _run = net.spawn(&["run"]);
    wait_for("the sidecar", || net.mqtt_fwd(&["status"]).status.success().then_some(()));
    wait_for("the sidecar", || healthy(&net).then_some(()));
    let before = net.ok(&["status"]);
    let error = net.fails(1, &["run"]);
    assert!(error.contains("another `run` already manages eth0 (pid "), "{error}");
    let error = net.fails(1, &["balancer"]);
    assert!(error.contains("listening at unix:@DIR@/balancer.sock (is another"), "{error}");
    assert_eq!(net.ok(&["status"]).lines().next(), before.lines().next());
    assert_eq!(net.ok(&["status"]).lines().nth(3), before.lines().nth(3), "the same program");

    let dir = fs::File::open(net.bpf("mqtt_fwd/eth0/mqtt_fwd")).unwrap();
    let _reader = nix::fcntl::Flock::lock(dir, nix::fcntl::FlockArg::LockExclusive).unwrap();
    let error = net.fails(1, &["events", "--seconds", "0"]);
    assert!(error.contains("another `mqtt-fwd events` reads the events"), "{error}");
}
