//! Connections to brokers: TCP or TLS, with a PROXY protocol header if they want one.

use std::io;
use std::net::SocketAddr;

use socket2::SockRef;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use super::tls::Connector;

/// A broker.
#[derive(Debug, Clone)]
pub struct BrokerInfo {
    /// Where it listens.
    pub addr: SocketAddr,
    /// Name of its group.
    pub group: String,
    /// Whether it expects a PROXY protocol header.
    pub proxy_protocol: bool,
    /// How TLS is spoken to it.
    pub tls: Option<Connector>,
}

impl BrokerInfo {
    /// Connects, writes the header, and does TLS' handshake behind it.
    pub fn open(
        &self,
        header: Option<Vec<u8>>,
    ) -> impl Future<Output = io::Result<BrokerStream>> + Send + use<> {
        let (addr, tls) = (self.addr, self.tls.clone());
        async move {
            let mut stream = connect(addr).await?;
            stream.set_nodelay(true)?;
            if let Some(header) = header {
                stream.write_all(&header).await?;
            }
            Ok(match tls {
                None => Either::Left(stream),
                Some(tls) => Either::Right(Box::new(tls.connect(addr.ip(), stream).await?)),
            })
        }
    }
}

/// TCP's handshake. Its last ACK waits for what is written first, so that both are one packet.
async fn connect(addr: SocketAddr) -> io::Result<TcpStream> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    SockRef::from(&socket).set_tcp_quickack(false)?;
    socket.connect(addr).await
}

/// The TCP connection of one.
pub fn tcp_of(stream: &BrokerStream) -> &TcpStream {
    match stream {
        Either::Left(tcp) => tcp,
        Either::Right(tls) => tls.get_ref().0,
    }
}

/// A connection to a broker: TCP, or TLS.
pub type BrokerStream = Either<TcpStream, Box<TlsStream<TcpStream>>>;
