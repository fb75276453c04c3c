//! Packets of a client, and a look at what became of them.

use std::net::{IpAddr, SocketAddr};

use etherparse::{PacketBuilder, SlicedPacket, TcpHeader};

pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const LB_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// A TCP segment from `src` to `dst`; `shape` sets flags.
pub fn tcp(
    src: SocketAddr,
    dst: SocketAddr,
    seq: u32,
    ack: u32,
    shape: impl FnOnce(&mut TcpHeader),
    payload: &[u8],
) -> Vec<u8> {
    let mut header = TcpHeader::new(src.port(), dst.port(), seq, 65_000);
    header.ack = ack != 0;
    header.acknowledgment_number = ack;
    shape(&mut header);
    let eth = PacketBuilder::ethernet2(CLIENT_MAC, LB_MAC);
    let mut packet = Vec::new();
    match (src.ip(), dst.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            eth.ipv4(src.octets(), dst.octets(), 64).tcp_header(header).write(&mut packet, payload)
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            eth.ipv6(src.octets(), dst.octets(), 64).tcp_header(header).write(&mut packet, payload)
        }
        _ => panic!("{src} and {dst} are of two families"),
    }
    .unwrap();
    packet
}

/// What a router between real and client says about a packet service → client that is too big.
pub fn icmp_error(service: SocketAddr, client: SocketAddr) -> Vec<u8> {
    let quoted = tcp(service, client, 9, 9, |_| {}, &[b'x'; 100]);
    let eth = PacketBuilder::ethernet2(CLIENT_MAC, LB_MAC);
    let mut packet = Vec::new();
    match service.ip() {
        IpAddr::V4(addr) => eth
            .ipv4([10, 1, 9, 9], addr.octets(), 64)
            .icmpv4(etherparse::Icmpv4Type::DestinationUnreachable(
                etherparse::icmpv4::DestUnreachableHeader::FragmentationNeeded {
                    next_hop_mtu: 1300,
                },
            ))
            .write(&mut packet, &quoted[14..]),
        IpAddr::V6(addr) => eth
            .ipv6("fd01:9::9".parse::<std::net::Ipv6Addr>().unwrap().octets(), addr.octets(), 64)
            .icmpv6(etherparse::Icmpv6Type::PacketTooBig { mtu: 1300 })
            .write(&mut packet, &quoted[14..]),
    }
    .unwrap();
    packet
}

/// Destination address of a packet's (outer) IP header.
pub fn dst(packet: &[u8]) -> IpAddr {
    match packet[12..14] {
        [0x08, 0x00] => IpAddr::from(<[u8; 4]>::try_from(&packet[30..34]).unwrap()),
        [0x86, 0xdd] => IpAddr::from(<[u8; 16]>::try_from(&packet[38..54]).unwrap()),
        _ => panic!("not IP"),
    }
}

/// Is it TCP, over IPv4 or IPv6 without extension headers?
pub fn is_tcp(packet: &[u8]) -> bool {
    packet[if packet[12..14] == [0x08, 0x00] { 23 } else { 20 }] == 6
}

/// Is the IPv4 header's checksum right? (IPv6 has none.)
pub fn ip_checksum_right(packet: &[u8]) -> bool {
    packet[12..14] != [0x08, 0x00] || checksum(&[&packet[14..34]]) == 0
}

/// Is the TCP checksum right for the addresses that the packet has now?
pub fn tcp_checksum_right(packet: &[u8]) -> bool {
    let sliced = SlicedPacket::from_ethernet(packet).unwrap();
    let Some(etherparse::TransportSlice::Tcp(tcp)) = sliced.transport else { return false };
    let payload = tcp.payload();
    let expected = match sliced.net.unwrap() {
        etherparse::NetSlice::Ipv4(ip) => {
            tcp.to_header().calc_checksum_ipv4(&ip.header().to_header(), payload)
        }
        etherparse::NetSlice::Ipv6(ip) => {
            tcp.to_header().calc_checksum_ipv6(&ip.header().to_header(), payload)
        }
        etherparse::NetSlice::Arp(_) => return false,
    };
    tcp.to_header().checksum == expected.unwrap()
}

/// RFC 1071's checksum of the concatenation; 0 over data with a right checksum in it.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes: Vec<u8> = parts.concat();
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|c| u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
