//! What a client sends from its first misrouted PUBLISH on: published where it belongs, once.

use std::time::Duration;

use crate::client::{Client, connect, padded};
use crate::lab::{TOPICS, a_stream, all_right, lab};
use crate::support::lab::Lab;
use crate::support::mqtt;
use crate::support::net::wait_for;
use crate::support::session::{SERVICE, SERVICE6};

/// A client that is bound straight to the brokers of m/temp/x, whatever it writes next: its id published
/// there before.
fn at_temperature(
    lab: &Lab,
    service: &'static str,
    connect_packet: &[u8],
    level: u8,
    id: &str,
) -> Client {
    let open = |level, packet: &[u8]| {
        let stream = a_stream(lab, "c1", service);
        stream.set_nodelay(true).unwrap();
        let mut client = Client::new(stream, level);
        client.send(packet);
        let connack = client.packet().expect("CONNACK");
        assert_eq!((connack[0], connack[3]), (0x20, 0), "{connack:02x?}");
        client
    };
    let mut teacher = open(4, &connect(4, id).packet());
    for n in 0..2 {
        teacher.publish("m/temp/x", 0, format!("taught-{id}-{n}").as_bytes());
    }
    teacher.disconnect();
    let message = format!("taught-{id}-1");
    let at = lab.wait_received(&format!("m/temp/x {message}"));
    assert!(at <= 2, "{at}");
    open(level, connect_packet)
}

#[test]
fn whatever_its_size_and_protocol_a_message_gets_to_its_group_once() {
    let Some(lab) = lab(true) else { return };
    let mut wanted = Vec::new();
    for service in [SERVICE, SERVICE6] {
        for level in [4, 5] {
            for size in [0, 70_000, 1 << 20] {
                let id = format!("c{}-{level}-{size}", service.len());
                let packet = connect(level, &id).packet();
                let mut client = at_temperature(&lab, service, &packet, level, &id);
                for i in 0..7 {
                    let (topic, _) = TOPICS[i % 3];
                    let name = format!("{id}-{i}");
                    client.publish(topic, 0, &padded(&name, size));
                    wanted.push((topic.to_owned(), name));
                }
                // Some close at once, some when they are told to.
                if level == 4 {
                    client.expect_end();
                } else {
                    client.disconnect();
                }
            }
        }
    }
    all_right(&lab, &wanted);
    assert_eq!(lab.counter("flow_rescued"), 12);
    assert_eq!(lab.counter("publish_lost"), 0);
}

#[test]
fn a_burst_in_one_write_and_messages_until_the_end_is_noticed_are_all_there() {
    let Some(lab) = lab(true) else { return };
    let mut wanted = Vec::new();
    let name = |n: usize, i: usize| format!("burst{n}-{i}");
    for n in 0..4 {
        let id = format!("burst{n}");
        let mut client = at_temperature(&lab, SERVICE, &connect(4, &id).packet(), 4, &id);
        let mut burst = Vec::new();
        for i in 0..1000 {
            let (topic, _) = TOPICS[i % 3];
            burst.extend(mqtt::publish(topic.as_bytes(), 0, name(n, i).as_bytes()));
            wanted.push((topic.to_owned(), name(n, i)));
        }
        client.send(&burst);
        // It looks for the end of the connection only now.
        for i in 1000..1020 {
            std::thread::sleep(Duration::from_millis(5));
            client.publish("m/hum/x", 0, name(n, i).as_bytes());
            wanted.push(("m/hum/x".to_owned(), name(n, i)));
        }
        client.expect_end();
    }
    all_right(&lab, &wanted);
    // In order, as far as one topic's go to one broker.
    for (real, lines) in lab.received() {
        for (topic, _) in TOPICS {
            let of = |n: usize| {
                let prefix = format!("{topic} burst{n}-");
                let number = |l: &String| l.strip_prefix(&prefix)?.parse::<usize>().ok();
                lines.iter().filter_map(number).collect::<Vec<_>>()
            };
            for n in 0..4 {
                assert!(of(n).is_sorted(), "{topic} at r{real}: {:?}", of(n));
            }
        }
    }
}

#[test]
fn qos_1_and_2_are_left_to_the_client_and_what_is_between_them_is_not() {
    let Some(lab) = lab(true) else { return };
    let mut client = at_temperature(&lab, SERVICE, &connect(4, "mixed").packet(), 4, "mixed");
    client.publish("m/hum/x", 1, b"at-qos-1");
    client.publish("m/hum/x", 0, b"between");
    client.publish("m/temp/x", 2, b"at-qos-2");
    client.publish("m/temp/x", 0, b"behind");
    client.expect_end();
    let wanted =
        [("m/hum/x", "between"), ("m/temp/x", "behind")].map(|(t, m)| (t.to_owned(), m.to_owned()));
    all_right(&lab, &wanted);
    let all = lab.arrivals();
    assert!(!all.contains_key("at-qos-1") && !all.contains_key("at-qos-2"), "{all:?}");
}

/// The sidecar publishes without credentials: it must not lend that to who has others.
#[test]
fn what_comes_with_credentials_is_not_published_by_another() {
    let Some(lab) = lab(true) else { return };
    let with_password = mqtt::connect_as(4, 0xc2, b"secret", &[b"user", b"password"]);
    // MQTT 5: an authentication method (property 0x15) is a credential, too.
    let mut method = connect(5, "method");
    method.properties = b"\x15\x00\x01m".to_vec();
    let mut long = connect(5, "numbers");
    long.properties =
        b"\x11\0\0\0\x05\x21\0\x09\x27\0\0\xff\xff\x22\0\x02\x17\x01\x19\x01".to_vec();
    let cases = [("secret", 4, with_password, false), ("numbers", 5, long.packet(), true)];
    for (id, level, packet, rescued) in cases {
        let before = lab.counter("flow_rescued");
        let mut client = at_temperature(&lab, SERVICE, &packet, level, id);
        client.publish("m/hum/x", 0, format!("of-{id}").as_bytes());
        client.expect_end();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(lab.counter("flow_rescued") - before, u64::from(rescued), "{id}");
        assert_eq!(lab.arrivals().contains_key(&format!("of-{id}")), rescued, "{id}");
    }
    assert_eq!(lab.counter("not_rescued"), 1);
    // mosquitto knows no methods and refuses; what is published behind CONNECT nevertheless is nobody's.
    let mut client = Client::new(a_stream(&lab, "c1", SERVICE), 5);
    let mut at_once = method.packet();
    at_once.extend(mqtt::publish5(b"m/temp/x", b"of-method-1"));
    at_once.extend(mqtt::publish5(b"m/hum/x", b"of-method-2"));
    client.send(&at_once);
    std::thread::sleep(Duration::from_millis(500));
    let all = lab.arrivals();
    assert!(!all.contains_key("of-method-1") && !all.contains_key("of-method-2"), "{all:?}");
}

#[test]
fn without_a_sidecar_connections_end_as_without_rescue() {
    let Some(lab) = lab(true) else { return };
    assert!(lab.script("sidecar").arg("kill").status().unwrap().success());
    std::thread::sleep(Duration::from_millis(3500));
    let mut client = at_temperature(&lab, SERVICE, &connect(4, "alone").packet(), 4, "alone");
    client.publish("m/hum/x", 0, b"lost");
    client.expect_end();
    assert_eq!(lab.counter("not_rescued"), 1);
    assert_eq!(lab.counter("publish_lost"), 1);
    // With one again, others are rescued, as soon as it reads.
    assert!(lab.script("sidecar").arg("start").status().unwrap().success());
    let mut tries = 0;
    let message = wait_for("a rescue", || {
        tries += 1;
        let (id, message) = (format!("again{tries}"), format!("rescued{tries}"));
        let mut client = at_temperature(&lab, SERVICE, &connect(4, &id).packet(), 4, &id);
        client.publish("m/hum/x", 0, message.as_bytes());
        client.expect_end();
        (lab.counter("flow_rescued") == 1).then_some(message)
    });
    all_right(&lab, &[("m/hum/x".to_owned(), message)]);
}

/// umqtt, say, reads nothing while it only publishes.
#[test]
fn a_client_that_never_reads_is_reset_in_the_end() {
    let Some(lab) = lab(true) else { return };
    let mut client = at_temperature(&lab, SERVICE, &connect(4, "deaf").packet(), 4, "deaf");
    let mut wanted = Vec::new();
    for n in 0..8 {
        let message = format!("unheard-{n}");
        client.publish("m/hum/x", 0, message.as_bytes());
        wanted.push(("m/hum/x".to_owned(), message));
        std::thread::sleep(Duration::from_millis(1500));
    }
    all_right(&lab, &wanted);
    std::thread::sleep(Duration::from_secs(4));
    // The datapath has given up, and says so.
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        for _ in 0..5 {
            client.publish("m/hum/x", 0, b"too late");
            std::thread::sleep(Duration::from_millis(200));
        }
    }));
    assert!(result.is_err(), "writing fails");
    assert!(!lab.arrivals().contains_key("too late"));
}

/// What one client may cost: aliases, messages that are never complete.
#[test]
fn memory_is_bounded_and_good_messages_before_a_bad_one_arrive() {
    let Some(lab) = lab(true) else { return };
    let mut wanted = Vec::new();
    let id = "bounded";
    let mut client = at_temperature(&lab, SERVICE, &connect(5, id).packet(), 5, id);
    let mut burst = Vec::new();
    for n in 0..30 {
        let message = format!("before-{n}");
        burst.extend(mqtt::publish5(b"m/hum/x", message.as_bytes()));
        wanted.push(("m/hum/x".to_owned(), message));
    }
    // A message of 5 MiB, of which there is only the beginning.
    burst.extend(b"\x30\x85\x80\xc0\x02\x00\x07m/hum/x\x00");
    client.send(&burst);
    all_right(&lab, &wanted);

    let pid =
        std::fs::read_to_string(format!("/run/mqtt-fwd-lab/{}/sidecar.pid", lab.name)).unwrap();
    let resident = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", pid.trim())).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let before = resident();
    let long = "t".repeat(60_000);
    // Their streams stand until the end, each with what it keeps.
    let _clients: Vec<_> = (0..3)
        .map(|n| {
            let id = format!("aliases{n}");
            let hello = connect(5, &id).packet();
            let mut client = at_temperature(&lab, SERVICE, &hello, 5, &id);
            client.publish("m/hum/x", 0, b"first");
            for alias in 1..500u16 {
                let [high, low] = alias.to_be_bytes();
                let topic = format!("m/hum/{alias}{long}");
                let sent = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    client.publish_with(&topic, 2, &[0x23, high, low], b"x");
                }));
                if sent.is_err() {
                    break;
                }
            }
            client
        })
        .collect();
    std::thread::sleep(Duration::from_millis(500));
    // What has come and is not looked at yet may be 64 MiB, on a busy machine; all of it, as it came, 90 MB and more.
    assert!(resident() < before + 88 * 1024, "{} kB, {before} before", resident());
}
