//! One client's stream, from its first misrouted PUBLISH on.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tracing::{debug, info};

use super::broker::Connection;
use super::{HELD_MAX, SHARE, Shared, held};
use crate::brokers::router::{Broker, Router};
use crate::datapath::rescues::{Piece, StreamKey};
use crate::mqtt::wire::{self, Header, Malformed, kind};

/// Longer than the datapath answers a client (`bpf/forward/end/rescue_stage.h`): so all that it acknowledges has a stream.
const IDLE: Duration = Duration::from_secs(20);
/// Before the first message is published.
const HEAD_START: Duration = Duration::from_millis(100);
/// Largest message that is published.
const MESSAGE_MAX: usize = 4 << 20;

/// Brokers and routes of a service.
#[derive(Debug, Clone)]
pub struct Destination {
    pub name: String,
    pub addr: SocketAddr,
    pub router: Arc<Router>,
}

/// A client's topic aliases (MQTT 5 §3.3.2.3.4), as far as there is room for their topics.
#[derive(Default)]
struct Aliases {
    topics: HashMap<u16, String>,
    /// Of all topics that were set, those that another has replaced included.
    bytes: usize,
}

impl Aliases {
    fn set(&mut self, alias: u16, topic: &str) -> Result<(), Malformed> {
        self.bytes += topic.len();
        if self.bytes > SHARE {
            return Err(Malformed { code: 0x97, what: "too many topic aliases" });
        }
        self.topics.insert(alias, topic.to_owned());
        Ok(())
    }
}

/// A stream being published.
pub struct Stream {
    shared: Arc<Shared>,
    to: Destination,
    key: StreamKey,
    v5: bool,
    /// Sequence number behind what has come.
    next: u32,
    /// What has come and is not published.
    buffer: Vec<u8>,
    aliases: Aliases,
    connections: HashMap<Broker, Connection>,
    failed: Vec<Broker>,
    published: u64,
}

impl Stream {
    pub fn new(shared: Arc<Shared>, to: Destination, key: StreamKey, v5: bool) -> Self {
        Self {
            shared,
            to,
            key,
            v5,
            next: key.start,
            buffer: Vec::new(),
            aliases: Aliases::default(),
            connections: HashMap::new(),
            failed: Vec::new(),
            published: 0,
        }
    }

    /// Until the client closes, is silent, or sends what is no MQTT.
    pub async fn run(mut self, mut pieces: UnboundedReceiver<Piece>) {
        // Its broker works on what came before: messages of one topic stay in order.
        tokio::time::sleep(HEAD_START).await;
        loop {
            let Ok(Some(piece)) = tokio::time::timeout(IDLE, pieces.recv()).await else { break };
            let last = piece.last;
            if !self.add(&piece) {
                break;
            }
            // What has come already can go on together.
            let mut ended = last;
            while let Ok(piece) = pieces.try_recv() {
                ended |= piece.last;
                if !self.add(&piece) {
                    break;
                }
            }
            // What could not be reached before may be reachable now.
            self.failed.clear();
            let published = self.publish().await;
            self.confirm().await;
            if let Err(error) = published {
                debug!(client = %self.key.client, %error, "rescue ends");
                self.shared.observed.rescue_lost.add(1);
                self.forget();
                break;
            }
            if ended {
                break;
            }
        }
        pieces.close();
        while let Ok(piece) = pieces.try_recv() {
            self.shared.held.sub(held(&piece));
        }
        if !self.buffer.is_empty() {
            // The beginning of a message.
            self.shared.observed.rescue_lost.add(1);
            self.forget();
        }
        for connection in self.connections.into_values() {
            connection.close().await;
        }
        info!(
            client = %self.key.client, service = self.to.name, messages = self.published,
            "published for a client that was at the wrong group"
        );
    }

    /// Takes a piece; false: one is missing before it.
    fn add(&mut self, piece: &Piece) -> bool {
        let known = self.next.wrapping_sub(piece.seq) as usize;
        let Some(new) = piece.bytes.get(known..) else {
            self.shared.held.sub(held(piece));
            return known < 1 << 31;
        };
        self.buffer.extend_from_slice(new);
        self.shared.held.sub(held(piece) - new.len() as u64);
        self.next = piece.seq.wrapping_add(piece.bytes.len() as u32);
        true
    }

    fn forget(&mut self) {
        self.shared.held.sub(self.buffer.len() as u64);
        self.buffer.clear();
    }

    /// Publishes all messages that are complete.
    async fn publish(&mut self) -> Result<(), Malformed> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut at = 0;
        let result = loop {
            let rest = &buffer[at..];
            match wire::header(rest) {
                Err(error) => break Err(error),
                Ok(Some(h)) if h.total() > MESSAGE_MAX => {
                    break Err(Malformed { code: 0x95, what: "message too large to be rescued" });
                }
                Ok(Some(h)) if rest.len() >= h.total() => {
                    if let Err(error) = self.packet(&rest[..h.total()], h).await {
                        break Err(error);
                    }
                    at += h.total();
                }
                // Others need the room, too, and not all of these messages will ever be complete.
                Ok(_) if self.shared.held.get() > HELD_MAX && rest.len() > SHARE => {
                    break Err(Malformed { code: 0x97, what: "too much is held of others" });
                }
                Ok(_) => break Ok(()),
            }
        };
        self.shared.held.sub(at as u64);
        buffer.drain(..at);
        if buffer.len() < SHARE {
            buffer.shrink_to(SHARE);
        }
        self.buffer = buffer;
        result
    }

    /// One control packet. Those that are no PUBLISH were for the connection that has ended.
    async fn packet(&mut self, packet: &[u8], h: Header) -> Result<(), Malformed> {
        if h.kind() != kind::PUBLISH {
            return Ok(());
        }
        let short = Malformed { code: 0x81, what: "PUBLISH is shorter than what is in it" };
        let p = wire::publish(packet, h, self.v5)?.ok_or(short)?;
        let topic = if p.topic.is_empty() {
            self.aliases.topics.get(&p.alias).cloned()
        } else {
            if p.alias != 0 {
                self.aliases.set(p.alias, p.topic)?;
            }
            Some(p.topic.to_owned())
        };
        // The alias was set before: only its broker knew it.
        let Some(topic) = topic else {
            self.shared.observed.rescue_lost.add(1);
            return Ok(());
        };
        if p.qos > 0 {
            self.shared.observed.rescue_left.add(1);
            return Ok(());
        }
        let mut message = Vec::with_capacity(packet.len());
        if self.v5 {
            wire::rewrite_publish(h, &p, &topic, 0, &mut message);
            message.extend_from_slice(&packet[p.payload_at..]);
        } else {
            message.extend_from_slice(packet);
        }
        self.send(&topic, &message).await;
        Ok(())
    }

    /// To the topic's broker, or to another of its group if that cannot be reached.
    async fn send(&mut self, topic: &str, message: &[u8]) {
        loop {
            let out = |broker: Broker| {
                let addr = self.to.router.broker(broker).addr.ip();
                self.failed.contains(&broker) || self.shared.reals.is_out(&self.to.name, addr)
            };
            // A topic of an "any" route would have followed its connection: to a client's home.
            let router = &self.to.router;
            let broker = router
                .broker_of(topic, out)
                .unwrap_or_else(|| router.home_of(topic.as_bytes(), out));
            if self.failed.contains(&broker) {
                self.shared.observed.rescue_lost.add(1);
                return;
            }
            let open = match self.connections.remove(&broker) {
                Some(connection) => Ok(connection),
                None => {
                    let info = self.to.router.broker(broker);
                    Connection::open(info, self.key.client, self.to.addr, self.v5).await
                }
            };
            let mut connection = match open {
                Ok(connection) => connection,
                Err(error) => {
                    info!(%error, "rescue: another broker is tried");
                    self.failed.push(broker);
                    continue;
                }
            };
            // Once something was written, it may have been read: never to two brokers.
            if connection.write(message).await {
                self.connections.insert(broker, connection);
            } else {
                self.shared.observed.rescue_lost.add(connection.unconfirmed);
                self.failed.push(broker);
            }
            return;
        }
    }

    /// Waits until the brokers say that they have all of it.
    async fn confirm(&mut self) {
        for (broker, mut connection) in std::mem::take(&mut self.connections) {
            let count = connection.unconfirmed;
            if connection.confirm().await {
                self.shared.observed.rescued.add(count);
                self.published += count;
                self.connections.insert(broker, connection);
            } else {
                self.shared.observed.rescue_lost.add(count);
                self.failed.push(broker);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_of_aliases_are_bounded_however_often_they_are_set() {
        let long = "t".repeat(SHARE / 2);
        for second in [1, 2] {
            let mut aliases = Aliases::default();
            assert!(aliases.set(1, &long).is_ok() && aliases.set(second, &long).is_ok());
            assert_eq!(aliases.set(3, "t").unwrap_err().what, "too many topic aliases");
            let kept: usize = aliases.topics.values().map(String::len).sum();
            assert!(kept <= SHARE && !aliases.topics.contains_key(&3));
        }
    }
}
