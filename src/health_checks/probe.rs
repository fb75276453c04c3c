//! One check of one broker.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::path::{Opening, Path, PathError, TIMESTAMPS};
use crate::brokers::connection::{BrokerStream, tcp_of};
use crate::brokers::tls::{self, Connector};
use crate::domain::BrokerTls;
use crate::domain::health::{CheckKind, HealthCheck};
use crate::handover::HOST_ADVICE;
use crate::kernel::tcp;
use crate::mqtt::client::{self, ConnectOptions};
use crate::mqtt::proxy_header;

/// Seconds; a check is over long before.
const KEEPALIVE: u16 = 10;
/// From one look at what TCP has been told to the next.
const POLL: Duration = Duration::from_millis(5);

/// What is checked, and on which way.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    pub real: IpAddr,
    pub to: SocketAddr,
    /// With a PROXY header in front.
    pub proxy: bool,
    /// Wrapped; `None`: `to` is the real's own address.
    pub path: Option<&'a Path>,
    /// Clients' connections are answered at the balancer.
    pub delayed: bool,
    /// Its service speaks TLS.
    pub tls: Option<&'a BrokerTls>,
}

/// When the first of its certificates expires, if it shows any.
pub type Expires = Option<SystemTime>;

/// What did not succeed.
enum Failure {
    /// A connection that a client is served on.
    Connection(String),
    /// The largest segment, on a connection that is well otherwise.
    Largest(String),
}

impl Failure {
    fn text(self) -> String {
        let (Self::Connection(text) | Self::Largest(text)) = self;
        text
    }
}

/// Checks once. The inner error says what was expected; the outer one, why there was no check.
pub async fn probe(
    target: Target<'_>,
    check: &HealthCheck,
) -> Result<Result<Expires, String>, PathError> {
    let Some(path) = target.path else {
        let connecting = TcpStream::connect(target.to);
        return Ok(within(check, target, connecting, None).await.map_err(Failure::text));
    };
    let as_clients = |error| format!("wrapped, as clients' packets are: {error}");
    let opening = if target.delayed { Opening::Answered } else { Opening::Syn };
    let error = match wrapped(target, check, path, opening, true).await? {
        Err(Failure::Connection(error)) if target.delayed => error,
        result => return Ok(result.map_err(|failure| as_clients(failure.text()))),
    };
    // What every connection needs comes first.
    if let Err(failure) = wrapped(target, check, path, Opening::Syn, false).await? {
        return Ok(Err(as_clients(failure.text())));
    }
    Ok(Err(format!(
        "it does not take connections over ({error}), and accepts new ones: {HOST_ADVICE}"
    )))
}

async fn wrapped(
    target: Target<'_>,
    check: &HealthCheck,
    path: &Path,
    opening: Opening,
    largest: bool,
) -> Result<Result<Expires, Failure>, PathError> {
    let mut socket = path.socket(target.to, target.real, opening).await?;
    let mss = largest.then_some(socket.mss);
    Ok(within(check, target, socket.connect(target.to), mss).await)
}

/// `mss`: of the largest segment that is to arrive; none: that is not looked at.
async fn within(
    check: &HealthCheck,
    target: Target<'_>,
    connecting: impl Future<Output = io::Result<TcpStream>>,
    mss: Option<usize>,
) -> Result<Expires, Failure> {
    let end = Instant::now() + check.timeout;
    let late = || format!("no answer from {} in {} ms", target.to, check.timeout.as_millis());
    let connecting = exchange(target, connecting, check);
    let connected = tokio::time::timeout_at(end, connecting).await.unwrap_or_else(|_| Err(late()));
    let (mut stream, expires) = connected.map_err(Failure::Connection)?;
    let CheckKind::Mqtt { v5, .. } = check.kind else {
        // With close_notify (RFC 8446 §6.1).
        let _ = stream.shutdown().await;
        return Ok(expires);
    };
    if let Some(mss) = mss {
        let arrives = send_largest(&mut stream, v5, mss, end).await;
        arrives.map_err(|error| Failure::Largest(format!("{}: {error}", target.to)))?;
    }
    let _ = stream.write_all(&client::DISCONNECT).await;
    Ok(expires)
}

async fn exchange(
    target: Target<'_>,
    connecting: impl Future<Output = io::Result<TcpStream>>,
    check: &HealthCheck,
) -> Result<(BrokerStream, Expires), String> {
    let header = target.proxy.then(proxy_header::local);
    let tcp = client::open(target.to, connecting, header.as_deref()).await?;
    let (mut stream, expires) = match target.tls {
        None => (BrokerStream::Left(tcp), None),
        Some(settings) => {
            let connector = Connector::load(settings).map_err(|e| e.to_string())?;
            let connected = connector.connect(target.real, tcp).await;
            let stream = connected.map_err(|e| format!("TLS with {}: {e}", target.to))?;
            let expires = tls::expires(stream.get_ref().1.peer_certificates().unwrap_or_default());
            (BrokerStream::Right(Box::new(stream)), expires)
        }
    };
    if let CheckKind::Mqtt { v5, client_id, username, password } = &check.kind {
        let options = ConnectOptions {
            v5: *v5,
            client_id,
            username: username.as_deref(),
            password: password.as_deref(),
            keep_alive: KEEPALIVE,
        };
        client::connect(&mut stream, target.to, &options).await?;
    }
    Ok((stream, expires))
}

/// A segment as large as clients', in an UNSUBSCRIBE that changes nothing, and TCP's word that it is there.
async fn send_largest(
    stream: &mut BrokerStream,
    v5: bool,
    mss: usize,
    end: Instant,
) -> Result<(), String> {
    let failed = |e: io::Error| format!("sending a large packet: {e}");
    // No more than the broker's kernel takes, where that is less.
    let mss = mss.min(tcp::mss(tcp_of(stream)).map_err(failed)? + TIMESTAMPS);
    stream.write_all(&client::unsubscribe(v5, mss)).await.map_err(failed)?;
    while tcp::unacknowledged(tcp_of(stream)).is_ok_and(|segments| segments > 0) {
        if Instant::now() >= end {
            return Err(format!(
                "small packets arrive, and segments of {mss} bytes do not: a link on the way has a smaller MTU; raise \
                 that, or set max_packet to what fits"
            ));
        }
        tokio::time::sleep(POLL).await;
    }
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
        let target =
            Target { real: to.ip(), to, proxy: false, path: None, delayed: false, tls: None };
        let result = runtime.block_on(probe(target, &check)).unwrap();
        let sent = broker.join().unwrap();
        assert_eq!(sent[8], if v5 { 5 } else { 4 });
        assert_eq!(sent[9], 0xc2, "clean, with user name and password");
        assert!(sent.ends_with(b"\0\x05check\0\x04user\0\x06secret"), "{sent:?}");
        result.map(drop)
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
