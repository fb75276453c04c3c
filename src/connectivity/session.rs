//! What a test says to a broker, and what has to come back. Written byte by byte: MQTT 3.1.1 and 5 differ little here.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

use crate::brokers::connection::{BrokerStream, tcp_of};
use crate::kernel::tcp;
use crate::mqtt::client::{DISCONNECT, PINGREQ};
use crate::mqtt::wire::{self, kind, put_varint};

/// For each answer.
pub const PATIENCE: Duration = Duration::from_secs(3);

/// A connection whose CONNECT was accepted.
pub struct Session {
    stream: BrokerStream,
    v5: bool,
    buffer: Vec<u8>,
    id: u16,
    /// Of messages that came in.
    topics: Vec<String>,
}

/// A control packet that came in.
struct Packet {
    header: wire::Header,
    bytes: Vec<u8>,
    /// Of a PUBLISH.
    topic: Option<String>,
}

impl Session {
    /// Of a stream on which CONNACK was the last that came.
    pub fn new(stream: BrokerStream, v5: bool) -> Self {
        Self { stream, v5, buffer: Vec::new(), id: 0, topics: Vec::new() }
    }

    /// Publishes at QoS 0. PINGRESP says that the broker has read all that was in front of PINGREQ.
    pub async fn publish_qos0(&mut self, topic: &str, payload: &[u8]) -> Result<(), String> {
        let mut packets = publish(self.v5, topic, 0, 0, payload);
        packets.extend(PINGREQ);
        self.send(&packets).await?;
        self.answer("PINGRESP", |packet| packet.header.kind() == kind::PINGRESP).await.map(drop)
    }

    /// Publishes at QoS 1, and waits for the acknowledgement.
    pub async fn publish_qos1(&mut self, topic: &str, payload: &[u8]) -> Result<(), String> {
        let id = self.next_id();
        let packet = publish(self.v5, topic, 1, id, payload);
        self.send(&packet).await?;
        let answer = self.answer("PUBACK", |packet| packet.is(kind::PUBACK, id)).await?;
        accepted("PUBLISH", wire::reason(&answer.bytes, answer.header))
    }

    /// Subscribes to a filter.
    pub async fn subscribe(&mut self, filter: &str) -> Result<(), String> {
        let id = self.next_id();
        let mut body = id.to_be_bytes().to_vec();
        if self.v5 {
            body.push(0);
        }
        body.extend((filter.len() as u16).to_be_bytes());
        body.extend(filter.as_bytes());
        // At QoS 0, so that nothing has to be acknowledged.
        body.push(0);
        self.send(&packet(kind::SUBSCRIBE << 4 | 2, &body)).await?;
        let answer = self.answer("SUBACK", |packet| packet.is(kind::SUBACK, id)).await?;
        accepted("SUBSCRIBE", answer.bytes.last().copied().unwrap_or(0x80) & 0x80)
    }

    /// Waits for a message on a topic, which may be there already.
    pub async fn message(&mut self, topic: &str) -> Result<(), String> {
        if self.topics.iter().any(|seen| seen == topic) {
            return Ok(());
        }
        let is_it = |packet: &Packet| packet.topic.as_deref() == Some(topic);
        self.answer("message", is_it).await.map(drop)
    }

    /// Payload bytes of a message that fills one segment.
    pub fn largest_payload(&self, topic: &str) -> io::Result<usize> {
        let mss = tcp::mss(tcp_of(&self.stream))?;
        let around = publish(self.v5, topic, 1, 1, &[0; 256]).len() - 256;
        Ok(mss.saturating_sub(around).max(256))
    }

    /// DISCONNECT, and the end.
    pub async fn end(mut self) {
        let _ = self.stream.write_all(&DISCONNECT).await;
        let _ = self.stream.shutdown().await;
        // Until the broker's FIN is there, so that no RST takes the way of the test.
        let _ = tokio::time::timeout(Duration::from_millis(200), self.stream.read(&mut [0])).await;
        // What was not acknowledged is not repeated when nobody takes it any more.
        let _ = tcp_of(&self.stream).set_zero_linger();
    }

    fn next_id(&mut self) -> u16 {
        self.id += 1;
        self.id
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.stream.write_all(bytes).await.map_err(|e| format!("sending: {e}"))
    }

    async fn answer(
        &mut self,
        what: &str,
        is_it: impl Fn(&Packet) -> bool,
    ) -> Result<Packet, String> {
        let end = Instant::now() + PATIENCE;
        loop {
            while let Some(packet) = self.take()? {
                if is_it(&packet) {
                    return Ok(packet);
                }
                if packet.header.kind() == kind::DISCONNECT {
                    let code = packet.bytes.get(2).copied().unwrap_or(0);
                    return Err(format!(
                        "DISCONNECT with reason code {code:#04x} instead of {what}"
                    ));
                }
            }
            let mut chunk = [0; 4096];
            let read = tokio::time::timeout_at(end, self.stream.read(&mut chunk)).await;
            match read {
                Err(_) => {
                    let acknowledged =
                        tcp::unacknowledged(tcp_of(&self.stream)).is_ok_and(|n| n == 0);
                    let seconds = PATIENCE.as_secs();
                    return Err(if acknowledged {
                        format!("no {what} in {seconds} s, though it arrived")
                    } else {
                        format!("no {what} in {seconds} s, and it did not arrive")
                    });
                }
                Ok(Ok(0)) => return Err(format!("the connection was closed instead of {what}")),
                Ok(Ok(n)) => self.buffer.extend(&chunk[..n]),
                Ok(Err(e)) => return Err(format!("{e} instead of {what}")),
            }
        }
    }

    fn take(&mut self) -> Result<Option<Packet>, String> {
        let header = wire::header(&self.buffer).map_err(|e| e.to_string())?;
        let Some(header) = header.filter(|h| h.total() <= self.buffer.len()) else {
            return Ok(None);
        };
        let bytes: Vec<u8> = self.buffer.drain(..header.total()).collect();
        let topic = match header.kind() {
            kind::PUBLISH => wire::publish(&bytes, header, self.v5).map_err(|e| e.to_string())?,
            _ => None,
        };
        let topic = topic.map(|publish| publish.topic.to_owned());
        self.topics.extend(topic.clone());
        Ok(Some(Packet { header, bytes, topic }))
    }
}

impl Packet {
    fn is(&self, kind: u8, id: u16) -> bool {
        self.header.kind() == kind && wire::id(&self.bytes, self.header).is_ok_and(|is| is == id)
    }
}

fn accepted(what: &str, code: u8) -> Result<(), String> {
    if code < 0x80 {
        Ok(())
    } else {
        Err(format!("{what} was refused with reason code {code:#04x}"))
    }
}

fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![first];
    put_varint(body.len(), &mut packet);
    packet.extend(body);
    packet
}

fn publish(v5: bool, topic: &str, qos: u8, id: u16, payload: &[u8]) -> Vec<u8> {
    let mut body = (topic.len() as u16).to_be_bytes().to_vec();
    body.extend(topic.as_bytes());
    if qos > 0 {
        body.extend(id.to_be_bytes());
    }
    if v5 {
        body.push(0);
    }
    body.extend(payload);
    packet(kind::PUBLISH << 4 | qos << 1, &body)
}
