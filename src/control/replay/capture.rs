//! What clients send in a capture file: pcap or pcapng, Ethernet, Linux cooked or plain IP.

use std::fs::File;
use std::io::{BufReader, Read, Seek as _};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use etherparse::{LaxPacketHeaders, NetHeaders, TcpHeader, TransportHeader};
use pcap_file::DataLink;
use pcap_file::pcap::PcapReader;
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::pcapng::{Block, PcapNgReader};

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
    Format(#[from] pcap_file::PcapError),
    #[error("link type {0:?} is not known here; capture with -y EN10MB, or -i any")]
    LinkType(DataLink),
    #[error("packet {0} was cut when it was captured; replay needs them whole (tcpdump -s 0)")]
    Cut(usize),
}

/// First bytes of a pcapng file (its section header block's type).
const PCAPNG: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];
/// Bytes of a Linux cooked header, version 2.
const SLL2: usize = 20;

/// Gives all TCP segments to `each`, in the order of the file.
pub fn read(path: &Path, mut each: impl FnMut(Segment)) -> Result<(), CaptureError> {
    let mut file = File::open(path)?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic).map_err(|_| CaptureError::Empty)?;
    file.rewind()?;
    let file = BufReader::new(file);
    if magic == PCAPNG { pcapng(file, &mut each) } else { pcap(file, &mut each) }
}

fn pcap(file: impl Read, each: &mut impl FnMut(Segment)) -> Result<(), CaptureError> {
    let mut reader = PcapReader::new(file)?;
    let link = reader.header().datalink;
    let mut number = 0;
    while let Some(packet) = reader.next_packet() {
        let packet = match packet {
            Ok(packet) => packet,
            Err(error) if number > 0 => {
                ends_early(number, &error);
                break;
            }
            Err(error) => return Err(error.into()),
        };
        number += 1;
        let is_cut = (packet.data.len() as u64) < u64::from(packet.orig_len);
        take(link, packet.timestamp, &packet.data, is_cut, number, each)?;
    }
    Ok(())
}

/// What was written when it was ended, as a capture that is killed does.
fn ends_early(number: usize, error: &pcap_file::PcapError) {
    tracing::warn!("the capture ends in the middle of a packet, behind packet {number} ({error})");
}

/// An interface of a pcapng file.
#[derive(Clone, Copy)]
struct Interface {
    link: DataLink,
    /// Nanoseconds of a unit of its times.
    unit: f64,
}

fn interface(of: &InterfaceDescriptionBlock<'_>) -> Interface {
    let resolution = of.options.iter().find_map(|option| match option {
        InterfaceDescriptionOption::IfTsResol(resolution) => Some(*resolution),
        _ => None,
    });
    // Powers of ten, or of two; microseconds unless it says otherwise (if_tsresol).
    let seconds = match resolution.unwrap_or(6) {
        two @ 0x80.. => 0.5f64.powi(i32::from(two & 0x7f)),
        ten => 0.1f64.powi(i32::from(ten)),
    };
    Interface { link: of.linktype, unit: seconds * 1e9 }
}

fn pcapng(file: impl Read, each: &mut impl FnMut(Segment)) -> Result<(), CaptureError> {
    let mut reader = PcapNgReader::new(file)?;
    let mut interfaces: Vec<Interface> = Vec::new();
    let mut number = 0;
    let mut last = Duration::ZERO;
    while let Some(block) = reader.next_block() {
        let block = match block {
            Ok(block) => block,
            Err(error) if number > 0 => {
                ends_early(number, &error);
                break;
            }
            Err(error) => return Err(error.into()),
        };
        let of = |id: usize| {
            let ethernet = Interface { link: DataLink::ETHERNET, unit: 1000.0 };
            interfaces.get(id).copied().unwrap_or(ethernet)
        };
        match block {
            Block::SectionHeader(_) => interfaces.clear(),
            Block::InterfaceDescription(found) => interfaces.push(interface(&found)),
            Block::EnhancedPacket(packet) => {
                number += 1;
                let Interface { link, unit } = of(packet.interface_id as usize);
                // The library takes units for nanoseconds.
                last = Duration::from_nanos((packet.timestamp.as_nanos() as f64 * unit) as u64);
                let is_cut = (packet.data.len() as u64) < u64::from(packet.original_len);
                take(link, last, &packet.data, is_cut, number, each)?;
            }
            // Without a time: that of the packet before.
            Block::SimplePacket(packet) => {
                number += 1;
                let is_cut = (packet.data.len() as u64) < u64::from(packet.original_len);
                take(of(0).link, last, &packet.data, is_cut, number, each)?;
            }
            _ => {}
        }
    }
    Ok(())
}

fn take(
    link: DataLink,
    time: Duration,
    data: &[u8],
    is_cut: bool,
    number: usize,
    each: &mut impl FnMut(Segment),
) -> Result<(), CaptureError> {
    let packet = match link {
        DataLink::ETHERNET => LaxPacketHeaders::from_ethernet(data).ok(),
        DataLink::LINUX_SLL => LaxPacketHeaders::from_linux_sll(data).ok(),
        DataLink::LINUX_SLL2 => data.get(SLL2..).and_then(|ip| LaxPacketHeaders::from_ip(ip).ok()),
        DataLink::RAW | DataLink::IPV4 | DataLink::IPV6 => LaxPacketHeaders::from_ip(data).ok(),
        // A word of the host's before the IP header.
        DataLink::NULL | DataLink::LOOP => {
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
