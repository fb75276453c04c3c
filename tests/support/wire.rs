//! A piece of wire in a lab's gateway that loses, doubles and delays frames by rule: two interfaces
//! and a thread that carries frames from one to the other, whatever a rule makes of them.

use std::collections::BinaryHeap;
use std::fs::File;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use nix::sched::{CloneFlags, setns};

use super::lab::Lab;

/// What becomes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Pass,
    Lost,
    Twice,
    Late(Duration),
}

/// What a TCP segment is, as far as its payload shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Syn,
    SynAck,
    /// No data, no flags.
    Ack,
    /// CONNECT and nothing else.
    Connect,
    /// CONNECT and more: of the client's own, or put together by the balancer.
    ConnectAndMore,
    Connack,
    Publish,
    Puback,
    Fin,
    Rst,
    Other,
}

/// A segment between a client and a service.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    pub kind: Kind,
    /// In IPIP, on its way from the balancer to a broker.
    pub wrapped: bool,
    /// The client's port.
    pub port: u16,
    pub from_client: bool,
    pub seq: u32,
    pub ack: u32,
    pub length: usize,
}

pub fn seen(frame: &[u8]) -> Option<Seen> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let (inner, wrapped) = match (&packet.transport, packet.net.as_ref()?) {
        (None, NetSlice::Ipv4(ip)) => (ip.payload().payload, true),
        (None, NetSlice::Ipv6(ip)) => (ip.payload().payload, true),
        _ => (frame.get(14..)?, false),
    };
    let packet = SlicedPacket::from_ip(inner).ok()?;
    let TransportSlice::Tcp(tcp) = packet.transport.as_ref()? else { return None };
    let from_client = tcp.destination_port() == 1883;
    let payload = tcp.payload();
    let kind = if tcp.rst() {
        Kind::Rst
    } else if tcp.syn() {
        if tcp.ack() { Kind::SynAck } else { Kind::Syn }
    } else if tcp.fin() {
        Kind::Fin
    } else {
        match payload.first().map(|b| b >> 4) {
            None => Kind::Ack,
            Some(1) if usize::from(payload[1]) + 2 == payload.len() => Kind::Connect,
            Some(1) => Kind::ConnectAndMore,
            Some(2) => Kind::Connack,
            Some(3) => Kind::Publish,
            Some(4) => Kind::Puback,
            _ => Kind::Other,
        }
    };
    let port = if from_client { tcp.source_port() } else { tcp.destination_port() };
    let (seq, ack) = (tcp.sequence_number(), tcp.acknowledgment_number());
    Some(Seen { kind, wrapped, port, from_client, seq, ack, length: payload.len() })
}

pub type Rule = Box<dyn FnMut(Option<Seen>) -> Fate + Send>;

pub struct Wire {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

fn ip(lab: &Lab, args: &str) {
    let output = Command::new("ip")
        .args(["-n", &format!("{}-gw", lab.name)])
        .args(args.split_whitespace())
        .output()
        .unwrap();
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Wire {
    /// In a client's wire.
    pub fn of_client(lab: &Lab, client: &str, rule: Rule) -> Self {
        ip(lab, &format!("link set {client} nomaster"));
        ip(lab, &format!("link add {client}x type veth peer name {client}y"));
        ip(lab, &format!("link set {client}y master br1 up"));
        Self::between(lab, client, &format!("{client}x"), rule)
    }

    /// In the balancer's.
    pub fn of_balancer(lab: &Lab, rule: Rule) -> Self {
        const GATEWAY_MAC: &str = "02:4d:51:54:54:01";
        ip(lab, "addr flush dev lb");
        ip(lab, "link set lb address 02:4d:51:54:54:02");
        ip(lab, &format!("link add lbx address {GATEWAY_MAC} type veth peer name lby"));
        ip(lab, "addr add 10.1.2.101/24 dev lbx");
        ip(lab, "addr add fd01:2::101/64 dev lbx nodad");
        ip(lab, "link set lbx up");
        let wire = Self::between(lab, "lb", "lby", rule);
        ip(lab, "route replace 10.1.50.0/24 via 10.1.2.102");
        ip(lab, "route replace fd01:50::/64 via fd01:2::102");
        wire
    }

    fn between(lab: &Lab, a: &str, b: &str, mut rule: Rule) -> Self {
        for interface in [a, b] {
            // The gateway itself does not speak here.
            lab.ok("gw", &["sysctl", "-qw", &format!("net.ipv4.conf.{interface}.arp_ignore=8")]);
            lab.ok("gw", &["sysctl", "-qw", &format!("net.ipv6.conf.{interface}.disable_ipv6=1")]);
            ip(lab, &format!("link set {interface} promisc on up"));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, names) = (stop.clone(), [a.to_owned(), b.to_owned()]);
        let namespace = format!("/run/netns/{}-gw", lab.name);
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            setns(File::open(namespace).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            let ends = names.map(|name| packet_socket(&name));
            ready.send(()).unwrap();
            carry(&ends, &mut rule, &stopped);
        });
        is_ready.recv().unwrap();
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn packet_socket(interface: &str) -> OwnedFd {
    let name = std::ffi::CString::new(interface).unwrap();
    // SAFETY: plain system calls; pointers are valid for the sizes given.
    unsafe {
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            i32::from(protocol),
        );
        assert!(fd >= 0);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = libc::if_nametoindex(name.as_ptr()).cast_signed();
        let size = size_of::<libc::sockaddr_ll>() as u32;
        assert_eq!(libc::bind(fd, (&raw const address).cast(), size), 0);
        let one = 1i32;
        const PACKET_IGNORE_OUTGOING: i32 = 23;
        let set = libc::setsockopt(
            fd,
            libc::SOL_PACKET,
            PACKET_IGNORE_OUTGOING,
            (&raw const one).cast(),
            4,
        );
        assert_eq!(set, 0);
        let room = 8i32 << 20;
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, (&raw const room).cast(), 4);
        OwnedFd::from_raw_fd(fd)
    }
}

/// A frame that waits, the earliest first.
#[derive(PartialEq, Eq)]
struct Waiting {
    at: Instant,
    to: usize,
    frame: Vec<u8>,
}

impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.at.cmp(&self.at)
    }
}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

fn carry(ends: &[OwnedFd; 2], rule: &mut Rule, stop: &AtomicBool) {
    let send = |to: usize, frame: &[u8]| {
        // SAFETY: the frame is valid for its length.
        unsafe {
            libc::send(ends[to].as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0);
        }
    };
    let mut waiting: BinaryHeap<Waiting> = BinaryHeap::new();
    let mut buffer = vec![0u8; 1 << 16];
    while !stop.load(Ordering::Relaxed) {
        let mut polled = [0, 1].map(|end: usize| libc::pollfd {
            fd: ends[end].as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        });
        let pause = if waiting.is_empty() { 20 } else { 1 };
        // SAFETY: an array of two, and its length.
        unsafe { libc::poll(polled.as_mut_ptr(), 2, pause) };
        for (from, end) in ends.iter().enumerate() {
            loop {
                // SAFETY: the buffer is valid for its length.
                let length = unsafe {
                    libc::recv(end.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0)
                };
                if length <= 0 {
                    break;
                }
                let (to, frame) = (1 - from, &buffer[..length as usize]);
                match rule(seen(frame)) {
                    Fate::Pass => send(to, frame),
                    Fate::Lost => {}
                    Fate::Twice => {
                        send(to, frame);
                        send(to, frame);
                    }
                    Fate::Late(by) => {
                        let frame = frame.to_vec();
                        waiting.push(Waiting { at: Instant::now() + by, to, frame });
                    }
                }
            }
        }
        while waiting.peek().is_some_and(|w| w.at <= Instant::now()) {
            if let Some(w) = waiting.pop() {
                send(w.to, &w.frame);
            }
        }
    }
}
