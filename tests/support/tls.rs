//! ClientHellos (RFC 8446 §4.1.2), as any stack could write them.

use std::iter::repeat_n;

/// A ClientHello.
#[derive(Debug, Clone, Default)]
pub struct Hello {
    pub name: Option<Vec<u8>>,
    pub protocols: Vec<Vec<u8>>,
    /// Bytes of an extension that nobody knows, in front of the others and behind them.
    pub before: usize,
    pub behind: usize,
    /// ALPN comes first.
    pub protocols_first: bool,
    /// Bytes in a TLS record; 0: all in one.
    pub record: usize,
}

impl Hello {
    pub fn named(name: &str) -> Self {
        Self { name: Some(name.as_bytes().to_vec()), ..Self::default() }
    }

    /// The handshake message, and as many bytes of it as come before the name's end.
    pub fn message(&self) -> Vec<u8> {
        let mut extensions = Vec::new();
        if self.before > 0 {
            extensions.extend(extension(0x0a0a, &vec![0; self.before]));
        }
        let mut known = Vec::new();
        if let Some(name) = &self.name {
            let entry = [&[0][..], &sized(name)].concat();
            known.push(extension(0, &sized(&entry)));
        }
        if !self.protocols.is_empty() {
            let list: Vec<u8> =
                self.protocols.iter().flat_map(|p| [&[p.len() as u8][..], p].concat()).collect();
            known.push(extension(16, &sized(&list)));
        }
        if self.protocols_first {
            known.reverse();
        }
        extensions.extend(known.concat());
        if self.behind > 0 {
            extensions.extend(extension(21, &vec![0; self.behind]));
        }
        let mut body = vec![3, 3];
        body.extend(repeat_n(7, 32));
        body.extend([32]);
        body.extend(repeat_n(8, 32));
        body.extend(sized(&[0x13, 1, 0x13, 2, 0x13, 3, 0xc0, 0x2b]));
        body.extend([1, 0]);
        body.extend(sized(&extensions));
        let length = (body.len() as u32).to_be_bytes();
        [&[1][..], &length[1..], &body].concat()
    }

    /// In its records.
    pub fn bytes(&self) -> Vec<u8> {
        let message = self.message();
        let record = if self.record == 0 { message.len() } else { self.record };
        message.chunks(record).flat_map(|part| [&[22, 3, 1][..], &sized(part)].concat()).collect()
    }
}

pub fn sized(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat()
}

fn extension(kind: u16, body: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &sized(body)].concat()
}
