//! A client's end of a connection, and what is kept of it.

use std::net::SocketAddr;

use etherparse::{SlicedPacket, TcpHeader, TcpOptionElement, TransportSlice};
use mqtt_fwd::domain::MapSizes;
use mqtt_fwd::kernel::abi::handover_keys;
use mqtt_fwd::kernel::skeletons::mqtt_fwd::types::rodata;

use crate::support::datapath::{Fixture, Outcome, SERVICE, SERVICE6, XDP_TX};
use crate::support::{datapath, packet};

pub fn delayed() -> Fixture {
    delayed_at(u32::MAX)
}

/// Delayed binding, with maps of these sizes.
pub fn delayed_with(sizes: &MapSizes) -> Fixture {
    delayed_where(sizes, |_| {})
}

/// Delayed binding, with so many new flows in a window of time.
pub fn delayed_at(flows_per_window: u32) -> Fixture {
    delayed_where(&datapath::SMALL, |rodata| rodata.flows_per_window = flows_per_window)
}

/// Delayed binding, with load-time configuration of the test's own.
pub fn delayed_where(sizes: &MapSizes, set: impl FnOnce(&mut rodata)) -> Fixture {
    delayed_of(datapath::CONFIG, sizes, set)
}

/// The same of another configuration.
pub fn delayed_of(text: &str, sizes: &MapSizes, set: impl FnOnce(&mut rodata)) -> Fixture {
    let text = text.replace("max_packet", "binding = \"delayed\"\nmax_packet");
    let f = Fixture::loaded(&text, sizes, |rodata| {
        rodata.flows_per_window = u32::MAX;
        rodata.topics_per_window = u32::MAX;
        set(rodata);
    });
    let keys = handover_keys { key: [[1, 2], [3, 4]], epoch: 1, pad: 0 };
    f.datapath.handover_keys.put(&0, &keys).unwrap();
    f
}

/// What is kept of connections, in entries.
pub fn kept(f: &Fixture) -> usize {
    let d = &f.datapath;
    let counts = [
        d.flows.mapped().unwrap().entries().count(),
        d.handovers.keys().unwrap().len(),
        d.client_ids.keys().unwrap().len(),
        d.clients.keys().unwrap().len(),
        d.clients6.keys().unwrap().len(),
    ];
    counts.iter().sum()
}

/// A TCP header and payload, without addresses.
pub struct Reply {
    pub tcp: TcpHeader,
    pub payload: Vec<u8>,
}

pub fn reply(outcome: &Outcome) -> Reply {
    assert_eq!(outcome.verdict, XDP_TX);
    assert!(packet::ip_checksum_right(&outcome.packet), "IP checksum");
    assert!(packet::tcp_checksum_right(&outcome.packet), "TCP checksum");
    let sliced = SlicedPacket::from_ethernet(&outcome.packet).unwrap();
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("not TCP") };
    Reply { tcp: tcp.to_header(), payload: tcp.payload().to_vec() }
}

/// Which options a client offers.
#[derive(Debug, Clone, Copy)]
#[allow(clippy::struct_excessive_bools)] // they are four independent options
pub struct Offer {
    pub mss: bool,
    pub sack: bool,
    pub timestamps: bool,
    pub wscale: bool,
}

impl Offer {
    pub fn all() -> impl Iterator<Item = Self> {
        (0..16).map(|n| Self {
            mss: n & 1 != 0,
            sack: n & 2 != 0,
            timestamps: n & 4 != 0,
            wscale: n & 8 != 0,
        })
    }

    pub fn elements(self, tsval: u32) -> Vec<TcpOptionElement> {
        let mut all = Vec::new();
        if self.mss {
            all.push(TcpOptionElement::MaximumSegmentSize(1400));
        }
        if self.sack {
            all.push(TcpOptionElement::SelectiveAcknowledgementPermitted);
        }
        if self.timestamps {
            all.push(TcpOptionElement::Timestamp(tsval, 0));
        }
        if self.wscale {
            all.push(TcpOptionElement::WindowScale(9));
        }
        all
    }
}

/// A client's end of a connection.
#[derive(Clone)]
pub struct Client {
    pub addr: SocketAddr,
    pub service: SocketAddr,
    pub isn: u32,
    /// What it acknowledges.
    pub ack: u32,
    pub offer: Offer,
    pub tsecr: u32,
}

impl Client {
    pub fn new(addr: &str, isn: u32) -> Self {
        let addr: SocketAddr = addr.parse().unwrap();
        let service = if addr.is_ipv4() { SERVICE } else { SERVICE6 };
        let offer = Offer { mss: true, sack: true, timestamps: true, wscale: true };
        Self { addr, service: service.parse().unwrap(), isn, ack: 0, offer, tsecr: 0 }
    }

    pub fn syn(&self) -> Vec<u8> {
        let options = self.offer.elements(500);
        let shape = |h: &mut TcpHeader| {
            h.syn = true;
            h.set_options(&options).unwrap();
        };
        packet::tcp(self.addr, self.service, self.isn, 0, shape, &[])
    }

    /// A segment `offset` bytes behind the first.
    pub fn segment(
        &self,
        offset: u32,
        payload: &[u8],
        shape: impl FnOnce(&mut TcpHeader),
    ) -> Vec<u8> {
        let seq = self.isn.wrapping_add(1).wrapping_add(offset);
        let with_options = |h: &mut TcpHeader| {
            if self.offer.timestamps {
                h.set_options(&[TcpOptionElement::Timestamp(501, self.tsecr)]).unwrap();
            }
            shape(h);
        };
        packet::tcp(self.addr, self.service, seq, self.ack, with_options, payload)
    }

    /// Takes a SYN-ACK.
    pub fn opened(&mut self, reply: &Reply) {
        assert!(reply.tcp.syn && reply.tcp.ack);
        assert_eq!(reply.tcp.acknowledgment_number, self.isn.wrapping_add(1));
        self.ack = reply.tcp.sequence_number.wrapping_add(1);
        self.tsecr = timestamps(&reply.tcp).map_or(0, |(tsval, _)| tsval);
    }

    pub fn open(f: &Fixture, addr: &str, isn: u32) -> Self {
        let mut client = Self::new(addr, isn);
        let outcome = f.send(&client.syn());
        client.opened(&reply(&outcome));
        client
    }
}

pub fn timestamps(tcp: &TcpHeader) -> Option<(u32, u32)> {
    tcp.options_iterator().flatten().find_map(|option| match option {
        TcpOptionElement::Timestamp(value, echo) => Some((value, echo)),
        _ => None,
    })
}
