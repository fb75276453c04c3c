//! What went wrong once.

use std::io::Read as _;
use std::time::Duration;

use nix::sys::signal::Signal;
use socket2::{Domain, SockRef, Socket, Type};

use crate::bed::{Bed, RELAY, TOPICS};
use crate::client::{self, Client, Connect, connect};
use crate::support::net::wait_for;

/// A client with a CONNECT of its own, and its CONNACK.
fn come(bed: &Bed, connect: &Connect) -> (Client, Vec<u8>) {
    let mut client = Client::new(bed.stream(RELAY), connect.level);
    client.send(&connect.packet());
    let connack = client.packet().unwrap();
    assert_eq!((connack[0], connack[3]), (0x20, 0), "{connack:02x?}");
    (client, connack)
}

#[test]
fn a_large_message_waits_for_the_clients_receive_maximum_and_then_comes() {
    let bed = Bed::new();
    let properties = vec![0x21, 0, 1]; // receive maximum 1
    let (mut subscriber, _) = come(&bed, &Connect { properties, ..connect(5, "one") });
    subscriber.subscribe(&["#"], 1);
    let mut publisher = bed.client("publisher");
    publisher.publish_and_wait("temp/x", 1, b"first");
    let first = subscriber.packet().unwrap();
    let large = vec![9; 3 << 20];
    publisher.publish_and_wait("hum/x", 1, &large);
    std::thread::sleep(Duration::from_millis(300));
    let (message, id) = subscriber.read(&first);
    assert_eq!(message.text(), "first");
    subscriber.send(&client::packet(0x40, &id.to_be_bytes()));
    assert_eq!(subscriber.message().payload, large);
}

#[test]
fn an_alias_means_what_it_meant_last_whichever_broker_gets_it() {
    let mut bed = Bed::new();
    let mut client = bed.client5("aliases");
    // Two topics of the group temp at different brokers.
    let at = |bed: &Bed, topic: &str| {
        let mut watchers = bed.watchers();
        bed.client("probe").publish_and_wait(topic, 1, b"");
        watchers.iter_mut().position(|w| w.try_message_soon().is_some()).unwrap() + 1
    };
    let all: Vec<String> = (0..8).map(|n| format!("temp/{n}")).collect();
    let one = all.iter().find(|t| at(&bed, t) == 1).unwrap();
    let two = all.iter().find(|t| at(&bed, t) == 2).unwrap();
    client.publish_with(one, 0, &[0x23, 0, 1], b"");
    client.publish_with(two, 2, &[0x23, 0, 1], b"");
    assert_eq!(client.packet().unwrap()[0], 0x40);
    bed.kill_broker(2);
    std::thread::sleep(Duration::from_millis(200));
    let mut watcher = Client::new(bed.stream(Bed::broker(1)), 4);
    watcher.send(&connect(4, "watcher").packet());
    watcher.expect(&[0x20, 2, 0, 0]);
    watcher.subscribe(&["#"], 0);
    client.publish_with("", 0, &[0x23, 0, 1], b"by alias");
    assert_eq!(&watcher.message().topic, two);
}

#[test]
fn qos_2_is_finished_on_the_next_connection() {
    let bed = Bed::new();
    let mut watchers = bed.watchers();
    let persistent = Connect { clean: false, ..connect(4, "resumes") };
    let (mut client, _) = come(&bed, &persistent);
    let mut ids = Vec::new();
    for topic in TOPICS {
        let id = client.publish(topic, 2, topic.as_bytes());
        client.expect(&[&[0x50, 2], &id.to_be_bytes()[..]].concat());
        ids.push(id);
    }
    drop(client);
    std::thread::sleep(Duration::from_millis(200));
    let (mut client, connack) = come(&bed, &persistent);
    assert_eq!(connack[2], 1, "session present");
    for id in ids {
        client.send(&client::packet(0x62, &id.to_be_bytes()));
        client.expect(&[&[0x70, 2], &id.to_be_bytes()[..]].concat());
    }
    let mut got: Vec<String> = Vec::new();
    for watcher in &mut watchers {
        while let Some(message) = watcher.try_message_soon() {
            got.push(message.text());
        }
    }
    got.sort();
    let mut wanted = TOPICS.map(str::to_owned);
    wanted.sort();
    assert_eq!(got, wanted, "each once");
}

#[test]
fn a_client_without_an_id_has_one_session_at_all_brokers() {
    let bed = Bed::new();
    let properties = vec![0x11, 0, 0, 0, 100];
    let (mut client, connack) =
        come(&bed, &Connect { properties: properties.clone(), ..connect(5, "") });
    // Assigned client identifier: property 0x12.
    let at = connack.iter().position(|b| *b == 0x12).unwrap();
    let length = usize::from(connack[at + 2]);
    let id = String::from_utf8(connack[at + 3..at + 3 + length].to_vec()).unwrap();
    client.subscribe(&["#"], 1);
    drop(client);
    std::thread::sleep(Duration::from_millis(200));
    let mut other = bed.client("other");
    for topic in TOPICS {
        other.publish_and_wait(topic, 1, topic.as_bytes());
    }
    let again = Connect { clean: false, properties, ..connect(5, &id) };
    let (mut client, connack) = come(&bed, &again);
    assert_eq!(connack[2], 1, "session present");
    let mut got: Vec<String> = (0..3).map(|_| client.message().text()).collect();
    got.sort();
    let mut wanted = TOPICS.map(str::to_owned);
    wanted.sort();
    assert_eq!(got, wanted);
}

#[test]
fn an_empty_id_without_clean_start_is_what_a_broker_says_it_is() {
    let bed = Bed::new();
    // MQTT 3.1.1 §3.1.3.1: refused. MQTT 5 §3.1.3.1: the broker assigns one, which other brokers get, too.
    let mut old = bed.inside(|| Client::new(bed.stream(crate::bed::RELAY), 4));
    old.send(&Connect { clean: false, ..connect(4, "") }.packet());
    old.expect(&[0x20, 2, 0, 2]);
    let (mut client, connack) = come(&bed, &Connect { clean: false, ..connect(5, "") });
    assert!(connack[3] == 0 && connack.contains(&0x12), "{connack:02x?}");
    for topic in TOPICS {
        client.publish_and_wait(topic, 1, b"x");
    }
}

#[test]
fn the_newer_of_two_connections_of_one_id_stays() {
    let bed = Bed::new();
    let will = Some(("temp/will".to_owned(), "gone".to_owned()));
    for (old, new) in [(will.clone(), None), (None, will)] {
        let (mut old, _) = come(&bed, &Connect { will: old, ..connect(4, "same") });
        old.subscribe(&["#"], 0);
        let (mut new, _) = come(&bed, &Connect { will: new, ..connect(4, "same") });
        new.subscribe(&["#"], 0);
        // What came before, and a will, may be said; then it is the end.
        while old.packet().is_some() {}
        std::thread::sleep(Duration::from_millis(1500));
        let mut other = bed.client("other");
        for topic in TOPICS {
            other.publish_and_wait(topic, 1, topic.as_bytes());
            while new.message().topic != topic {}
        }
        new.disconnect();
    }
}

#[test]
fn a_new_configuration_moves_subscribers_and_ends_who_used_a_broker_that_is_gone() {
    let bed = Bed::new();
    let mut subscriber = bed.client("subscriber");
    subscriber.subscribe(&["temp/x", "foo/#"], 0);
    let mut publisher = bed.client("publisher");
    publisher.publish_and_wait("birth/x", 1, b"");
    let file = bed.dir.join("config.toml");
    let reload = |text: &str, times: usize| {
        std::fs::write(&file, text).unwrap();
        bed.signal_relay(nix::sys::signal::Signal::SIGHUP);
        wait_for("the new configuration", || {
            let log = bed.relay_log();
            (log.matches("configuration reloaded").count() == times).then_some(())
        });
    };
    let text = std::fs::read_to_string(&file).unwrap();
    let text = text.replace(
        "{ topic = \"hum/#\"",
        "{ topic = \"foo/#\", group = \"temp\" },\n{ topic = \"hum/#\"",
    );
    reload(&text, 1);
    subscriber.ping();
    std::thread::sleep(Duration::from_millis(300));
    publisher.publish_and_wait("foo/1", 1, b"");
    assert_eq!(subscriber.message().topic, "foo/1");
    // Without one broker of each group: clients that are connected to one come again.
    let text = ["10.9.0.1", "10.9.0.3", "10.9.0.5"]
        .iter()
        .fold(text, |text, addr| text.replace(&format!("{{ address = \"{addr}\" }}, "), ""));
    let mut everywhere = bed.client5("everywhere");
    everywhere.subscribe(&["#"], 0);
    reload(&text, 2);
    everywhere.send(&[0xc0, 0]);
    while everywhere.packet().is_some() {}
    let mut again = bed.client("again");
    again.subscribe(&["#"], 0);
    let mut other = bed.client("other");
    for topic in TOPICS.into_iter().chain(["birth/x"]) {
        other.publish_and_wait(topic, 1, b"");
        assert_eq!(again.message().topic, topic);
    }
    assert!(!bed.relay_log().contains("panicked"));
}

#[test]
fn a_client_that_pings_without_reading_is_not_silent() {
    let bed = Bed::new();
    let (mut slow, _) = come(&bed, &Connect { keepalive: 2, ..connect(4, "slow") });
    slow.subscribe(&["temp/x"], 0);
    let mut publisher = bed.client("publisher");
    for n in 0..300 {
        publisher.publish("temp/x", 0, &vec![0; 20_000]);
        if n % 30 == 0 {
            slow.send(&[0xc0, 0]);
        }
    }
    // Longer than 1.5 × its keepalive it reads nothing, and still sends PINGREQs.
    for _ in 0..5 {
        std::thread::sleep(Duration::from_secs(1));
        slow.send(&[0xc0, 0]);
    }
    let mut got = 0;
    while got < 300 {
        let packet = slow.packet().expect("the relay keeps the connection");
        got += u32::from(packet[0] == 0x30);
    }
}

/// Sockets in TIME_WAIT by who closed first: the relay, or a broker.
fn time_wait(bed: &Bed) -> (usize, usize) {
    const MQTT: &str = ":075B";
    const TIME_WAIT: &str = "06";
    let table = bed.inside(|| std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap());
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let waiting: Vec<_> = rows.filter(|f| f[3] == TIME_WAIT).collect();
    // 10.9.0.x, in the byte order of the machine.
    let of_broker = |end: &str| end.ends_with(MQTT) && end[..8].ends_with("00090A");
    let relays = waiting.iter().filter(|f| of_broker(f[2])).count();
    (relays, waiting.iter().filter(|f| of_broker(f[1])).count())
}

#[test]
fn ports_to_brokers_are_free_again_at_once() {
    let bed = Bed::new();
    let before = time_wait(&bed);
    for n in 0..50 {
        let mut client = bed.client(&format!("short{n}"));
        client.publish_and_wait(TOPICS[n % 3], 1, b"x");
        client.disconnect();
    }
    // A broker for each client, and home's where that is another.
    wait_for("brokers to close", || (time_wait(&bed).1 >= before.1 + 50).then_some(()));
    // All of them, if the relay closed first.
    assert!(time_wait(&bed).0 < before.0 + 10);
}

#[test]
fn a_broker_that_does_not_close_after_disconnect_is_left_after_a_second() {
    let mut bed = Bed::empty("", "");
    let listeners: Vec<_> = bed
        .inside(|| (5..=6).map(|n| std::net::TcpListener::bind(Bed::broker(n)).unwrap()).collect());
    let (told, left) = std::sync::mpsc::channel();
    for listener in listeners {
        let told = told.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut broker = Client::new(stream.unwrap(), 4);
                if broker.try_packet().is_ok_and(|p| p.is_some_and(|p| p[0] == 0x10)) {
                    broker.send(&[0x20, 2, 0, 0]);
                    assert_eq!(broker.packet().unwrap(), [0xe0, 0]);
                    let begun = std::time::Instant::now();
                    assert_eq!(broker.packet(), None);
                    let _ = told.send(begun.elapsed());
                }
            }
        });
    }
    bed.start_relay();
    bed.client("short").disconnect();
    let waited = left.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!((500..4000).contains(&waited.as_millis()), "{waited:?}");
}

#[test]
fn the_log_says_when_a_broker_does_not_answer_or_hangs_up() {
    for (silent, said) in [(true, "no CONNACK within 5 s"), (false, "it closed the connection")] {
        let mut bed = Bed::empty("", "");
        let listeners: Vec<_> = bed.inside(|| {
            (5..=6).map(|n| std::net::TcpListener::bind(Bed::broker(n)).unwrap()).collect()
        });
        for listener in listeners {
            std::thread::spawn(move || {
                let mut kept = Vec::new();
                for mut stream in listener.incoming().flatten() {
                    if silent {
                        kept.push(stream);
                    } else {
                        let _ = stream.read(&mut [0; 512]);
                    }
                }
            });
        }
        bed.start_relay();
        let mut client = Client::new(bed.stream(RELAY), 4);
        client.send(&connect(4, "early").packet());
        wait_for(said, || bed.relay_log().contains(said).then_some(()));
    }
}

#[test]
fn the_log_says_when_ports_to_a_broker_have_run_out() {
    let bed = Bed::new();
    let two_ports = "40000 40001";
    bed.inside(|| std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", two_ports).unwrap());
    let to: std::net::SocketAddr = RELAY.parse().unwrap();
    let clients: Vec<_> = (50_000..50_008)
        .map(|port| {
            let stream = bed.inside(|| {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                socket.bind(&std::net::SocketAddr::from(([10, 9, 1, 200], port)).into()).unwrap();
                socket.connect(&to.into()).unwrap();
                std::net::TcpStream::from(socket)
            });
            let mut client = Client::new(stream, 4);
            client.send(&connect(4, &format!("client{port}")).packet());
            client
        })
        .collect();
    wait_for("the log", || bed.relay_log().contains("net.ipv4.ip_local_port_range").then_some(()));
    drop(clients);
}

#[test]
fn what_a_client_sent_before_it_closed_is_delivered() {
    let bed = Bed::new();
    let mut watchers = bed.watchers();
    for round in 0..12 {
        // FIN before CONNACK, FIN and RST after it (RST before it: brokers do not read on, either); while its message
        // waits for a connection to a broker, or not.
        let (answered, resets, waits) = (round % 3 > 0, round % 3 > 1, round % 2 == 1);
        if waits {
            (3..=4).for_each(|broker| bed.signal_broker(broker, Signal::SIGSTOP));
        }
        let mut bytes = connect(4, &format!("leaves{round}")).packet();
        let mut body = client::text("hum/x");
        body.extend(format!("{round}").as_bytes());
        bytes.extend(client::packet(0x30, &body));
        let stream = bed.stream(RELAY);
        let mut sender = Client::new(stream.try_clone().unwrap(), 4);
        sender.send(&bytes);
        if answered {
            sender.expect(&[0x20, 2, 0, 0]);
        }
        if resets {
            SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        }
        drop((sender, stream));
        if waits {
            std::thread::sleep(Duration::from_millis(100));
            (3..=4).for_each(|broker| bed.signal_broker(broker, Signal::SIGCONT));
        }
        let got = (0..5).find_map(|_| watchers[2..4].iter_mut().find_map(Client::try_message_soon));
        let text = got.map(|m| m.text());
        assert_eq!(text, Some(round.to_string()), "{answered} {resets} {waits}");
    }
}

/// A broker that says "session present" only where it holds a subscription, and holds none.
fn broker_without_sessions(listener: std::net::TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut client = Client::new(stream.unwrap(), 4);
            std::thread::spawn(move || {
                while let Ok(Some(packet)) = client.try_packet() {
                    match packet[0] >> 4 {
                        1 => client.send(&[0x20, 2, 0, 0]),
                        12 => client.send(&[0xd0, 0]),
                        14 => return,
                        _ => {}
                    }
                }
            });
        }
    });
}

/// As RabbitMQ and aedes do. Their answers made every session a new one, and what was kept for it was discarded.
#[test]
fn a_session_is_present_if_those_brokers_say_so_that_hold_something_of_it() {
    let mut bed = Bed::empty("", "");
    for broker in 1..=4 {
        bed.start_broker(broker);
    }
    for listener in
        bed.inside(|| [5, 6].map(|n| std::net::TcpListener::bind(Bed::broker(n)).unwrap()))
    {
        broker_without_sessions(listener);
    }
    bed.start_relay();
    fn come(bed: &Bed, clean: bool, present: u8) -> Client {
        let mut client = Client::new(bed.stream(RELAY), 4);
        client.send(&crate::client::Connect { clean, ..connect(4, "keeps") }.packet());
        client.expect(&[0x20, 2, present, 0]);
        client
    }
    // Nothing is known of it, and its first broker has nothing.
    let mut client = come(&bed, false, 0);
    client.subscribe(&["temp/#"], 1);
    client.disconnect();
    let mut publisher = bed.client("publisher");
    for n in 0..10 {
        publisher.publish_and_wait(&format!("temp/{n}"), 1, b"kept");
    }
    let mut client = come(&bed, false, 1);
    for _ in 0..10 {
        assert_eq!(client.message().text(), "kept");
    }
    client.disconnect();
    // One of its brokers has lost everything: it has to subscribe again.
    bed.kill_broker(1);
    bed.start_broker(1);
    let mut client = come(&bed, false, 0);
    client.subscribe(&["temp/#"], 1);
    client.disconnect();
    come(&bed, false, 1).disconnect();
    come(&bed, true, 0).disconnect();
    come(&bed, false, 0).disconnect();
}
