//! One check of one broker.

use std::io;
use std::net::{IpAddr, SocketAddr};

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use super::path::{Path, PathError};
use crate::domain::health::{CheckKind, HealthCheck};
use crate::mqtt::client::{self, ConnectOptions};
use crate::mqtt::proxy_header;

/// Seconds; a check is over long before.
const KEEPALIVE: u16 = 10;

/// What is checked, and on which way.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    pub real: IpAddr,
    pub to: SocketAddr,
    /// With a PROXY header in front.
    pub proxy: bool,
    /// Wrapped; `None`: `to` is the real's own address.
    pub path: Option<&'a Path>,
}

/// Checks once. The inner error says what was expected; the outer one, why there was no check.
pub async fn probe(
    target: Target<'_>,
    check: &HealthCheck,
) -> Result<Result<(), String>, PathError> {
    let Some(path) = target.path else {
        return Ok(within(check, target, TcpStream::connect(target.to)).await);
    };
    let mut socket = path.socket(target.to, target.real)?;
    let result = within(check, target, socket.connect(target.to)).await;
    Ok(result.map_err(|error| format!("wrapped, as clients' packets are: {error}")))
}

async fn within(
    check: &HealthCheck,
    target: Target<'_>,
    connecting: impl Future<Output = io::Result<TcpStream>>,
) -> Result<(), String> {
    match tokio::time::timeout(check.timeout, exchange(target, connecting, &check.kind)).await {
        Ok(result) => result,
        Err(_) => Err(format!("no answer from {} in {} ms", target.to, check.timeout.as_millis())),
    }
}

async fn exchange(
    target: Target<'_>,
    connecting: impl Future<Output = io::Result<TcpStream>>,
    kind: &CheckKind,
) -> Result<(), String> {
    let header = target.proxy.then(proxy_header::local);
    let mut stream = client::open(target.to, connecting, header.as_deref()).await?;
    let CheckKind::Mqtt { v5, client_id, username, password } = kind else { return Ok(()) };
    let options = ConnectOptions {
        v5: *v5,
        client_id,
        username: username.as_deref(),
        password: password.as_deref(),
        keep_alive: KEEPALIVE,
    };
    client::connect(&mut stream, target.to, &options).await?;
    let _ = stream.write_all(&client::DISCONNECT).await;
    Ok(())
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
        let target = Target { real: to.ip(), to, proxy: false, path: None };
        let result = runtime.block_on(probe(target, &check)).unwrap();
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
