//! A balancer of a fleet gets the flows of others: how fast it finds out where they are. `run` as it is, packets by
//! BPF_PROG_TEST_RUN, broker hosts that answer from here.
//!
//!     cargo bench --bench fleet              idle, then 50,000 a second, then a million at once
//!     cargo bench --bench fleet -- 100000    with so many at once

#[path = "../tests/support/mod.rs"]
#[allow(unused)]
mod support;

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mqtt_fwd::config::Config;
use mqtt_fwd::datapath::Datapath;
use mqtt_fwd::kernel::test_run;
use nix::sched::{CloneFlags, setns};
use siphasher::sip::SipHasher24;
use support::net::{Background, Net};
use support::{mqtt, packet};

const REALS: u8 = 6;
const HEAD: usize = 48;
const ENTRY: usize = 32;

fn config(flows: u32) -> String {
    let reals: Vec<_> = (1..=REALS)
        .map(|n| format!("{{ address = \"10.9.0.{n}\", vip = \"10.1.50.10{n}\" }}"))
        .collect();
    format!(
        r#"
interface = "eth0"
bpffs = "@DIR@/bpf"
balancer = "embedded"
balancer_endpoint = "unix:@DIR@/balancer.sock"
gateway_mac = "02:00:00:00:00:09"
handover_key = "@DIR@/key"
events_per_second = 0

[fleet]
name = "lb1"
misses_per_second = 10000000

[maps]
clients = 1000
flows = {flows}
vips = 16

[[service]]
name = "mqtt"
address = "10.1.50.200"
default_group = "default"
group = [{{ name = "default", vip = "10.1.50.250", reals = [{}] }}]
"#,
        reals.join(", ")
    )
}

/// A broker host that has every sixth connection.
fn answer(socket: &UdpSocket, number: u8, key: [u64; 2], stop: &AtomicBool) {
    let mut bytes = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        let Ok((length, from)) = socket.recv_from(&mut bytes) else { continue };
        let bytes = &mut bytes[..length];
        bytes[5] = 2;
        for entry in bytes[HEAD..].chunks_exact_mut(ENTRY) {
            entry[18] = u8::from(entry[3] % REALS == number);
        }
        let rest = [&bytes[..HEAD - 8], &bytes[HEAD..]].concat();
        let mac = SipHasher24::new_with_keys(key[0], key[1]).hash(&rest);
        bytes[HEAD - 8..HEAD].copy_from_slice(&mac.to_le_bytes());
        let _ = socket.send_to(bytes, from);
    }
}

fn frame(number: u32) -> Vec<u8> {
    let client: SocketAddr = (Ipv4Addr::from(0x0b00_0000 + number), 40_000).into();
    packet::tcp(
        client,
        "10.1.50.200:1883".parse().unwrap(),
        1000 + number,
        77,
        |h| h.psh = true,
        &mqtt::publish(b"a", 0, b"x"),
    )
}

/// Seconds of a CPU that a process has used, and its memory, MiB.
fn used(run: &Background) -> (f64, u64) {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", run.id())).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: f64 = fields[11..13].iter().map(|t| t.parse::<f64>().unwrap()).sum();
    let status = std::fs::read_to_string(format!("/proc/{}/status", run.id())).unwrap();
    let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    (ticks / 100.0, rss.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() / 1024)
}

fn percentile(times: &mut [Duration], part: f64) -> Duration {
    times.sort_unstable();
    times[((times.len() - 1) as f64 * part) as usize]
}

/// Of all flows.
fn addresses(datapath: &Datapath) -> HashSet<u32> {
    let flows = datapath.flows.mapped().unwrap();
    flows.entries().map(|(_, f)| u32::from_be(f.key.addr[0])).collect()
}

fn main() {
    let most: u32 = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(1_000_000);
    let net = Net::new();
    net.write_config(&config(2 * most.next_power_of_two()));
    for n in 1..=REALS {
        net.sh(&format!("ip addr add 10.9.0.{n}/32 dev lo"));
    }
    net.ok(&["keys", "new", "--file", net.dir.join("key").to_str().unwrap()]);
    let file = mqtt_fwd::handover::keys::KeyFile::read(&net.dir.join("key")).unwrap();
    let keys = file.cookie_keys(mqtt_fwd::handover::keys::now());
    let key = mqtt_fwd::fleet::key::ask_keys(&keys)[(keys.epoch & 1) as usize];
    let stop = Arc::new(AtomicBool::new(false));
    let name = net.name.clone();
    let reals: Vec<_> = (0..REALS)
        .map(|number| {
            let (name, stop) = (name.clone(), Arc::clone(&stop));
            std::thread::spawn(move || {
                let ns = std::fs::File::open(format!("/run/netns/{name}")).unwrap();
                setns(ns.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
                let socket =
                    UdpSocket::bind((Ipv4Addr::new(10, 9, 0, number + 1), 18_830)).unwrap();
                socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
                answer(&socket, number, key, &stop);
            })
        })
        .collect();
    let run = net.spawn(&["run"]);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !net.mqtt_fwd(&["status", "--check"]).status.success() {
        let status = net.mqtt_fwd(&["status"]);
        assert!(
            Instant::now() < deadline,
            "{}{}{}",
            run.log(),
            String::from_utf8_lossy(&status.stdout),
            String::from_utf8_lossy(&status.stderr)
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    let config = Config::load(&net.config()).unwrap();
    let datapath = Datapath::open(&config.pins()).unwrap();
    let (program, _) = config.pins().pinned_program("mqtt_fwd").unwrap();
    std::thread::sleep(Duration::from_millis(1500));

    // Idle: one at a time, until its flow is there.
    let mut times = Vec::new();
    for number in 0..500 {
        let begun = Instant::now();
        test_run::run(program.as_fd(), &frame(number), 1).unwrap();
        let client: SocketAddr = (Ipv4Addr::from(0x0b00_0000 + number), 40_000).into();
        // Not busily: on two CPUs, whoever answers would wait for this.
        while !datapath.has_flow(client).unwrap() {
            std::thread::sleep(Duration::from_micros(10));
            assert!(begun.elapsed() < Duration::from_secs(1), "{client} was not found");
        }
        times.push(begun.elapsed());
        std::thread::sleep(Duration::from_millis(2));
    }
    println!(
        "idle, until the flow is there: p50 {:?}, p99 {:?}",
        percentile(&mut times, 0.5),
        percentile(&mut times, 0.99)
    );

    for (what, from, count, rate) in [
        ("50,000 a second for 3 s", 1000, 150_000.min(most / 4), 50_000.0),
        ("all at once", 200_000.max(most), most, f64::INFINITY),
    ] {
        let (cpu_before, _) = used(&run);
        let begun = Instant::now();
        let before = addresses(&datapath).len();
        let mut sent = 0u64;
        let mut round = 0;
        // What nobody answered, TCP repeats after 200 ms, 400 ms and so on.
        let mut missing: Vec<u32> = (from..from + count).collect();
        while !missing.is_empty() {
            let round_begun = Instant::now();
            for (i, number) in missing.iter().enumerate() {
                test_run::run(program.as_fd(), &frame(*number), 1).unwrap();
                sent += 1;
                while (i as f64) / rate > round_begun.elapsed().as_secs_f64() {
                    std::hint::spin_loop();
                }
            }
            round += 1;
            std::thread::sleep(Duration::from_millis(200));
            let there = addresses(&datapath);
            missing.retain(|number| !there.contains(&(0x0b00_0000 + number)));
            assert!(begun.elapsed() < Duration::from_secs(120), "{} still missing", missing.len());
        }
        let (cpu, rss) = used(&run);
        let seconds = begun.elapsed().as_secs_f64();
        println!(
            "{what}: {count} found in {seconds:.1} s, {round} rounds, {sent} segments; {:.1} µs of CPU each, {rss} MiB; \
             flows {} → {}",
            (cpu - cpu_before) * 1e6 / f64::from(count),
            before,
            addresses(&datapath).len()
        );
    }
    stop.store(true, Ordering::Relaxed);
    for real in reals {
        real.join().unwrap();
    }
    drop(run);
}
