//! Katran's gRPC interface: a client for it, and the embedded balancer that serves it.

pub mod client;
pub mod embedded;
pub mod ring;
pub mod server;

use std::fmt;
use std::net::IpAddr;

/// Generated from `proto/katran.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("lb.katran");
}

/// A balancer's virtual address. Its text is canonical: Katran compares addresses as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vip {
    /// Address.
    pub addr: IpAddr,
    /// Port.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
}

impl Vip {
    /// A TCP VIP.
    pub fn tcp(addr: IpAddr, port: u16) -> Self {
        Self { addr, port, protocol: libc::IPPROTO_TCP as u8 }
    }
}

impl fmt::Display for Vip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addr = std::net::SocketAddr::new(self.addr, self.port);
        match i32::from(self.protocol) {
            libc::IPPROTO_TCP => write!(f, "{addr}/tcp"),
            libc::IPPROTO_UDP => write!(f, "{addr}/udp"),
            other => write!(f, "{addr}/{other}"),
        }
    }
}

impl From<Vip> for proto::Vip {
    fn from(vip: Vip) -> Self {
        Self {
            address: vip.addr.to_string(),
            port: i32::from(vip.port),
            protocol: i32::from(vip.protocol),
        }
    }
}

impl TryFrom<&proto::Vip> for Vip {
    type Error = String;

    fn try_from(vip: &proto::Vip) -> Result<Self, String> {
        Ok(Self {
            addr: vip.address.parse().map_err(|_| format!("{:?} is no IP address", vip.address))?,
            port: u16::try_from(vip.port).map_err(|_| format!("{} is no port", vip.port))?,
            protocol: u8::try_from(vip.protocol)
                .map_err(|_| format!("{} is no IP protocol", vip.protocol))?,
        })
    }
}
