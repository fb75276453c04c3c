//! netdevice(7): requests about an interface by its name.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd as _;

/// Asks the kernel.
///
/// # Safety
///
/// What `fill` puts into the request's union is what this request expects, and lives until the call has
/// returned.
pub unsafe fn request(
    interface: &str,
    code: libc::Ioctl,
    fill: impl FnOnce(&mut libc::ifreq),
) -> io::Result<libc::ifreq> {
    // SAFETY: zeroes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    fill(&mut request);
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: the request is valid, its union as the caller promises.
    match unsafe { libc::ioctl(socket.as_raw_fd(), code, &raw mut request) } {
        0 => Ok(request),
        _ => Err(io::Error::last_os_error()),
    }
}
