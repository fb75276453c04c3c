//! Clients' segments, as this host makes them once more.

use std::net::{IpAddr, SocketAddr};

use etherparse::{PacketBuilder, TcpHeader, TcpOptionElement};

/// A client's segment to a service.
#[derive(Debug, Clone, Copy)]
pub struct Made<'a> {
    pub client: SocketAddr,
    pub service: SocketAddr,
    /// Sequence and acknowledgement number.
    pub seq: u32,
    pub ack: u32,
    /// Value and echo (RFC 7323 §3).
    pub timestamps: Option<(u32, u32)>,
    pub payload: &'a [u8],
}

impl Made<'_> {
    /// Its frame. Nothing if client and service are of different families, as those of one table never are.
    pub fn frame(&self) -> Vec<u8> {
        const HOPS: u8 = 64;
        let ethernet = PacketBuilder::ethernet2([0; 6], [0; 6]);
        let ip = match (self.client.ip(), self.service.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), HOPS),
            (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), HOPS),
            _ => return Vec::new(),
        };
        // The window is the client's next segment's to say.
        let mut tcp = TcpHeader::new(self.client.port(), self.service.port(), self.seq, 1024);
        tcp.acknowledgment_number = self.ack;
        (tcp.ack, tcp.psh) = (true, true);
        if let Some((tsval, tsecr)) = self.timestamps {
            let timestamps = [
                TcpOptionElement::Noop,
                TcpOptionElement::Noop,
                TcpOptionElement::Timestamp(tsval, tsecr),
            ];
            tcp.set_options(&timestamps).expect("12 bytes of options fit");
        }
        let segment = ip.tcp_header(tcp);
        let mut frame = Vec::with_capacity(segment.size(self.payload.len()));
        segment
            .write(&mut frame, self.payload)
            .expect("a segment, of bounded length, fits into a packet");
        frame
    }
}
