//! Clients of all kinds: what they write when, and whose TCP they have.

use std::time::Duration;

use super::{ROUTES, all_right, delayed, expect_all, sessions};
use crate::support::mqtt;
use crate::support::net::wait_for;
use crate::support::session::{SERVICE, SERVICE6, Session, enter, run_all};

#[test]
fn clients_that_say_nothing_after_connect_get_a_broker_and_their_will_is_published() {
    let Some(lab) = delayed(&[("m/temp", "a"), ("will/#", "default")]) else { return };
    let connect = mqtt::connect_as(4, 0x06, b"silent", &[b"will/silent", b"gone"]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use std::io::{Read as _, Write as _};
            enter(&lab, "c1");
            let mut stream = std::net::TcpStream::connect(SERVICE).unwrap();
            stream.write_all(&connect).unwrap();
            let mut answer = [0; 4];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer, [0x20, 2, 0, 0]);
            wait_for("the silent client's broker", || {
                lab.mqtt_fwd(&["flows"]).contains("silent").then_some(())
            });
            // Whoever asks by the address is told by what the client is known.
            let explained = lab
                .script("exec")
                .args(["lb", "mqtt-fwd", "explain", "client", "10.1.1.1"])
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&explained.stderr);
            assert!(said.contains("`mqtt-fwd explain client silent`"), "{said}");
            // The broker's own CONNACK is what the balancer said: TCP takes it for a repetition.
            stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            assert!(stream.read(&mut answer).is_err());
            stream.write_all(&mqtt::pingreq()).unwrap();
            stream.read_exact(&mut answer[..2]).unwrap();
            assert_eq!(answer[..2], [0xd0, 0]);
            drop(stream); // without DISCONNECT: its will
        });
    });
    assert_eq!(lab.wait_received("will/silent gone"), 3);
    // And one that hangs up while nobody has it.
    let hung_up = mqtt::connect_as(4, 0x06, b"hung-up", &[b"will/hung-up", b"gone"]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use std::io::{Read as _, Write as _};
            enter(&lab, "c1");
            let mut stream = std::net::TcpStream::connect(SERVICE6).unwrap();
            stream.write_all(&hung_up).unwrap();
            stream.read_exact(&mut [0; 4]).unwrap();
        });
    });
    assert_eq!(lab.wait_received("will/hung-up gone"), 3);
}

#[test]
fn another_tcp_than_linux_with_small_windows_and_late_acknowledgements() {
    use crate::support::other_stack::{Shape, converse};
    let Some(lab) = delayed(ROUTES) else { return };
    let connect = mqtt::connect_as(4, 2, b"smol", &[]);
    let known = mqtt::connect_as(4, 2, b"smol-again", &[]);
    let mut port = 20_000;
    let mut wanted = Vec::new();
    for window in [200, 600, 4096, 100_000] {
        for (ack_delay, nagle) in [(None, false), (Some(40), true), (Some(200), false)] {
            for v6 in [false, true] {
                let own: (std::net::IpAddr, std::net::IpAddr) = if v6 {
                    ("fd01:1::77".parse().unwrap(), "fd01:1::101".parse().unwrap())
                } else {
                    ("10.1.1.77".parse().unwrap(), "10.1.1.101".parse().unwrap())
                };
                let service: std::net::SocketAddr =
                    if v6 { SERVICE6 } else { SERVICE }.parse().unwrap();
                for (style, first) in [&connect, &known].into_iter().enumerate() {
                    port += 1;
                    let payloads = [format!("{port}-0"), format!("{port}-1")];
                    let publish = |p: &String| mqtt::publish(b"m/hum", 1, p.as_bytes());
                    let (one, two) = (publish(&payloads[0]), publish(&payloads[1]));
                    let together = [&first[..], &one].concat();
                    let bye = mqtt::disconnect();
                    // Waiting for CONNACK, or all at once.
                    let pieces: &[(&[u8], usize)] = if style == 0 {
                        &[(first, 4), (&one, 4), (&two, 4), (&bye, 0)]
                    } else {
                        &[(&together, 8), (&two, 4), (&bye, 0)]
                    };
                    let shape = Shape { window, ack_delay, nagle };
                    let service = (service.ip(), service.port());
                    let got = std::thread::scope(|scope| {
                        let talk = || converse(&lab, "c1", own, service, port, shape, pieces);
                        scope.spawn(talk).join().unwrap()
                    });
                    let expected =
                        [&[0x20, 2, 0, 0], [0x40, 2, 0, 7].repeat(2).as_slice()].concat();
                    assert_eq!(got.as_deref(), Ok(&expected[..]), "{shape:?} {service:?}");
                    wanted.extend(payloads);
                }
            }
        }
    }
    // The broker has acknowledged them all; its watchers may not have written down the last yet.
    let last = wanted.last().unwrap();
    wait_for("the last message", || lab.arrivals().contains_key(last).then_some(()));
    let all = lab.arrivals();
    for payload in wanted {
        assert!(
            all.get(&payload).is_some_and(|at| at.iter().all(|r| *r == 2)),
            "{payload}: {all:?}"
        );
    }
}

#[test]
fn every_set_of_tcp_options() {
    let Some(lab) = delayed(ROUTES) else { return };
    for n in 0..8 {
        let on = |bit: u32| u32::from(n >> bit & 1 == 1);
        let settings = format!(
            "sysctl -qw net.ipv4.tcp_timestamps={} net.ipv4.tcp_sack={} \
             net.ipv4.tcp_window_scaling={}",
            on(0),
            on(1),
            on(2)
        );
        lab.ok("c1", &["sh", "-c", &settings]);
        let all: Vec<Session> =
            [sessions(&format!("o{n}q0"), 18, 3, 0), sessions(&format!("o{n}q1"), 18, 3, 1)]
                .concat();
        expect_all(&run_all(&lab, &all, 4));
        all_right(&lab, &all);
    }
}

#[test]
fn connect_in_pieces_and_connect_of_two_kilobytes() {
    let Some(lab) = delayed(ROUTES) else { return };
    let will = vec![b'w'; 1800];
    let large = mqtt::connect_as(4, 0x06, b"large", &[b"m/other", &will]);
    let small = mqtt::connect_as(4, 2, b"dribble", &[]);
    for service in [SERVICE, SERVICE6] {
        for (connect, piece) in [(&large, 4000), (&large, 100), (&small, 1)] {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    use std::io::{Read as _, Write as _};
                    enter(&lab, "c1");
                    let mut stream = std::net::TcpStream::connect(service).unwrap();
                    stream.set_nodelay(true).unwrap();
                    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                    for part in connect.chunks(piece) {
                        stream.write_all(part).unwrap();
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    let mut answer = [0; 4];
                    stream.read_exact(&mut answer).unwrap();
                    assert_eq!(answer, [0x20, 2, 0, 0]);
                    // Of the default group, where it is.
                    stream.write_all(&mqtt::publish(b"m/other", 1, b"pieces")).unwrap();
                    stream.read_exact(&mut answer).unwrap();
                    assert_eq!(answer, [0x40, 2, 0, 7]);
                    stream.write_all(&mqtt::disconnect()).unwrap();
                });
            });
        }
    }
    wait_for("all of them", || (lab.arrivals().get("pieces")? == &vec![3; 6]).then_some(()));
    // Fresh clients, all of one address: what each says first decides.
    let mut expected = Vec::new();
    for (n, (topic, real)) in
        [("m/temp", 1), ("m/hum", 2), ("m/other", 3)].repeat(4).into_iter().enumerate()
    {
        let (message, service) =
            (format!("fresh-{n}"), if n % 2 == 0 { SERVICE } else { SERVICE6 });
        let connect = mqtt::connect_as(4, 2, format!("umqtt{n}").as_bytes(), &[]);
        let (lab, to) = (&lab, message.clone());
        std::thread::scope(|scope| {
            scope.spawn(move || {
                use std::io::{Read as _, Write as _};
                enter(lab, "c2");
                let mut stream = std::net::TcpStream::connect(service).unwrap();
                stream.set_nodelay(true).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                // As MicroPython's umqtt does.
                for part in [&connect[..2], &connect[2..12], &connect[12..14], &connect[14..]] {
                    stream.write_all(part).unwrap();
                }
                let mut answer = [0; 4];
                stream.read_exact(&mut answer).unwrap();
                assert_eq!(answer, [0x20, 2, 0, 0]);
                stream.write_all(&mqtt::publish(topic.as_bytes(), 0, to.as_bytes())).unwrap();
                stream.write_all(&mqtt::disconnect()).unwrap();
                let _ = stream.read(&mut answer);
            });
        });
        expected.push((message, real));
    }
    for (message, real) in expected {
        wait_for(&message, || (lab.arrivals().get(&message)? == &vec![real]).then_some(()));
    }
    let why = lab.mqtt_fwd(&["counters"]);
    assert!(why.contains("fallback_cut"), "{why}");
}
