//! The PUBLISHes in what one client sends, each with its place in the TCP stream.

use std::collections::{BTreeMap, HashMap};

use crate::mqtt::wire::{self, kind};

/// Bytes that are kept of a stream with a gap in it, or of a packet that is not whole.
const BUFFER_MAX: usize = 1 << 20;

/// A PUBLISH.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// Offset of its first byte from that of the stream.
    pub at: u64,
    /// `None`: its alias was given before the capture began.
    pub topic: Option<String>,
    pub qos: u8,
}

/// A client's bytes, put in order.
#[derive(Debug, Default)]
pub struct Stream {
    /// Offset of the first byte that has not come.
    next: u64,
    /// What came behind a gap.
    ahead: BTreeMap<u64, Vec<u8>>,
    ahead_bytes: usize,
    /// The control packet that is not whole, from its first byte on.
    rest: Vec<u8>,
    /// Bytes of the control packet in hand that need not be kept.
    skip: u64,
    v5: bool,
    client_id: Option<String>,
    aliases: HashMap<u16, String>,
    /// It is no MQTT, or not from its beginning.
    opaque: bool,
}

impl Stream {
    /// The client id that its CONNECT had.
    pub fn client_id(&self) -> Option<&str> {
        self.client_id.as_deref()
    }

    /// Takes a segment. Returns the PUBLISHes that begin in what is in order now.
    pub fn take(&mut self, at: u64, bytes: &[u8]) -> Vec<Publish> {
        if !self.opaque && at + bytes.len() as u64 > self.next {
            // Of two that begin at one place, the longer has all of the other.
            let there = self.ahead.entry(at).or_default();
            if there.len() < bytes.len() {
                self.ahead_bytes += bytes.len() - there.len();
                *there = bytes.to_vec();
            }
        }
        let mut found = Vec::new();
        while let Some((at, bytes)) = self.ahead.pop_first() {
            if at > self.next {
                self.ahead.insert(at, bytes);
                break;
            }
            self.ahead_bytes -= bytes.len();
            let known = (self.next - at) as usize;
            if let Some(new) = bytes.get(known..) {
                self.next += new.len() as u64;
                self.parse(new, &mut found);
            }
        }
        if self.ahead_bytes + self.rest.len() > BUFFER_MAX {
            self.give_up();
        }
        found
    }

    /// Whether all that came of it was read.
    pub fn is_read(&self) -> bool {
        !self.opaque && self.ahead.is_empty()
    }

    fn give_up(&mut self) {
        self.opaque = true;
        self.ahead.clear();
        self.ahead_bytes = 0;
        self.rest = Vec::new();
    }

    fn parse(&mut self, mut new: &[u8], found: &mut Vec<Publish>) {
        let skipped = (self.skip as usize).min(new.len());
        self.skip -= skipped as u64;
        new = &new[skipped..];
        self.rest.extend_from_slice(new);
        loop {
            let Ok(parsed) = self.packet(found) else {
                self.give_up();
                return;
            };
            let Some(total) = parsed else { return };
            let here = total.min(self.rest.len());
            self.skip = (total - here) as u64;
            self.rest.drain(..here);
        }
    }

    /// The control packet that `rest` begins with: its length, once enough of it is there.
    fn packet(&mut self, found: &mut Vec<Publish>) -> Result<Option<usize>, wire::Malformed> {
        let Some(header) = wire::header(&self.rest)? else { return Ok(None) };
        match header.kind() {
            kind::CONNECT => {
                let Some(packet) = self.rest.get(..header.total()) else { return Ok(None) };
                if let Ok(connect) = crate::mqtt::connect::Connect::read(packet) {
                    self.v5 = connect.v5;
                    self.client_id = Some(connect.client_id.clone());
                }
            }
            kind::PUBLISH => {
                let Some(publish) = wire::publish(&self.rest, header, self.v5)? else {
                    return Ok(None);
                };
                let topic = match (publish.topic, publish.alias) {
                    ("", alias) => self.aliases.get(&alias).cloned(),
                    (topic, 0) => Some(topic.to_owned()),
                    (topic, alias) => {
                        self.aliases.insert(alias, topic.to_owned());
                        Some(topic.to_owned())
                    }
                };
                let at = self.next - self.rest.len() as u64;
                found.push(Publish { at, topic, qos: publish.qos });
            }
            _ => {}
        }
        Ok(Some(header.total()))
    }
}
