//! A client's connection through a loaded datapath, for tests.

use std::net::SocketAddr;

use super::datapath::{Fixture, JUMPED, SERVICE, SERVICE6};
use super::{mqtt, packet};

/// A client's connection: sends its stream in whatever pieces the test wants.
pub struct Conn<'a> {
    pub fixture: &'a Fixture,
    pub client: SocketAddr,
    pub service: SocketAddr,
    pub isn: u32,
    pub sent: u32,
    /// What it acknowledges: a CONNACK once something is sent.
    pub ack: u32,
}

/// What the tests look at.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    pub group: &'static str,
    pub counters: Vec<String>,
}

impl<'a> Conn<'a> {
    pub fn new(fixture: &'a Fixture, client: &str) -> Self {
        let client: SocketAddr = client.parse().unwrap();
        let service = if client.is_ipv4() { SERVICE } else { SERVICE6 };
        // Close to the wrap, so that every test crosses it.
        Self {
            fixture,
            client,
            service: service.parse().unwrap(),
            isn: u32::MAX - 20,
            sent: 0,
            ack: 77,
        }
    }

    pub fn open(fixture: &'a Fixture, client: &str) -> Self {
        let mut conn = Self::new(fixture, client);
        conn.syn();
        conn
    }

    pub fn next_seq(&self) -> u32 {
        self.isn.wrapping_add(1).wrapping_add(self.sent)
    }

    pub fn seen(&self, sent: &[u8]) -> Seen {
        self.seen_as(sent, sent)
    }

    /// Sends a packet; but for its destination, `arrives` has to come out.
    pub fn seen_as(&self, sent: &[u8], arrives: &[u8]) -> Seen {
        let (outcome, counters) = self.fixture.send_counting(sent);
        assert_eq!(outcome.verdict, JUMPED, "the balancer was not reached");
        assert!(packet::ip_checksum_right(&outcome.packet));
        let behind_addresses = if self.client.is_ipv4() { 34 } else { 54 };
        if packet::is_tcp(sent) {
            assert_eq!(outcome.packet[behind_addresses..], arrives[behind_addresses..]);
        } else {
            assert_eq!(outcome.packet.len(), sent.len());
        }
        let group = match packet::dst(&outcome.packet).to_string().as_str() {
            "10.1.50.1" | "fd01:50::1" => "a",
            "10.1.50.2" | "fd01:50::2" => "b",
            "10.1.50.251" => "relay",
            "10.1.50.250" | "fd01:50::250" => "default",
            _ => "none",
        };
        Seen { group, counters: counters.into_iter().map(|(k, n)| format!("{k} {n}")).collect() }
    }

    pub fn syn(&mut self) -> Seen {
        self.seen(&packet::tcp(self.client, self.service, self.isn, 0, |h| h.syn = true, &[]))
    }

    pub fn data_at(&self, offset: u32, payload: &[u8]) -> Seen {
        let seq = self.isn.wrapping_add(1).wrapping_add(offset);
        self.seen(&packet::tcp(self.client, self.service, seq, self.ack, |_| {}, payload))
    }

    pub fn data(&mut self, payload: &[u8]) -> Seen {
        let seen = self.data_at(self.sent, payload);
        self.sent += payload.len() as u32;
        self.ack = 81;
        seen
    }

    /// The same, whatever becomes of it.
    pub fn write(&mut self, payload: &[u8]) {
        self.fixture.send(&self.segment(payload));
        self.sent += payload.len() as u32;
        self.ack = 81;
    }

    /// The next segment, not sent yet.
    pub fn segment(&self, payload: &[u8]) -> Vec<u8> {
        packet::tcp(self.client, self.service, self.next_seq(), self.ack, |_| {}, payload)
    }

    /// Sends a PUBLISH for which the flow is ended: what the broker gets is DISCONNECT and FIN.
    pub fn ended(&mut self, publish: &[u8]) -> Seen {
        let sent = self.segment(publish);
        self.sent += publish.len() as u32;
        self.seen_as(
            &sent,
            &packet::tcp(
                self.client,
                self.service,
                self.next_seq().wrapping_sub(publish.len() as u32),
                self.ack,
                |h| h.fin = true,
                &mqtt::disconnect(),
            ),
        )
    }

    pub fn flagged(&self, shape: impl FnOnce(&mut etherparse::TcpHeader)) -> Seen {
        self.seen(&packet::tcp(self.client, self.service, self.next_seq(), self.ack, shape, &[]))
    }

    pub fn prediction(&self) -> Option<(String, String)> {
        let row = self.fixture.client(&self.client.ip().to_string())?;
        Some((row.topic, row.group))
    }
}

#[allow(clippy::unnecessary_wraps)] // to be compared with what may be missing
pub fn predicted(topic: &str, group: &str) -> Option<(String, String)> {
    Some((topic.to_owned(), group.to_owned()))
}

pub fn seen(group: &'static str, counters: &[&str]) -> Seen {
    Seen { group, counters: counters.iter().map(|c| (*c).to_owned()).collect() }
}
