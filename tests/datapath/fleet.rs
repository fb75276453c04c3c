//! A balancer in a fleet: what it does not know, it asks for, and what it is told, it does.

use libbpf_rs::RingBufferBuilder;
use mqtt_fwd::datapath::misses::{Answer, Report, Segment};
use mqtt_fwd::kernel::test_run;
use std::cell::RefCell;
use std::os::fd::AsFd as _;

use crate::support::conn::{Conn, seen};
use crate::support::datapath::{CONFIG, Fixture, JUMPED, SMALL, XDP_DROP, XDP_TX};
use crate::support::net::{numbers, wait_for};
use crate::support::{mqtt, packet};
use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};
use mqtt_fwd::kernel::abi::ask_keys;
use mqtt_fwd::kernel::ask::{Asked, Had, Question, read_answer};
use mqtt_fwd::kernel::maps::Table;
use mqtt_fwd::kernel::skeletons::decap::DecapSkelBuilder;
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, TcpStream};

/// In a fleet; bound by prediction.
fn fleet(text: &str) -> Fixture {
    Fixture::loaded(text, &SMALL, |rodata| {
        rodata.fleet = 2;
        rodata.flows_per_window = u32::MAX;
        rodata.topics_per_window = u32::MAX;
    })
}

fn delayed() -> String {
    CONFIG.replace("max_packet", "binding = \"delayed\"\nmax_packet")
}

/// What was told since the last time.
fn reports(f: &Fixture) -> Vec<Report> {
    let all = RefCell::new(Vec::new());
    let mut builder = RingBufferBuilder::new();
    builder
        .add(&f.skel.maps.fleet_reports, |bytes| {
            all.borrow_mut().push(Report::read(bytes).unwrap());
            0
        })
        .unwrap();
    builder.build().unwrap().consume().unwrap();
    all.into_inner()
}

/// Of that, what was asked for.
fn misses(f: &Fixture) -> Vec<Segment> {
    let segment = |report| if let Report::Missed(segment) = report { Some(segment) } else { None };
    reports(f).into_iter().filter_map(segment).collect()
}

/// Tells the datapath what was found out; the verdict, and the packet.
fn adopt(f: &Fixture, segment: &Segment, answer: &Answer) -> (u32, Vec<u8>) {
    let run = test_run::run(f.skel.progs.mqtt_adopt.as_fd(), &segment.with(answer), 1).unwrap();
    (run.verdict, run.frame)
}

fn group(f: &Fixture, name: &str) -> Answer {
    let id = f
        .datapath
        .groups()
        .unwrap()
        .into_iter()
        .find(|(_, g)| mqtt_fwd::kernel::abi::name_text(&g.name) == name && g.service == 0);
    let (id, g) = id.unwrap();
    Answer::Real(mqtt_fwd::kernel::abi::binding_of(id, g.epoch))
}

#[test]
fn what_is_not_known_is_asked_for_and_goes_where_it_is_had() {
    for text in [CONFIG.to_owned(), delayed()] {
        let f = fleet(&text);
        let mut conn = Conn::new(&f, "10.1.1.1:40000");
        let publish = mqtt::publish(b"sensor/a", 0, b"1");
        let sent = conn.segment(&publish);
        let (outcome, counters) = f.send_counting(&sent);
        assert_eq!(outcome.verdict, XDP_DROP, "never by prediction");
        assert_eq!(counters.keys().copied().collect::<Vec<_>>(), ["missed"]);
        let asked = misses(&f);
        assert_eq!(asked.len(), 1);
        assert_eq!((asked[0].client, asked[0].seq), (conn.client, conn.next_seq()));
        assert_eq!(asked[0].frame(), sent);

        let (verdict, packet) = adopt(&f, &asked[0], &group(&f, "b"));
        assert_eq!(verdict, JUMPED);
        assert_eq!(packet::dst(&packet).to_string(), "10.1.50.2");
        conn.sent += publish.len() as u32;
        // From here on it is a flow as any other; its group was not chosen here, so it is not ended for its topic.
        for _ in 0..40 {
            assert_eq!(conn.data(&mqtt::publish(b"sensor/a", 0, b"2")).group, "b");
        }
        assert!(misses(&f).is_empty());
        assert_eq!(f.flow(conn.client).unwrap().bound_by, "real");
    }
}

#[test]
fn whom_nobody_has_is_told_so_at_once() {
    let f = fleet(CONFIG);
    let conn = Conn::new(&f, "10.1.1.1:40000");
    f.send(&conn.segment(&mqtt::publish(b"sensor/a", 0, b"1")));
    let asked = misses(&f).remove(0);
    let (verdict, packet) = adopt(&f, &asked, &Answer::Nobody);
    assert_eq!(verdict, XDP_TX);
    let headers = etherparse::PacketHeaders::from_ethernet_slice(&packet).unwrap();
    let tcp = headers.transport.unwrap().tcp().unwrap();
    assert!(tcp.rst && tcp.sequence_number == conn.ack && packet::tcp_checksum_right(&packet));
    // An RST is not answered (RFC 9293 §3.10.7.1).
    f.send(&packet::tcp(conn.client, conn.service, 5, 5, |h| h.rst = true, &[]));
    let asked = misses(&f).remove(0);
    assert_eq!(adopt(&f, &asked, &Answer::Nobody).0, XDP_DROP);
    // Nor is an acknowledgement alone: it may be of a handshake whose CONNECT is still to come.
    let other = Conn::new(&f, "10.1.1.1:40001");
    f.send(&other.segment(&[]));
    let asked = misses(&f).remove(0);
    assert_eq!(adopt(&f, &asked, &Answer::Nobody).0, XDP_DROP);
}

#[test]
fn without_data_a_connection_is_asked_for_once_a_second() {
    let f = fleet(CONFIG);
    let conn = Conn::new(&f, "10.1.1.1:40000");
    for _ in 0..100 {
        f.send(&conn.segment(&[]));
    }
    assert_eq!(misses(&f).len(), 1);
    assert_eq!(f.counters()["miss_dropped"], 99);
    // With data, and with FIN, always.
    for _ in 0..3 {
        f.send(&conn.segment(b"x"));
        f.send(&packet::tcp(conn.client, conn.service, 9, 9, |h| h.fin = true, &[]));
    }
    assert_eq!(misses(&f).len(), 6);
}

#[test]
fn a_connection_that_ended_elsewhere_does_not_keep_its_port() {
    for text in [CONFIG.to_owned(), delayed()] {
        let f = fleet(&text);
        let mut old = Conn::new(&f, "10.1.1.1:40000");
        f.send(&old.segment(b"x"));
        adopt(&f, &misses(&f).remove(0), &group(&f, "a"));
        old.sent += 1;
        assert_eq!(old.data(&mqtt::publish(b"sensor/a", 0, b"1")).group, "a");
        // It ended through another balancer, and so began the next one on the same addresses.
        let mut new = Conn::new(&f, "10.1.1.1:40000");
        new.isn = old.isn.wrapping_add(500_000_000);
        let sent = new.segment(&mqtt::publish(b"sensor/b", 0, b"1"));
        assert_eq!(f.send(&sent).verdict, XDP_DROP);
        let asked = misses(&f);
        assert_eq!(asked.len(), 1);
        adopt(&f, &asked[0], &group(&f, "b"));
        new.sent += mqtt::publish(b"sensor/b", 0, b"1").len() as u32;
        assert_eq!(new.data(&mqtt::publish(b"sensor/b", 0, b"2")).group, "b");
        assert_eq!(new.data_at(new.sent, &[]), seen("b", &["no_data 1"]));
    }
}

/// As a broker host does with what it has no connection for; or a client, whose number it is by chance.
fn mark_as_returned(frame: &mut [u8], client: SocketAddr) {
    if client.is_ipv4() {
        frame[18..20].copy_from_slice(&0x4dffu16.to_be_bytes());
        frame[20] |= 0x40;
        frame[24..26].fill(0);
        let sum = packet::checksum(&[&frame[14..34]]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    } else {
        frame[16..18].copy_from_slice(&0x4dffu16.to_be_bytes());
    }
}

#[test]
fn a_client_whose_own_number_is_that_mark_is_served() {
    let f = fleet(&delayed());
    let keys = mqtt_fwd::kernel::abi::handover_keys { key: [[1, 2], [3, 4]], epoch: 1, pad: 0 };
    f.datapath.handover_keys.put(&0, &keys).unwrap();
    let clients = ["10.1.1.1:40000", "[fd01:1::1]:40000"];
    // The first one leaves a flow on the addresses of the second.
    for (client, marks) in clients.iter().flat_map(|client| [(client, false), (client, true)]) {
        let mut conn = Conn::new(&f, client);
        conn.isn = conn.isn.wrapping_add(u32::from(marks) * 80_000_000);
        let send = |conn: &Conn, payload: &[u8]| {
            let mut frame = conn.segment(payload);
            if marks {
                mark_as_returned(&mut frame, conn.client);
            }
            let (outcome, rose) = f.send_counting(&frame);
            assert_eq!(rose.get("missed"), None, "{rose:?}");
            outcome
        };
        let syn = packet::tcp(conn.client, conn.service, conn.isn, 0, |h| h.syn = true, &[]);
        let syn_ack = f.send(&syn);
        let headers = etherparse::PacketHeaders::from_ethernet_slice(&syn_ack.packet).unwrap();
        conn.ack = headers.transport.unwrap().tcp().unwrap().sequence_number.wrapping_add(1);
        assert_eq!(send(&conn, &[]).verdict, XDP_DROP, "the handshake's last");
        let id = format!("{client}{marks}");
        let connect = mqtt::connect_as(4, 2, id.as_bytes(), &[]);
        assert_eq!(send(&conn, &connect).verdict, XDP_TX, "CONNACK");
        conn.sent += connect.len() as u32;
        conn.ack = conn.ack.wrapping_add(4);
        let bound = send(&conn, &mqtt::publish(b"sensor/a", 0, b"1"));
        assert_eq!(bound.verdict, JUMPED, "with CONNECT in front");
        assert!(misses(&f).is_empty());
    }
}

#[test]
fn what_comes_back_from_a_broker_host_is_asked_for() {
    for client in ["10.1.1.1:40000", "[fd01:1::1]:40000"] {
        let f = fleet(CONFIG);
        let mut conn = Conn::open(&f, client);
        conn.data(&mqtt::connect(4));
        // Without data, it goes by the cache.
        for _ in 0..200 {
            conn.data_at(conn.sent, &[]);
        }
        let mut frame = conn.segment(&[]);
        mark_as_returned(&mut frame, conn.client);
        let (outcome, counters) = f.send_counting(&frame);
        assert_eq!(outcome.verdict, XDP_DROP);
        assert_eq!(counters, [("missed", 1), ("returned", 1)].into_iter().collect());
        assert_eq!(misses(&f).len(), 1);
        // Without a fleet it means nothing: the flow goes on.
        let alone = Fixture::new();
        let mut conn = Conn::open(&alone, client);
        conn.data(&mqtt::connect(4));
        assert_eq!(alone.send(&frame).verdict, JUMPED);
    }
}

#[test]
fn misses_are_bounded() {
    let f = Fixture::loaded(CONFIG, &SMALL, |rodata| {
        rodata.fleet = 1;
        rodata.misses_per_window = 10;
    });
    for port in 1..1000 {
        let conn = Conn::new(&f, &format!("10.1.1.1:{port}"));
        f.send(&conn.segment(b"x"));
    }
    // Windows of 0.1 s: the loop may see a few.
    let asked = misses(&f).len();
    assert!((10..=100).contains(&asked), "{asked}");
    assert_eq!(f.counters()["miss_dropped"], 999 - asked as u64);
    assert!(f.flow("10.1.1.1:5".parse().unwrap()).is_none(), "a stranger's segment leaves no flow");
}

#[test]
fn a_late_segment_of_the_last_connection_does_not_cost_the_next_one_its_flow() {
    let f = fleet(CONFIG);
    let mut conn = Conn::open(&f, "10.1.1.1:40000");
    assert_eq!(conn.data(&mqtt::connect(4)).group, "default");
    let old =
        packet::tcp(conn.client, conn.service, conn.isn.wrapping_sub(90_000_000), 9, |_| {}, b"x");
    f.send(&old);
    let asked = misses(&f).remove(0);
    adopt(&f, &asked, &Answer::Nobody);
    assert_eq!(conn.data(&mqtt::publish(b"sensor/x", 0, b"1")).group, "default");
    assert!(misses(&f).is_empty());
}

fn fleet_with_keys(text: &str) -> Fixture {
    let f = fleet(text);
    let keys = mqtt_fwd::kernel::abi::handover_keys { key: [[1, 2], [3, 4]], epoch: 1, pad: 0 };
    f.datapath.handover_keys.put(&0, &keys).unwrap();
    f
}

/// A connection whose CONNECT was answered.
fn waiting<'a>(f: &'a Fixture, client: &str) -> (Conn<'a>, Vec<u8>) {
    let mut conn = Conn::new(f, client);
    let syn = packet::tcp(conn.client, conn.service, conn.isn, 0, |h| h.syn = true, &[]);
    let syn_ack = f.send(&syn);
    assert_eq!(syn_ack.verdict, XDP_TX);
    let headers = etherparse::PacketHeaders::from_ethernet_slice(&syn_ack.packet).unwrap();
    conn.ack = headers.transport.unwrap().tcp().unwrap().sequence_number.wrapping_add(1);
    let connect = mqtt::connect(4);
    assert_eq!(f.send(&conn.segment(&connect)).verdict, XDP_TX, "CONNACK");
    conn.sent += connect.len() as u32;
    conn.ack = conn.ack.wrapping_add(4);
    (conn, connect)
}

#[test]
fn a_lost_first_message_is_waited_for_whatever_comes_behind_it() {
    let f = fleet_with_keys(&delayed());
    for client in ["10.1.1.1:40000", "[fd01:1::1]:40000"] {
        let (mut conn, _) = waiting(&f, client);
        let (first, second) =
            (mqtt::publish(b"sensor/b", 0, b"1"), mqtt::publish(b"sensor/b", 0, b"2"));
        let lost = conn.segment(&first);
        conn.sent += first.len() as u32;
        assert_eq!(f.send(&conn.segment(&second)).verdict, XDP_DROP);
        let asked = misses(&f).remove(0);
        assert_eq!(adopt(&f, &asked, &Answer::Nobody).0, XDP_DROP, "no RST");
        assert_eq!(f.send(&lost).verdict, JUMPED, "TCP repeats it");
        assert_eq!(f.flow(conn.client).unwrap().bound_by, "message_answered");
    }
}

#[test]
fn a_late_segment_of_the_last_connection_does_not_cost_the_next_one_its_connect() {
    let f = fleet_with_keys(&delayed());
    for client in ["10.1.1.1:40000", "[fd01:1::1]:40000"] {
        let before = Conn::new(&f, client);
        f.send(&before.segment(b"x"));
        let mut asked = misses(&f).remove(0);
        asked.seq = asked.seq.wrapping_sub(90_000_000);
        // Before the answer comes, the next connection on that port has begun.
        let (conn, _) = waiting(&f, client);
        assert_eq!(adopt(&f, &asked, &group(&f, "b")).0, XDP_DROP);
        assert!(f.flow(conn.client).is_none());
        let message = conn.segment(&mqtt::publish(b"sensor/b", 0, b"1"));
        assert_eq!(f.send(&message).verdict, JUMPED);
        assert_eq!(f.flow(conn.client).unwrap().bound_by, "message_answered");
        assert!(misses(&f).is_empty());
    }
}

#[test]
fn a_connect_that_another_balancer_answered_goes_on_here() {
    let text = delayed();
    let (there, here) = (fleet_with_keys(&text), fleet_with_keys(&text));
    for client in ["10.1.1.1:40000", "[fd01:1::1]:40000"] {
        let (conn, connect) = waiting(&there, client);
        let kept = reports(&there).into_iter().find_map(|report| match report {
            Report::Kept((of, service), kept) => {
                assert_eq!(of, conn.client);
                Some(
                    there.datapath.places(&there.config).unwrap()[&service].waiting(&kept).unwrap(),
                )
            }
            _ => None,
        });
        let waiting = kept.expect("it is told of for the store");
        assert_eq!(waiting.connect, connect);

        // The message comes here: nobody has it, but the store.
        let message = conn.segment(&mqtt::publish(b"sensor/b", 0, b"1"));
        assert_eq!(here.send(&message).verdict, XDP_DROP);
        let asked = misses(&here).remove(0);
        assert!(waiting.is_before(asked.seq));
        let kept =
            here.datapath.places(&here.config).unwrap()[&asked.service].kept(&waiting).unwrap();
        let (verdict, sent) = adopt(&here, &asked, &Answer::Waiting(Box::new(kept)));
        assert_eq!(verdict, JUMPED);
        let vip = if conn.client.is_ipv4() { "10.1.50.2" } else { "fd01:50::2" };
        assert_eq!(packet::dst(&sent).to_string(), vip);
        let payload = etherparse::PacketHeaders::from_ethernet_slice(&sent).unwrap();
        assert!(payload.payload.slice().starts_with(&connect), "with CONNECT in front");
        assert!(matches!(reports(&here).last(), Some(Report::Given(_))));
        assert_eq!(here.flow(conn.client).unwrap().bound_by, "message_answered");

        // There, the same connection is silent, and the store no longer has it: it is forgotten, without an RST.
        let silent = there.datapath.silent_handovers(0).unwrap().remove(0);
        let connect = mqtt_fwd::handover::silent::connect_again(&silent);
        let again = Segment::of_silent(&silent, connect);
        assert_eq!(adopt(&there, &again, &Answer::Elsewhere).0, XDP_DROP);
        assert!(there.datapath.silent_handovers(0).unwrap().is_empty());
    }
}

#[test]
fn a_broker_host_says_which_connections_this_kernel_has() {
    let mut storage = MaybeUninit::uninit();
    let skel = DecapSkelBuilder::default().open(&mut storage).unwrap().load().unwrap();
    let keys = [[1, 2], [3, 4]];
    Table::of(&skel.maps.ask_keys).unwrap().put(&0u32, &ask_keys { key: keys }).unwrap();
    let ask = |service, asked: Asked| {
        let question =
            Question { nonce: 7, epoch: 1, service, connections: &[asked] }.encode(&keys);
        let mut frame = Vec::new();
        let eth = etherparse::PacketBuilder::ethernet2(packet::LB_MAC, packet::CLIENT_MAC);
        let ip = eth.ipv4([10, 1, 2, 102], [10, 1, 3, 201], 64);
        ip.udp(40_000, 18_830).write(&mut frame, &question).unwrap();
        let run = test_run::run(skel.progs.decap.as_fd(), &frame, 1).unwrap();
        assert_eq!(run.verdict, XDP_TX);
        read_answer(&keys, &run.frame[frame.len() - question.len()..]).unwrap().1[0]
    };
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(listener) = TcpListener::bind(address) else { continue };
        let service = listener.local_addr().unwrap();
        let client = TcpStream::connect(service).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let (seq, ack) = numbers(&client);
        let asked = Asked { client: client.local_addr().unwrap(), seq, ack };
        assert_eq!(ask(service, asked), Had::This);
        assert_eq!(ask(service, Asked { seq: seq.wrapping_add(1 << 25), ..asked }), Had::Other);
        // The service ends it: what is left of it there (TIME_WAIT) is it still.
        drop(accepted);
        drop(client);
        wait_for("TIME_WAIT", || (ask(service, asked) == Had::This).then_some(()));
        assert_eq!(ask(service, Asked { seq: seq.wrapping_add(1 << 25), ..asked }), Had::Other);
        let stranger = std::net::SocketAddr::new(service.ip(), 9);
        assert_eq!(ask(service, Asked { client: stranger, ..asked }), Had::Nothing);
    }
}
