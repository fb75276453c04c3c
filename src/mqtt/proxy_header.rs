//! The client's address in front of a connection: PROXY protocol (HAProxy, doc/proxy-protocol.txt). Version 2 is
//! written, versions 1 and 2 are read.

use std::io;
use std::net::{SocketAddr, SocketAddrV4};

use ppp::v2::{Addresses, Builder, Command, Protocol, Version};
use ppp::{HeaderResult, v1, v2};
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// The header for a client's connection to a service.
pub fn header(client: SocketAddr, service: SocketAddr) -> Vec<u8> {
    // Both are of one version in a header: where they are not, the IPv4 one is mapped (RFC 4291 §2.5.5.2).
    let (client, service) = match (client, service) {
        (SocketAddr::V4(v4), v6 @ SocketAddr::V6(_)) => (mapped(v4), v6),
        (v6 @ SocketAddr::V6(_), SocketAddr::V4(v4)) => (v6, mapped(v4)),
        same => same,
    };
    let addresses = Addresses::from((client, service));
    Builder::with_addresses(Version::Two | Command::Proxy, Protocol::Stream, addresses)
        .build()
        .expect("addresses fit into the header's 65,535 bytes")
}

fn mapped(addr: SocketAddrV4) -> SocketAddr {
    SocketAddr::new(addr.ip().to_ipv6_mapped().into(), addr.port())
}

/// The header of a connection of the sender's own: a health check (LOCAL).
pub fn local() -> Vec<u8> {
    let command = Version::Two | Command::Local;
    Builder::with_addresses(command, Protocol::Unspecified, Addresses::Unspecified)
        .build()
        .expect("an empty header fits")
}

/// Reads the header that a balancer has put in front: the client's address, or `None` if it speaks for itself (LOCAL) or
/// does not know. Not a byte of what follows is read.
pub async fn read<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Option<SocketAddr>> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    // The shortest of version 1 is "PROXY UNKNOWN\r\n"; version 2 has 16 bytes, of which the last two are the length.
    const SHORTEST: usize = 15;
    const V1_MOST: usize = 107;
    const V2_MOST: usize = 4096;
    let mut bytes = vec![0; 1];
    stream.read_exact(&mut bytes).await?;
    if !matches!(bytes[0], b'P' | b'\r') {
        return Err(wrong("no PROXY header"));
    }
    bytes.resize(SHORTEST, 0);
    stream.read_exact(&mut bytes[1..]).await?;
    if bytes.starts_with(v2::PROTOCOL_PREFIX) {
        bytes.push(stream.read_u8().await?);
        let length = usize::from(u16::from_be_bytes([bytes[14], bytes[15]]));
        if length > V2_MOST {
            return Err(wrong("PROXY header too large"));
        }
        bytes.resize(16 + length, 0);
        stream.read_exact(&mut bytes[16..]).await?;
    } else {
        while !bytes.ends_with(b"\r\n") {
            if bytes.len() == V1_MOST {
                return Err(wrong("PROXY header too large"));
            }
            bytes.push(stream.read_u8().await?);
        }
    }
    let said = match HeaderResult::parse(&bytes) {
        HeaderResult::V1(Ok(header)) => Ok(match header.addresses {
            v1::Addresses::Tcp4(a) => Some((a.source_address, a.source_port).into()),
            v1::Addresses::Tcp6(a) => Some((a.source_address, a.source_port).into()),
            v1::Addresses::Unknown => None,
        }),
        HeaderResult::V2(Ok(header)) => Ok(match (header.command, header.addresses) {
            (Command::Proxy, Addresses::IPv4(a)) => Some((a.source_address, a.source_port).into()),
            (Command::Proxy, Addresses::IPv6(a)) => Some((a.source_address, a.source_port).into()),
            _ => None,
        }),
        HeaderResult::V1(Err(error)) => Err(wrong(&format!("PROXY header: {error}"))),
        HeaderResult::V2(Err(error)) => Err(wrong(&format!("PROXY header: {error}"))),
    };
    // A balancer that listens for both versions on one socket has IPv4 clients mapped.
    let canonical = |client: SocketAddr| SocketAddr::new(client.ip().to_canonical(), client.port());
    said.map(|client| client.map(canonical))
}

#[cfg(test)]
mod tests {
    use ppp::v2::Header;

    use super::*;

    #[test]
    fn the_header_says_who_the_client_is() {
        for (client, service, length) in [
            ("10.1.1.1:4000", "10.1.50.200:1883", 28),
            ("[fd01:1::1]:4000", "[fd01:50::200]:1883", 52),
        ] {
            let (client, service): (SocketAddr, SocketAddr) =
                (client.parse().unwrap(), service.parse().unwrap());
            let bytes = header(client, service);
            assert_eq!(bytes.len(), length);
            let read = Header::try_from(&bytes[..]).unwrap();
            assert_eq!(read.addresses, Addresses::from((client, service)));
        }
    }
    #[test]
    fn clients_of_the_other_ip_version_are_said_as_well() {
        for (client, service, source) in [
            ("10.1.1.1:4000", "[fd01:50::200]:1883", "[::ffff:10.1.1.1]:4000"),
            ("[fd01:1::1]:4000", "10.1.50.200:1883", "[fd01:1::1]:4000"),
        ] {
            let bytes = header(client.parse().unwrap(), service.parse().unwrap());
            let read = Header::try_from(&bytes[..]).unwrap();
            let Addresses::IPv6(said) = read.addresses else { panic!("{read:?}") };
            let said = SocketAddr::from((said.source_address, said.source_port));
            assert_eq!(said.to_string(), source);
            let mut stream = &bytes[..];
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let heard = runtime.block_on(super::read(&mut stream)).unwrap().unwrap();
            assert_eq!(heard.to_string(), client, "as it is");
        }
    }

    #[test]
    fn both_versions_are_read_up_to_their_end() {
        let client: SocketAddr = "192.0.2.7:4000".parse().unwrap();
        let client6: SocketAddr = "[fd01:1::1]:4000".parse().unwrap();
        let service: SocketAddr = "10.1.50.200:1883".parse().unwrap();
        let service6: SocketAddr = "[fd01:50::200]:1883".parse().unwrap();
        let with_tlv =
            [&header(client, service)[..14], &[0, 20], &header(client, service)[16..]].concat();
        for (bytes, expected) in [
            (header(client, service), Some(client)),
            (header(client6, service6), Some(client6)),
            (with_tlv, None),
            (local(), None),
            (b"PROXY TCP4 192.0.2.7 10.1.50.200 4000 1883\r\n".to_vec(), Some(client)),
            (b"PROXY TCP6 fd01:1::1 fd01:50::200 4000 1883\r\n".to_vec(), Some(client6)),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (b"PROXY UNKNOWN ffff::1 ffff::1 1 1\r\n".to_vec(), None),
        ] {
            let mut stream = &[&bytes[..], b"\x10\x0c\x00\x04MQTT"].concat()[..];
            let read = futures(read(&mut stream));
            if bytes[15..].first() == Some(&20) {
                // It says to be longer than it is.
                assert_ne!(stream.len(), 8);
                continue;
            }
            assert_eq!((read.unwrap(), stream.len()), (expected, 8), "{bytes:02x?}");
        }
        for wrong in [
            &b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x3c\x00\x00"[..],
            b"PROXY TCP4 1.2.3 4 5 6\r\n",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff",
        ] {
            let mut stream = [wrong, &[b'x'; 200]].concat();
            assert!(futures(read(&mut &stream.split_off(0)[..])).is_err(), "{wrong:02x?}");
        }
    }

    fn futures<T>(what: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(what)
    }
}
