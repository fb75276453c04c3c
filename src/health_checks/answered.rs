//! Sockets of connections that nobody opened: as the balancer hands them over when it has answered a client's SYN.
//! TCP_REPAIR (Linux 3.5, CAP_NET_ADMIN) makes them of what both ends would have agreed on.

use std::io;
use std::mem::size_of;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;

use socket2::Socket;

use crate::domain::CookieKeys;
use crate::handover::cookie;

/// linux/tcp.h
const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_WINDOW: i32 = 29;
const TCP_RECV_QUEUE: u32 = 1;
const TCP_SEND_QUEUE: u32 = 2;
/// Without a window probe.
const TCP_REPAIR_OFF_NO_WP: i32 = -1;
/// The windows of both ends until the broker's says otherwise.
const WINDOW: u32 = 0xffff;

/// struct tcp_repair_window
#[repr(C)]
struct RepairWindow {
    snd_wl1: u32,
    snd_wnd: u32,
    max_window: u32,
    rcv_wnd: u32,
    rcv_wup: u32,
}

fn set<T>(socket: &Socket, option: i32, value: &T) -> io::Result<()> {
    // SAFETY: the pointer is valid for the length given, for the whole call.
    let failed = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes a bound socket one that is connected to a service. Nothing is sent for that.
pub fn establish(
    socket: &Socket,
    keys: &CookieKeys,
    service: SocketAddr,
    mss: u32,
) -> io::Result<()> {
    socket.set_tcp_mss(mss)?;
    set(socket, TCP_REPAIR, &1i32)?;
    let client = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::Unsupported)?;
    let isn = getrandom::u32().map_err(|e| io::Error::other(e.to_string()))?;
    let (sent, received) =
        (isn.wrapping_add(1), cookie::make(keys, client, service, isn)?.wrapping_add(1));
    for (queue, next) in [(TCP_SEND_QUEUE, sent), (TCP_RECV_QUEUE, received)] {
        set(socket, TCP_REPAIR_QUEUE, &queue)?;
        set(socket, TCP_QUEUE_SEQ, &next)?;
    }
    socket.connect(&service.into())?;
    let window = RepairWindow {
        snd_wl1: received,
        snd_wnd: WINDOW,
        max_window: WINDOW,
        rcv_wnd: WINDOW,
        rcv_wup: received,
    };
    set(socket, TCP_REPAIR_WINDOW, &window)?;
    set(socket, TCP_REPAIR, &TCP_REPAIR_OFF_NO_WP)
}
