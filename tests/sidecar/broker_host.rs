//! A broker host's preparation, in a namespace of its own: undone, everything is as it was.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;

use crate::support::net::{Net, wait_for};
use crate::support::packet;
use mqtt_fwd::kernel::pins::Pins;
use mqtt_fwd::kernel::{takeover, test_run};

/// All that `host up` may touch.
fn state(net: &Net) -> String {
    let mut all = String::new();
    for command in [
        "ip -d addr show",
        "ip -d route show table all",
        "ip -d -6 route show table all",
        "sysctl -a --pattern net.ipv[46]|net.netfilter",
        "bpftool net show dev eth0",
    ] {
        let output = net
            .command("sh")
            .args(["-c", &format!("{} 2>/dev/null", command.replace('|', "\\|"))])
            .output();
        let shown = String::from_utf8_lossy(&output.unwrap().stdout).into_owned();
        assert!(!shown.is_empty(), "{command} shows nothing");
        all += &format!("== {command}\n{shown}");
    }
    // What counts by itself, or is drawn by lot.
    let volatile = [
        "expires",
        "netns_ehash",
        "stable_secret",
        "valid_lft",
        "tcp_fastopen_key",
        "neigh",
        "tentative",
    ];
    let lines: Vec<&str> =
        all.lines().filter(|line| !volatile.iter().any(|v| line.contains(v))).collect();
    lines.join("\n")
}

/// Names the lines that differ.
fn same(before: &str, after: &str) {
    let lacks = |a: &str, b: &str| -> Vec<String> {
        a.lines().filter(|l| !b.lines().any(|m| m == *l)).map(str::to_owned).collect()
    };
    let (gone, new) = (lacks(before, after), lacks(after, before));
    assert!(gone.is_empty() && new.is_empty(), "gone: {gone:#?}\nnew: {new:#?}");
    assert_eq!(before.lines().count(), after.lines().count());
}

fn ip(net: &Net, args: &str) {
    let output = net.command("ip").args(args.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The kernel gives link-local addresses some time after links are up, and to both.
fn settle(net: &Net) {
    wait_for("link-local addresses", || {
        let args = ["-6", "-o", "addr", "show", "scope", "link", "-tentative"];
        let output = net.command("ip").args(args).output().unwrap();
        let settled = String::from_utf8_lossy(&output.stdout).lines().count();
        (settled == 2).then_some(())
    });
}

#[test]
fn undone_everything_is_as_it_was() {
    let net = Net::new();
    for args in [
        "addr add 10.1.3.201/24 dev eth0",
        "addr add fd01:3::201/64 dev eth0 nodad",
        // Metrics of the administrator's own, which have to stay.
        "route add default via 10.1.3.101 dev eth0 mtu 1400 advmss 1300 initcwnd 20 metric 7",
        "route add 10.9.0.0/16 via 10.1.3.101 dev eth0 src 10.1.3.201 window 9000",
        "-6 route add default via fd01:3::101 dev eth0 hoplimit 9",
        // A VIP that was there before.
        "addr add 10.1.50.201/32 dev lo",
    ] {
        ip(&net, args);
    }
    let key = net.dir.join("handover.key");
    let key = key.to_str().unwrap();
    net.ok(&["keys", "new", "--file", key]);
    let bpffs = net.bpf("");
    let bpffs = bpffs.to_str().unwrap().trim_end_matches('/');
    settle(&net);
    let before = state(&net);
    let up = [
        "host",
        "up",
        "--interface",
        "eth0",
        "--bpffs",
        bpffs,
        "--vip",
        "10.1.50.200",
        "--vip",
        "10.1.50.201",
        "--vip",
        "fd01:50::200",
    ];
    let down = ["host", "down", "--interface", "eth0", "--bpffs", bpffs];
    let status = ["host", "status", "--interface", "eth0", "--bpffs", bpffs];

    // Predicted binding: routes advertise a smaller MSS.
    let done = net.ok(&up);
    assert!(done.contains("route default advmss") && done.contains("10.1.50.200 on lo"), "{done}");
    assert!(!done.contains("10.1.50.201 on lo"), "{done}");
    let routes = net.command("ip").args(["route"]).output().unwrap();
    let routes = String::from_utf8(routes.stdout).unwrap();
    assert!(routes.contains("mtu 1400") && routes.contains("initcwnd 20"), "{routes}");
    assert_eq!(net.ok(&up), "nothing to do\n");
    net.ok(&down);
    same(&before, &state(&net));
    assert_eq!(net.ok(&down), "nothing to do\n");

    if !takeover::supported() {
        return;
    }
    let late = [&up[..], &["--handover-key", key]].concat();
    net.command("sysctl").args(["-qw", "net.ipv4.tcp_sack=0"]).output().unwrap();
    let before = state(&net);
    let done = net.ok(&late);
    assert!(done.contains("takeover on eth0") && done.contains("tcp_sack = 1"), "{done}");
    assert!(!done.contains("advmss"), "the balancer's SYN-ACK says what fits: {done}");
    assert_eq!(net.ok(&late), "nothing to do\n");

    // Nobody listens yet, and that is all that is wrong.
    let problems = net.fails(1, &status);
    assert!(
        problems.ends_with("start the broker, here and not in another namespace")
            && problems.contains("not healthy: nobody listens"),
        "{problems}"
    );
    for (break_it, says) in [
        ("sysctl -qw net.ipv4.tcp_syncookies=0", "net.ipv4.tcp_syncookies = 0; it has to be 1"),
        ("sysctl -qw net.ipv4.fwmark_reflect=0", "net.ipv4.fwmark_reflect = 0"),
        ("ip addr del 10.1.50.200/32 dev lo", "10.1.50.200 is not on lo"),
    ] {
        net.command("sh").args(["-c", break_it]).output().unwrap();
        let problems = net.fails(1, &status);
        assert!(problems.contains(says), "{problems}");
    }
    // This one was right before; the others are put right by `up`.
    net.command("sysctl").args(["-qw", "net.ipv4.tcp_syncookies=1"]).output().unwrap();
    net.ok(&late);
    // A listener that connections cannot be handed to, where the kernel has multipath TCP at all.
    let listen = "import socket,time;s=socket.socket(socket.AF_INET,socket.SOCK_STREAM,262);\
                  s.bind(('',1883));s.listen();print('listens',flush=True);time.sleep(30)";
    let mut listener = net
        .command("python3")
        .args(["-c", listen])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let said = std::io::BufReader::new(listener.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut { said }, &mut line).unwrap();
    if line.contains("listens") {
        let problems = net.fails(1, &status);
        assert!(problems.contains("0.0.0.0:1883: listens for multipath TCP"), "{problems}");
    }
    let _ = listener.kill();
    let _ = listener.wait();
    // Another key than the programs'.
    let other = net.dir.join("other.key");
    let other = other.to_str().unwrap();
    net.ok(&["keys", "new", "--file", other]);
    let problems = net.fails(1, &[&status[..], &["--handover-key", other]].concat());
    assert!(problems.contains("holds other keys than the programs"), "{problems}");
    let problems = net.fails(1, &[&status[..], &["--handover-key", key]].concat());
    assert!(!problems.contains("other keys"), "{problems}");

    net.ok(&down);
    same(&before, &state(&net));
}

/// A client's SYN for the service, as a balancer at `outer` sends it on.
fn encapsulated(outer: &str, service: &str) -> Vec<u8> {
    let client: SocketAddr =
        if service.contains('[') { "[fd01:1::1]:4000" } else { "10.1.1.1:4000" }.parse().unwrap();
    let inner = packet::tcp(client, service.parse().unwrap(), 1, 0, |h| h.syn = true, &[]);
    let eth = etherparse::PacketBuilder::ethernet2(packet::CLIENT_MAC, packet::LB_MAC);
    let protocol =
        if client.is_ipv4() { etherparse::ip_number::IPV4 } else { etherparse::ip_number::IPV6 };
    let mut all = Vec::new();
    match outer.parse().unwrap() {
        IpAddr::V4(outer) => {
            eth.ipv4(outer.octets(), [10, 1, 3, 201], 64).write(&mut all, protocol, &inner[14..])
        }
        IpAddr::V6(outer) => {
            let to: Ipv6Addr = "fd01:3::201".parse().unwrap();
            eth.ipv6(outer.octets(), to.octets(), 64).write(&mut all, protocol, &inner[14..])
        }
    }
    .unwrap();
    all
}

#[test]
fn only_what_a_balancer_sends_is_decapsulated() {
    let net = Net::new();
    let bpffs = net.bpf("");
    let bpffs = bpffs.to_str().unwrap().trim_end_matches('/');
    let up = [
        "host",
        "up",
        "--interface",
        "eth0",
        "--bpffs",
        bpffs,
        "--advmss",
        "0",
        "--vip",
        "10.1.50.200",
    ];
    let up = [&up[..], &["--vip", "fd01:50::200"]].concat();
    net.ok(&up);
    let pins = Pins::new(std::path::Path::new(bpffs), "eth0", None);
    let unwraps = |outer: &str, service: &str| {
        let sent = encapsulated(outer, service);
        let (program, _) = pins.pinned_program("decap").unwrap();
        let run = test_run::run(program.as_fd(), &sent, 1).unwrap();
        assert_eq!(run.verdict, libbpf_sys::XDP_PASS);
        let unwrapped = run.frame.len() < sent.len();
        assert!(unwrapped || run.frame == sent, "left as it was");
        unwrapped
    };
    let (v4, v6) = ("10.1.50.200:1883", "[fd01:50::200]:1883");
    assert!(unwraps("172.16.0.0", v4) && unwraps("172.16.255.255", v4) && unwraps("100::1234", v6));
    assert!(unwraps("100::1234", v4), "IPv4 in IPv6");
    for stranger in ["172.17.0.1", "10.1.1.66", "::172.16.0.1", "100:0:0:1::1", "fd01:1::66"] {
        assert!(!unwraps(stranger, if stranger.contains(':') { v6 } else { v4 }), "{stranger}");
    }
    assert!(!unwraps("172.16.0.1", "10.1.50.199:1883"), "no service of this host");

    let from = [&up[..], &["--from", "10.1.2.0/24", "--from", "fd01:2::9"]].concat();
    assert_eq!(net.ok(&from), "decapsulates what comes from 10.1.2.0/24, fd01:2::9/128\n");
    assert_eq!(net.ok(&from), "nothing to do\n");
    assert!(unwraps("10.1.2.9", v4) && unwraps("fd01:2::9", v6));
    assert!(!unwraps("172.16.0.1", v4) && !unwraps("fd01:2::8", v6), "these and no others");
    let status = net.mqtt_fwd(&["host", "status", "--interface", "eth0", "--bpffs", bpffs]);
    let status = String::from_utf8(status.stdout).unwrap();
    for line in [
        "balancers send from 10.1.2.0/24, fd01:2::9/128",
        "         6  packets decapsulated",
        "         1  encapsulated packets for no service of this host",
        "         7  encapsulated packets from where no balancer sends",
    ] {
        assert!(status.contains(line), "{status}");
    }
    let wrong = net.mqtt_fwd(&[&up[..], &["--from", "10.1.2.1/24"]].concat());
    let says = String::from_utf8(wrong.stderr).unwrap();
    assert!(wrong.status.code() == Some(2) && says.contains("did you mean 10.1.2.0/24?"), "{says}");
    net.ok(&["host", "down", "--interface", "eth0", "--bpffs", bpffs]);
}
