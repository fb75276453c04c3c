//! A balancer's virtual addresses.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// IP protocol numbers (IANA).
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

/// A MAC address.
pub type Mac = [u8; 6];

/// A MAC address as Katran writes it.
pub fn mac_text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Six pairs of hexadecimal digits with colons. Not all zero, which is what Katran makes of nonsense, and no
/// multicast address (the lowest bit of the first byte, IEEE 802).
pub fn parse_mac(text: &str) -> Option<Mac> {
    let pairs: Vec<&str> = text.split(':').collect();
    let mut mac = Mac::default();
    if pairs.len() != mac.len() {
        return None;
    }
    for (byte, pair) in mac.iter_mut().zip(pairs) {
        let is_hex = pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit());
        *byte = u8::from_str_radix(pair, 16).ok().filter(|_| is_hex)?;
    }
    (mac != Mac::default() && mac[0] & 1 == 0).then_some(mac)
}

/// A virtual address. Its text is canonical: Katran compares addresses as text.
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
        Self { addr, port, protocol: TCP }
    }
}

impl fmt::Display for Vip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addr = SocketAddr::new(self.addr, self.port);
        match self.protocol {
            TCP => write!(f, "{addr}/tcp"),
            UDP => write!(f, "{addr}/udp"),
            other => write!(f, "{addr}/{other}"),
        }
    }
}
