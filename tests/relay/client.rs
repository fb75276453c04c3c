//! A client that writes and reads packets one by one.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::support::lab::unpadded;
use crate::support::mqtt::varint;
pub use crate::support::mqtt::{packet, text};

/// What a client reads and writes.
pub trait Wire: Read + Write + Send {
    fn patience(&mut self, patience: Duration);
}

impl Wire for TcpStream {
    fn patience(&mut self, patience: Duration) {
        self.set_read_timeout(Some(patience)).unwrap();
    }
}

pub struct Client {
    wire: Box<dyn Wire>,
    level: u8,
    next: u16,
}

/// A message that a client got.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Message {
    pub topic: String,
    pub payload: Vec<u8>,
    pub qos: u8,
    pub retain: bool,
}

impl Message {
    /// Without what `padded` added.
    pub fn text(&self) -> String {
        let text = unpadded(&String::from_utf8_lossy(&self.payload)).to_owned();
        if self.payload.len() > 1000 {
            assert!(self.payload == padded(&text, self.payload.len()), "{text}: damaged");
            assert!([1 << 20, 65_535].contains(&self.payload.len()), "{text}: cut, or longer");
        }
        text
    }
}

/// Sizes of messages that tests go through: as they are, and a mebibyte.
pub const SIZES: [usize; 2] = [0, 1 << 20];

/// A payload of at least that size; see `unpadded`.
pub fn padded(text: &str, size: usize) -> Vec<u8> {
    let mut payload = text.as_bytes().to_vec();
    payload.resize(size.max(text.len()), b'.');
    payload
}

/// A CONNECT to be.
#[derive(Clone)]
pub struct Connect {
    pub level: u8,
    pub id: String,
    pub clean: bool,
    pub keepalive: u16,
    pub will: Option<(String, String)>,
    pub properties: Vec<u8>,
}

/// These clients send no PINGREQ, however long their tests take.
pub fn connect(level: u8, id: &str) -> Connect {
    let id = id.to_owned();
    Connect { level, id, clean: true, keepalive: 600, will: None, properties: Vec::new() }
}

impl Connect {
    pub fn packet(&self) -> Vec<u8> {
        let mut body = text("MQTT");
        let will = if self.will.is_some() { 0x04 } else { 0 };
        body.extend([self.level, u8::from(self.clean) << 1 | will]);
        body.extend(self.keepalive.to_be_bytes());
        if self.level == 5 {
            body.extend(varint(self.properties.len()));
            body.extend(&self.properties);
        }
        body.extend(text(&self.id));
        if let Some((topic, message)) = &self.will {
            if self.level == 5 {
                body.push(0);
            }
            body.extend(text(topic));
            body.extend(text(message));
        }
        packet(0x10, &body)
    }
}

impl Client {
    pub fn new(wire: impl Wire + 'static, level: u8) -> Self {
        let mut wire: Box<dyn Wire> = Box::new(wire);
        wire.patience(Duration::from_secs(10));
        Self { wire, level, next: 0 }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.wire.write_all(bytes).unwrap();
    }

    /// A whole packet; `None` at the end of the connection.
    pub fn packet(&mut self) -> Option<Vec<u8>> {
        self.try_packet().unwrap()
    }

    pub fn try_packet(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; 2];
        match self.wire.read(&mut bytes[..1]) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
            Err(e) => return Err(e),
        }
        self.wire.read_exact(&mut bytes[1..])?;
        let (mut length, mut shift) = (usize::from(bytes[1] & 0x7f), 7);
        while bytes.last().unwrap() & 0x80 != 0 {
            let mut byte = [0];
            self.wire.read_exact(&mut byte)?;
            bytes.push(byte[0]);
            length |= usize::from(byte[0] & 0x7f) << shift;
            shift += 7;
        }
        let header = bytes.len();
        bytes.resize(header + length, 0);
        self.wire.read_exact(&mut bytes[header..])?;
        Ok(Some(bytes))
    }

    /// Whether nothing comes for a while.
    pub fn is_quiet(&mut self, patience: Duration) -> bool {
        self.wire.patience(patience);
        let quiet = self.try_packet().is_err();
        self.wire.patience(Duration::from_secs(10));
        quiet
    }

    #[track_caller]
    pub fn expect(&mut self, expected: &[u8]) {
        let packet = self.packet();
        assert_eq!(packet.as_deref(), Some(expected), "{packet:02x?}");
    }

    /// The next packet is the last.
    #[track_caller]
    pub fn expect_end(&mut self) {
        let packet = self.packet();
        assert_eq!(packet, None, "{packet:02x?}");
    }

    pub fn id(&mut self) -> u16 {
        self.next = self.next % 60_000 + 1;
        self.next
    }

    /// A PUBLISH, whose answer is not waited for.
    pub fn publish(&mut self, topic: &str, qos: u8, payload: &[u8]) -> u16 {
        self.publish_with(topic, qos << 1, &[], payload)
    }

    pub fn publish_with(&mut self, topic: &str, flags: u8, properties: &[u8], data: &[u8]) -> u16 {
        let mut body = text(topic);
        let id = if flags & 6 == 0 { 0 } else { self.id() };
        if id != 0 {
            body.extend(id.to_be_bytes());
        }
        if self.level == 5 {
            body.extend(varint(properties.len()));
            body.extend(properties);
        }
        body.extend(data);
        self.send(&packet(0x30 | flags, &body));
        id
    }

    /// A PUBLISH, and what its broker answers.
    #[track_caller]
    pub fn publish_and_wait(&mut self, topic: &str, qos: u8, payload: &[u8]) {
        let id = self.publish(topic, qos, payload).to_be_bytes();
        if qos == 1 {
            self.expect_ack(0x40, id);
        }
        if qos == 2 {
            self.expect_ack(0x50, id);
            self.send(&packet(0x62, &id));
            self.expect_ack(0x70, id);
        }
    }

    /// An acknowledgement; in MQTT 5 with whatever reason behind it, below 0x80.
    #[track_caller]
    fn expect_ack(&mut self, first: u8, id: [u8; 2]) {
        let packet = self.packet().unwrap();
        assert_eq!((packet[0], &packet[2..4]), (first, &id[..]), "{packet:02x?}");
        assert!(packet.len() == 4 || packet[4] < 0x80, "{packet:02x?}");
    }

    /// A SUBSCRIBE, whose SUBACK is not waited for.
    pub fn send_subscribe(&mut self, filters: &[&str], qos: u8) -> u16 {
        let id = self.id();
        let mut body = id.to_be_bytes().to_vec();
        if self.level == 5 {
            body.push(0);
        }
        for filter in filters {
            body.extend(text(filter));
            body.push(qos);
        }
        self.send(&packet(0x82, &body));
        id
    }

    #[track_caller]
    pub fn subscribe(&mut self, filters: &[&str], qos: u8) -> Vec<u8> {
        let id = self.send_subscribe(filters, qos);
        let mut early = Vec::new();
        loop {
            let packet = self.packet().unwrap();
            // Retained messages may come first.
            if packet[0] >> 4 == 3 {
                early.push(packet);
                continue;
            }
            assert_eq!((packet[0], &packet[2..4]), (0x90, &id.to_be_bytes()[..]), "{packet:02x?}");
            assert!(early.is_empty(), "messages before SUBACK: {early:02x?}");
            return packet[if self.level == 5 { 5 } else { 4 }..].to_vec();
        }
    }

    /// The next message, acknowledged.
    #[track_caller]
    pub fn message(&mut self) -> Message {
        self.try_message().expect("a message")
    }

    pub fn try_message(&mut self) -> Option<Message> {
        loop {
            let packet = self.try_packet().ok()??;
            match packet[0] >> 4 {
                3 => return Some(self.take(&packet)),
                6 => {
                    let id = [packet[2], packet[3]];
                    self.send(&crate::client::packet(0x70, &id));
                }
                _ => panic!("{packet:02x?}"),
            }
        }
    }

    /// A message that comes soon, if one does.
    pub fn try_message_soon(&mut self) -> Option<Message> {
        self.wire.patience(Duration::from_millis(400));
        let message = self.try_message();
        self.wire.patience(Duration::from_secs(10));
        message
    }

    /// A message out of its packet, which is acknowledged.
    pub fn take(&mut self, packet: &[u8]) -> Message {
        let (message, id) = self.read(packet);
        match message.qos {
            1 => self.send(&crate::client::packet(0x40, &id.to_be_bytes())),
            2 => self.send(&crate::client::packet(0x50, &id.to_be_bytes())),
            _ => {}
        }
        message
    }

    /// What is in a PUBLISH, and its identifier.
    pub fn read(&self, packet: &[u8]) -> (Message, u16) {
        let header = 1 + packet[1..].iter().position(|b| b & 0x80 == 0).unwrap() + 1;
        let length = usize::from(u16::from_be_bytes([packet[header], packet[header + 1]]));
        let mut at = header + 2 + length;
        let topic = String::from_utf8(packet[header + 2..at].to_vec()).unwrap();
        let qos = packet[0] >> 1 & 3;
        let mut id = 0;
        if qos > 0 {
            id = u16::from_be_bytes([packet[at], packet[at + 1]]);
            at += 2;
        }
        if self.level == 5 {
            // Properties of less than 128 bytes.
            at += 1 + usize::from(packet[at]);
        }
        let payload = packet[at..].to_vec();
        (Message { topic, payload, qos, retain: packet[0] & 1 != 0 }, id)
    }

    pub fn ping(&mut self) {
        self.send(&[0xc0, 0]);
        self.expect(&[0xd0, 0]);
    }

    /// DISCONNECT, and the relay closes.
    #[track_caller]
    pub fn disconnect(mut self) {
        self.send(&[0xe0, 0]);
        self.expect_end();
    }
}
