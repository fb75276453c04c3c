//! A client with another TCP than Linux': smoltcp, on a packet socket in a client's namespace, with
//! an address and a MAC of its own. Small windows, delayed acknowledgements, no timestamps.

use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{Medium, RawSocket};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, IpEndpoint};

use super::lab::Lab;
use super::session::enter;

/// What a connection is like.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Bytes that the client can take.
    pub window: usize,
    /// Milliseconds that it keeps acknowledgements back; `None`: not at all.
    pub ack_delay: Option<u64>,
    /// Nagle's algorithm.
    pub nagle: bool,
}

/// Writes each piece when all of the answers before it have come, and returns what came, in the end.
pub fn converse(
    lab: &Lab,
    host: &str,
    own: (IpAddr, IpAddr),
    service: (IpAddr, u16),
    port: u16,
    shape: Shape,
    pieces: &[(&[u8], usize)],
) -> Result<Vec<u8>, String> {
    enter(lab, host);
    let mut device = RawSocket::new("eth0", Medium::Ethernet).map_err(|e| e.to_string())?;
    let fd = device.as_raw_fd();
    let mac = EthernetAddress([2, 0x5a, 0, 0, (port >> 8) as u8, port as u8]);
    let now = || StackInstant::now();
    let mut interface = Interface::new(Config::new(mac.into()), &mut device, now());
    let (addr, gateway) = own;
    interface.update_ip_addrs(|addrs| {
        let prefix = if addr.is_ipv4() { 24 } else { 64 };
        addrs.push(IpCidr::new(IpAddress::from(addr), prefix)).unwrap();
    });
    match gateway {
        IpAddr::V4(v4) => interface.routes_mut().add_default_ipv4_route(v4).map(drop),
        IpAddr::V6(v6) => interface.routes_mut().add_default_ipv6_route(v6).map(drop),
    }
    .map_err(|e| e.to_string())?;

    let mut socket = tcp::Socket::new(
        tcp::SocketBuffer::new(vec![0; shape.window]),
        tcp::SocketBuffer::new(vec![0; 1 << 16]),
    );
    socket.set_ack_delay(shape.ack_delay.map(smoltcp::time::Duration::from_millis));
    socket.set_nagle_enabled(shape.nagle);
    let mut sockets = SocketSet::new(vec![]);
    let handle = sockets.add(socket);
    let remote = IpEndpoint::new(IpAddress::from(service.0), service.1);
    sockets
        .get_mut::<tcp::Socket>(handle)
        .connect(interface.context(), remote, port)
        .map_err(|e| e.to_string())?;

    let deadline = Instant::now() + Duration::from_secs(15);
    let (mut got, mut wanted, mut next) = (Vec::new(), 0, 0);
    loop {
        interface.poll(now(), &mut device, &mut sockets);
        let socket = sockets.get_mut::<tcp::Socket>(handle);
        if socket.can_recv() {
            socket
                .recv(|bytes| {
                    got.extend_from_slice(bytes);
                    (bytes.len(), ())
                })
                .map_err(|e| e.to_string())?;
        }
        if got.len() >= wanted && socket.may_send() {
            match pieces.get(next) {
                Some((piece, answer)) => {
                    let sent = socket.send_slice(piece).map_err(|e| e.to_string())?;
                    assert_eq!(sent, piece.len());
                    wanted += answer;
                    next += 1;
                }
                None => socket.close(),
            }
        }
        match socket.state() {
            tcp::State::Closed | tcp::State::TimeWait if next == pieces.len() => return Ok(got),
            tcp::State::Closed => return Err(format!("closed after {got:02x?}")),
            _ if Instant::now() > deadline => {
                return Err(format!("{} after {got:02x?}", socket.state()));
            }
            _ => {}
        }
        let pause = interface.poll_delay(now(), &sockets);
        let _ = smoltcp::phy::wait(
            fd,
            Some(pause.map_or(smoltcp::time::Duration::from_millis(5), |p| {
                p.min(smoltcp::time::Duration::from_millis(5))
            })),
        );
    }
}
