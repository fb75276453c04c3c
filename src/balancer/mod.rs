//! Katran's gRPC interface: a client for it, and the embedded balancer that serves it.

pub mod by_hand;
pub mod client;
pub mod desired;
pub mod embedded;
pub mod flags;
pub mod listeners;
pub mod sock_diag;

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::domain::Vip;

/// Generated from `proto/katran.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("lb.katran");
}

/// A VIP as it is written in a call: Katran takes `fc00::1` and `FC00::1` for two.
#[derive(Debug, Clone, PartialEq)]
pub struct VerbatimVip(pub proto::Vip);

impl VerbatimVip {
    /// Whether it is the text that this client writes.
    pub fn is_canonical(&self) -> bool {
        Vip::try_from(&self.0).is_ok_and(|vip| proto::Vip::from(vip) == self.0)
    }
}

impl From<Vip> for VerbatimVip {
    fn from(vip: Vip) -> Self {
        Self(vip.into())
    }
}

impl fmt::Display for VerbatimVip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let proto::Vip { address, port, protocol } = &self.0;
        if address.contains(':') {
            write!(f, "[{address}]:{port}")?;
        } else {
            write!(f, "{address}:{port}")?;
        }
        match *protocol {
            libc::IPPROTO_TCP => write!(f, "/tcp"),
            libc::IPPROTO_UDP => write!(f, "/udp"),
            other => write!(f, "/{other}"),
        }
    }
}

impl FromStr for VerbatimVip {
    type Err = String;

    /// `address:port`, `[address]:port`, either with `/tcp` (the default), `/udp` or a number.
    fn from_str(text: &str) -> Result<Self, String> {
        let (rest, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let protocol = match protocol {
            "tcp" => libc::IPPROTO_TCP,
            "udp" => libc::IPPROTO_UDP,
            other => other
                .parse::<u8>()
                .map_err(|_| format!("{other:?} is no protocol; tcp, udp or a number"))?
                .into(),
        };
        let wrong = || format!("{text:?} is not address:port or [address]:port");
        let (address, port) = rest.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse::<u16>().map_err(|_| format!("{port:?} is no port (0 to 65535)"))?;
        let address = match address.strip_prefix('[') {
            Some(inner) => inner.strip_suffix(']').ok_or_else(wrong)?,
            None if address.contains(':') => return Err(wrong()),
            None => address,
        };
        address.parse::<IpAddr>().map_err(|_| format!("{address:?} is no IP address"))?;
        Ok(Self(proto::Vip { address: address.to_owned(), port: port.into(), protocol }))
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
