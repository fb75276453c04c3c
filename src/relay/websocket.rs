//! MQTT over WebSocket (MQTT 5 §6): a byte stream in binary messages.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use futures_util::{Sink as _, Stream as _};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::http::{HeaderValue, StatusCode, header};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};

use super::memory::Held;

/// Of MQTT since 3.1.1, and of MQTT 3.1.
const PROTOCOLS: [&str; 2] = ["mqtt", "mqttv3.1"];

/// Bytes from a client until its CONNECT is there: the library keeps a message, as long as `max_packet`, until it is
/// whole.
const BEFORE_CONNECT: usize = 300 << 10;

/// A transport of which is known what was read for a message that is not whole.
#[derive(Debug)]
struct Metered<S> {
    inner: S,
    /// Bytes read since the last whole message.
    unfinished: usize,
    most: usize,
    held: Held,
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        self.unfinished += buf.filled().len() - before;
        if self.unfinished > self.most {
            let what = "too much before CONNECT";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, what)));
        }
        let unfinished = self.unfinished;
        Poll::Ready(self.held.set(unfinished).map_err(Into::into))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// A byte stream over WebSocket messages.
#[derive(Debug)]
pub struct WebSocket<S> {
    inner: WebSocketStream<Metered<S>>,
    /// The unread rest of a message.
    rest: Bytes,
}

impl<S: AsyncRead + AsyncWrite + Unpin> WebSocket<S> {
    /// Performs the server's side of the handshake.
    pub async fn accept(stream: S, max_message: usize, held: Held) -> io::Result<Self> {
        let mut config = WebSocketConfig::default();
        config.read_buffer_size = 4096;
        config.write_buffer_size = 0;
        config.max_write_buffer_size = max_message + (1 << 20);
        config.max_message_size = Some(max_message);
        config.max_frame_size = Some(max_message);
        let stream = Metered { inner: stream, unfinished: 0, most: BEFORE_CONNECT, held };
        let inner =
            tokio_tungstenite::accept_hdr_async_with_config(stream, subprotocol, Some(config))
                .await
                .map_err(other)?;
        Ok(Self { inner, rest: Bytes::new() })
    }

    /// CONNECT is there: messages may be as long as `max_packet_size` says.
    pub fn connected(&mut self) {
        self.inner.get_mut().most = usize::MAX;
    }
}

/// Selects the subprotocol, which clients must offer (MQTT 5 §6.0.0-3, -4).
#[allow(clippy::result_large_err, clippy::unnecessary_wraps)] // tungstenite's signature
fn subprotocol(request: &Request, mut response: Response) -> Result<Response, ErrorResponse> {
    let offered = request.headers().get_all(header::SEC_WEBSOCKET_PROTOCOL);
    let offers = |value: &HeaderValue, protocol: &str| {
        value.to_str().is_ok_and(|v| v.split(',').any(|p| p.trim().eq_ignore_ascii_case(protocol)))
    };
    let chosen = PROTOCOLS.into_iter().find(|p| offered.iter().any(|value| offers(value, p)));
    let Some(chosen) = chosen else {
        let mut refusal = ErrorResponse::new(Some(
            "MQTT clients offer the WebSocket subprotocol \"mqtt\"\n".to_owned(),
        ));
        *refusal.status_mut() = StatusCode::BAD_REQUEST;
        return Err(refusal);
    };
    response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(chosen));
    Ok(response)
}

fn other(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        Error::ConnectionClosed | Error::AlreadyClosed => io::ErrorKind::BrokenPipe.into(),
        error => io::Error::new(io::ErrorKind::InvalidData, error),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for WebSocket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(Pin::new(&mut self.inner).poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => {
                    self.inner.get_mut().unfinished = 0;
                    self.rest = bytes;
                }
                // MQTT 5 §6.0.0-1: other data is an error. Pings are answered by the library.
                Some(Ok(Message::Text(_))) => {
                    let what = "a text message; MQTT is sent in binary ones";
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, what)));
                }
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(other(error))),
            }
        }
        let n = self.rest.len().min(buf.remaining());
        buf.put_slice(&self.rest[..n]);
        self.rest.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for WebSocket<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(Pin::new(&mut self.inner).poll_ready(cx)).map_err(other)?;
        let message = Message::Binary(Bytes::copy_from_slice(bytes));
        Pin::new(&mut self.inner).start_send(message).map_err(other)?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx).map_err(other)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(cx).map_err(other)
    }
}
