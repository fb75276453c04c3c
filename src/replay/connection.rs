//! One captured connection, and what of it came where.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use etherparse::{PacketBuilder, SlicedPacket, TcpHeader, TransportSlice};

use super::capture::Segment;
use super::stream::{Publish, Stream};
use crate::datapath::flows::Followed;
use crate::handover::hello::{self, Asked};
use crate::kernel::Result;
use crate::kernel::sandbox::{Sandbox, Verdict};

/// Captures on a sender's host have segments of up to 64 KiB, which its network card cuts; here they are cut to
/// what fits any path.
const PAYLOAD_MAX: usize = 1380;
/// Kind and length of TCP's timestamps option (RFC 7323 §3.2).
const TIMESTAMPS: [u8; 2] = [8, 10];

/// What the datapath answered a SYN with.
#[derive(Debug, Clone, Copy)]
struct SynAck {
    /// Of the first byte behind it.
    next: u32,
    tsval: Option<u32>,
}

/// A stretch of the stream that was forwarded, and to which address.
#[derive(Debug)]
struct Stretch {
    from: u64,
    to: u64,
    vip: IpAddr,
}

/// What became of a PUBLISH.
#[derive(Debug)]
pub struct Fate {
    pub time: Duration,
    pub publish: Publish,
    /// The VIP that its first byte was forwarded to.
    pub vip: Option<IpAddr>,
    /// It is behind the end of its flow; whether the sidecar has it.
    pub behind_end: Option<bool>,
}

#[derive(Debug)]
pub struct Connection {
    pub client: SocketAddr,
    service: SocketAddr,
    /// Sequence number of the client's first byte.
    start: u32,
    /// It began in the capture.
    pub is_whole: bool,
    pub began: Duration,
    /// What it says first, if that is TLS.
    hello: hello::Stream,
    /// Acknowledgement number of the first segment after the SYN: the captured server's first byte.
    server: Option<u32>,
    answer: Option<SynAck>,
    pub stream: Stream,
    publishes: Vec<(Duration, Publish)>,
    forwarded: Vec<Stretch>,
    /// As the datapath has it, once it has one.
    pub flow: Followed,
}

impl Connection {
    /// Of its first segment.
    pub fn new(segment: &Segment, service: SocketAddr) -> Self {
        let is_whole = segment.tcp.syn;
        Self {
            client: segment.from,
            service,
            start: segment.tcp.sequence_number.wrapping_add(u32::from(is_whole)),
            is_whole,
            began: segment.time,
            hello: hello::Stream::default(),
            server: None,
            answer: None,
            stream: Stream::default(),
            publishes: Vec::new(),
            forwarded: Vec::new(),
            flow: Followed::default(),
        }
    }

    /// Whether a SYN begins another connection on the same addresses.
    pub fn is_over(&self, segment: &Segment) -> bool {
        segment.tcp.syn && segment.tcp.sequence_number.wrapping_add(1) != self.start
    }

    /// Gives a segment to the datapath, as its client would have sent it there.
    pub fn take(&mut self, sandbox: &Sandbox<'_>, segment: &Segment) -> Result<()> {
        let mut tcp = segment.tcp.clone();
        if !tcp.syn && tcp.ack {
            self.translate(&mut tcp);
        }
        let pieces = segment.payload.chunks(PAYLOAD_MAX).collect::<Vec<_>>();
        let count = pieces.len().max(1);
        for i in 0..count {
            let piece = pieces.get(i).copied().unwrap_or_default();
            let mut tcp = tcp.clone();
            tcp.sequence_number = tcp.sequence_number.wrapping_add((i * PAYLOAD_MAX) as u32);
            tcp.fin &= i + 1 == count;
            let (verdict, frame) = sandbox.run(&frame(segment.from, self.service, &tcp, piece))?;
            match verdict {
                Verdict::Answered if tcp.syn => self.answer = syn_ack(&frame),
                Verdict::Forwarded if !piece.is_empty() => {
                    self.note_forwarded(&tcp, piece, &frame);
                }
                _ => {}
            }
        }
        if self.is_whole && !segment.payload.is_empty() {
            // A SYN may carry data (RFC 7413), behind its own sequence number.
            let seq = segment.tcp.sequence_number.wrapping_add(u32::from(segment.tcp.syn));
            let at = self.offset(seq);
            let found = self.stream.take(at, &segment.payload);
            self.publishes.extend(found.into_iter().map(|publish| (segment.time, publish)));
        }
        Ok(())
    }

    /// Its ClientHello.
    pub fn asked(&self) -> Asked {
        hello::read(&self.hello.bytes())
    }

    /// Gives the ClientHello to the datapath once more, from its first byte on.
    pub fn say_hello_again(&mut self, sandbox: &Sandbox<'_>, last: &Segment) -> Result<()> {
        let mut again = last.clone();
        again.tcp.sequence_number = self.start;
        again.payload = self.hello.bytes();
        self.take(sandbox, &again)
    }

    /// Keeps what may be a ClientHello.
    pub fn keep_hello(&mut self, segment: &Segment) {
        let at = self.offset(segment.tcp.sequence_number) as usize;
        if at < hello::LENGTH_MAX {
            self.hello.put(at, &segment.payload);
        }
    }

    /// Streams are shorter than 4 GiB here.
    fn offset(&self, seq: u32) -> u64 {
        u64::from(seq.wrapping_sub(self.start))
    }

    /// The client acknowledges what the captured server sent; the datapath's SYN-ACK has other numbers.
    fn translate(&mut self, tcp: &mut TcpHeader) {
        let server = *self.server.get_or_insert(tcp.acknowledgment_number);
        let Some(answer) = self.answer else { return };
        tcp.acknowledgment_number =
            tcp.acknowledgment_number.wrapping_sub(server).wrapping_add(answer.next);
        let Some(tsval) = answer.tsval else { return };
        let mut options = tcp.options.as_slice().to_vec();
        if let Some(at) = timestamps(&options) {
            options[at + 6..at + 10].copy_from_slice(&tsval.to_be_bytes());
            // As many as before.
            let _ = tcp.set_options_raw(&options);
        }
    }

    /// What of a segment is in the frame that went to the balancer: all, or what is before a cut.
    fn note_forwarded(&mut self, tcp: &TcpHeader, piece: &[u8], frame: &[u8]) {
        let Some((vip, there, payload)) = parse(frame) else { return };
        // CONNECT may be in front of it.
        let before = tcp.sequence_number.wrapping_sub(there.sequence_number) as usize;
        let Some(rest) = payload.get(before..) else { return };
        let same = piece.iter().zip(rest).take_while(|(a, b)| a == b).count() as u64;
        let from = self.offset(there.sequence_number);
        let to = self.offset(tcp.sequence_number) + same;
        match self.forwarded.last_mut() {
            Some(last) if last.vip == vip && from <= last.to && to >= last.from => {
                (last.from, last.to) = (last.from.min(from), last.to.max(to));
            }
            _ => self.forwarded.push(Stretch { from, to, vip }),
        }
    }

    /// Where it was forwarded to, if it was.
    pub fn vip(&self) -> Option<IpAddr> {
        self.forwarded.last().map(|stretch| stretch.vip)
    }

    /// What became of its PUBLISHes.
    pub fn fates(&mut self) -> Vec<Fate> {
        let publishes = std::mem::take(&mut self.publishes);
        publishes
            .into_iter()
            .map(|(time, publish)| {
                let behind = self.flow.ended.filter(|(cut, _)| publish.at >= self.offset(*cut));
                let at = |s: &&Stretch| (s.from..s.to).contains(&publish.at);
                Fate {
                    time,
                    // What goes on behind the end is only what ends it at the broker.
                    vip: self.forwarded.iter().find(at).filter(|_| behind.is_none()).map(|s| s.vip),
                    behind_end: behind.map(|(_, rescued)| rescued),
                    publish,
                }
            })
            .collect()
    }
}

fn frame(from: SocketAddr, to: SocketAddr, tcp: &TcpHeader, payload: &[u8]) -> Vec<u8> {
    const HOPS: u8 = 64;
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let ip = match (from.ip(), to.ip()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => ethernet.ipv4(a.octets(), b.octets(), HOPS),
        (IpAddr::V6(a), IpAddr::V6(b)) => ethernet.ipv6(a.octets(), b.octets(), HOPS),
        // The caller has matched families.
        _ => return Vec::new(),
    };
    let mut header = tcp.clone();
    header.destination_port = to.port();
    let builder = ip.tcp_header(header);
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut frame, payload).expect("a piece fits into a packet");
    frame
}

/// Destination, TCP header and payload of a frame.
fn parse(frame: &[u8]) -> Option<(IpAddr, TcpHeader, &[u8])> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let to = match packet.net? {
        etherparse::NetSlice::Ipv4(ip) => ip.header().destination_addr().into(),
        etherparse::NetSlice::Ipv6(ip) => ip.header().destination_addr().into(),
        etherparse::NetSlice::Arp(_) => return None,
    };
    let TransportSlice::Tcp(tcp) = packet.transport? else { return None };
    Some((to, tcp.to_header(), tcp.payload()))
}

fn syn_ack(frame: &[u8]) -> Option<SynAck> {
    let (_, tcp, _) = parse(frame)?;
    let options = tcp.options.as_slice();
    let tsval = timestamps(options).and_then(|at| options.get(at + 2..at + 6)?.try_into().ok());
    Some(SynAck { next: tcp.sequence_number.wrapping_add(1), tsval: tsval.map(u32::from_be_bytes) })
}

/// Where TCP's timestamps option begins.
fn timestamps(options: &[u8]) -> Option<usize> {
    let mut at = 0;
    while let Some(&kind) = options.get(at) {
        if options.get(at..at + 2) == Some(&TIMESTAMPS) && options.len() >= at + 10 {
            return Some(at);
        }
        at += match kind {
            0 => return None,
            1 => 1,
            _ => usize::from(*options.get(at + 1)?).max(2),
        };
    }
    None
}
