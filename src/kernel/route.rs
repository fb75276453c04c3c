//! This host's routes, as a socket finds them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use socket2::SockRef;

/// The address that this host sends from to another; over a device, or any.
pub fn source_towards(to: IpAddr, device: Option<&[u8]>) -> io::Result<IpAddr> {
    let any: IpAddr = match to {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // Of UDP, connecting sends nothing (discard port, RFC 863).
    let socket = UdpSocket::bind((any, 0))?;
    SockRef::from(&socket).bind_device(device)?;
    socket.connect((to, 9))?;
    Ok(socket.local_addr()?.ip())
}
