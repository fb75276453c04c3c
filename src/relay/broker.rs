//! Connections to brokers: TCP or TLS, with a PROXY protocol header if they want one.

use std::io;
use std::net::SocketAddr;

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
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
            let mut stream = TcpStream::connect(addr).await?;
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

/// A connection to a broker: TCP, or TLS.
pub type BrokerStream = Either<TcpStream, Box<TlsStream<TcpStream>>>;
