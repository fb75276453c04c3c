//! The client's address in front of a connection: PROXY protocol, version 2 (HAProxy,
//! doc/proxy-protocol.txt).

use std::net::SocketAddr;

use ppp::v2::{Addresses, Builder, Command, Protocol, Version};

/// The header for a client's connection to a service.
pub fn header(client: SocketAddr, service: SocketAddr) -> Vec<u8> {
    let addresses = match (client, service) {
        (SocketAddr::V4(_), SocketAddr::V4(_)) | (SocketAddr::V6(_), SocketAddr::V6(_)) => {
            Addresses::from((client, service))
        }
        _ => Addresses::Unspecified,
    };
    Builder::with_addresses(Version::Two | Command::Proxy, Protocol::Stream, addresses)
        .build()
        .expect("addresses fit into the header's 65,535 bytes")
}

/// The header of a connection of the sender's own: a health check (LOCAL).
pub fn local() -> Vec<u8> {
    let command = Version::Two | Command::Local;
    Builder::with_addresses(command, Protocol::Unspecified, Addresses::Unspecified)
        .build()
        .expect("an empty header fits")
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
}
