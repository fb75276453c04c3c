//! What the kernel knows of a TCP connection: tcp(7), TCP_INFO.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::AsRawFd;

fn info(socket: &impl AsRawFd) -> io::Result<libc::tcp_info> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: both pointers are valid, and the length is that of what the first points to.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeros are a valid value, and the kernel wrote integers over them.
    Ok(unsafe { info.assume_init() })
}

/// Payload bytes of the largest segment that is sent.
pub fn mss(socket: &impl AsRawFd) -> io::Result<usize> {
    Ok(info(socket)?.tcpi_snd_mss as usize)
}

/// Segments that were sent, and not acknowledged.
pub fn unacknowledged(socket: &impl AsRawFd) -> io::Result<u32> {
    Ok(info(socket)?.tcpi_unacked)
}
