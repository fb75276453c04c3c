//! A connection whose CONNECT a balancer has answered and which no broker has yet, by names instead of numbers: so any
//! balancer of a fleet can go on with it.

use serde::{Deserialize, Serialize};

/// What the connection is, and the CONNECT, which its broker is to get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// Sequence numbers of the client's and of the server's first byte.
    pub start: u32,
    pub server: u32,
    /// The last timestamps that were sent to the client and by it (RFC 7323 §3); `None`: it has none.
    pub timestamps: Option<(u32, u32)>,
    /// Where the client id lies in CONNECT: offset and length, bytes; length 0: it has none.
    pub client_id: (u8, u16),
    /// The group of its will's topic, if that must be its broker's.
    pub will_group: Option<String>,
    /// The packet, and its sum as TCP forms it (RFC 1071).
    #[serde(with = "hex")]
    pub connect: Vec<u8>,
    pub connect_sum: u16,
}

impl Waiting {
    /// Whether a segment is this connection's next one, or one of its last.
    pub fn is_before(&self, seq: u32) -> bool {
        let behind = self.start.wrapping_add(self.connect.len() as u32);
        seq.wrapping_sub(self.start) <= behind.wrapping_sub(self.start)
    }
}

/// Bytes as text that people can read and compare.
mod hex {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble)]);
        let text: String =
            bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect();
        s.serialize_str(&text)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(d)?;
        let byte = |pair: &[u8]| {
            let pair = std::str::from_utf8(pair).ok()?;
            u8::from_str_radix(pair, 16).ok()
        };
        let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(byte).collect();
        bytes.ok_or_else(|| D::Error::custom("not hexadecimal"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_as_it_was_written_and_knows_its_segments() {
        let waiting = Waiting {
            start: u32::MAX - 3,
            server: 7,
            timestamps: Some((1, 2)),
            client_id: (14, 3),
            will_group: None,
            connect: vec![0x10, 0xff, 0, 9],
            connect_sum: 5,
        };
        let text = serde_json::to_string(&waiting).unwrap();
        assert_eq!(serde_json::from_str::<Waiting>(&text).unwrap(), waiting);
        let of_it = [u32::MAX - 3, u32::MAX, 0];
        assert!(of_it.into_iter().all(|seq| waiting.is_before(seq)));
        assert!(!waiting.is_before(1) && !waiting.is_before(u32::MAX - 4));
    }
}
