//! TC programs, attached by links (tcx, Linux 6.6): a link that nobody holds or pins is gone, and with it its
//! program.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use super::{BpfError, Result, xdp};

/// Which packets a program sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Ingress,
    Egress,
}

/// Attaches a program behind those that are there.
pub fn attach(program: BorrowedFd<'_>, interface: &str, direction: Direction) -> Result<OwnedFd> {
    let index = xdp::interface_index(interface)?;
    let place = match direction {
        Direction::Ingress => libbpf_sys::BPF_TCX_INGRESS,
        Direction::Egress => libbpf_sys::BPF_TCX_EGRESS,
    };
    // SAFETY: the descriptor is open; without options there is no pointer to follow.
    let link =
        unsafe { libbpf_sys::bpf_link_create(program.as_raw_fd(), index, place, std::ptr::null()) };
    if link < 0 {
        return Err(BpfError::Tcx {
            interface: interface.to_owned(),
            source: io::Error::from_raw_os_error(-link),
        });
    }
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(link) })
}
