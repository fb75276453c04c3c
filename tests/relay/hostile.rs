//! What clients do that they should not, and what they cost.

use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use crate::bed::{Bed, RELAY};
use crate::client::{self, Client, connect};
use crate::support::net::{assert_within, wait_for};

#[test]
fn protocol_violations_are_answered_and_the_connection_closed() {
    let bed = Bed::new();
    for (code, bytes) in [
        (0x81, &b"\x36\x05\x00\x01a\x00\x01"[..]),   // QoS 3
        (0x81, b"\x62\x01\x00"),                     // PUBREL without an identifier
        (0x81, b"\x82\x03\x00\x01\x00"),             // SUBSCRIBE without a filter
        (0x82, b"\x10\x02\x00\x00"),                 // a second CONNECT
        (0x82, b"\x20\x02\x00\x00"),                 // a CONNACK
        (0x81, b"\x00\x00"),                         // type 0
        (0x81, b"\x30\xff\xff\xff\xff\x01"),         // five bytes of length
        (0x90, b"\x30\x06\x00\x03a/#\x00"),          // a wildcard in a topic
        (0x95, b"\x30\xff\xff\xff\x7f\x00\x01a"),    // 256 MiB
        (0x82, b"\x30\x06\x00\x00\x03\x23\x00\x09"), // an alias that stands for nothing
    ] {
        let mut client = bed.client5("bad");
        client.send(bytes);
        let end = client.packet();
        let end = end.unwrap_or_else(|| panic!("nothing was said to {bytes:02x?}"));
        assert_eq!(end[..2], [0xe0, 2], "{bytes:02x?}: {end:02x?}");
        // An alias is refused for being too large before it is looked up.
        assert!(end[2] == code || (code == 0x82 && end[2] == 0x94), "{bytes:02x?}: {end:02x?}");
        client.expect_end();
        let mut client = bed.client("bad4");
        client.send(bytes);
        client.expect_end();
    }
    bed.client("good").publish_and_wait("temp/x", 1, b"");
}

/// Without bounds, each filter of these took two milliseconds of the relay's thread, and nobody was served for a minute.
#[test]
fn topic_filters_without_end_do_not_keep_others_waiting() {
    let mut bed = Bed::empty("", "");
    let file = bed.dir.join("config.toml");
    let routes = (0..2000).map(|i| format!("{{ topic = \"r{i}/x/+/y{i}\", group = \"temp\" }},\n"));
    let text = std::fs::read_to_string(&file).unwrap();
    let text = text.replace("route = [\n", &format!("route = [\n{}", routes.collect::<String>()));
    std::fs::write(&file, text).unwrap();
    for broker in 1..=6 {
        bed.start_broker(broker);
    }
    bed.start_relay();
    let mut victim = bed.client("victim");
    let mut round_trips = |seconds| {
        let end = Instant::now() + Duration::from_secs(seconds);
        let mut all = Vec::new();
        while Instant::now() < end {
            let start = Instant::now();
            victim.publish_and_wait("temp/x", 1, b"");
            all.push(start.elapsed());
        }
        all.sort();
        (all[all.len() * 99 / 100], all[all.len() - 1])
    };
    let before = round_trips(2);
    let text =
        |filter: &str| [&(filter.len() as u16).to_be_bytes()[..], filter.as_bytes()].concat();
    let unsubscribe = |id: &[u8], filters: usize| {
        let body = [id, &text("+/+/+/+").repeat(filters)].concat();
        client::packet(0xa2, &body)
    };
    // More than are taken at once.
    let mut much = bed.client5("much");
    much.send(&unsubscribe(&[0, 1, 0], 13_000));
    assert_eq!(much.packet().unwrap()[..3], [0xe0, 2, 0x97]);
    let mut attackers: Vec<Client> = (0..4).map(|n| bed.client(&format!("attacker{n}"))).collect();
    for attacker in &mut attackers {
        attacker.send(&unsubscribe(&[0, 1], 1000).repeat(16));
    }
    let during = round_trips(4);
    println!("p99 and worst before: {before:?}; during the attack: {during:?}");
    // Tests are built without optimization.
    assert_within(during.0, before.0 * 20 + Duration::from_millis(100));
    assert_within(during.1, Duration::from_secs(2));
}

#[test]
fn more_at_a_time_than_connack_allows_is_refused() {
    let bed = Bed::new();
    let mut client = bed.client5("many");
    // mosquitto's receive maximum is 20.
    for _ in 0..40 {
        client.publish("temp/x", 2, b"");
    }
    let end = loop {
        let packet = client.packet().expect("DISCONNECT");
        if packet[0] != 0x50 {
            break packet;
        }
    };
    assert_eq!(end[..3], [0xe0, 2, 0x93]);
}

#[test]
fn a_connect_that_brokers_close_on_takes_no_broker_from_others() {
    let bed = Bed::new();
    let mut there = bed.client("there before");
    // No will's topic has a wildcard (MQTT 3.1.1 §4.7.1.1): mosquitto closes, without CONNACK.
    // Of "other", whose group clients' homes are of, and of a group that is opened for the will.
    for round in 0..6 {
        let topic = ["other/#", "temp/#"][round % 2];
        let will = Some((topic.to_owned(), String::new()));
        for number in 0..12 {
            let mut bad = Client::new(bed.stream(RELAY), 4);
            let id = format!("bad-{round}-{number}");
            bad.send(&client::Connect { will: will.clone(), ..connect(4, &id) }.packet());
            while bad.packet().is_some() {}
        }
        // Connections to brokers that were not needed before, too.
        let mut fresh = bed.client(&format!("fresh-{round}"));
        for client in [&mut there, &mut fresh] {
            for number in 0..4 {
                for topic in ["temp", "hum", "other"] {
                    client.publish_and_wait(&format!("{topic}/{round}/{number}"), 1, b"x");
                }
            }
        }
    }
}

#[test]
fn who_says_nothing_or_no_mqtt_does_not_stay() {
    let bed = Bed::new();
    for begin in
        [&b""[..], b"\x10", b"\x10\x50\x00\x04MQTT", b"GET / HTTP/1.1\r\n\r\n", b"\x30\x00"]
    {
        let mut stream = bed.stream(RELAY);
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(begin).unwrap();
        let started = Instant::now();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        let took = started.elapsed();
        assert!(rest.is_empty(), "{begin:02x?}");
        assert_within(took, Duration::from_secs(4));
    }
    // An unknown protocol level has its own answer (MQTT 3.1.1 §3.1.2.2).
    let mut stream = bed.stream(RELAY);
    stream.write_all(b"\x10\x0e\x00\x04MQTT\x09\x02\x00\x3c\x00\x02id").unwrap();
    let mut answer = Vec::new();
    stream.set_read_timeout(Some(Duration::from_secs(7))).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, [0x20, 2, 0, 1]);
    // Keepalive of one second.
    let mut client = Client::new(bed.stream(RELAY), 5);
    client.send(&client::Connect { keepalive: 1, ..connect(5, "silent") }.packet());
    assert_eq!(client.packet().unwrap()[0], 0x20);
    let started = Instant::now();
    client.expect(&[0xe0, 2, 0x8d, 0]);
    client.expect_end();
    let took = started.elapsed();
    assert!(took > Duration::from_millis(1300), "{took:?}");
    assert_within(took, Duration::from_secs(3));
}

#[test]
fn idle_clients_are_kept_at_brokers_by_the_relays_own_pings() {
    let bed = Bed::new();
    let mut client = Client::new(bed.stream(RELAY), 4);
    client.send(&client::Connect { keepalive: 2, ..connect(4, "pings") }.packet());
    client.expect(&[0x20, 2, 0, 0]);
    client.subscribe(&["#"], 0);
    // Six brokers would end their connections after three seconds without anything.
    for _ in 0..6 {
        std::thread::sleep(Duration::from_secs(1));
        client.ping();
    }
    let mut other = bed.client("other");
    for topic in crate::bed::TOPICS {
        other.publish_and_wait(topic, 1, b"");
        assert_eq!(client.message().topic, topic);
    }
}

#[test]
fn an_address_has_so_many_connections_at_a_time() {
    let bed = Bed::with("connections_per_address = 10", "");
    let come = |id: &str| {
        let mut stream = bed.stream(RELAY);
        // Refused, it may be reset before.
        let _ = stream.write_all(&connect(4, id).packet());
        let mut connack = [0; 4];
        stream.read_exact(&mut connack).ok().map(|()| Client::new(stream, 4))
    };
    let clients: Vec<_> = (0..10).map(|n| come(&format!("c{n}")).expect("ten")).collect();
    assert!(come("refused").is_none());
    bed.client("of another address");
    for client in clients {
        client.disconnect();
    }
    wait_for("room", || come("now"));
}

/// Bytes of memory that a process has.
fn resident(pid: u32) -> usize {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find(|l| l.starts_with("Rss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// Topic aliases, CONNECTs and WebSocket messages that are not finished: what each could have the relay keep.
#[test]
fn what_clients_leave_unfinished_is_bounded_in_bytes() {
    let bed = Bed::with(
        "connections_per_address = 2000\nconnections_per_second = 5000",
        "listener = [{ port = 9001, websocket = true }]",
    );
    let mut others = bed.client("other");
    others.publish_and_wait("temp/x", 1, b"");
    let before = resident(bed.relay_pid());
    // 800 × 250 KiB of a CONNECT of 256.
    let connect_begins =
        [&b"\x10\xf0\xff\x0f\x00\x04MQTT\x04\xc2\x00\x3c"[..], &vec![0; 250 << 10]].concat();
    let mut held: Vec<std::net::TcpStream> = Vec::new();
    for _ in 0..800 {
        let mut stream = bed.stream(RELAY);
        // It is closed while it is written to, once there are too many.
        let _ = stream.set_write_timeout(Some(Duration::from_millis(200)));
        let _ = stream.write_all(&connect_begins);
        held.push(stream);
    }
    // 30 × 8 MB of a WebSocket message.
    let relay: std::net::SocketAddr = RELAY.parse().unwrap();
    for _ in 0..30 {
        let mut stream = bed.stream((relay.ip(), 9001));
        let _ = stream.set_write_timeout(Some(Duration::from_millis(200)));
        let upgrade = "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                       Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\
                       Sec-WebSocket-Protocol: mqtt\r\n\r\n";
        stream.write_all(upgrade.as_bytes()).unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"HTTP/1.1 101");
        let frame =
            [&b"\x82\xff\x00\x00\x00\x00\x00\x80\x00\x00\x01\x02\x03\x04"[..], &vec![0; 8_000_000]];
        let _ = stream.write_all(&frame.concat());
        held.push(stream);
    }
    let grown = resident(bed.relay_pid()).saturating_sub(before);
    assert!(grown < 80 << 20, "the relay has grown by {grown} bytes");
    others.publish_and_wait("temp/x", 1, b"");
    bed.client("one more").publish_and_wait("temp/x", 1, b"");
    // A large CONNECT of somebody who finishes it, once there is room again.
    drop(held);
    let mut client = bed.client5("aliases");
    let mut code = 0;
    for alias in 1..=10u16 {
        let topic = format!("temp/{alias}{}", "x".repeat(10_000));
        let properties = [&b"\x23"[..], &alias.to_be_bytes()].concat();
        client.publish_with(&topic, 0, &properties, b"");
    }
    while let Some(packet) = client.packet() {
        if packet[0] == 0xe0 {
            code = packet[2];
            break;
        }
    }
    assert!(
        code == 0x97 || code == 0x94,
        "{code:#x}: more than 64 KiB of topics, or than the broker's aliases"
    );
}

/// All of it at once: what one client may have is bounded, but 10,000 of an address would have it all.
#[test]
fn all_that_clients_have_kept_is_below_the_ceiling() {
    const CEILING: usize = 96 << 20;
    let bed = Bed::with(
        &format!("connections_per_second = 5000\nmax_memory = {CEILING}"),
        "listener = [{ port = 9001, websocket = true }]",
    );
    let mut others = bed.client("other");
    others.publish_and_wait("temp/x", 1, b"");
    let before = resident(bed.relay_pid());
    // Subscriptions: 400 clients with 1,000 filters of 200 bytes.
    let mut held: Vec<std::net::TcpStream> = Vec::new();
    let filter = client::text(format!("temp/{}/", "x".repeat(190)));
    for n in 0..400 {
        let mut stream = bed.stream_of_a_host();
        let _ = stream.set_write_timeout(Some(Duration::from_millis(500)));
        let filters: Vec<u8> = (0..1000u16)
            .flat_map(|f| {
                let number = format!("{f:04}");
                let length = (filter.len() - 2 + 4) as u16;
                [&length.to_be_bytes()[..], &filter[2..], number.as_bytes(), &[1]].concat()
            })
            .collect();
        let subscribe = client::packet(0x82, &[&[0, 1][..], &filters].concat());
        let _ = stream.write_all(&connect(4, &format!("subscribes{n}")).packet());
        let _ = stream.write_all(&subscribe);
        held.push(stream);
    }
    // Messages over WebSocket that do not end.
    for n in 0..60 {
        let relay: std::net::SocketAddr = RELAY.parse().unwrap();
        let stream = bed.stream((relay.ip(), 9001));
        let _ = stream.set_write_timeout(Some(Duration::from_millis(200)));
        let _ = stream.set_read_timeout(Some(Duration::from_millis(500)));
        let other = stream.try_clone().unwrap();
        // Refused when there is no room.
        if let Some(mut ws) = crate::transports::over_websocket(stream, "mqtt") {
            let _ = ws.write_all(&connect(4, &format!("ws{n}")).packet());
            let mut raw = other.try_clone().unwrap();
            let _ = raw.read(&mut [0; 64]);
            let frame = [
                &b"\x82\xff\x00\x00\x00\x00\x00\x80\x00\x00\x01\x02\x03\x04"[..],
                &vec![0; 8_000_000],
            ];
            let _ = raw.write_all(&frame.concat());
        }
        held.push(other);
    }
    // CONNECTs that do not end.
    let connect_begins =
        [&b"\x10\xf0\xff\x0f\x00\x04MQTT\x04\xc2\x00\x3c"[..], &vec![0; 250 << 10]].concat();
    for _ in 0..200 {
        let mut stream = bed.stream(RELAY);
        let _ = stream.set_write_timeout(Some(Duration::from_millis(100)));
        let _ = stream.write_all(&connect_begins);
        held.push(stream);
    }
    let now = resident(bed.relay_pid());
    println!("{} KiB before, {} KiB now, ceiling {}", before >> 10, now >> 10, CEILING >> 10);
    assert!(now < CEILING, "the relay has {now} bytes");
    // Who was there and holds little was not touched.
    others.publish_and_wait("temp/x", 1, b"");
    // Once they are gone, there is room.
    drop(held);
    wait_for("room", || {
        let mut stream = bed.stream_of_a_host();
        let _ = stream.write_all(&connect(4, "one more").packet());
        let mut connack = [0; 4];
        stream.read_exact(&mut connack).ok()
    });
}

/// Deliveries that a client does not acknowledge are left with the brokers.
#[test]
fn a_client_that_acknowledges_nothing_is_not_buffered_for() {
    let bed = Bed::new();
    let mut subscriber = Client::new(bed.stream(RELAY), 5);
    let properties = vec![0x21, 0, 10]; // receive maximum 10
    subscriber.send(&client::Connect { properties, ..connect(5, "lazy") }.packet());
    assert_eq!(subscriber.packet().unwrap()[0], 0x20);
    subscriber.subscribe(&["#"], 1);
    let before = resident(bed.relay_pid());
    let mut publisher = bed.client("publisher");
    let payload = vec![7; 200_000];
    for n in 0..120 {
        publisher.publish_and_wait(crate::bed::TOPICS[n % 3], 1, &payload);
    }
    // Ten of each of six brokers: 12 MB.
    let grown = resident(bed.relay_pid()).saturating_sub(before);
    assert!(grown < 5 << 20, "the relay has grown by {grown} bytes");
    let mut got = 0;
    while got < 120 {
        assert_eq!(subscriber.message().payload.len(), payload.len());
        got += 1;
    }
}

/// Each subscription identifier has a SUBSCRIBE of its own when a broker is back.
#[test]
fn thousands_of_subscription_identifiers_keep_nobody_waiting() {
    let mut bed = Bed::with("subscriptions = 10000", "");
    let mut held: Vec<Client> = (0..4).map(|n| bed.client5(&format!("many{n}"))).collect();
    for client in &mut held {
        for id in 1..=9000usize {
            let properties = [&b"\x0b"[..], &crate::support::mqtt::varint(id)].concat();
            let filter = client::text(format!("temp/{id}"));
            let body = [
                &(id as u16).to_be_bytes()[..],
                &crate::support::mqtt::varint(properties.len()),
                &properties,
                &filter,
                &[0],
            ];
            client.send(&client::packet(0x82, &body.concat()));
            let answer = client.packet().unwrap();
            assert_eq!(answer[0], 0x90, "{id}: {answer:02x?}");
        }
    }
    let mut victim = bed.client("victim");
    bed.kill_broker(1);
    std::thread::sleep(Duration::from_millis(300));
    bed.start_broker(1);
    let (mut worst, start) = (Duration::ZERO, Instant::now());
    while start.elapsed() < Duration::from_secs(4) {
        let sent = Instant::now();
        victim.publish_and_wait("hum/x", 1, b"");
        worst = worst.max(sent.elapsed());
    }
    println!("worst of another client's round trips: {worst:?}");
    // Tests are built without optimization.
    assert_within(worst, Duration::from_secs(1));
}

#[test]
fn a_slow_subscriber_delays_no_other_and_is_not_buffered_for() {
    let bed = Bed::new();
    let mut slow = bed.client("slow");
    slow.subscribe(&["temp/#"], 0);
    let mut fast = bed.client("fast");
    fast.subscribe(&["temp/#"], 0);
    let before = resident(bed.relay_pid());
    let mut publisher = bed.client("publisher");
    let payload = vec![7; 10_000];
    // 40 MB, of which `slow` reads nothing.
    for i in 0..4000 {
        publisher.publish("temp/x", 0, &payload);
        if i % 10 == 9 {
            for _ in 0..10 {
                assert_eq!(fast.message().payload.len(), payload.len());
            }
        }
    }
    let grown = resident(bed.relay_pid()).saturating_sub(before);
    assert!(grown < 8 << 20, "the relay has grown by {grown} bytes");
    assert_eq!(slow.message().payload.len(), payload.len(), "it can still read");
}

#[test]
fn a_slow_broker_holds_up_its_own_clients_only() {
    let mut bed = Bed::empty("", "");
    for broker in 3..=6 {
        bed.start_broker(broker);
    }
    // Takes CONNECT, says CONNACK, and reads nothing more.
    let listeners: Vec<_> = bed
        .inside(|| (1..=2).map(|n| std::net::TcpListener::bind(Bed::broker(n)).unwrap()).collect());
    bed.start_relay();
    let stuck = std::thread::spawn(move || {
        listeners[0].set_nonblocking(true).unwrap();
        listeners[1].set_nonblocking(true).unwrap();
        for _ in 0..500 {
            for listener in &listeners {
                if let Ok((mut stream, _)) = listener.accept() {
                    stream.write_all(&[0x20, 2, 0, 0]).unwrap();
                    std::thread::sleep(Duration::from_secs(4));
                    return stream;
                }
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("no connection arrived");
    });
    let before = resident(bed.relay_pid());
    let mut held = bed.stream(RELAY);
    held.write_all(&connect(4, "held").packet()).unwrap();
    held.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut publish = client::text("temp/x");
    publish.extend(vec![1; 60_000]);
    let publish = client::packet(0x30, &publish);
    let mut taken = 0;
    while held.write_all(&publish).is_ok() {
        taken += publish.len();
        assert!(taken < 100 << 20, "the relay takes all of it");
    }
    let mut other = bed.client("other");
    for _ in 0..20 {
        other.publish_and_wait("hum/x", 1, b"");
    }
    let grown = resident(bed.relay_pid()).saturating_sub(before);
    assert!(grown < 4 << 20, "the relay has grown by {grown} bytes");
    drop(stuck.join().unwrap());
}

#[test]
fn an_idle_connection_takes_less_than_16_kib() {
    const CLIENTS: usize = 2000;
    let bed = Bed::with("connections_per_second = 100000", "");
    let mut warm: Vec<Client> = (0..50).map(|n| bed.client(&format!("warm{n}"))).collect();
    for client in &mut warm {
        client.publish_and_wait("temp/x", 1, b"");
    }
    let before = resident(bed.relay_pid());
    let mut clients: Vec<Client> = (0..CLIENTS).map(|n| bed.client(&format!("idle{n}"))).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        client.publish_and_wait(&format!("temp/{n}"), 1, b"21.5");
    }
    let each = resident(bed.relay_pid()).saturating_sub(before) / CLIENTS;
    println!("{each} bytes a connection with two brokers");
    assert!(each < 16 << 10, "{each} bytes");
}
