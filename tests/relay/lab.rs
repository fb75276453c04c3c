//! Who goes to the relay and who does not: balancer, broker hosts and relays of a lab.

use std::collections::BTreeMap;
use std::time::Duration;

use mqtt_fwd::kernel::takeover;

use crate::client::{Client, SIZES, connect, padded};
use crate::support::lab::{Group, Lab, config, unpadded};
use crate::support::mqtt;
use crate::support::session::{SERVICE, SERVICE6, STYLES, Session, Style, enter, run_all};
use crate::transports::over_websocket;

const GROUPS: &[Group] = &[
    ("a", 1, &[201, 202]),
    ("b", 2, &[203, 204]),
    ("default", 250, &[205, 206]),
    ("relay", 251, &[207, 208]),
];
const ROUTES: &[(&str, &str)] = &[("m/temp/#", "a"), ("m/hum/#", "b"), ("birth/#", "any")];
/// Topics, and the first real of their groups.
pub const TOPICS: [(&str, u32); 3] = [("m/temp/x", 1), ("m/hum/x", 3), ("m/other", 5)];

pub fn lab(delayed: bool) -> Option<Lab> {
    if delayed && !takeover::supported() {
        eprintln!("skipped: this kernel has no bpf_sk_assign_tcp_reqsk (Linux 6.9)");
        return None;
    }
    let text = config(GROUPS, ROUTES).replace(
        "default_group = \"default\"\n",
        "default_group = \"default\"\nrelay = \"relay\"\n",
    );
    let text = format!("{text}\n[relay]\nreturn_after = \"0s\"\n");
    let options: &[&str] = if delayed { &["--relay", "--delayed"] } else { &["--relay"] };
    Some(Lab::up(&text, options))
}

/// Each message is at one of the two reals of its topic's group, once.
pub fn all_right(lab: &Lab, wanted: &[(String, String)]) {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    let all = loop {
        let all = lab.arrivals();
        let missing: Vec<_> = wanted.iter().filter(|(_, m)| !all.contains_key(m)).collect();
        if missing.is_empty() {
            break all;
        }
        assert!(std::time::Instant::now() < deadline, "{} are missing: {missing:?}", missing.len());
        std::thread::sleep(Duration::from_millis(50));
    };
    std::thread::sleep(Duration::from_millis(200));
    for (topic, message) in wanted {
        let at = &all[message];
        let first = TOPICS.iter().find(|(t, _)| t == topic).unwrap().1;
        assert!(at.len() == 1 && at[0] - first < 2, "{message} of {topic} at {at:?}");
    }
}

fn text(name: &str, size: usize) -> String {
    String::from_utf8(padded(name, size)).unwrap()
}

fn messages(sessions: &[Session]) -> Vec<(String, String)> {
    let each = |s: &Session| -> Vec<_> {
        s.messages.iter().map(|m| (s.topic.clone(), unpadded(m).to_owned())).collect()
    };
    sessions.iter().flat_map(each).collect()
}

#[track_caller]
fn run(lab: &Lab, sessions: &[Session]) {
    for (result, session) in run_all(lab, sessions, 8).iter().zip(sessions) {
        assert!(result.is_ok(), "{result:?}: {session:?}");
    }
    all_right(lab, &messages(sessions));
}

/// CONNECTs that only a broker can answer, and one that the datapath can.
fn connects(id: &str) -> Vec<(&'static str, Vec<u8>)> {
    let connect = |kind, level, flags, texts: &[&[u8]]| {
        (kind, mqtt::connect_as(level, flags, format!("{id}-{kind}").as_bytes(), texts))
    };
    vec![
        connect("plain", 4, 0x02, &[]),
        connect("v5", 5, 0x02, &[]),
        connect("credentials", 4, 0xc2, &[b"user", b"password"]),
        connect("persistent", 4, 0x00, &[]),
    ]
}

/// Sessions of unknown clients of every kind, all behind one address.
fn unknown(tag: &str, size: usize) -> Vec<Session> {
    let mut all = Vec::new();
    let times = if size == 0 { 3 } else { 1 };
    for round in 0..times {
        for (n, (topic, _)) in TOPICS.iter().enumerate() {
            for style in STYLES {
                for service in [SERVICE, SERVICE6] {
                    let tag = format!("{tag}-{round}-{n}-{style:?}-{}", service.len());
                    for (kind, connect) in connects(&tag) {
                        all.push(Session {
                            connect,
                            style,
                            topic: (*topic).to_owned(),
                            messages: (0..times)
                                .map(|m| text(&format!("{tag}-{kind}-{m}"), size))
                                .collect(),
                            qos: 0,
                            ..Session::new("c1", service, "")
                        });
                    }
                }
            }
        }
    }
    all
}

pub fn a_stream(lab: &Lab, host: &'static str, service: &'static str) -> std::net::TcpStream {
    std::thread::scope(|scope| {
        let connects = scope.spawn(|| {
            enter(lab, host);
            let service = service.parse().unwrap();
            // A relay that is gone answers with RST; the next port may be another's.
            for _ in 0..50 {
                if let Ok(stream) =
                    std::net::TcpStream::connect_timeout(&service, Duration::from_secs(3))
                {
                    return stream;
                }
            }
            panic!("no connection to {service}");
        });
        connects.join().unwrap()
    })
}

fn a_client(lab: &Lab, host: &'static str, service: &'static str, id: &str) -> Client {
    let stream = a_stream(lab, host, service);
    stream.set_nodelay(true).unwrap();
    let mut client = Client::new(stream, 4);
    client.send(&connect(4, id).packet());
    client
}

fn the_table(delayed: bool, size: usize) {
    let Some(lab) = lab(delayed) else { return };
    // First messages of unknown clients of every kind, all behind one address.
    run(&lab, &unknown("unknown", size));

    for service in [SERVICE, SERVICE6] {
        // One connection that alternates between three groups. With delayed binding, the first is bound to a broker,
        // and ends when it shows another group, which is proof enough: what came behind is rescued.
        let mut wanted = Vec::new();
        for round in 0..3 {
            let mut client = a_client(&lab, "c2", service, "alternates");
            client.expect(&[0x20, 2, 0, 0]);
            for i in 0..if size == 0 { 30 } else { 9 } {
                let (topic, _) = TOPICS[i % 3];
                let message = format!("alt{}-{round}-{i}", service.len());
                client.publish(topic, 0, &padded(&message, size));
                wanted.push((topic.to_owned(), message));
            }
            if round < 1 && delayed {
                assert!(client.packet().is_none(), "the connection is ended");
            } else {
                client.ping();
                client.disconnect();
            }
            // Its next connection has the same id: brokers drop what they have not read of this one.
            all_right(&lab, &wanted);
        }

        // A birth message goes where its client's first broker is, telemetry to its group.
        let mut device = a_client(&lab, "c3", service, &format!("born{}", service.len()));
        device.expect(&[0x20, 2, 0, 0]);
        device.publish("birth/x", 0, &padded(&format!("birth{}", service.len()), size));
        std::thread::sleep(Duration::from_millis(100));
        device.publish("m/temp/x", 0, &padded(&format!("born{}", service.len()), size));
        all_right(&lab, &[("m/temp/x".to_owned(), format!("born{}", service.len()))]);
        device.disconnect();
    }

    // A subscriber to everything, while others publish past the relay.
    let mut subscriber = a_client(&lab, "c4", SERVICE, "everything");
    subscriber.expect(&[0x20, 2, 0, 0]);
    assert_eq!(subscriber.subscribe(&["#"], 0), [0]);
    let each = if size == 0 { 3 } else { 1 };
    let publishers: Vec<Session> = (0..100)
        .map(|n| Session {
            style: Style::OneWrite,
            topic: TOPICS[n % 3].0.to_owned(),
            messages: (0..each).map(|m| text(&format!("all-{n}-{m}"), size)).collect(),
            qos: 0,
            ..Session::new("c5", SERVICE, &format!("straight{n}"))
        })
        .collect();
    run(&lab, &publishers);
    let mut got: BTreeMap<String, usize> = BTreeMap::new();
    while got.len() < 100 * each {
        *got.entry(subscriber.message().text()).or_default() += 1;
    }
    assert!(got.values().all(|n| *n == 1), "once each");

    // Devices that publish in one group and get commands of another.
    let mut devices: Vec<Client> = (0..4)
        .map(|n| {
            let mut device = a_client(&lab, "c6", SERVICE, &format!("device{n}"));
            device.expect(&[0x20, 2, 0, 0]);
            device.subscribe(&[&format!("cmd/{n}")], 0);
            device.publish("m/temp/x", 0, &padded(&format!("from-device{n}"), size));
            device
        })
        .collect();
    let mut operator = a_client(&lab, "c5", SERVICE, "operator");
    operator.expect(&[0x20, 2, 0, 0]);
    for i in 0..40 {
        operator.publish(&format!("cmd/{}", i % 4), 0, &padded(&i.to_string(), size));
    }
    for (n, device) in devices.iter_mut().enumerate() {
        let got: Vec<String> = (0..10).map(|_| device.message().text()).collect();
        let wanted: Vec<String> = (0..10).map(|i| (i * 4 + n).to_string()).collect();
        assert_eq!(got, wanted);
    }
    let sent: Vec<_> = (0..4).map(|n| ("m/temp/x".to_owned(), format!("from-device{n}"))).collect();
    all_right(&lab, &sent);
}

#[test]
fn every_message_its_group_with_predicted_binding_and_a_relay() {
    the_table(false, 0);
}

#[test]
fn every_message_its_group_with_delayed_binding_and_a_relay() {
    the_table(true, 0);
}

#[test]
fn every_mebibyte_its_group_with_predicted_binding_and_a_relay() {
    the_table(false, 1 << 20);
}

#[test]
fn every_mebibyte_its_group_with_delayed_binding_and_a_relay() {
    the_table(true, 1 << 20);
}

#[test]
fn a_relay_that_is_killed_takes_its_own_connections_only() {
    let Some(lab) = lab(false) else { return };
    let mut clients: Vec<Client> = (0..40)
        .map(|n| {
            let mut client = a_client(&lab, "c1", SERVICE, &format!("r{n}"));
            client.expect(&[0x20, 2, 0, 0]);
            client.subscribe(&[&format!("to/{n}")], 0);
            client
        })
        .collect();
    let killed = lab.script("relay").args(["kill", "r7"]).status().unwrap();
    assert!(killed.success());
    let mut stayed = 0;
    for (n, client) in clients.iter_mut().enumerate() {
        client.send(&[0xc0, 0]);
        if client.try_packet().is_ok_and(|p| p.as_deref() == Some(&[0xd0, 0])) {
            stayed += 1;
            continue;
        }
        // Its client connects again, and finds the other.
        loop {
            let mut again = a_client(&lab, "c1", SERVICE, &format!("r{n}"));
            if again.try_packet().is_ok_and(|p| p.as_deref() == Some(&[0x20, 2, 0, 0])) {
                again.subscribe(&[&format!("to/{n}")], 0);
                *client = again;
                break;
            }
        }
    }
    assert!((5..=35).contains(&stayed), "{stayed} of 40 were the other relay's");
    let mut operator = clients.pop().unwrap();
    for size in SIZES {
        for (n, client) in clients.iter_mut().enumerate() {
            operator.publish(&format!("to/{n}"), 0, &padded(&n.to_string(), size));
            assert_eq!(client.message().text(), n.to_string());
        }
    }
}

/// With delayed binding, clients of one group never meet the relay.
#[test]
fn clients_of_one_group_go_straight_to_their_brokers() {
    let Some(lab) = lab(true) else { return };
    for round in 0..3 {
        let sessions: Vec<Session> = (0..30)
            .map(|n| Session {
                style: STYLES[n % 3],
                topic: TOPICS[n % 3].0.to_owned(),
                messages: vec![format!("straight-{round}-{n}")],
                qos: 0,
                ..Session::new("c1", if n % 2 == 0 { SERVICE } else { SERVICE6 }, &format!("id{n}"))
            })
            .collect();
        run(&lab, &sessions);
    }
    let flows: serde_json::Value =
        serde_json::from_str(&lab.mqtt_fwd(&["flows", "--json"])).unwrap();
    let flows = flows["flows"].as_array().unwrap();
    assert!(flows.len() >= 60, "{}", flows.len());
    let relayed: Vec<_> = flows.iter().filter(|f| f["group"] == "relay").collect();
    assert!(relayed.is_empty(), "{relayed:?}");
}

/// MQTT 5, which only a broker can answer: an unknown client would be the relay's.
#[test]
fn imported_clients_go_straight_from_their_first_connection_on() {
    let Some(lab) = lab(true) else { return };
    let file = std::env::temp_dir().join(format!("{}.csv", lab.name));
    let text = "service,by,client,topic\nmqtt,client_id,seeded,m/hum/x\n\
                mqtt6, client_id, seeded, m/hum/x\nmqtt,client_id,known,m/temp/x\n";
    std::fs::write(&file, text).unwrap();
    let said = lab.mqtt_fwd(&["clients", "import", file.to_str().unwrap()]);
    assert_eq!(said.trim(), "3 clients imported; 0 had been learned already");
    for (service, id, direct) in
        [(SERVICE, "seeded", true), (SERVICE6, "seeded", true), (SERVICE, "stranger", false)]
    {
        let before = lab.counter("bound_client_id");
        let mut client = Client::new(a_stream(&lab, "c1", service), 5);
        client.send(&connect(5, id).packet());
        assert_eq!(client.packet().unwrap()[0], 0x20);
        assert_eq!(lab.counter("bound_client_id") - before, u64::from(direct), "{id}");
        let message = format!("{id}{}", service.len());
        client.publish("m/hum/x", 0, message.as_bytes());
        all_right(&lab, &[("m/hum/x".to_owned(), message)]);
        client.disconnect();
    }
    let said = lab.mqtt_fwd(&["clients", "import", file.to_str().unwrap()]);
    assert_eq!(said.trim(), "0 clients imported; 3 had been learned already");
    let exported = lab.mqtt_fwd(&["clients", "export"]);
    for line in text.lines().map(|l| l.replace(' ', "")) {
        assert!(exported.contains(&line), "{line}: {exported}");
    }
    std::fs::remove_file(&file).unwrap();
}

/// Other ports of the service: nothing of them is read on the way.
#[test]
fn websocket_clients_reach_the_relay_through_the_balancer() {
    let text = config(GROUPS, ROUTES).replace(
        "default_group = \"default\"\n",
        "default_group = \"default\"\nrelay = \"relay\"\n\
         listener = [{ port = 8083, websocket = true }]\n",
    );
    let lab = Lab::up(&text, &["--relay"]);
    for (service, tag) in [("10.1.50.200:8083", "v4"), ("[fd01:50::200]:8083", "v6")] {
        let stream = a_stream(&lab, "c1", service);
        let mut client = Client::new(over_websocket(stream, "mqtt").unwrap(), 4);
        client.send(&connect(4, tag).packet());
        client.expect(&[0x20, 2, 0, 0]);
        for (topic, _) in TOPICS {
            client.publish_and_wait(topic, 1, format!("{tag}-{topic}").as_bytes());
        }
        let wanted = TOPICS.map(|(topic, _)| (topic.to_owned(), format!("{tag}-{topic}")));
        all_right(&lab, &wanted);
    }
}
