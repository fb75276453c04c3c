//! Listening TCP sockets, as sock_diag(7) lists them. /proc/net/tcp has them, too, at the price of a
//! walk through the table of all connections.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

/// A socket that listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listening {
    /// Where.
    pub local: SocketAddr,
    /// Its inode, by which processes hold it.
    pub inode: u64,
    /// It takes multipath TCP (RFC 8684).
    pub mptcp: bool,
}

// include/uapi/linux/netlink.h, sock_diag.h, inet_diag.h, net/tcp_states.h
const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST_DUMP: u16 = 0x1 | 0x300;
const TCP_LISTEN: u32 = 1 << 10;
const REQUEST: usize = HEADER + 56;
const MESSAGE: usize = 72;

/// All listening TCP sockets of this network namespace.
pub fn listening() -> nix::Result<Vec<Listening>> {
    let mut all = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )?;
        send(socket.as_raw_fd(), &request(family as u8), MsgFlags::empty())?;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            if !take(&buffer[..length], &mut all)? {
                break;
            }
        }
    }
    Ok(all)
}

/// struct nlmsghdr, struct inet_diag_req_v2.
fn request(family: u8) -> [u8; REQUEST] {
    let mut bytes = [0; REQUEST];
    bytes[..4].copy_from_slice(&(REQUEST as u32).to_ne_bytes());
    bytes[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes[6..8].copy_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    bytes[HEADER] = family;
    bytes[HEADER + 1] = libc::IPPROTO_TCP as u8;
    // With it the kernel names the upper layer protocol, too.
    const INET_DIAG_INFO: u8 = 2;
    bytes[HEADER + 2] = 1 << (INET_DIAG_INFO - 1);
    bytes[HEADER + 4..HEADER + 8].copy_from_slice(&TCP_LISTEN.to_ne_bytes());
    bytes
}

/// Takes the sockets out of some messages; whether more come.
fn take(mut messages: &[u8], all: &mut Vec<Listening>) -> nix::Result<bool> {
    let u32_at = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
    };
    while messages.len() >= HEADER {
        let length = u32_at(messages, 0) as usize;
        let Some(message) = messages.get(..length).filter(|_| length >= HEADER) else {
            return Err(nix::Error::EBADMSG);
        };
        match u16::from_ne_bytes([message[4], message[5]]) {
            NLMSG_DONE => return Ok(false),
            NLMSG_ERROR => {
                let error = u32_at(message, HEADER).cast_signed();
                return Err(nix::Error::from_raw(-error));
            }
            _ => {
                let (Some(m), attributes) =
                    (message.get(HEADER..HEADER + MESSAGE), message.get(HEADER + MESSAGE..))
                else {
                    return Err(nix::Error::EBADMSG);
                };
                // INET_DIAG_ULP_INFO names the upper layer protocol; nothing else has such a text.
                let mptcp = attributes.is_some_and(|a| a.windows(6).any(|text| text == b"mptcp\0"));
                all.push(Listening { local: local(m), inode: u32_at(m, 68).into(), mptcp });
            }
        }
        messages = messages.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

/// Of struct inet_diag_msg: family, and the source port and address in network order.
fn local(message: &[u8]) -> SocketAddr {
    let port = u16::from_be_bytes([message[4], message[5]]);
    let mut octets = [0; 16];
    octets.copy_from_slice(&message[8..24]);
    let ip: IpAddr = if i32::from(message[0]) == libc::AF_INET {
        Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]).into()
    } else {
        Ipv6Addr::from(octets).into()
    };
    SocketAddr::new(ip, port)
}
