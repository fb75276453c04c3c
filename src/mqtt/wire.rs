//! Zero-copy parsing of MQTT control packets, as far as forwarding needs it. Packets that have to be
//! decoded as a whole (CONNECT, SUBSCRIBE, …) are left to the codec library.

/// Types of control packets: the upper half of their first byte (MQTT 5 §2.1.2).
pub mod kind {
    pub const CONNECT: u8 = 1;
    pub const CONNACK: u8 = 2;
    pub const PUBLISH: u8 = 3;
    pub const PUBACK: u8 = 4;
    pub const PUBREC: u8 = 5;
    pub const PUBREL: u8 = 6;
    pub const PUBCOMP: u8 = 7;
    pub const SUBSCRIBE: u8 = 8;
    pub const SUBACK: u8 = 9;
    pub const UNSUBSCRIBE: u8 = 10;
    pub const UNSUBACK: u8 = 11;
    pub const PINGREQ: u8 = 12;
    pub const PINGRESP: u8 = 13;
    pub const DISCONNECT: u8 = 14;
    pub const AUTH: u8 = 15;
}

const TOPIC_ALIAS: u8 = 0x23;

/// A protocol violation, with its DISCONNECT reason code (MQTT 5 §3.14.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} (reason code 0x{code:02x})")]
pub struct Malformed {
    /// DISCONNECT's reason code.
    pub code: u8,
    /// Description.
    pub what: &'static str,
}

const fn malformed(what: &'static str) -> Malformed {
    Malformed { code: 0x81, what }
}

const fn protocol(what: &'static str) -> Malformed {
    Malformed { code: 0x82, what }
}

/// A control packet's fixed header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Type and flags.
    pub first: u8,
    /// Length of this header, bytes.
    pub length: usize,
    /// Remaining length, bytes.
    pub remaining: usize,
}

impl Header {
    /// Type of the control packet, see [`kind`].
    pub fn kind(self) -> u8 {
        self.first >> 4
    }

    /// Length of the whole packet, bytes.
    pub fn total(self) -> usize {
        self.length + self.remaining
    }
}

/// Parses a fixed header; `None`: it is incomplete.
pub fn header(bytes: &[u8]) -> Result<Option<Header>, Malformed> {
    let Some(&first) = bytes.first() else { return Ok(None) };
    let flags = first & 0x0f;
    let right = match first >> 4 {
        0 => return Err(malformed("control packet of type 0")),
        kind::PUBLISH => flags & 0x06 != 0x06,
        // In MQTT 3.1, PUBREL may have DUP set.
        kind::PUBREL => flags & !8 == 2,
        kind::SUBSCRIBE | kind::UNSUBSCRIBE => flags == 2,
        _ => flags == 0,
    };
    if !right {
        return Err(malformed("reserved flags of a fixed header (MQTT 3.1.1 §2.2.2)"));
    }
    match varint(&bytes[1..])? {
        Some((remaining, length)) => Ok(Some(Header { first, length: 1 + length, remaining })),
        None => Ok(None),
    }
}

/// A variable byte integer and its length (MQTT 5 §1.5.5).
pub fn varint(bytes: &[u8]) -> Result<Option<(usize, usize)>, Malformed> {
    let mut value = 0;
    for (i, byte) in bytes.iter().take(4).enumerate() {
        value |= usize::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Ok(Some((value, i + 1)));
        }
    }
    if bytes.len() >= 4 {
        Err(malformed("variable byte integer of more than 4 bytes"))
    } else {
        Ok(None)
    }
}

/// The bytes before and after something that was cut out.
type Around<'a> = (&'a [u8], &'a [u8]);

/// A PUBLISH up to its payload. Offsets are from the packet's first byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish<'a> {
    /// Topic name; empty if the alias replaces it.
    pub topic: &'a str,
    /// Quality of service, 0 to 2.
    pub qos: u8,
    /// Offset of the packet identifier; QoS 1 and 2.
    pub id_at: usize,
    /// The packet identifier; 0 at QoS 0.
    pub id: u16,
    /// The topic alias; 0: none (MQTT 5 §3.3.2.3.4).
    pub alias: u16,
    /// MQTT 5: the properties before and after the topic alias, without their length.
    pub properties: Around<'a>,
    /// Offset of the payload.
    pub payload_at: usize,
}

/// Parses a PUBLISH up to its payload; `None`: that part is incomplete.
pub fn publish(bytes: &[u8], h: Header, v5: bool) -> Result<Option<Publish<'_>>, Malformed> {
    let end = h.total();
    let there = &bytes[..bytes.len().min(end)];
    // Beyond the packet's end: malformed; beyond the bytes received so far: incomplete.
    let missing = |needed: usize| {
        if needed > end {
            Err(malformed("PUBLISH is shorter than what is in it"))
        } else {
            Ok(None)
        }
    };
    let mut at = h.length + 2;
    let Some(length) = there.get(h.length..at) else { return missing(at) };
    let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
    let Some(topic) = there.get(at..at + length) else { return missing(at + length) };
    let topic = std::str::from_utf8(topic).map_err(|_| malformed("topic is not valid UTF-8"))?;
    if topic.bytes().any(|b| matches!(b, 0 | b'+' | b'#')) {
        return Err(Malformed {
            code: 0x90,
            what: "topic name with a wildcard or a null character",
        });
    }
    at += length;
    let qos = h.first >> 1 & 3;
    let (mut id, id_at) = (0, at);
    if qos > 0 {
        let Some(bytes) = there.get(at..at + 2) else { return missing(at + 2) };
        id = u16::from_be_bytes([bytes[0], bytes[1]]);
        if id == 0 {
            return Err(malformed("packet identifier 0"));
        }
        at += 2;
    }
    let mut publish =
        Publish { topic, qos, id_at, id, alias: 0, properties: (&[], &[]), payload_at: at };
    if v5 {
        let Some((length, bytes)) = varint(there.get(at..).unwrap_or_default())? else {
            return missing(at + 1);
        };
        at += bytes;
        let Some(all) = there.get(at..at + length) else { return missing(at + length) };
        (publish.alias, publish.properties) = alias(all)?;
        publish.payload_at = at + length;
    }
    if topic.is_empty() && publish.alias == 0 {
        return Err(protocol("PUBLISH without a topic"));
    }
    Ok(Some(publish))
}

/// The topic alias among the properties, and the bytes around it.
fn alias(all: &[u8]) -> Result<(u16, Around<'_>), Malformed> {
    let short = || malformed("property that is cut short");
    let (mut alias, mut rest) = (0, (all, &[][..]));
    let mut at = 0;
    while let Some(&property) = all.get(at) {
        let tail = &all[at + 1..];
        let text = |at: usize| {
            let length = tail.get(at..at + 2).ok_or_else(short)?;
            Ok::<_, Malformed>(at + 2 + usize::from(u16::from_be_bytes([length[0], length[1]])))
        };
        let length = match property {
            0x01 => 1,
            0x02 => 4,
            TOPIC_ALIAS => 2,
            0x03 | 0x08 | 0x09 => text(0)?,
            0x26 => text(text(0)?)?,
            0x0b => varint(tail)?.ok_or_else(short)?.1,
            _ => return Err(protocol("property that PUBLISH cannot have (MQTT 5 §3.3.2.3)")),
        };
        let value = tail.get(..length).ok_or_else(short)?;
        if property == TOPIC_ALIAS {
            if alias != 0 {
                return Err(protocol("two topic aliases"));
            }
            alias = u16::from_be_bytes([value[0], value[1]]);
            if alias == 0 {
                return Err(Malformed { code: 0x94, what: "topic alias 0" });
            }
            rest = (&all[..at], &all[at + 1 + length..]);
        }
        at += 1 + length;
    }
    Ok((alias, rest))
}

/// Rewrites a PUBLISH up to its payload, with another topic and alias (0: none).
pub fn rewrite_publish(h: Header, p: &Publish<'_>, topic: &str, alias: u16, out: &mut Vec<u8>) {
    let payload = h.total() - p.payload_at;
    let properties = p.properties.0.len() + p.properties.1.len() + if alias == 0 { 0 } else { 3 };
    let mut behind = Vec::with_capacity(topic.len() + properties + 8);
    behind.extend((topic.len() as u16).to_be_bytes());
    behind.extend(topic.as_bytes());
    if p.qos > 0 {
        behind.extend(p.id.to_be_bytes());
    }
    put_varint(properties, &mut behind);
    behind.extend(p.properties.0);
    if alias != 0 {
        behind.push(TOPIC_ALIAS);
        behind.extend(alias.to_be_bytes());
    }
    behind.extend(p.properties.1);
    out.push(h.first);
    put_varint(behind.len() + payload, out);
    out.extend(behind);
}

/// Appends a variable byte integer.
pub fn put_varint(mut value: usize, out: &mut Vec<u8>) {
    loop {
        let byte = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 {
            return out.push(byte);
        }
        out.push(byte | 0x80);
    }
}

/// The packet identifier of a complete packet, which must not be 0.
pub fn id(packet: &[u8], h: Header) -> Result<u16, Malformed> {
    match packet.get(h.length..h.length + 2).map(|b| u16::from_be_bytes([b[0], b[1]])) {
        Some(id) if id != 0 && h.remaining >= 2 => Ok(id),
        _ => Err(malformed("control packet without an identifier")),
    }
}

/// The reason code after the packet identifier (MQTT 5); 0 if omitted.
pub fn reason(packet: &[u8], h: Header) -> u8 {
    if h.remaining >= 3 { packet.get(h.length + 2).copied().unwrap_or(0) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], v5: bool) -> Result<Option<Publish<'_>>, Malformed> {
        match header(bytes)? {
            Some(h) => publish(bytes, h, v5),
            None => Ok(None),
        }
    }

    #[test]
    fn a_publish_is_read_as_soon_as_its_header_is_there() {
        let whole = b"\x32\x0a\x00\x03a/b\x00\x07xyz";
        for cut in 0..9 {
            assert_eq!(read(&whole[..cut], false).unwrap(), None, "{cut}");
        }
        for cut in 9..=whole.len() {
            let p = read(&whole[..cut], false).unwrap().unwrap();
            assert_eq!((p.topic, p.qos, p.id, p.id_at, p.payload_at), ("a/b", 1, 7, 7, 9));
        }
    }

    #[test]
    fn what_is_no_publish_is_refused() {
        for (bytes, v5) in [
            (&b"\x36\x05\x00\x01a\x00\x01"[..], false),   // QoS 3
            (b"\x30\x03\x00\x01+", false),                // wildcard
            (b"\x30\x03\x00\x01\xff", false),             // no UTF-8
            (b"\x30\x02\x00\x00", false),                 // no topic
            (b"\x30\x03\x00\x02ab", false),               // longer than the packet
            (b"\x32\x05\x00\x01a\x00\x00", false),        // identifier 0
            (b"\x30\xff\xff\xff\xff\x01", false),         // length of five bytes
            (b"\x30\x07\x00\x01a\x03\x23\x00\x00", true), // alias 0
            (b"\x30\x06\x00\x01a\x02\x23\x00", true),     // property cut short
            (b"\x30\x06\x00\x01a\x02\x11\x00", true),     // no property of PUBLISH
            (b"\x60\x02\x00\x01", false),                 // PUBREL's flags
        ] {
            assert!(read(bytes, v5).is_err(), "{bytes:02x?}");
        }
    }

    #[test]
    fn an_alias_can_be_taken_out_and_put_in() {
        // Two user properties with an alias between, payload "xy".
        let user = b"\x26\x00\x01k\x00\x01v";
        let properties = [&user[..], b"\x23\x00\x05", user].concat();
        let mut packet = vec![0x32, (2 + 1 + 2 + 1 + properties.len() + 2) as u8];
        packet.extend(b"\x00\x01t\x00\x09");
        packet.push(properties.len() as u8);
        packet.extend(&properties);
        packet.extend(b"xy");
        let h = header(&packet).unwrap().unwrap();
        let p = publish(&packet, h, true).unwrap().unwrap();
        assert_eq!((p.topic, p.alias, p.id), ("t", 5, 9));
        let again = |topic, alias| {
            let mut out = Vec::new();
            rewrite_publish(h, &p, topic, alias, &mut out);
            out.extend(b"xy");
            out
        };
        assert_eq!(again("t", 5).len(), packet.len());
        let without = again("long/topic", 0);
        let h2 = header(&without).unwrap().unwrap();
        assert_eq!(h2.total(), without.len());
        let p2 = publish(&without, h2, true).unwrap().unwrap();
        assert_eq!(
            (p2.topic, p2.alias, p2.id, &without[p2.payload_at..]),
            ("long/topic", 0, 9, &b"xy"[..])
        );
        assert_eq!(p2.properties.0, [&user[..], user].concat());
    }
}
