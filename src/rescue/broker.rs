//! A connection to a broker, on which a client's messages are published at QoS 0.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

use crate::brokers::connection::{BrokerInfo, BrokerStream};
use crate::mqtt::client::{self, ConnectOptions};
use crate::mqtt::proxy_header;
use crate::mqtt::wire::{self, kind};

/// Seconds; longer than any of these connections lasts.
const KEEPALIVE: u16 = 120;
const OPEN: Duration = Duration::from_secs(2);
/// For a write, and for the answer to PINGREQ.
const PATIENCE: Duration = Duration::from_secs(5);

pub struct Connection {
    stream: BrokerStream,
    /// Messages that the broker has not confirmed.
    pub unconfirmed: u64,
}

impl Connection {
    /// For a client (`peer`), without credentials, as it was.
    pub async fn open(
        broker: &BrokerInfo,
        peer: SocketAddr,
        service: SocketAddr,
        v5: bool,
    ) -> Result<Self, String> {
        let header = broker.proxy_protocol.then(|| proxy_header::header(peer, service));
        let client_id = format!("rescue-{:08x}", getrandom::u32().unwrap_or_default());
        let options = ConnectOptions {
            v5,
            client_id: &client_id,
            username: None,
            password: None,
            keep_alive: KEEPALIVE,
        };
        let opening = async {
            let opened = broker.open(header).await;
            let mut stream = opened.map_err(|e| format!("connecting to {}: {e}", broker.addr))?;
            client::connect(&mut stream, broker.addr, &options).await?;
            Ok(Self { stream, unconfirmed: 0 })
        };
        match timeout(OPEN, opening).await {
            Ok(result) => result,
            Err(_) => Err(format!("no answer from {} in {} s", broker.addr, OPEN.as_secs())),
        }
    }

    /// Writes a PUBLISH; false: the broker may or may not have it.
    pub async fn write(&mut self, message: &[u8]) -> bool {
        self.unconfirmed += 1;
        matches!(timeout(PATIENCE, self.stream.write_all(message)).await, Ok(Ok(())))
    }

    /// A broker works through a connection's packets in order, so PINGRESP says that it has them all.
    pub async fn confirm(&mut self) -> bool {
        if self.unconfirmed == 0 {
            return true;
        }
        self.unconfirmed = 0;
        matches!(timeout(PATIENCE, self.ping()).await, Ok(Some(())))
    }

    async fn ping(&mut self) -> Option<()> {
        self.stream.write_all(&client::PINGREQ).await.ok()?;
        let mut received = Vec::new();
        loop {
            if self.stream.read_buf(&mut received).await.ok()? == 0 {
                return None;
            }
            while let Some(h) = wire::header(&received).ok()? {
                match h.kind() {
                    kind::PINGRESP => return Some(()),
                    kind::DISCONNECT => return None,
                    _ if received.len() >= h.total() => drop(received.drain(..h.total())),
                    _ => break,
                }
            }
        }
    }

    pub async fn close(mut self) {
        let _ = timeout(PATIENCE, self.stream.write_all(&client::DISCONNECT)).await;
    }
}
