//! Checks that go the way of clients' packets: to the service's address, wrapped towards one real, by the balancer's
//! gateway, and with delayed binding as a connection that was answered here.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

use super::answered;
use crate::balancer::client::Client;
use crate::config::{Config, Encapsulation, Service};
use crate::datapath::handovers::cookie_keys;
use crate::datapath::image::{self, ImageError};
use crate::domain::Mac;
use crate::domain::vip::parse_mac;
use crate::kernel::wrap::{Outer, Wrap};
use crate::kernel::{BpfError, decap, route, xdp};

/// Why a check could not be made, which says nothing about its real.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("there is no handover key in the datapath")]
    NoKey,
    #[error("a socket for a check of {real}: {source}")]
    Socket { real: IpAddr, source: io::Error },
}

/// How a connection begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// The real gets its SYN.
    Syn,
    /// The balancer has answered that (delayed binding): the real gets what comes after it.
    Answered,
}

/// For how long the balancer's gateway is taken to be the same.
const GATEWAY_AGE: Duration = Duration::from_secs(2);

/// For its answer: all checks wait for that.
const GATEWAY_TIMEOUT: Duration = Duration::from_millis(300);

/// IP and TCP headers without options.
const HEADERS_V4: u16 = 20 + 20;
const HEADERS_V6: u16 = 40 + 20;
/// The most that is put around a packet.
const ENCAPSULATION: u16 = 40 + 8;
/// Bytes of the TCP option, padded (RFC 7323 §3.2).
pub const TIMESTAMPS: usize = 12;

/// Wraps checks, as long as it lives.
#[derive(Debug)]
pub struct Path {
    config: Arc<Config>,
    gue: bool,
    wrap: Mutex<Wrap>,
    /// The balancer's, and when it was asked.
    gateway: tokio::sync::Mutex<Option<(Instant, Option<Mac>)>>,
}

impl Path {
    /// Attaches the program that wraps.
    pub fn new(config: Arc<Config>) -> Result<Self, PathError> {
        Ok(Self {
            gue: config.encapsulation == Encapsulation::Gue,
            wrap: Mutex::new(Wrap::attach(&config.interface)?),
            gateway: tokio::sync::Mutex::default(),
            config,
        })
    }

    /// A socket whose packets all go to `real`, wrapped.
    pub async fn socket(
        &self,
        to: SocketAddr,
        real: IpAddr,
        opening: Opening,
    ) -> Result<Wrapped<'_>, PathError> {
        let failed = |source| PathError::Socket { real, source };
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP));
        let socket = socket.map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        // Nowhere else would it be wrapped: it would come to the balancer, as a client's.
        let device = Some(self.config.interface.as_bytes());
        socket.bind_device(device).map_err(failed)?;
        let cookie = socket.cookie().map_err(failed)?;
        // As the balancer's own, so that a broker host takes it for that.
        let source = if self.gue {
            route::source_towards(real, None).map_err(failed)?
        } else {
            decap::usual_source(real)
        };
        let mac = self.gateway().await;
        let mss = self.mss(to)?;
        let outer =
            Outer { source, real, gue: self.gue, mac, answered: opening == Opening::Answered };
        let mut wrap = self.wrap();
        wrap.renew()?;
        wrap.add(cookie, outer)?;
        drop(wrap);
        // From here on: removed with the value.
        let mut wrapped = Wrapped { socket: None, mss, cookie, path: self };
        if opening == Opening::Answered {
            let from = route::source_towards(to.ip(), device).map_err(failed)?;
            socket.bind(&SocketAddr::new(from, 0).into()).map_err(failed)?;
            let keys = cookie_keys(&self.config.pins())?.ok_or(PathError::NoKey)?;
            answered::establish(&socket, &keys, to, mss as u32).map_err(failed)?;
            let stream = TcpStream::from_std(socket.into()).map_err(failed)?;
            wrapped.socket = Some(Ready::Connected(stream));
        } else {
            wrapped.mss -= TIMESTAMPS;
            wrapped.socket = Some(Ready::New(TcpSocket::from_std_stream(socket.into())));
        }
        Ok(wrapped)
    }

    /// With delayed binding, the one in the balancer's SYN-ACKs.
    fn mss(&self, to: SocketAddr) -> Result<usize, PathError> {
        let is = |service: &&Service| service.addr == to.ip();
        let mtu = xdp::interface_mtu(&self.config.interface)?;
        let service = self.config.services.iter().find(is);
        let max = service.map(|service| image::max_packet(&self.config, service, mtu));
        let headers = if to.is_ipv4() { HEADERS_V4 } else { HEADERS_V6 };
        let whole = max.transpose()?.unwrap_or((mtu as u16).saturating_sub(ENCAPSULATION));
        Ok(whole.saturating_sub(headers).into())
    }

    /// The MAC address that the balancer sends to; none: it does not say.
    async fn gateway(&self) -> Option<Mac> {
        let mut asked = self.gateway.lock().await;
        if let Some((when, mac)) = *asked
            && when.elapsed() < GATEWAY_AGE
        {
            return mac;
        }
        let ask = async { Client::connect(&self.config.balancer_endpoint).await?.mac().await };
        let mac = match tokio::time::timeout(GATEWAY_TIMEOUT, ask).await {
            // Zeros are no address, and yet what a Katran that was told none sends to.
            Ok(Ok(text)) => Some(parse_mac(&text).unwrap_or_default()),
            // It sends to where it sent before, whether or not it answers.
            _ => asked.and_then(|(_, before)| before),
        };
        *asked = Some((Instant::now(), mac));
        mac
    }

    fn wrap(&self) -> MutexGuard<'_, Wrap> {
        self.wrap.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
enum Ready {
    New(TcpSocket),
    Connected(TcpStream),
}

/// A check's socket. To be dropped behind its connection, whose RST goes the same way.
#[derive(Debug)]
pub struct Wrapped<'a> {
    socket: Option<Ready>,
    /// Payload bytes of the largest packet that clients may send.
    pub mss: usize,
    cookie: u64,
    path: &'a Path,
}

impl Wrapped<'_> {
    /// Connects, once.
    pub async fn connect(&mut self, to: SocketAddr) -> io::Result<TcpStream> {
        match self.socket.take().ok_or(io::ErrorKind::NotConnected)? {
            Ready::New(socket) => socket.connect(to).await,
            Ready::Connected(stream) => Ok(stream),
        }
    }
}

impl Drop for Wrapped<'_> {
    fn drop(&mut self) {
        self.path.wrap().remove(self.cookie);
    }
}
