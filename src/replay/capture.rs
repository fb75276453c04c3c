//! What clients send in a capture file: pcap or pcapng, Ethernet, Linux cooked or plain IP.

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use etherparse::{LaxPacketHeaders, NetHeaders, TcpHeader, TransportHeader};
use pcap_parser::pcapng::Block;
use pcap_parser::traits::{PcapNGPacketBlock as _, PcapReaderIterator};
use pcap_parser::{Linktype, PcapBlockOwned, PcapError, PcapHeader, create_reader};

/// A TCP segment.
#[derive(Debug, Clone)]
pub struct Segment {
    /// Since 1970-01-01T00:00:00Z.
    pub time: Duration,
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub tcp: TcpHeader,
    pub payload: Vec<u8>,
}

/// Why a capture cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("there is nothing in it")]
    Empty,
    #[error("neither pcap nor pcapng, or damaged: {0}")]
    Format(String),
    #[error("link type {} is not known here; capture with -y EN10MB, or -i any", .0.0)]
    LinkType(Linktype),
    #[error("packet {0} was cut when it was captured; replay needs them whole (tcpdump -s 0)")]
    Cut(usize),
}

/// Room for a block: more than the largest packet.
const BUFFER: usize = 1 << 20;
/// LINKTYPE_RAW, and what BSDs write in its place.
const RAW: Linktype = Linktype(101);
/// Bytes of a Linux cooked header, version 2.
const SLL2: usize = 20;

/// Gives all TCP segments to `each`, in the order of the file.
pub fn read(path: &Path, mut each: impl FnMut(Segment)) -> Result<(), CaptureError> {
    let file = File::open(path)?;
    let mut reader = create_reader(BUFFER, file).map_err(|error| match error {
        PcapError::Eof => CaptureError::Empty,
        other => CaptureError::Format(format!("{other}")),
    })?;
    let mut blocks = Blocks::default();
    while let Some(consumed) = next(reader.as_mut(), &mut blocks, &mut each)? {
        reader.consume(consumed);
    }
    Ok(())
}

/// Takes the next block: how long it is; `None`: there is none.
fn next(
    reader: &mut dyn PcapReaderIterator,
    blocks: &mut Blocks,
    each: &mut impl FnMut(Segment),
) -> Result<Option<usize>, CaptureError> {
    loop {
        let is_all_there = reader.reader_exhausted();
        let error = match reader.next() {
            Ok((length, block)) => {
                blocks.take(&block, each)?;
                return Ok(Some(length));
            }
            Err(PcapError::Eof) => return Ok(None),
            Err(PcapError::Incomplete(_)) if !is_all_there => None,
            Err(error) => Some(format!("{error}")),
        };
        let Some(error) = error else {
            reader.refill().map_err(|error| CaptureError::Format(format!("{error}")))?;
            continue;
        };
        if blocks.packets == 0 {
            return Err(CaptureError::Format(error));
        }
        // As a capture that is killed ends.
        let packets = blocks.packets;
        tracing::warn!(
            "the capture ends in the middle of a packet, behind packet {packets} ({error})"
        );
        return Ok(None);
    }
}

/// An interface of the file.
#[derive(Clone, Copy)]
struct Interface {
    link: Linktype,
    /// Units of its times in a second.
    resolution: u64,
    /// Seconds to add.
    offset: u64,
}

impl Interface {
    fn time(self, units: u64) -> Duration {
        let nanoseconds = u128::from(units) * 1_000_000_000 / u128::from(self.resolution.max(1));
        Duration::from_secs(self.offset)
            + Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

/// What is read so far.
#[derive(Default)]
struct Blocks {
    interfaces: Vec<Interface>,
    packets: usize,
    /// Of the last packet that had one.
    time: Duration,
}

impl Blocks {
    fn take(
        &mut self,
        block: &PcapBlockOwned<'_>,
        each: &mut impl FnMut(Segment),
    ) -> Result<(), CaptureError> {
        match block {
            PcapBlockOwned::LegacyHeader(header) => self.interfaces = vec![of_pcap(header)],
            PcapBlockOwned::Legacy(packet) => {
                let of = self.interface(0);
                let fraction = u64::from(packet.ts_usec);
                let time = of.time(u64::from(packet.ts_sec) * of.resolution + fraction);
                let data = &packet.data[..packet.data.len().min(packet.caplen as usize)];
                self.packet(of.link, time, data, packet.caplen < packet.origlen, each)?;
            }
            PcapBlockOwned::NG(Block::SectionHeader(_)) => self.interfaces.clear(),
            PcapBlockOwned::NG(Block::InterfaceDescription(of)) => {
                self.interfaces.push(Interface {
                    link: of.linktype,
                    resolution: of.ts_resolution().unwrap_or(1_000_000),
                    offset: u64::try_from(of.ts_offset()).unwrap_or_default(),
                });
            }
            PcapBlockOwned::NG(Block::EnhancedPacket(packet)) => {
                let of = self.interface(packet.if_id as usize);
                let time = of.time(u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low));
                self.packet(of.link, time, packet.packet_data(), packet.truncated(), each)?;
            }
            // Without a time: that of the packet before.
            PcapBlockOwned::NG(Block::SimplePacket(packet)) => {
                let link = self.interface(0).link;
                self.packet(link, self.time, packet.packet_data(), packet.truncated(), each)?;
            }
            PcapBlockOwned::NG(_) => {}
        }
        Ok(())
    }

    fn interface(&self, number: usize) -> Interface {
        let ethernet = Interface { link: Linktype::ETHERNET, resolution: 1_000_000, offset: 0 };
        self.interfaces.get(number).copied().unwrap_or(ethernet)
    }

    fn packet(
        &mut self,
        link: Linktype,
        time: Duration,
        data: &[u8],
        is_cut: bool,
        each: &mut impl FnMut(Segment),
    ) -> Result<(), CaptureError> {
        self.packets += 1;
        self.time = time;
        take(link, time, data, is_cut, self.packets, each)
    }
}

fn of_pcap(header: &PcapHeader) -> Interface {
    let resolution = if header.is_nanosecond_precision() { 1_000_000_000 } else { 1_000_000 };
    Interface { link: header.network, resolution, offset: 0 }
}

fn take(
    link: Linktype,
    time: Duration,
    data: &[u8],
    is_cut: bool,
    number: usize,
    each: &mut impl FnMut(Segment),
) -> Result<(), CaptureError> {
    let packet = match link {
        Linktype::ETHERNET => LaxPacketHeaders::from_ethernet(data).ok(),
        Linktype::LINUX_SLL => LaxPacketHeaders::from_linux_sll(data).ok(),
        Linktype::LINUX_SLL2 => data.get(SLL2..).and_then(|ip| LaxPacketHeaders::from_ip(ip).ok()),
        RAW | Linktype::IPV4 | Linktype::IPV6 => LaxPacketHeaders::from_ip(data).ok(),
        // A word of the host's before the IP header.
        Linktype::NULL | Linktype::LOOP => {
            data.get(4..).and_then(|ip| LaxPacketHeaders::from_ip(ip).ok())
        }
        other => return Err(CaptureError::LinkType(other)),
    };
    let Some(packet) = packet else { return Ok(()) };
    let (Some(net), Some(TransportHeader::Tcp(tcp))) = (packet.net, packet.transport) else {
        return Ok(());
    };
    // What mqtt_fwd does not look into: fragments, IP options, extension headers.
    let (from, to): (IpAddr, IpAddr) = match net {
        NetHeaders::Ipv4(ip, _) if ip.is_fragmenting_payload() || !ip.options.is_empty() => {
            return Ok(());
        }
        NetHeaders::Ipv6(_, extensions) if !extensions.is_empty() => return Ok(()),
        NetHeaders::Ipv4(ip, _) => (ip.source.into(), ip.destination.into()),
        NetHeaders::Ipv6(ip, _) => (ip.source.into(), ip.destination.into()),
        NetHeaders::Arp(_) => return Ok(()),
    };
    let payload = packet.payload.slice().to_vec();
    if is_cut {
        return Err(CaptureError::Cut(number));
    }
    each(Segment {
        time,
        from: SocketAddr::new(from, tcp.source_port),
        to: SocketAddr::new(to, tcp.destination_port),
        tcp,
        payload,
    });
    Ok(())
}
