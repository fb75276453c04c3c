//! Connections of the sidecar's own to brokers.

use std::io;
use std::net::SocketAddr;

use futures_util::{SinkExt as _, StreamExt as _};
use rmqtt_codec::{v3, v5};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::codec::Framed;

/// PINGREQ (MQTT 3.1.1 §3.12).
pub const PINGREQ: [u8; 2] = [0xc0, 0];
/// DISCONNECT: of MQTT 3.1.1 (§3.14), and of MQTT 5 with reason code 0.
pub const DISCONNECT: [u8; 2] = [0xe0, 0];

/// The contents of a CONNECT.
#[derive(Debug, Clone, Copy)]
pub struct ConnectOptions<'a> {
    pub v5: bool,
    pub client_id: &'a str,
    pub username: Option<&'a str>,
    pub password: Option<&'a str>,
    /// Seconds.
    pub keep_alive: u16,
}

/// Completes a connection and writes a PROXY protocol header, if there is one. Closed, it leaves nothing in
/// TIME-WAIT.
pub async fn open(
    to: SocketAddr,
    connecting: impl Future<Output = io::Result<TcpStream>>,
    header: Option<&[u8]>,
) -> Result<TcpStream, String> {
    let mut stream = connecting.await.map_err(|e| format!("connecting to {to}: {e}"))?;
    let _ = stream.set_zero_linger();
    let _ = stream.set_nodelay(true);
    if let Some(header) = header {
        let written = stream.write_all(header).await;
        written.map_err(|e| format!("writing to {to}: {e}"))?;
    }
    Ok(stream)
}

/// Sends CONNECT, for a clean session, and waits for a CONNACK that accepts it.
pub async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    to: SocketAddr,
    options: &ConnectOptions<'_>,
) -> Result<(), String> {
    // The two versions' types differ, and not their fields.
    macro_rules! exchange {
        ($version:ident, $clean:ident, $code:ident) => {{
            let connect = $version::Connect {
                $clean: true,
                keep_alive: options.keep_alive,
                client_id: options.client_id.to_owned().into(),
                username: options.username.map(|name| name.to_owned().into()),
                password: options.password.map(|secret| secret.to_owned().into()),
                ..Default::default()
            };
            let mut framed = Framed::new(stream, $version::Codec::default());
            let connect = $version::Packet::Connect(Box::new(connect));
            framed.send(connect).await.map_err(|e| wrong(to, &e))?;
            match framed.next().await {
                Some(Ok(($version::Packet::ConnectAck(ack), _))) => {
                    accepted(to, u8::from(ack.$code))
                }
                Some(Ok(_)) => Err(no_connack(to)),
                Some(Err(e)) => Err(wrong(to, &e)),
                None => Err(closed(to)),
            }
        }};
    }
    if options.v5 {
        exchange!(v5, clean_start, reason_code)
    } else {
        exchange!(v3, clean_session, return_code)
    }
}

/// UNSUBSCRIBE (MQTT 3.1.1 §3.10) from something that nobody subscribes to, `length` bytes long, 256 at least.
pub fn unsubscribe(v5: bool, length: usize) -> Vec<u8> {
    const TOPIC: &str = "mqtt-fwd/check/";
    // Behind a remaining length of two bytes: packet identifier, properties, length of the topic.
    let properties: &[u8] = if v5 { &[0] } else { &[] };
    let remaining = length.clamp(256, 16_384) - 3;
    let topic = remaining - 2 - properties.len() - 2;
    let mut packet = vec![0xa2, remaining as u8 | 0x80, (remaining >> 7) as u8, 0, 1];
    packet.extend(properties);
    packet.extend((topic as u16).to_be_bytes());
    packet.extend(TOPIC.bytes());
    packet.resize(3 + remaining, b'x');
    packet
}

fn accepted(to: SocketAddr, code: u8) -> Result<(), String> {
    if code == 0 { Ok(()) } else { Err(format!("{to} refused CONNECT with code {code:#04x}")) }
}

fn no_connack(to: SocketAddr) -> String {
    format!("{to} answered with another packet than CONNACK")
}

fn closed(to: SocketAddr) -> String {
    format!("{to} closed the connection before CONNACK")
}

fn wrong(to: SocketAddr, error: &impl std::fmt::Debug) -> String {
    // The library's errors have no other text, and those of the system are within.
    let text = format!("{error:?}");
    let of_system = text.strip_prefix("Io(\"").and_then(|text| text.strip_suffix("\")"));
    format!("reading CONNACK from {to}: {}", of_system.unwrap_or(&text))
}
