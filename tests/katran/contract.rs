//! Katran's gRPC interface as our client uses it: against the embedded server, against its
//! double that is as silent as Katran, and against a real one (see support/server.rs).

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::support::net::{Background, CONFIG, Net};
use crate::support::server::Kind;
use mqtt_fwd::balancer::client::{BalancerError, Client};
use mqtt_fwd::balancer::flags::GROUP_FLAG;
use mqtt_fwd::domain::Vip;

struct Server {
    client: Client,
    process: Background,
    net: Net,
    kind: Kind,
}

async fn start(kind: Kind) -> Server {
    let net = Net::new();
    net.write_config(&kind.config(CONFIG));
    net.ok(&["load"]);
    let endpoint = format!("unix:{}/balancer.sock", net.dir.display());
    let process = kind.start(&net, &endpoint);
    Server { client: Client::connect(&endpoint).await.unwrap(), process, net, kind }
}

fn vip(text: &str) -> Vip {
    Vip::tcp(text.parse().unwrap(), 1883)
}

fn reals(list: &[(&str, u32)]) -> BTreeMap<IpAddr, u32> {
    list.iter().map(|(addr, weight)| (addr.parse().unwrap(), *weight)).collect()
}

/// What was refused, and the reason, which only the embedded balancer gives.
fn refused(result: Result<(), BalancerError>) -> (String, String) {
    match result {
        Err(BalancerError::Refused { call, reason, causes }) => {
            assert!(!causes.is_empty());
            (call, reason.unwrap_or_default())
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn vips_come_and_go() {
    for kind in Kind::all() {
        vips(start(kind).await).await;
    }
}

async fn vips(mut s: Server) {
    assert!(s.client.vips().await.unwrap().is_empty());
    for v in [vip("10.1.50.1"), vip("fd01:50::1")] {
        s.client.add_vip(v, GROUP_FLAG | 1).await.unwrap();
        assert_eq!(s.client.vip_flags(v).await.unwrap(), GROUP_FLAG | 1);
        s.client.modify_vip(v, 1, false).await.unwrap();
        assert_eq!(s.client.vip_flags(v).await.unwrap(), GROUP_FLAG);
        let (call, reason) = refused(s.client.add_vip(v, 0).await);
        assert_eq!(call, format!("addVip {v} (flags 0x0)"));
        assert_eq!(reason, s.kind.reason(&format!("there is a VIP {v} already")));
    }
    assert_eq!(s.client.vips().await.unwrap(), [vip("10.1.50.1"), vip("fd01:50::1")].into());
    s.client.del_vip(vip("10.1.50.1")).await.unwrap();
    let (call, reason) = refused(s.client.del_vip(vip("10.1.50.1")).await);
    assert_eq!(call, "delVip 10.1.50.1:1883/tcp");
    assert_eq!(reason, s.kind.reason("there is no VIP 10.1.50.1:1883/tcp"));
    assert_eq!(s.client.vips().await.unwrap(), [vip("fd01:50::1")].into());
}

#[tokio::test]
async fn reals_are_added_weighed_and_removed_in_batches() {
    for kind in Kind::all() {
        batches(start(kind).await).await;
    }
}

async fn batches(mut s: Server) {
    let v = vip("10.1.50.1");
    let (_, reason) = refused(s.client.add_reals(v, &reals(&[("10.1.3.1", 1)])).await);
    assert_eq!(reason, s.kind.reason(&format!("there is no VIP {v}")));
    s.client.add_vip(v, 0).await.unwrap();
    let three = reals(&[("10.1.3.1", 1), ("10.1.3.2", 5), ("fd01:3::1", 1)]);
    s.client.add_reals(v, &three).await.unwrap();
    assert_eq!(s.client.reals(v).await.unwrap(), three);
    s.client.add_reals(v, &reals(&[("10.1.3.1", 7)])).await.unwrap();
    assert_eq!(s.client.reals(v).await.unwrap()[&"10.1.3.1".parse::<IpAddr>().unwrap()], 7);
    s.client.del_reals(v, &reals(&[("10.1.3.2", 0), ("fd01:3::1", 0)])).await.unwrap();
    assert_eq!(s.client.reals(v).await.unwrap(), reals(&[("10.1.3.1", 7)]));
    let unknown = s.client.del_reals(v, &reals(&[("10.1.3.9", 0)])).await;
    if s.kind == Kind::Embedded {
        assert!(refused(unknown).1.contains("has no real 10.1.3.9"));
    } else {
        assert!(unknown.is_ok(), "Katran says yes, and does nothing");
    }
    assert_eq!(s.client.reals(v).await.unwrap(), reals(&[("10.1.3.1", 7)]));
}

#[tokio::test]
async fn what_katran_would_break_on_is_refused_with_a_reason() {
    let mut s = start(Kind::Embedded).await;
    let v6 = vip("fd01:50::1");
    s.client.add_vip(v6, 0).await.unwrap();
    let (_, mixed) = refused(s.client.add_reals(v6, &reals(&[("10.1.3.1", 1)])).await);
    assert!(mixed.contains("IPv4 and cannot get packets of the IPv6 VIP"), "{mixed}");
    let (_, weightless) = refused(s.client.add_reals(v6, &reals(&[("fd01:3::1", 0)])).await);
    assert!(weightless.contains("weight must be at least 1"), "{weightless}");
    let udp = Vip { protocol: 17, ..v6 };
    let (_, refusal) = refused(s.client.add_vip(udp, 0).await);
    assert!(refusal.contains("only TCP"), "{refusal}");
    for i in 2..=8 {
        s.client.add_vip(vip(&format!("10.1.50.{i}")), 0).await.unwrap();
    }
    let (_, full) = refused(s.client.add_vip(vip("10.1.50.9"), 0).await);
    assert!(full.contains("8 VIPs already"), "{full}");
}

#[tokio::test]
async fn a_restarted_embedded_server_still_has_its_state() {
    let mut s = start(Kind::Embedded).await;
    let v = vip("10.1.50.1");
    s.client.add_vip(v, GROUP_FLAG).await.unwrap();
    s.client.add_reals(v, &reals(&[("10.1.3.1", 2)])).await.unwrap();
    s.process.signal("KILL");
    s.process.wait();
    s.process = s.kind.start(&s.net, s.client.endpoint());
    let mut client = Client::connect(s.client.endpoint()).await.unwrap();
    assert_eq!(client.reals(v).await.unwrap(), reals(&[("10.1.3.1", 2)]));
    assert_eq!(client.vip_flags(v).await.unwrap(), GROUP_FLAG);
}

#[tokio::test]
async fn apply_plans_does_reads_back_and_is_idempotent() {
    for kind in Kind::all() {
        apply(start(kind).await).await;
    }
}

async fn apply(mut s: Server) {
    // An operator's own VIP on the same balancer is none of our business.
    let theirs = vip("10.1.60.1");
    s.client.add_vip(theirs, 0).await.unwrap();

    let dry = s.net.ok(&["apply", "--dry-run"]);
    assert!(dry.contains("balancer: add VIP 10.1.50.1:1883/tcp"), "{dry}");
    assert!(dry.contains("nothing was changed"), "{dry}");
    assert_eq!(s.client.vips().await.unwrap(), [theirs].into());

    let first = s.net.ok(&["apply"]);
    assert!(first.contains("switch to generation 1"), "{first}");
    assert!(first.contains("read back"), "{first}");
    assert_eq!(s.net.ok(&["apply"]), "all is as configured\n");
    let group_a = vip("10.1.50.1");
    assert_eq!(
        s.client.reals(group_a).await.unwrap(),
        reals(&[("10.1.3.201", 1), ("10.1.3.202", 2)])
    );

    // Somebody meddles: the difference is found and put right, nothing else is touched.
    s.client.del_reals(group_a, &reals(&[("10.1.3.202", 0)])).await.unwrap();
    s.client.modify_vip(group_a, GROUP_FLAG, false).await.unwrap();
    let repaired = s.net.ok(&["apply"]);
    assert_eq!(
        repaired,
        "balancer: mark VIP 10.1.50.1:1883/tcp as an MQTT group\n\
         balancer: 10.1.50.1:1883/tcp: add 10.1.3.202 weight 2\n\
         2 steps done, and read back\n"
    );

    // A group goes: its VIP is deleted, for Katran would go on sending to the old ring.
    let smaller = CONFIG
        .replace("{ topic = \"sensor/a\", group = \"a\" }", "")
        .replace("{ name = \"a\", vip = \"10.1.50.1\"", "{ name = \"b\", vip = \"10.1.50.2\"");
    s.net.write_config(&s.kind.config(&smaller));
    let change = s.net.ok(&["apply"]);
    assert!(change.contains("balancer: remove VIP 10.1.50.1:1883/tcp"), "{change}");
    assert_eq!(
        s.client.vips().await.unwrap(),
        [theirs, vip("10.1.50.2"), vip("10.1.50.250")].into()
    );
}

#[tokio::test]
async fn a_refused_vip_leaves_what_was_in_force() {
    // A real Katran has room for 512.
    for kind in [Kind::Embedded, Kind::Silent] {
        full(start(kind).await).await;
    }
}

async fn full(mut s: Server) {
    s.net.ok(&["apply"]);
    let before = s.client.vips().await.unwrap();
    // As many VIPs as fit; the configuration wants two more.
    for i in 1..=6 {
        s.client.add_vip(vip(&format!("10.1.60.{i}")), 0).await.unwrap();
    }
    let larger = CONFIG.replace(
        "group = [",
        "group = [{ name = \"c\", vip = \"10.1.50.3\", reals = [{ address = \"10.1.3.203\" }] },",
    );
    s.net.write_config(&s.kind.config(&larger));
    let error = s.net.fails(1, &["apply"]);
    assert!(error.contains("refused addVip 10.1.50.3:1883/tcp"), "{error}");
    assert!(error.contains("likely causes: "), "{error}");
    assert!(before.is_subset(&s.client.vips().await.unwrap()));
    s.net.write_config(&s.kind.config(CONFIG));
    // Nothing of the failed attempt is in force: only its note for the balancer is to remove.
    let after = s.net.ok(&["apply"]);
    assert!(!after.contains("generation"), "{after}");
}
