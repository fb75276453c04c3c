//! Checks that go the way of clients' packets: to the service's address, wrapped towards one real.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Mutex, MutexGuard, PoisonError};

use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream};

use crate::config::{Config, Encapsulation};
use crate::kernel::BpfError;
use crate::kernel::decap;
use crate::kernel::wrap::{Outer, Wrap};

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
    wrap: Mutex<Wrap>,
}

impl Path {
    /// Attaches the program that wraps.
    pub fn new(config: &Config) -> Result<Self, PathError> {
        Ok(Self {
            interface: config.interface.clone(),
            gue: config.encapsulation == Encapsulation::Gue,
            wrap: Mutex::new(Wrap::attach(&config.interface)?),
        })
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
        // As the balancer's own, so that a broker host takes it for that.
        let source = if self.gue {
            source_towards(real).map_err(failed)?
        } else {
            decap::usual_source(real)
        };
        let mut wrap = self.wrap();
        wrap.renew()?;
        wrap.add(cookie, Outer { source, real, gue: self.gue })?;
        drop(wrap);
        Ok(Wrapped { socket: Some(socket), cookie, path: self })
    }

    fn wrap(&self) -> MutexGuard<'_, Wrap> {
        self.wrap.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.path.wrap().remove(self.cookie);
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
