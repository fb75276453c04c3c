//! Connections to brokers: TCP or TLS, with a PROXY protocol header if they want one.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

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
                None => BrokerStream::Tcp(stream),
                Some(tls) => BrokerStream::Tls(Box::new(tls.connect(addr.ip(), stream).await?)),
            })
        }
    }
}

/// A connection to a broker.
#[derive(Debug)]
pub enum BrokerStream {
    /// TCP.
    Tcp(TcpStream),
    /// TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

macro_rules! each {
    ($self:ident, $stream:ident => $what:expr) => {
        match $self.get_mut() {
            BrokerStream::Tcp($stream) => $what,
            BrokerStream::Tls($stream) => $what,
        }
    };
}

impl AsyncRead for BrokerStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        each!(self, s => Pin::new(s).poll_read(cx, buf))
    }
}

impl AsyncWrite for BrokerStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        each!(self, s => Pin::new(s).poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, s => Pin::new(s).poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, s => Pin::new(s).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, s => Pin::new(s).poll_shutdown(cx))
    }
}
