//! A ClientHello that comes in several segments: put together, and read.

use std::collections::BTreeMap;

use tokio_rustls::rustls::server::Acceptor;

/// Bytes of a ClientHello, at most: none is longer (`HELLO_MAX` of `bpf/forward/handshake/late_name.h`).
pub const LENGTH_MAX: usize = 1 << 14;

/// What came of a stream, in whatever order.
#[derive(Debug, Default)]
pub struct Stream {
    /// By their offset.
    pieces: BTreeMap<usize, Vec<u8>>,
}

impl Stream {
    /// Takes a piece. What lies beyond the longest ClientHello is left out.
    pub fn put(&mut self, offset: usize, piece: &[u8]) {
        let known = self.pieces.get(&offset).map_or(0, Vec::len);
        if piece.len() > known && offset + piece.len() <= LENGTH_MAX {
            self.pieces.insert(offset, piece.to_vec());
        }
    }

    /// All up to the first gap.
    pub fn bytes(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for (offset, piece) in &self.pieces {
            let Some(skipped) = all.len().checked_sub(*offset) else { break };
            all.extend(piece.get(skipped..).unwrap_or_default());
        }
        all
    }

    /// What is kept, bytes.
    pub fn size(&self) -> usize {
        self.pieces.values().map(Vec::len).sum()
    }
}

/// What a ClientHello asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Asked {
    /// It is not whole.
    More,
    /// A server, and protocols, the preferred first.
    For { name: Option<String>, protocols: Vec<String> },
    /// It is none that could be read.
    Nothing,
}

/// Reads a ClientHello, across TLS records.
pub fn read(bytes: &[u8]) -> Asked {
    let mut acceptor = Acceptor::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        match acceptor.read_tls(&mut rest) {
            Ok(0) | Err(_) => return Asked::Nothing,
            Ok(_) => {}
        }
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                return Asked::For {
                    name: hello.server_name().map(str::to_owned),
                    protocols: hello.alpn().into_iter().flatten().map(text).collect(),
                };
            }
            Err(_) => return Asked::Nothing,
        }
    }
    Asked::More
}

/// Cuts a stream into segments of no more than `most` bytes, with their offsets, of which none but the first begins at
/// `not_at`.
pub fn cut(bytes: &[u8], most: usize, not_at: usize) -> Vec<(usize, &[u8])> {
    let mut all = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let mut end = (at + most).min(bytes.len());
        if end == not_at && end < bytes.len() {
            end -= 1;
        }
        all.push((at, &bytes[at..end]));
        at = end;
    }
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_real_stacks_send_is_read_when_it_is_whole() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hellos");
        let mut read_some = 0;
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_str().unwrap().to_owned();
            if path.extension().is_none_or(|extension| extension != "bin") {
                continue;
            }
            read_some += 1;
            let bytes = std::fs::read(&path).unwrap();
            let Asked::For { name, protocols } = read(&bytes) else { panic!("{file}") };
            let named = !file.starts_with("openssl-noname");
            assert_eq!(name.as_deref(), named.then_some("tenant-a.example.net"), "{file}");
            assert_eq!(file.contains("alpn"), protocols.iter().any(|p| p == "mqtt"), "{file}");
            assert_eq!(read(&bytes[..bytes.len() - 46]), Asked::More, "{file}");
            assert_eq!(read(&bytes[..3]), Asked::More, "{file}");
        }
        assert!(read_some > 30);
        assert_eq!(read(b""), Asked::More);
        assert_eq!(read(b"GET / HTTP/1.1\r\n\r\n"), Asked::Nothing);
    }

    proptest! {
        #[test]
        fn pieces_in_any_order_are_one_stream(
            bytes in prop::collection::vec(any::<u8>(), 1..3000),
            cuts in prop::collection::vec((0..3000usize, 1..900usize), 0..12),
        ) {
            let mut stream = Stream::default();
            let mut there = vec![false; bytes.len()];
            for (at, length) in cuts {
                let at = at.min(bytes.len());
                let end = (at + length).min(bytes.len());
                stream.put(at, &bytes[at..end]);
                there[at..end].fill(true);
            }
            let until = there.iter().position(|is| !is).unwrap_or(bytes.len());
            let found = stream.bytes();
            prop_assert_eq!(&found[..], &bytes[..found.len()]);
            prop_assert!(found.len() <= until);
        }

        #[test]
        fn cuts_leave_nothing_out_and_avoid_one_place(
            length in 1..4000usize, most in 2..1500usize, not_at in 1..3000usize,
        ) {
            let bytes: Vec<u8> = (0..length).map(|i| i as u8).collect();
            let parts = cut(&bytes, most, not_at);
            let joined: Vec<u8> = parts.iter().flat_map(|(_, part)| part.to_vec()).collect();
            prop_assert_eq!(&joined, &bytes);
            prop_assert!(parts.iter().all(|(at, part)| part.len() <= most && (*at == 0 || *at != not_at)));
        }
    }
}
