//! What katran-patches/ cost, on a Katran that you built: KATRAN_BALANCER is its patched object,
//! KATRAN_UNPATCHED one without. Nanoseconds a packet of `balancer_ingress` (established ACK, IPIP),
//! patched and not in turns, and the median of the differences.

#[allow(dead_code)] // each bench uses its own part
mod common;
#[path = "../tests/support/mod.rs"]
#[allow(unused)]
mod support;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use common::{Bench, Case, Order, ROUNDS, load_rewind, median};
use mqtt_fwd::balancer::flags::GROUP_FLAG;
use support::datapath::{CONFIG, Fixture, XDP_TX, sentinel};
use support::katran_object::KatranObject;
use support::packet;

fn katran(variable: &str) -> KatranObject {
    let path = std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} is not set"));
    let katran = KatranObject::load(&PathBuf::from(path));
    for (number, (vip, flags, real)) in (0..).zip([
        ("10.1.50.1", GROUP_FLAG, "10.1.3.201"),
        ("10.1.60.1", 0, "10.1.3.201"),
        ("fd01:50::1", GROUP_FLAG, "fd01:3::201"),
        ("fd01:60::1", 0, "fd01:3::201"),
    ]) {
        let vip: IpAddr = vip.parse().unwrap();
        katran.add_vip(number, vip, 1883, flags, real.parse().unwrap());
        if katran.has("vip_inner_dst") && flags != 0 {
            let service = if vip.is_ipv4() { "10.1.50.200" } else { "fd01:50::200" };
            katran.set_service(vip, service.parse().unwrap(), 1883);
        }
    }
    katran
}

fn main() {
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    if std::env::var_os("KATRAN_BALANCER").is_none() {
        println!("no Katran: set KATRAN_BALANCER and KATRAN_UNPATCHED");
        return;
    }
    let (patched, unpatched) = (katran("KATRAN_BALANCER"), katran("KATRAN_UNPATCHED"));
    let bench = Bench { fixture: Fixture::with(CONFIG), end: sentinel(XDP_TX) };
    println!("{:24}{:>12}{:>12}{:>12}", "VIP", "unpatched", "patched", "difference");
    for (name, vip) in [
        ("MQTT group", "10.1.50.1"),
        ("another VIP", "10.1.60.1"),
        ("MQTT group, IPv6", "fd01:50::1"),
        ("another VIP, IPv6", "fd01:60::1"),
    ] {
        let vip: IpAddr = vip.parse().unwrap();
        let client = if vip.is_ipv4() { "11.0.0.0:4000" } else { "[fd01:1::]:4000" };
        let client: SocketAddr = client.parse().unwrap();
        let wrapped = if vip.is_ipv4() { 20 } else { 40 };
        let sent = packet::tcp(client, SocketAddr::new(vip, 1883), 0, 7, |_| {}, &[]);
        let (dst, src) = (vip, client.ip());
        let case = Case {
            packet: sent,
            dst,
            src,
            clients: 1,
            seq_step: 0,
            topic_offset: 0,
            order: Order::Talking,
        };
        let rewind = load_rewind(&case, wrapped, &bench.fixture);
        // The first run takes off what is not there yet.
        let packet = [vec![0; usize::from(wrapped)], case.packet.clone()].concat();
        let cost = |katran: &KatranObject| bench.run(&rewind, katran.program().as_fd(), &packet);
        cost(&unpatched);
        cost(&patched);
        let rounds: Vec<(f64, f64)> =
            (0..3 * ROUNDS).map(|_| (cost(&unpatched), cost(&patched))).collect();
        println!(
            "{name:24}{:>12.0}{:>12.0}{:>12.1}",
            median(rounds.iter().map(|r| r.0).collect()),
            median(rounds.iter().map(|r| r.1).collect()),
            median(rounds.iter().map(|r| r.1 - r.0).collect()),
        );
    }
}
