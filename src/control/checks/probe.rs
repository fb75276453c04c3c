//! One check of one broker.

use std::net::SocketAddr;

use futures_util::{SinkExt as _, StreamExt as _};
use rmqtt_codec::{v3, v5};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio_util::codec::Framed;

use crate::domain::health::{CheckKind, HealthCheck};
use crate::relay::proxy;

/// Seconds of keepalive in a check's CONNECT; it is over long before.
const KEEPALIVE: u16 = 10;

/// Checks once; `proxy`: with a PROXY header in front. The error says what was expected.
pub async fn probe(to: SocketAddr, proxy: bool, check: &HealthCheck) -> Result<(), String> {
    match tokio::time::timeout(check.timeout, connect(to, proxy, &check.kind)).await {
        Ok(result) => result,
        Err(_) => Err(format!("no answer from {to} in {} ms", check.timeout.as_millis())),
    }
}

async fn connect(to: SocketAddr, proxy: bool, kind: &CheckKind) -> Result<(), String> {
    let mut stream =
        TcpStream::connect(to).await.map_err(|e| format!("connecting to {to}: {e}"))?;
    // Closed with RST, a check leaves nothing in TIME-WAIT here or there.
    let _ = stream.set_zero_linger();
    if proxy {
        let written = stream.write_all(&proxy::local()).await;
        written.map_err(|e| format!("writing to {to}: {e}"))?;
    }
    let CheckKind::Mqtt { v5, client_id, username, password } = kind else { return Ok(()) };
    let (client_id, username) = (client_id.clone().into(), username.clone().map(Into::into));
    let password = password.clone().map(Into::into);
    if *v5 {
        let connect = v5::Connect {
            clean_start: true,
            keep_alive: KEEPALIVE,
            client_id,
            username,
            password,
            ..Default::default()
        };
        let mut framed = Framed::new(stream, v5::Codec::default());
        framed.send(v5::Packet::Connect(Box::new(connect))).await.map_err(|e| wrong(to, &e))?;
        match framed.next().await {
            Some(Ok((v5::Packet::ConnectAck(ack), _))) => accepted(to, u8::from(ack.reason_code)),
            Some(Ok(_)) => Err(no_connack(to)),
            Some(Err(e)) => Err(wrong(to, &e)),
            None => Err(closed(to)),
        }?;
        let bye = v5::Packet::Disconnect(v5::Disconnect::default());
        let _ = framed.send(bye).await;
    } else {
        let connect = v3::Connect {
            clean_session: true,
            keep_alive: KEEPALIVE,
            client_id,
            username,
            password,
            ..Default::default()
        };
        let mut framed = Framed::new(stream, v3::Codec::default());
        framed.send(v3::Packet::Connect(Box::new(connect))).await.map_err(|e| wrong(to, &e))?;
        match framed.next().await {
            Some(Ok((v3::Packet::ConnectAck(ack), _))) => accepted(to, u8::from(ack.return_code)),
            Some(Ok(_)) => Err(no_connack(to)),
            Some(Err(e)) => Err(wrong(to, &e)),
            None => Err(closed(to)),
        }?;
        let _ = framed.send(v3::Packet::Disconnect).await;
    }
    Ok(())
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
    format!("reading CONNACK from {to}: {error:?}")
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::time::Duration;

    use super::*;

    /// The result of a check of a broker that answers so.
    fn checked(v5: bool, answer: &'static [u8]) -> Result<(), String> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let broker = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut connect = [0; 256];
            let n = stream.read(&mut connect).unwrap();
            stream.write_all(answer).unwrap();
            // Until the check closes.
            let _ = stream.read(&mut [0]);
            connect[..n].to_vec()
        });
        let kind = CheckKind::Mqtt {
            v5,
            client_id: "check".to_owned(),
            username: Some("user".to_owned()),
            password: Some("secret".to_owned()),
        };
        let check = HealthCheck { kind, timeout: Duration::from_millis(500), ..HealthCheck::tcp() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let result = runtime.block_on(probe(to, false, &check));
        let sent = broker.join().unwrap();
        assert_eq!(sent[8], if v5 { 5 } else { 4 });
        assert_eq!(sent[9], 0xc2, "clean, with user name and password");
        assert!(sent.ends_with(b"\0\x05check\0\x04user\0\x06secret"), "{sent:?}");
        result
    }

    #[test]
    fn only_a_connack_with_code_0_is_up() {
        assert_eq!(checked(false, &[0x20, 2, 0, 0]), Ok(()));
        assert_eq!(checked(true, &[0x20, 3, 0, 0, 0]), Ok(()));
        assert!(
            checked(false, &[0x20, 2, 0, 5])
                .unwrap_err()
                .contains("refused CONNECT with code 0x05")
        );
        assert!(checked(false, &[0xd0, 0]).unwrap_err().contains("another packet than CONNACK"));
        assert!(checked(false, &[]).unwrap_err().contains("no answer"));
    }

    #[test]
    fn a_refusal_behind_a_length_of_two_bytes_is_a_refusal() {
        // Server unavailable (0x88), with a reason of 130 bytes (MQTT 5 §3.2.2).
        let mut answer = vec![0x20, 0x89, 0x01, 0, 0x88, 0x85, 0x01, 0x1f, 0, 130];
        answer.extend([b'x'; 130]);
        answer[1] = 0x80 | ((answer.len() - 3) as u8 & 0x7f);
        let error = checked(true, answer.leak()).unwrap_err();
        assert!(error.contains("code 0x88"), "{error}");
    }
}
