//! The relay, with real brokers behind it.

mod bed;
mod client;
mod corners;
mod hostile;
mod lab;
mod many;
mod rescue;
#[path = "../support/mod.rs"]
mod support;
mod transports;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::time::Duration;

use bed::{Bed, RELAY, TOPICS};
use client::{Client, Message, SIZES, connect, padded};

/// The number of the group that a broker of the bed is in.
fn group_of(broker: usize) -> usize {
    broker / 2
}

/// What each watcher has got when there are so many in all.
fn gather(watchers: &mut [Client], count: usize) -> Vec<Vec<Message>> {
    let mut all: Vec<Vec<Message>> = watchers.iter().map(|_| Vec::new()).collect();
    let mut left = count;
    while left > 0 {
        let before = left;
        for (watcher, got) in watchers.iter_mut().zip(&mut all) {
            while let Some(message) = watcher.try_message_soon() {
                got.push(message);
                left = left.checked_sub(1).expect("more messages than were sent");
            }
        }
        assert!(left < before, "{left} of {count} are missing; there are {all:?}");
    }
    all
}

#[test]
fn each_message_of_one_connection_goes_to_its_group_once_and_in_order() {
    let bed = Bed::new();
    let mut watchers = bed.watchers();
    for (level, size) in [4, 5].into_iter().flat_map(|level| SIZES.map(|size| (level, size))) {
        let id = format!("alternates{level}-{size}");
        let mut client = if level == 4 { bed.client(&id) } else { bed.client5(&id) };
        let count = 90;
        for i in 0..count {
            let qos = (i / 3 % 3) as u8;
            client.publish_and_wait(TOPICS[i % 3], qos, &padded(&i.to_string(), size));
        }
        let got = gather(&mut watchers, count);
        for (broker, messages) in got.iter().enumerate() {
            let topic = TOPICS[group_of(broker)];
            assert!(messages.iter().all(|m| m.topic == topic), "{broker}: {messages:?}");
            let numbers: Vec<u32> = messages.iter().map(|m| m.text().parse().unwrap()).collect();
            assert!(numbers.is_sorted(), "{broker}: {numbers:?}");
        }
        client.disconnect();
    }
    for watcher in &mut watchers {
        assert!(watcher.is_quiet(Duration::from_millis(100)), "more than was sent");
    }
}

#[test]
fn messages_of_a_mebibyte_go_through_both_ways() {
    let bed = Bed::new();
    let mut subscriber = bed.client("large-sub");
    subscriber.subscribe(&["#"], 1);
    let mut client = bed.client("large");
    for (i, topic) in TOPICS.iter().enumerate() {
        let payload: Vec<u8> = (0..1 << 20).map(|n| ((n * (i + 3)) >> 3) as u8).collect();
        for qos in [0, 1, 2] {
            client.publish_and_wait(topic, qos, &payload);
            let message = subscriber.message();
            assert_eq!((message.topic.as_str(), message.payload == payload), (*topic, true));
        }
    }
}

#[test]
fn a_burst_in_one_write_is_split_among_the_groups() {
    let bed = Bed::new();
    let mut watchers = bed.watchers();
    let mut client = Client::new(bed.stream(RELAY), 4);
    let mut all = connect(4, "burst").packet();
    for i in 0..3000 {
        let mut body = client::text(TOPICS[i % 3]);
        body.extend(format!("{i}").as_bytes());
        all.extend(client::packet(0x30, &body));
    }
    // CONNECT, all messages and DISCONNECT, without waiting for anything.
    all.extend([0xe0, 0]);
    let started = std::time::Instant::now();
    client.send(&all);
    client.expect(&[0x20, 2, 0, 0]);
    client.expect_end();
    support::net::assert_within(started.elapsed(), Duration::from_secs(1));
    let got = gather(&mut watchers, 3000);
    let numbers: BTreeSet<u32> = got.iter().flatten().map(|m| m.text().parse().unwrap()).collect();
    assert_eq!(numbers.len(), 3000, "each once");
    for (broker, messages) in got.iter().enumerate() {
        assert!(messages.iter().all(|m| m.topic == TOPICS[group_of(broker)]));
        assert!(messages.iter().map(|m| m.text().parse::<u32>().unwrap()).is_sorted());
    }
}

#[test]
fn a_subscriber_gets_what_is_published_at_any_broker_once() {
    let bed = Bed::new();
    for (level, size) in [(4, SIZES[0]), (5, SIZES[0]), (4, SIZES[1])] {
        let mut subscriber =
            if level == 4 { bed.client(&format!("s4-{size}")) } else { bed.client5("s5") };
        assert_eq!(subscriber.subscribe(&["#", "temp/+"], 2), [2, 2]);
        // As from the fast path: straight at the brokers.
        let mut publishers: Vec<Client> = (0..100)
            .map(|n| {
                let broker = n % 6 + 1;
                let mut client = Client::new(bed.stream(Bed::broker(broker)), 4);
                client.send(&connect(4, &format!("p{level}-{n}-{size}")).packet());
                client.expect(&[0x20, 2, 0, 0]);
                client
            })
            .collect();
        for (n, client) in publishers.iter_mut().enumerate() {
            let topic = format!("{}/{n}", ["temp", "hum", "other"][group_of(n % 6)]);
            for qos in 0..3 {
                client.publish_and_wait(&topic, qos, &padded(&format!("{n}-{qos}"), size));
            }
        }
        let mut got: BTreeMap<String, usize> = BTreeMap::new();
        // Both filters match what is below temp/: brokers may send it once or twice (MQTT 3.1.1 §3.3.5).
        while got.len() < 300 {
            *got.entry(subscriber.message().text()).or_default() += 1;
        }
        let other: Vec<_> = got.iter().filter(|(text, n)| **n > 1 && !is_temp(text)).collect();
        assert!(other.is_empty(), "{other:?}");
        while let Some(message) = subscriber.try_message_soon() {
            assert!(is_temp(&message.text()), "twice: {message:?}");
        }
    }
}

fn is_temp(text: &str) -> bool {
    let n: usize = text.split('-').next().unwrap().parse().unwrap();
    group_of(n % 6) == 0
}

#[test]
fn devices_that_publish_in_one_group_get_commands_of_another() {
    let bed = Bed::new();
    for size in SIZES {
        let mut devices: Vec<Client> = (0..4)
            .map(|n| {
                let mut device = bed.client(&format!("device{n}-{size}"));
                device.subscribe(&[&format!("cmd/{n}-{size}/#")], 1);
                device.publish_and_wait(&format!("temp/{n}"), 1, &padded("21", size));
                device
            })
            .collect();
        let mut operator = bed.client(&format!("operator{size}"));
        for i in 0..40 {
            let topic = format!("cmd/{}-{size}/set", i % 4);
            operator.publish_and_wait(&topic, 1, &padded(&i.to_string(), size));
        }
        for (n, device) in devices.iter_mut().enumerate() {
            let got: Vec<String> = (0..10).map(|_| device.message().text()).collect();
            let wanted: Vec<String> = (0..10).map(|i| (i * 4 + n).to_string()).collect();
            assert_eq!(got, wanted);
        }
    }
}

#[test]
fn retained_messages_reach_later_subscribers_and_can_be_cleared() {
    let bed = Bed::new();
    for size in SIZES {
        for i in 0..12 {
            let mut client = bed.client(&format!("retains{i}"));
            let topic = format!("{}/{i}", ["temp", "hum", "else"][i % 3]);
            client.publish_with(&topic, 0x03, &[], &padded("old", size));
            client.expect(&[0x40, 2, 0, 1]);
            client.disconnect();
            // Another client: the same broker, so that there is one retained message a topic.
            let mut client = bed.client(&format!("retains-again{i}"));
            client.publish_with(&topic, 0x03, &[], &padded(&format!("r{i}"), size));
            client.expect(&[0x40, 2, 0, 1]);
            client.disconnect();
        }
        let collect = |id: &str, count: usize| {
            let mut subscriber = bed.client(id);
            let mut id_bytes = vec![0, 1];
            id_bytes.extend(client::text("#"));
            id_bytes.push(1);
            subscriber.send(&client::packet(0x82, &id_bytes));
            let mut got = Vec::new();
            let mut granted = false;
            while !granted || got.len() < count {
                let packet = subscriber.packet().unwrap();
                if packet[0] == 0x90 {
                    granted = true;
                    continue;
                }
                let message = subscriber.take(&packet);
                assert!(message.retain);
                got.push(message.text());
            }
            assert!(subscriber.try_message_soon().is_none(), "more than there were");
            got.sort();
            got
        };
        let mut wanted: Vec<String> = (0..12).map(|i| format!("r{i}")).collect();
        wanted.sort();
        assert_eq!(collect("later", 12), wanted);
        for i in 0..12 {
            let mut client = bed.client(&format!("clears{i}"));
            client.publish_with(&format!("{}/{i}", ["temp", "hum", "else"][i % 3]), 0x03, &[], b"");
            client.expect(&[0x40, 2, 0, 1]);
        }
        assert!(collect("last", 0).is_empty());
    }
}

#[test]
fn a_will_is_published_once_where_its_topic_belongs_and_not_after_disconnect() {
    let bed = Bed::new();
    let mut watchers = bed.watchers();
    let with_will = |id: &str, level: u8| {
        let mut client = Client::new(bed.stream(RELAY), level);
        // Of the largest size that is left for it (MQTT 3.1.1 §3.1.3.3).
        let message = String::from_utf8(padded(id, u16::MAX.into())).unwrap();
        let will = Some(("hum/will".to_owned(), message));
        client.send(&client::Connect { will, ..connect(level, id) }.packet());
        assert_eq!(client.packet().unwrap()[0], 0x20);
        // Brokers of all groups are in use.
        for topic in TOPICS {
            client.publish_and_wait(topic, 1, b"x");
        }
        client
    };
    for level in [4, 5] {
        drop(with_will("dies", level));
        with_will("leaves", level).disconnect();
        let got = gather(&mut watchers, 7);
        let wills: Vec<&Message> = got.iter().flatten().filter(|m| m.topic == "hum/will").collect();
        assert_eq!(wills.len(), 1, "{wills:?}");
        assert_eq!(wills[0].text(), "dies");
        assert!(got[2].contains(wills[0]) || got[3].contains(wills[0]), "in its group");
    }
}

#[test]
fn shared_subscriptions_are_shared() {
    let bed = Bed::new();
    for size in SIZES {
        let mut subscribers: Vec<Client> = (0..2)
            .map(|n| {
                let mut client = bed.client5(&format!("share{n}-{size}"));
                client.subscribe(&["$share/group/#"], 1);
                client
            })
            .collect();
        let mut client = bed.client(&format!("publishes{size}"));
        for i in 0..120 {
            let topic = format!("{}/{i}", TOPICS[i % 3]);
            client.publish_and_wait(&topic, 1, &padded(&i.to_string(), size));
        }
        let got = gather(&mut subscribers, 120);
        let numbers: BTreeSet<String> = got.iter().flatten().map(Message::text).collect();
        assert_eq!(numbers.len(), 120, "each to one of the two");
        assert!(got.iter().all(|g| g.len() > 20), "{} and {}", got[0].len(), got[1].len());
    }
}

#[test]
fn unsubscribed_is_unsubscribed_everywhere() {
    let bed = Bed::new();
    let mut client = bed.client("unsubscribes");
    client.subscribe(&["#"], 0);
    client.subscribe(&["hum/#"], 0);
    let mut body = vec![0, 77];
    body.extend(client::text("#"));
    client.send(&client::packet(0xa2, &body));
    client.expect(&[0xb0, 2, 0, 77]);
    let mut other = bed.client("other");
    for topic in TOPICS {
        other.publish_and_wait(topic, 1, topic.as_bytes());
    }
    assert_eq!(client.message().topic, "hum/x");
    assert!(client.is_quiet(Duration::from_millis(200)));
}

#[test]
fn sessions_outlive_connections_at_every_broker() {
    let bed = Bed::new();
    for size in SIZES {
        for level in [4, 5] {
            let id = format!("persistent{level}-{size}");
            // MQTT 5: session expiry interval of 100 s.
            let properties = if level == 5 { vec![0x11, 0, 0, 0, 100] } else { Vec::new() };
            let come = |clean: bool| {
                let mut client = Client::new(bed.stream(RELAY), level);
                let connect = client::Connect {
                    clean,
                    properties: properties.clone(),
                    ..connect(level, &id)
                };
                client.send(&connect.packet());
                let connack = client.packet().unwrap();
                assert_eq!((connack[0], connack[3]), (0x20, 0));
                (client, connack[2] & 1 == 1)
            };
            let (mut client, present) = come(false);
            assert!(!present);
            client.subscribe(&["#"], 1);
            client.disconnect();
            let mut other = bed.client(&format!("meanwhile{level}-{size}"));
            for i in 0..12 {
                let topic = format!("{}/{i}", ["temp", "hum", "x"][i % 3]);
                other.publish_and_wait(&topic, 1, &padded("kept", size));
            }
            let (mut client, present) = come(false);
            assert!(present, "the session is there");
            let topics: BTreeSet<String> = (0..12).map(|_| client.message().topic).collect();
            assert_eq!(topics.len(), 12);
            client.disconnect();
            // A new session in its place: nothing of the old one is left at any broker.
            let (client, present) = come(true);
            assert!(!present);
            client.disconnect();
            other.publish_and_wait("temp/late", 1, b"late");
            other.publish_and_wait("hum/late", 1, b"late");
            let (mut client, _) = come(false);
            assert!(client.is_quiet(Duration::from_millis(300)));
        }
    }
}

#[test]
fn a_broker_that_comes_back_is_subscribed_to_again() {
    let mut bed = Bed::new();
    let mut subscriber = bed.client("stays");
    subscriber.subscribe(&["temp/#", "hum/#"], 1);
    let mut publisher = bed.client("publisher");
    // The two brokers of the group temp: neither is the subscriber's first.
    for broker in [1, 2] {
        bed.kill_broker(broker);
    }
    std::thread::sleep(Duration::from_millis(300));
    for broker in [1, 2] {
        bed.start_broker(broker);
    }
    std::thread::sleep(Duration::from_millis(2500));
    for size in SIZES {
        for i in 0..20 {
            publisher.publish_and_wait(&format!("temp/{i}"), 1, &padded(&i.to_string(), size));
            assert_eq!(subscriber.message().text(), i.to_string());
        }
    }
}

#[test]
fn without_one_broker_of_a_group_the_other_takes_its_topics() {
    let mut bed = Bed::new();
    bed.kill_broker(1);
    let mut watcher = Client::new(bed.stream(Bed::broker(2)), 4);
    watcher.send(&connect(4, "watch").packet());
    watcher.expect(&[0x20, 2, 0, 0]);
    watcher.subscribe(&["#"], 0);
    let mut client = bed.client("c");
    for i in 0..20 {
        client.publish_and_wait(&format!("temp/{i}"), 1, format!("{i}").as_bytes());
    }
    assert_eq!((0..20).map(|_| watcher.message()).count(), 20);
    // Without any, its clients are told, and others are not concerned.
    bed.kill_broker(2);
    let mut other = bed.client("other");
    let mut lost = bed.client5("lost");
    lost.publish("temp/1", 1, b"x");
    assert_eq!(lost.packet().unwrap()[..3], [0xe0, 2, 0x89]);
    lost.expect_end();
    other.publish_and_wait("hum/1", 1, b"x");
}

#[test]
fn topic_aliases_mean_the_same_at_every_broker() {
    let bed = Bed::new();
    let mut watchers = bed.watchers();
    let mut client = bed.client5("aliases");
    for round in 0..3 {
        for (i, topic) in TOPICS.iter().enumerate() {
            let name = if round == 0 { *topic } else { "" };
            client.publish_with(name, 0, &[0x23, 0, i as u8 + 1], format!("{round}").as_bytes());
        }
    }
    // An alias can change its meaning.
    client.publish_with("hum/y", 0, &[0x23, 0, 1], b"changed");
    client.publish_with("", 0, &[0x23, 0, 1], b"changed");
    let got = gather(&mut watchers, 11);
    for (broker, messages) in got.iter().enumerate() {
        for message in messages.iter().filter(|m| m.text() != "changed") {
            assert_eq!(message.topic, TOPICS[group_of(broker)]);
        }
    }
    let changed: Vec<_> = got.iter().flatten().filter(|m| m.text() == "changed").collect();
    assert!(changed.len() == 2 && changed.iter().all(|m| m.topic == "hum/y"), "{changed:?}");
    // More than CONNACK allows.
    client.publish_with("temp/x", 0, &[0x23, 0xff, 0xff], b"");
    assert_eq!(client.packet().unwrap()[..3], [0xe0, 2, 0x94]);
}

#[test]
fn the_clients_receive_maximum_holds_over_all_brokers() {
    let bed = Bed::new();
    let mut subscriber = Client::new(bed.stream(RELAY), 5);
    let properties = vec![0x21, 0, 2]; // receive maximum 2
    subscriber.send(&client::Connect { properties, ..connect(5, "two") }.packet());
    assert_eq!(subscriber.packet().unwrap()[0], 0x20);
    subscriber.subscribe(&["#"], 2);
    let mut publisher = bed.client("publisher");
    for i in 0..60 {
        publisher.publish_and_wait(&format!("{}/{i}", TOPICS[i % 3]), 2, format!("{i}").as_bytes());
    }
    let mut got = BTreeSet::new();
    let mut open: BTreeSet<u16> = BTreeSet::new();
    while got.len() < 60 || !open.is_empty() {
        let packet = subscriber.packet().unwrap();
        if packet[0] >> 4 == 3 {
            let (message, id) = subscriber.read(&packet);
            assert!(open.insert(id), "identifier {id} is in use");
            assert!(open.len() <= 2, "more than two at a time");
            assert!(got.insert(message.text()), "twice");
            subscriber.send(&client::packet(0x50, &id.to_be_bytes()));
        } else {
            assert_eq!(packet[0], 0x62, "{packet:02x?}");
            let id = u16::from_be_bytes([packet[2], packet[3]]);
            assert!(open.remove(&id));
            subscriber.send(&client::packet(0x70, &id.to_be_bytes()));
        }
    }
}

#[test]
fn a_client_of_one_group_is_sent_to_the_fast_path_when_nothing_is_under_way() {
    let bed = Bed::returning(1);
    for level in [4, 5] {
        let mut watchers = bed.watchers();
        let mut client = if level == 4 { bed.client("returns4") } else { bed.client5("returns5") };
        let mut subscriber = bed.client("stays");
        subscriber.subscribe(&["nothing"], 0);
        for _ in 0..63 {
            client.publish_and_wait("temp/x", 1, b"");
        }
        std::thread::sleep(Duration::from_millis(1500));
        // The datapath would not take it yet.
        client.publish_and_wait("temp/x", 1, b"before");
        if level == 5 {
            assert_eq!(client.packet().unwrap(), [0xe0, 2, 0x9d, 0]);
        }
        client.expect_end();
        // What the client had sent before it read that still goes to its broker: at QoS 0.
        client.publish("temp/x", 0, b"late");
        client.publish("temp/x", 1, b"repeated elsewhere");
        drop(client);
        let got = gather(&mut watchers, 63 + 2);
        let texts: BTreeSet<String> = got.iter().flatten().map(Message::text).collect();
        assert_eq!(texts.into_iter().collect::<Vec<_>>(), ["", "before", "late"]);
        // One that uses two groups stays, and so does a subscriber.
        let mut two = bed.client(&format!("two{level}"));
        two.publish_and_wait("temp/x", 1, b"");
        two.publish_and_wait("hum/x", 1, b"");
        std::thread::sleep(Duration::from_millis(1500));
        two.ping();
        subscriber.ping();
    }
}

/// What is on its way while a client does not know would be lost at QoS 0; and over WebSocket only the relay serves.
#[test]
fn who_would_lose_by_it_or_gain_nothing_is_not_sent_to_the_fast_path() {
    let mut bed = Bed::empty("", "listener = [{ port = 9001, websocket = true }]");
    let file = bed.dir.join("config.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let text = text.replace("return_after = \"0s\"", "return_after = \"1s\"");
    std::fs::write(&file, text).unwrap();
    for broker in 1..=6 {
        bed.start_broker(broker);
    }
    bed.start_relay();
    let port = |port| bed.stream((RELAY.parse::<std::net::SocketAddr>().unwrap().ip(), port));
    let ws = transports::over_websocket(port(9001), "mqtt").unwrap();
    let will = Some(("hum/will".to_owned(), "gone".to_owned()));
    let mut stays = [
        ("over WebSocket", Client::new(ws, 4), None),
        ("with a will of another group", Client::new(bed.stream_of_a_host(), 4), will),
    ];
    for (id, client, will) in &mut stays {
        client.send(&client::Connect { will: will.clone(), ..connect(4, id) }.packet());
        client.expect(&[0x20, 2, 0, 0]);
    }
    let mut sends = bed.client("sends all the time");
    for n in 0..80 {
        sends.publish("temp/x", 0, b"");
        for (_, client, _) in &mut stays {
            client.publish_and_wait("temp/x", 1, b"");
        }
        // Twenty a second, three seconds beyond `return_after`.
        std::thread::sleep(Duration::from_millis(50));
        if n % 20 == 19 {
            sends.ping();
        }
    }
    // Now it pauses.
    sends.expect_end();
    std::thread::sleep(Duration::from_millis(1200));
    for (_, client, _) in &mut stays {
        client.ping();
    }
}

#[test]
fn the_relay_stops_with_a_word_and_reads_its_routes_again() {
    let mut bed = Bed::new();
    let mut subscriber = bed.client5("subscriber");
    subscriber.subscribe(&["moved/#"], 0);
    let text = std::fs::read_to_string(bed.dir.join("config.toml")).unwrap();
    let moved = text.replace("topic = \"temp/#\"", "topic = \"moved/#\"");
    std::fs::write(bed.dir.join("config.toml"), moved).unwrap();
    bed.signal_relay(nix::sys::signal::Signal::SIGHUP);
    support::net::wait_for("the new routes", || {
        bed.relay_log().contains("configuration reloaded").then_some(())
    });
    let mut watchers = bed.watchers();
    bed.client("c").publish_and_wait("moved/x", 1, b"");
    let got = gather(&mut watchers, 1);
    assert!(got[0].len() + got[1].len() == 1, "in the group temp now: {got:?}");
    bed.signal_relay(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(subscriber.packet().unwrap(), [0xe0, 2, 0x8b, 0], "server shutting down");
    subscriber.expect_end();
    support::net::wait_for("its end", || bed.relay_ended().then_some(()));
}

#[test]
fn what_passed_is_in_the_metrics() {
    let mut bed = Bed::empty("", "");
    let file = bed.dir.join("config.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("metrics = \"127.0.0.1:9469\"\n{text}")).unwrap();
    for broker in 1..=6 {
        bed.start_broker(broker);
    }
    bed.start_relay();
    let mut client = bed.client("measured");
    for topic in TOPICS {
        client.publish_and_wait(topic, 1, b"x");
    }
    let scrape = || {
        let mut stream = bed.stream("127.0.0.1:9469");
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    support::net::wait_for("three messages", || {
        let text = scrape();
        let series = "mqtt_fwd_relay_messages_total{direction=\"to_brokers\"} 3.0\n";
        (text.contains(series) && text.contains("\nmqtt_fwd_relay_connections 1.0\n")).then_some(())
    });
}
