//! What the sidecar does to flows: a configuration as large as they come, and connections that are terminated.

use crate::support::conn::{Conn, predicted};
use crate::support::datapath::{CONFIG, Fixture};
use crate::support::mqtt;
use mqtt_fwd::datapath::flows::{Termination, terminate};

#[test]
fn a_hundred_thousand_routes_load_and_route() {
    let routes: Vec<String> = (0..100_000)
        .map(|i| {
            let group = if i % 2 == 0 { "a" } else { "b" };
            format!("{{ topic = \"site/{}/dev{i}\", group = \"{group}\" }}", i % 100)
        })
        .collect();
    let route =
        format!("route = [{{ topic = \"site/+/#\", group = \"a\" }}, {}]", routes.join(", "));
    let start = CONFIG.find("route = [").unwrap();
    let end = start + CONFIG[start..].find("\n]\n").unwrap() + 3;
    let text = CONFIG.replace(&CONFIG[start..end], &format!("{route}\n"));
    let sizes = mqtt_fwd::config::MapSizes::default();
    let f = Fixture::sized(&text, &sizes);
    for (i, (topic, group)) in [
        ("site/7/dev77707", "b"),
        ("site/8/dev77707", "a"),
        ("site/8/dev8", "a"),
        ("site/7", "a"),
        ("sight/7", "default"),
    ]
    .iter()
    .enumerate()
    {
        let mut c = Conn::open(&f, &format!("10.1.1.{}:4000", i + 1));
        c.data(&mqtt::connect(4));
        f.send(&c.segment(&mqtt::publish(topic.as_bytes(), 0, b"1")));
        assert_eq!(c.prediction(), predicted(topic, group));
    }
}

#[test]
fn a_flow_that_is_terminated_ends_with_disconnect_and_no_more_bytes_than_its_client_sent() {
    let f = Fixture::new();
    for (number, (sent, fin)) in [
        (mqtt::publish(b"sensor/a", 0, b"1"), true),
        // FIN would be a byte more: what acknowledges it would be ignored.
        (mqtt::pingreq(), false),
    ]
    .into_iter()
    .enumerate()
    {
        let port = 5000 + number as u16;
        let mut conn = Conn::open(&f, &format!("10.1.7.7:{port}"));
        conn.data(&mqtt::connect(4));
        let service = f.datapath.service_table().unwrap().service[0].id;
        let (key, _) = f.datapath.flow(conn.client, service).unwrap().unwrap();
        assert_eq!(terminate(&f.datapath, &[key], Termination::Disconnect).unwrap(), 1);
        let outcome = f.send(&conn.segment(&sent));
        let out = etherparse::SlicedPacket::from_ethernet(&outcome.packet).unwrap();
        let etherparse::TransportSlice::Tcp(tcp) = out.transport.unwrap() else { panic!() };
        assert_eq!(tcp.payload(), mqtt::disconnect());
        assert_eq!(tcp.fin(), fin);
        assert!(tcp.payload().len() + usize::from(tcp.fin()) <= sent.len());
    }
}
