//! The fleet's questions to broker hosts as they go over the wire (`bpf/abi/ask.h`): which of these connections do you
//! have? The program `decap` answers them.

use std::net::SocketAddr;

use siphasher::sip::SipHasher24;

use super::abi::{Pod as _, addr_words, ask, ask_kind, ask_limits, asked, asked_state};
use super::decap::AskKeys;

/// Connections of a question, at most.
pub const CONNECTIONS_MAX: usize = ask_limits::ASK_CONNECTIONS.0 as usize;

/// Bytes of a question and of its answer.
pub const LENGTH_MAX: usize = size_of::<ask>() + CONNECTIONS_MAX * size_of::<asked>();

const _: () = assert!(LENGTH_MAX <= 1400, "with all headers it fits a packet");

/// A connection, by a segment of its client's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    pub client: SocketAddr,
    /// Sequence and acknowledgement number.
    pub seq: u32,
    pub ack: u32,
}

/// What a broker host has on a connection's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Had {
    Nothing,
    /// This connection.
    This,
    /// Another one.
    Other,
}

/// What the answer has, too: the nonce; by the key of an epoch.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    pub nonce: u64,
    pub epoch: u32,
    pub service: SocketAddr,
    pub connections: &'a [Asked],
}

impl Question<'_> {
    /// For the wire. Of more connections than fit, the first ones.
    pub fn encode(&self, keys: &AskKeys) -> Vec<u8> {
        let connections = &self.connections[..self.connections.len().min(CONNECTIONS_MAX)];
        let head = ask {
            magic: ask_limits::ASK_MAGIC.0.to_be(),
            version: ask_limits::ASK_VERSION.0 as u8,
            kind: ask_kind::ASK_QUESTION.0 as u8,
            count: connections.len() as u8,
            epoch: (self.epoch & 1) as u8,
            nonce: self.nonce,
            service: addr_words(self.service.ip()),
            port: self.service.port().to_be(),
            v6: self.service.is_ipv6().into(),
            ..ask::zeroed()
        };
        let mut bytes = head.bytes().to_vec();
        for one in connections {
            let entry = asked {
                client: addr_words(one.client.ip()),
                client_port: one.client.port().to_be(),
                seq: one.seq.to_be(),
                ack: one.ack.to_be(),
                ..asked::zeroed()
            };
            bytes.extend_from_slice(entry.bytes());
        }
        let mac = mac(keys, &bytes);
        bytes[MAC..size_of::<ask>()].copy_from_slice(&mac.to_le_bytes());
        bytes
    }
}

/// Where the MAC is.
const MAC: usize = size_of::<ask>() - size_of::<u64>();

/// Of all but itself.
fn mac(keys: &AskKeys, bytes: &[u8]) -> u64 {
    let [k0, k1] = keys[usize::from(bytes[EPOCH] & 1)];
    let rest = [&bytes[..MAC], &bytes[size_of::<ask>()..]].concat();
    SipHasher24::new_with_keys(k0, k1).hash(&rest)
}

/// Where the epoch's parity is.
const EPOCH: usize = 7;

/// An authentic answer's nonce, and what the host has, in the order of the question; `None`: it is none.
pub fn read_answer(keys: &AskKeys, bytes: &[u8]) -> Option<(u64, Vec<Had>)> {
    let (head, entries) = bytes.split_at_checked(size_of::<ask>())?;
    let head = ask::from_bytes(head);
    if head.magic != ask_limits::ASK_MAGIC.0.to_be()
        || u32::from(head.version) != ask_limits::ASK_VERSION.0
        || u32::from(head.kind) != ask_kind::ASK_ANSWER.0
        || entries.len() != usize::from(head.count) * size_of::<asked>()
        || keys[usize::from(head.epoch & 1)] == [0, 0]
        || u64::from_le(head.mac) != mac(keys, bytes)
    {
        return None;
    }
    let had = entries.chunks_exact(size_of::<asked>()).map(|entry| {
        match asked_state(asked::from_bytes(entry).state.into()) {
            asked_state::ASKED_HAS => Had::This,
            asked_state::ASKED_OTHER => Had::Other,
            _ => Had::Nothing,
        }
    });
    Some((head.nonce, had.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: AskKeys = [[1, 2], [3, 4]];

    #[test]
    fn only_an_authentic_answer_counts() {
        let connections = [Asked { client: "10.1.1.1:40000".parse().unwrap(), seq: 1, ack: 2 }; 3];
        let service = "10.1.50.200:1883".parse().unwrap();
        let question = Question { nonce: 7, epoch: 1, service, connections: &connections };
        let sent = question.encode(&KEYS);
        assert_eq!(read_answer(&KEYS, &sent), None, "a question is no answer");
        let mut answer = sent.clone();
        answer[5] = ask_kind::ASK_ANSWER.0 as u8;
        answer[size_of::<ask>() + 18] = asked_state::ASKED_HAS.0 as u8;
        let right = mac(&KEYS, &answer);
        answer[MAC..MAC + 8].copy_from_slice(&right.to_le_bytes());
        assert_eq!(
            read_answer(&KEYS, &answer),
            Some((7, vec![Had::This, Had::Nothing, Had::Nothing]))
        );
        for at in 0..answer.len() {
            let mut damaged = answer.clone();
            damaged[at] ^= 1;
            assert_eq!(read_answer(&KEYS, &damaged), None, "byte {at}");
            assert_eq!(read_answer(&KEYS, &answer[..at]), None, "{at} bytes");
        }
        assert_eq!(read_answer(&[[1, 2], [3, 5]], &answer), None, "another key");
    }
}
