//! `replay`: captures through the shipped program, and what that says beside what brokers really got.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use crate::support::datapath::{CONFIG, SERVICE};
use crate::support::lab::{Lab, ONE_REAL_EACH, config};
use crate::support::net::wait_for;
use crate::support::{mqtt, packet};
use pcap_parser::Linktype;
use serde_json::Value;

/// A directory with a configuration.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new(config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.toml"), config).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_mqtt-fwd"))
            .arg("--config")
            .arg(self.path("config.toml"))
            .arg("replay")
            .args(args)
            .current_dir(self.dir.path())
            .output()
            .unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Messages, each as "topic outcome group".
    fn messages(&self, args: &[&str]) -> Vec<String> {
        let report: Value = serde_json::from_str(&self.ok(&[args, &["--json"]].concat())).unwrap();
        let text = |m: &Value, key: &str| m[key].as_str().unwrap_or("-").to_owned();
        report["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| [text(m, "topic"), text(m, "outcome"), text(m, "went_to")].join(" "))
            .collect()
    }
}

/// A client's connection as it is captured: SYN, then its writes, each in one segment.
fn connection(client: &str, server: &str, writes: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let (client, server): (SocketAddr, SocketAddr) =
        (client.parse().unwrap(), server.parse().unwrap());
    let isn = 7000;
    let mut packets = vec![packet::tcp(client, server, isn, 0, |h| h.syn = true, &[])];
    let mut seq = isn + 1;
    for (n, write) in writes.iter().enumerate() {
        // A CONNACK comes after the first.
        let ack = if n == 0 { 9001 } else { 9005 };
        packets.push(packet::tcp(client, server, seq, ack, |h| h.psh = true, write));
        seq += write.len() as u32;
    }
    packets
}

/// A pcap file (draft-ietf-opsawg-pcap §4), a packet a millisecond.
fn write_pcap(path: &Path, link: Linktype, packets: &[Vec<u8>], cut_to: usize) {
    let word = |n: usize| (n as u32).to_le_bytes();
    let mut file = word(0xa1b2_c3d4).to_vec();
    file.extend([2, 0, 4, 0]);
    file.extend([word(0), word(0), word(65_535), word(link.0 as usize)].concat());
    for (i, packet) in packets.iter().enumerate() {
        let data = &packet[..packet.len().min(cut_to)];
        file.extend([word(0), word(1000 * i), word(data.len()), word(packet.len())].concat());
        file.extend(data);
    }
    std::fs::write(path, file).unwrap();
}

/// A pcapng file (draft-ietf-opsawg-pcapng §4) with one interface, all packets at the first second.
fn write_pcapng(path: &Path, link: Linktype, packets: &[&[u8]]) {
    let word = |n: usize| (n as u32).to_le_bytes();
    let mut file = Vec::new();
    let mut block = |kind: usize, body: &[u8]| {
        let length = 12 + body.len().next_multiple_of(4);
        file.extend([word(kind), word(length)].concat());
        file.extend(body);
        file.resize(file.len().next_multiple_of(4), 0);
        file.extend(word(length));
    };
    block(0x0a0d_0d0a, &[&word(0x1a2b_3c4d)[..], &[1, 0, 0, 0], &[0xff; 8]].concat());
    block(1, &[(link.0 as u16).to_le_bytes(), [0, 0], [0, 0], [0, 0]].concat());
    for packet in packets {
        let length = word(packet.len());
        block(6, &[&word(0)[..], &word(0), &word(1_000_000), &length, &length, packet].concat());
    }
    std::fs::write(path, file).unwrap();
}

fn connect_and(messages: &[Vec<u8>]) -> Vec<Vec<u8>> {
    [&[mqtt::connect(4)][..], messages].concat()
}

#[test]
fn a_capture_shows_what_is_lost_once_and_right_from_then_on() {
    let bench = Bench::new(CONFIG);
    let publish = || mqtt::publish(b"sensor/a", 0, b"1");
    let writes = connect_and(&[publish(), publish()]);
    let first = connection("10.1.1.1:1000", SERVICE, &writes);
    let second = connection("10.1.1.1:1001", SERVICE, &writes);
    let writes = [mqtt::connect_as(4, 2, b"other", &[]), mqtt::publish(b"else", 0, b"1")];
    let other = connection("10.1.1.2:1000", SERVICE, &writes);
    write_pcap(&bench.path("c.pcap"), Linktype::ETHERNET, &[first, second, other].concat(), 9999);
    assert_eq!(
        bench.messages(&["c.pcap"]),
        [
            "sensor/a lost -",
            "sensor/a lost -",
            "sensor/a right a",
            "sensor/a right a",
            "else right default"
        ]
    );
    let text = bench.ok(&["c.pcap"]);
    assert!(text.contains("5 PUBLISHes of 3 connections: 3 right, 2 lost"), "{text}");
    assert!(text.contains("; 1 connection would be ended"), "{text}");

    // The same, bound when the message is known.
    let delayed = CONFIG.replace("max_packet = 1480", "max_packet = 1480\nbinding = \"delayed\"");
    std::fs::write(bench.path("delayed.toml"), delayed).unwrap();
    let text = bench.ok(&["c.pcap", "--against", "delayed.toml"]);
    assert!(text.contains("delayed.toml: 5 PUBLISHes of 3 connections: 5 right"), "{text}");
    let row: Vec<_> = text.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(row, ["sensor/a", "lost", "right,", "a", "2"], "{text}");
}

#[test]
fn pcapng_plain_ip_and_segments_larger_than_packets_are_read() {
    let bench = Bench::new(CONFIG);
    let big = mqtt::publish(b"wild/x/a", 0, &vec![b'x'; 20_000]);
    let rest = mqtt::publish(b"else", 0, b"1");
    let one_write = [mqtt::connect(4), mqtt::publish(b"else", 0, b"0"), big, rest].concat();
    let packets = connection("10.1.1.1:1000", SERVICE, &[one_write]);

    let plain: Vec<&[u8]> = packets.iter().map(|packet| &packet[14..]).collect();
    write_pcapng(&bench.path("c.pcapng"), Linktype(101), &plain);
    let expected = ["else right default", "wild/x/a lost -", "else lost -"];
    assert_eq!(bench.messages(&["c.pcapng"]), expected);
}

#[test]
fn a_capture_that_was_taken_at_a_broker_is_replayed_as_if_it_were_the_service() {
    let bench = Bench::new(CONFIG);
    let writes = connect_and(&[mqtt::publish(b"else", 0, b"1")]);
    let packets = connection("10.1.1.1:1000", "192.0.2.7:1884", &writes);
    write_pcap(&bench.path("c.pcap"), Linktype::ETHERNET, &packets, 9999);
    let text = bench.ok(&["c.pcap"]);
    assert!(text.contains("3 segments are for other addresses than services'"), "{text}");
    let args = ["c.pcap", "--server", "192.0.2.7:1884"];
    assert_eq!(bench.messages(&args), ["else right default"]);
    // Its beginning is missing: what it sends cannot be read.
    write_pcap(&bench.path("late.pcap"), Linktype::ETHERNET, &packets[1..], 9999);
    let text = bench.ok(&["late.pcap", "--server", "192.0.2.7:1884"]);
    assert!(text.contains("1 more began before the capture, and are not judged"), "{text}");
}

#[test]
fn data_in_a_syn_repetitions_and_a_capture_that_was_killed_lose_no_message() {
    let bench = Bench::new(CONFIG);
    let writes = connect_and(&(0..4).map(|_| mqtt::publish(b"else", 0, b"1")).collect::<Vec<_>>());
    let (client, server): (SocketAddr, SocketAddr) =
        ("10.1.1.1:1000".parse().unwrap(), SERVICE.parse().unwrap());
    let segment =
        |seq: u32, payload: &[u8]| packet::tcp(client, server, seq, 9001, |_| {}, payload);

    // CONNECT in the SYN (RFC 7413).
    let with_data = packet::tcp(client, server, 7000, 0, |h| h.syn = true, &writes[0]);
    let rest = segment(7001 + writes[0].len() as u32, &writes[1..].concat());
    write_pcap(&bench.path("tfo.pcap"), Linktype::ETHERNET, &[with_data, rest], 9999);
    let report: Value = serde_json::from_str(&bench.ok(&["tfo.pcap", "--json"])).unwrap();
    assert_eq!(report["messages"].as_array().unwrap().len(), 4);

    // One segment is missing; what comes behind it comes again, in one, before it.
    let packets = connection("10.1.1.1:1000", SERVICE, &writes);
    let behind = segment(7001 + (writes[0].len() + writes[1].len()) as u32, &writes[2..].concat());
    let order = [&packets[0], &packets[1], &packets[3], &behind, &packets[2]];
    let order: Vec<_> = order.into_iter().cloned().collect();
    write_pcap(&bench.path("again.pcap"), Linktype::ETHERNET, &order, 9999);
    assert_eq!(bench.messages(&["again.pcap"]), ["else right default"; 4]);
    // It is missing for good.
    write_pcap(&bench.path("gap.pcap"), Linktype::ETHERNET, &order[..4], 9999);
    let text = bench.ok(&["gap.pcap"]);
    assert!(text.contains("; 1 connection could not be read to the end"), "{text}");

    let whole = std::fs::read(bench.path("again.pcap")).unwrap();
    std::fs::write(bench.path("killed.pcap"), &whole[..whole.len() - 5]).unwrap();
    let output = bench.run(&["killed.pcap"]);
    assert!(output.status.success());
    let warning = String::from_utf8(output.stderr).unwrap();
    assert!(warning.contains("ends in the middle of a packet, behind packet 4"), "{warning}");
    std::fs::write(bench.path("empty.pcap"), "").unwrap();
    let output = bench.run(&["empty.pcap"]);
    assert!(String::from_utf8(output.stderr).unwrap().contains("there is nothing in it"));
}

#[test]
fn what_cannot_be_replayed_is_refused_by_name() {
    let bench = Bench::new(CONFIG);
    let writes = connect_and(&[mqtt::publish(b"else", 0, &[0; 500])]);
    let packets = connection("10.1.1.1:1000", SERVICE, &writes);
    write_pcap(&bench.path("cut.pcap"), Linktype::ETHERNET, &packets, 96);
    write_pcap(&bench.path("wlan.pcap"), Linktype(105), &packets, 9999);
    std::fs::write(bench.path("text"), "not a capture at all, though long enough").unwrap();
    for (file, expected) in [
        ("cut.pcap", "cut.pcap: packet 3 was cut when it was captured"),
        ("wlan.pcap", "link type 105 is not known here"),
        ("text", "text: neither pcap nor pcapng, or damaged"),
        ("none", "none: No such file"),
    ] {
        let output = bench.run(&[file]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(expected), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn replay_says_what_the_brokers_really_got() {
    let routes = [("sensor/a", "a"), ("sensor/b", "b")];
    for delayed in [false, true] {
        let lab =
            Lab::up(&config(ONE_REAL_EACH, &routes), if delayed { &["--delayed"] } else { &[] });
        let file = std::env::temp_dir().join(format!("{}.pcap", lab.name));
        let name = file.to_str().unwrap();
        // Its buffer has room for eight packets of the largest size, unless told that they are smaller.
        let dump =
            ["gw", "tcpdump", "-U", "--immediate-mode", "-i", "any", "-s", "2048", "-w", name];
        let mut capture = lab
            .script("exec")
            .args(dump)
            .arg("tcp dst port 1883")
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let size = || file.metadata().map_or(0, |m| m.len());
        wait_for("the capture", || (size() >= 24).then_some(()));
        for (client, topic) in [("c1", "sensor/a"), ("c2", "sensor/b"), ("c1", "sensor/b")] {
            let args = ["--topic", topic, "--count", "30", "--interval", "0.01"];
            lab.publish(client, &args);
        }
        lab.publish("c3", &["--host", "fd01:50::200", "--topic", "sensor/a", "--count", "5"]);
        // What is on its way arrives; tcpdump writes all that it has, and ends.
        std::thread::sleep(Duration::from_millis(500));
        Command::new("pkill").args(["-INT", "-f", &format!("tcpdump.*{name}")]).status().unwrap();
        capture.wait().unwrap();
        let text = std::fs::read_to_string(format!("/run/mqtt-fwd-lab/{}/config.toml", lab.name));
        let bench = Bench::new(&text.unwrap());
        let (replayed, summary) = (bench.messages(&[name]), bench.ok(&[name]));
        std::fs::remove_file(&file).unwrap();
        let received = lab.received();
        for (group, real, topic) in [("a", 1, "sensor/a"), ("b", 2, "sensor/b")] {
            let said = replayed.iter().filter(|m| **m == format!("{topic} right {group}")).count();
            let of_topic = |m: &&String| m.starts_with(topic);
            let got = received.get(&real).map_or(0, |all| all.iter().filter(of_topic).count());
            assert_eq!(said, got, "{topic}, delayed: {delayed}: {summary}\n{replayed:#?}");
            assert!(got > 20, "{received:?}");
        }
        // Its address, or its client id, told sensor/a.
        assert!(replayed.iter().any(|m| m == "sensor/b lost -"), "{replayed:#?}");
    }
}
