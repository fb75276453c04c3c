//! Checks that go the way of clients' packets: to the service's address, wrapped towards one real.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Mutex, PoisonError};

use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};
use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream};

use crate::config::{Config, Encapsulation};
use crate::kernel::abi::{addr_words, check_path};
use crate::kernel::maps::Table;
use crate::kernel::skeletons::wrap::WrapSkelBuilder;
use crate::kernel::tcx::{self, Direction};
use crate::kernel::{BpfError, xdp};

/// Why a check could not be made, which says nothing about its real.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error("a socket for a check of {real}: {source}")]
    Socket { real: IpAddr, source: io::Error },
}

/// Wraps checks, as long as it lives.
#[derive(Debug)]
pub struct Path {
    interface: String,
    gue: bool,
    attached: Mutex<Attached>,
}

#[derive(Debug)]
struct Attached {
    /// Of the interface: one that is deleted and made again has another.
    index: i32,
    paths: Table<u64, check_path>,
    program: OwnedFd,
    /// Held, not used.
    #[allow(dead_code)]
    link: OwnedFd,
}

impl Path {
    /// Attaches the program that wraps.
    pub fn new(config: &Config) -> Result<Self, PathError> {
        let failed = |source| BpfError::Load { object: "wrap", source };
        let mut storage = MaybeUninit::uninit();
        let open = WrapSkelBuilder::default().open(&mut storage).map_err(failed)?;
        let skel = open.load().map_err(failed)?;
        let program = skel.progs.wrap_check.as_fd();
        let attached = Attached {
            index: xdp::interface_index(&config.interface)?,
            paths: Table::of(&skel.maps.check_paths)?,
            program: program
                .try_clone_to_owned()
                .map_err(|source| BpfError::Tcx { interface: config.interface.clone(), source })?,
            link: tcx::attach(program, &config.interface, Direction::Egress)?,
        };
        Ok(Self {
            interface: config.interface.clone(),
            gue: config.encapsulation == Encapsulation::Gue,
            attached: Mutex::new(attached),
        })
    }

    /// Puts the program back if the interface is another by now.
    fn renew(&self, attached: &mut Attached) -> Result<(), BpfError> {
        let index = xdp::interface_index(&self.interface)?;
        if index != attached.index {
            attached.link =
                tcx::attach(attached.program.as_fd(), &self.interface, Direction::Egress)?;
            attached.index = index;
        }
        Ok(())
    }

    /// A socket whose packets all go to `real`, wrapped.
    pub fn socket(&self, to: SocketAddr, real: IpAddr) -> Result<Wrapped<'_>, PathError> {
        let failed = |source| PathError::Socket { real, source };
        let socket = if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        let socket = socket.map_err(failed)?;
        let raw = SockRef::from(&socket);
        // Nowhere else would it be wrapped: it would come to the balancer, as a client's.
        raw.bind_device(Some(self.interface.as_bytes())).map_err(failed)?;
        let cookie = raw.cookie().map_err(failed)?;
        let wrapping = check_path {
            src: addr_words(source_towards(real).map_err(failed)?),
            dst: addr_words(real),
            v6: real.is_ipv6().into(),
            gue: self.gue.into(),
            pad: [0; 6],
        };
        let mut attached = self.attached();
        self.renew(&mut attached)?;
        attached.paths.put(&cookie, &wrapping)?;
        drop(attached);
        Ok(Wrapped { socket: Some(socket), cookie, path: self })
    }

    fn attached(&self) -> std::sync::MutexGuard<'_, Attached> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A check's socket. To be dropped behind its connection, whose RST goes the same way.
#[derive(Debug)]
pub struct Wrapped<'a> {
    socket: Option<TcpSocket>,
    cookie: u64,
    path: &'a Path,
}

impl Wrapped<'_> {
    /// Connects, once.
    pub async fn connect(&mut self, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.socket.take().ok_or(io::ErrorKind::NotConnected)?;
        socket.connect(to).await
    }
}

impl Drop for Wrapped<'_> {
    fn drop(&mut self) {
        let _ = self.path.attached().paths.remove(&self.cookie);
    }
}

/// The address that this host sends from to a real.
fn source_towards(real: IpAddr) -> io::Result<IpAddr> {
    let any: IpAddr = match real {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // Of UDP, connecting sends nothing (discard port, RFC 863).
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((real, 9))?;
    Ok(socket.local_addr()?.ip())
}
