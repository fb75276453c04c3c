//! What delayed binding needs of user space: its keys, and an end to waiting for clients that say
//! nothing after CONNECT.

use std::net::IpAddr;
use std::os::fd::AsFd as _;

use etherparse::{PacketBuilder, TcpHeader, TcpOptionElement};
use libbpf_rs::Program;
use tracing::{debug, info};

use super::{Error, Result, view};
use crate::config::Config;
use crate::datapath::Datapath;
use crate::handover::keys::{KeyFile, now};
use crate::kernel::BpfError;
use crate::kernel::abi::{Pod as _, flow6, handover, handover_state, words_addr};
use crate::kernel::{test_run, xdp};

/// A client that has said nothing for so long after its CONNECT was answered is given to a broker as
/// it is: it may only listen to what its session or its will is for.
const SILENT_S: u64 = 3;

/// Brings the keys into the datapath: once, and whenever the file or the time says otherwise.
pub fn put_keys(config: &Config, datapath: &Datapath) -> Result<()> {
    if !config.binds_late() {
        return Ok(());
    }
    let file = KeyFile::read(&config.handover_key)?;
    let image = file.image(now());
    let before = datapath.handover_keys.get(&0)?.unwrap_or_default();
    if before.bytes() != image.bytes() {
        datapath.handover_keys.put(&0, &image)?;
        let key = file.in_use(now());
        info!(epoch = key.epoch, fingerprint = key.fingerprint(), "handover key in use");
    }
    Ok(())
}

/// Binds connections whose clients are silent. Returns how many.
pub fn bind_silent(config: &Config, datapath: &Datapath) -> Result<usize> {
    if !config.binds_late() {
        return Ok(0);
    }
    let now = view::boot_time().as_secs();
    let waiting = |h: &handover| {
        u32::from(h.state) <= handover_state::HANDOVER_SILENT.0
            && now.saturating_sub(u64::from(h.born_s)) >= SILENT_S
    };
    let silent: Vec<(flow6, handover)> =
        datapath.handovers.entries()?.into_iter().filter(|(_, h)| waiting(h)).collect();
    if silent.is_empty() {
        return Ok(0);
    }
    let path = config.pins().program("mqtt_fwd");
    let program = Program::fd_from_pinned_path(&path).map_err(|source| BpfError::Pin {
        path: path.clone(),
        action: "opening",
        source,
    })?;
    let interface = xdp::interface_index(&config.interface)?;
    let services = datapath.service_table()?;
    let mut bound = 0;
    for (key, seen) in silent {
        let Some(service) = services.service[..usize::from(services.count)]
            .iter()
            .find(|service| service.id == key.service)
        else {
            continue;
        };
        // If its message has come meanwhile, it is bound; if another connection has its place, that has
        // just begun. Neither must be undone.
        let current = datapath.handovers.get(&key)?.filter(|now| {
            (now.start, now.server) == (seen.start, seen.server)
                && u32::from(now.state) <= handover_state::HANDOVER_SILENT.0
        });
        let Some(mut h) = current else { continue };
        h.state = handover_state::HANDOVER_SILENT.0 as u8;
        datapath.handovers.put(&key, &h)?;
        let v6 = service.v6 != 0;
        let client = (words_addr(key.addr, v6), u16::from_be(key.port));
        let vip = (words_addr(service.addr, v6), u16::from_be(service.port));
        debug!(client = %client.0, port = client.1, "silent since CONNECT: bound without a message");
        test_run::inject(program.as_fd(), interface, &connect_again(client, vip, &h)).map_err(
            |source| Error::Io {
                what: "giving a silent client's connection to a broker".to_owned(),
                source,
            },
        )?;
        bound += 1;
    }
    Ok(bound)
}

/// The client's CONNECT, once more. Nothing if client and service are of different families, as
/// those of one table never are.
fn connect_again(client: (IpAddr, u16), vip: (IpAddr, u16), h: &handover) -> Vec<u8> {
    const HOPS: u8 = 64;
    let ethernet = PacketBuilder::ethernet2([0; 6], [0; 6]);
    let ip = match (client.0, vip.0) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), HOPS),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), HOPS),
        _ => return Vec::new(),
    };
    // The window is the client's next segment's to say.
    let mut tcp = TcpHeader::new(client.1, vip.1, h.start, 1024);
    tcp.acknowledgment_number = h.server;
    (tcp.ack, tcp.psh) = (true, true);
    if h.timestamps != 0 {
        let timestamps = [
            TcpOptionElement::Noop,
            TcpOptionElement::Noop,
            TcpOptionElement::Timestamp(h.client_tsval, h.tsval),
        ];
        tcp.set_options(&timestamps).expect("12 bytes of options fit");
    }
    let connect = &h.connect[..usize::from(h.connect_length).min(h.connect.len())];
    let segment = ip.tcp_header(tcp);
    let mut frame = Vec::with_capacity(segment.size(connect.len()));
    segment.write(&mut frame, connect).expect("CONNECT, of bounded length, fits into a packet");
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_injected_is_a_tcp_segment_with_right_checksums() {
        let mut h =
            handover { start: 1000, server: 5000, connect_length: 15, ..handover::zeroed() };
        h.connect[..15].copy_from_slice(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01c");
        for (timestamps, client, vip) in
            [(0, "10.1.1.1", "10.1.50.200"), (1, "fd01:1::1", "fd01:50::200")]
        {
            h.timestamps = timestamps;
            let frame =
                connect_again((client.parse().unwrap(), 40_000), (vip.parse().unwrap(), 1883), &h);
            let packet = etherparse::PacketHeaders::from_ethernet_slice(&frame).unwrap();
            let tcp = packet.transport.unwrap().tcp().unwrap();
            assert_eq!((tcp.sequence_number, tcp.acknowledgment_number), (1000, 5000));
            let payload = packet.payload.slice();
            assert_eq!(payload, &h.connect[..15]);
            let right = match packet.net.unwrap() {
                etherparse::NetHeaders::Ipv4(ip, _) => {
                    assert_eq!(ip.header_checksum, ip.calc_header_checksum());
                    tcp.calc_checksum_ipv4(&ip, payload).unwrap()
                }
                etherparse::NetHeaders::Ipv6(ip, _) => {
                    tcp.calc_checksum_ipv6(&ip, payload).unwrap()
                }
                etherparse::NetHeaders::Arp(_) => unreachable!(),
            };
            assert_eq!(tcp.checksum, right);
        }
    }
}
