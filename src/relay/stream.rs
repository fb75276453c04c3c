//! Client transports, and buffered writes.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use super::websocket::WebSocket;

/// A client's transport.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// TLS.
    Tls(Box<TlsStream<TcpStream>>),
    /// WebSocket.
    Ws(Box<WebSocket<TcpStream>>),
    /// WebSocket in TLS.
    Wss(Box<WebSocket<TlsStream<TcpStream>>>),
}

impl Stream {
    /// CONNECT is there.
    pub fn connected(&mut self) {
        match self {
            Self::Ws(stream) => stream.connected(),
            Self::Wss(stream) => stream.connected(),
            Self::Tcp(_) | Self::Tls(_) => {}
        }
    }
}

macro_rules! each {
    ($self:ident, $stream:ident => $what:expr) => {
        match $self.get_mut() {
            Stream::Tcp($stream) => $what,
            Stream::Tls($stream) => $what,
            Stream::Ws($stream) => $what,
            Stream::Wss($stream) => $what,
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        each!(self, s => Pin::new(s).poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
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
        matches!(self, Self::Tcp(_))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, s => Pin::new(s).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, s => Pin::new(s).poll_shutdown(cx))
    }
}

/// Bytes that the socket has not accepted yet.
#[derive(Debug, Default)]
pub struct Pending {
    bytes: BytesMut,
    /// TLS and WebSocket streams buffer, and have to be flushed.
    unflushed: bool,
}

impl Pending {
    /// Buffered bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether everything was written and flushed.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && !self.unflushed
    }

    /// Takes the buffered bytes out.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes).to_vec()
    }

    /// Appends to the buffer.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Writes slices without copying if the buffer is empty; buffers what the socket does not accept.
    /// Returns whether anything was written.
    pub fn write<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
        slices: &mut [IoSlice<'_>],
    ) -> io::Result<bool> {
        let mut slices = slices;
        let mut wrote = false;
        while self.bytes.is_empty() && !slices.is_empty() {
            let Poll::Ready(n) = Pin::new(&mut *stream).poll_write_vectored(cx, slices)? else {
                break;
            };
            if n == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            IoSlice::advance_slices(&mut slices, n);
            wrote = true;
            self.unflushed = true;
        }
        for slice in slices {
            self.bytes.extend_from_slice(slice);
        }
        Ok(wrote)
    }

    /// Writes the buffered bytes. Returns whether anything was written.
    pub fn flush<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> io::Result<bool> {
        let mut wrote = false;
        while !self.bytes.is_empty() {
            let Poll::Ready(n) = Pin::new(&mut *stream).poll_write(cx, &self.bytes)? else {
                return Ok(wrote);
            };
            if n == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.bytes.advance(n);
            wrote = true;
            self.unflushed = true;
        }
        // Most connections are idle: no capacity is kept.
        self.bytes = BytesMut::new();
        if self.unflushed && Pin::new(stream).poll_flush(cx)?.is_ready() {
            self.unflushed = false;
        }
        Ok(wrote)
    }
}

/// Reads into `scratch` from `offset` on. 0: end of file.
pub fn read<S: AsyncRead + Unpin>(
    stream: &mut S,
    cx: &mut Context<'_>,
    scratch: &mut [u8],
    offset: usize,
) -> Poll<io::Result<usize>> {
    let mut buf = ReadBuf::new(&mut scratch[offset..]);
    ready!(Pin::new(stream).poll_read(cx, &mut buf))?;
    Poll::Ready(Ok(buf.filled().len()))
}
