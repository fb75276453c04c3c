//! A client's CONNECT, the CONNECTs that brokers get in its place, and what CONNACK says.

use std::num::NonZeroU16;
use std::ops::Range;

use bytes::BytesMut;
use rmqtt_codec::{v3, v5};
use tokio_util::codec::{Decoder as _, Encoder as _};

use super::wire::{Malformed, put_varint, varint};

/// What the relay needs of a CONNECT, and the packet itself.
#[derive(Debug, Clone)]
#[allow(clippy::struct_excessive_bools)] // they are independent of each other
pub struct Connect {
    /// MQTT 5.
    pub v5: bool,
    /// Client identifier; may be empty.
    pub client_id: String,
    /// The session outlives the connection.
    pub persistent: bool,
    /// Clean start (MQTT 3.1.1: clean session).
    pub clean: bool,
    /// Seconds; 0: none.
    pub keepalive: u16,
    /// Enhanced authentication (MQTT 5 §4.12).
    pub authenticates: bool,
    /// The will's topic.
    pub will: Option<String>,
    /// Receive maximum.
    pub receive_max: u16,
    /// Its credentials.
    pub has_username: bool,
    pub has_password: bool,
    /// The packet.
    pub bytes: Box<[u8]>,
}

/// Set in a bridge's protocol level (mosquitto's `try_private`): MQTT otherwise.
const BRIDGE: u8 = 0x80;

/// Receive maximum towards brokers other than home: what each of them has in flight may have to be
/// buffered until the client has room.
const SECONDARY_RECEIVE_MAX: u16 = 32;

/// Which CONNECT a broker gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The client's own bytes.
    Original,
    /// Home's, when another broker has the will.
    WithoutWill,
    /// That of the broker with the will, if that is not home.
    WithWill,
    /// Any other's.
    Secondary,
    /// As [`Kind::Secondary`], with clean start: discards the session that the broker has.
    CleanStart,
    /// As [`Kind::Secondary`], without clean start: after the connection was lost.
    Resume,
}

fn refused(code: u8, what: &'static str) -> Malformed {
    Malformed { code, what }
}

impl Connect {
    /// Reads a whole CONNECT.
    pub fn read(packet: &[u8]) -> Result<Self, Malformed> {
        let no_connect = || refused(0x81, "CONNECT that cannot be read");
        let (level, plain) = plain(packet).ok_or_else(no_connect)?;
        let packet_bytes: Box<[u8]> = packet.into();
        let packet = &*plain;
        match level {
            3 | 4 => {
                let Some(c) = decode_v3(packet) else { return Err(no_connect()) };
                Ok(Self {
                    v5: false,
                    client_id: c.client_id.to_string(),
                    persistent: !c.clean_session,
                    clean: c.clean_session,
                    keepalive: c.keep_alive,
                    authenticates: false,
                    will: c.last_will.map(|w| w.topic.to_string()),
                    receive_max: u16::MAX,
                    has_username: c.username.is_some(),
                    has_password: c.password.is_some(),
                    bytes: packet_bytes,
                })
            }
            5 => {
                let Some(c) = decode_v5(packet) else { return Err(no_connect()) };
                Ok(Self {
                    v5: true,
                    client_id: c.client_id.to_string(),
                    persistent: c.session_expiry_interval_secs > 0 || !c.clean_start,
                    clean: c.clean_start,
                    keepalive: c.keep_alive,
                    authenticates: c.auth_method.is_some(),
                    will: c.last_will.map(|w| w.topic.to_string()),
                    receive_max: c.receive_max.map_or(u16::MAX, u16::from),
                    has_username: c.username.is_some(),
                    has_password: c.password.is_some(),
                    bytes: packet_bytes,
                })
            }
            _ => Err(refused(0x84, "protocol level other than 3, 4 and 5")),
        }
    }

    /// The CONNECT for a broker. `assigned`: the client identifier that home assigned.
    pub fn for_broker(&self, kind: Kind, assigned: Option<&str>) -> Box<[u8]> {
        if kind == Kind::Original {
            return self.bytes.clone();
        }
        if !self.v5 {
            return self.edited_v3(|c| {
                if kind != Kind::WithWill {
                    c.last_will = None;
                }
                c.clean_session |= kind == Kind::CleanStart;
            });
        }
        self.edited_v5(|c| {
            if kind != Kind::WithWill {
                c.last_will = None;
            }
            // Topic aliases are numbered by one broker only.
            if kind != Kind::WithoutWill {
                c.topic_alias_max = 0;
                let most = c.receive_max.map_or(u16::MAX, NonZeroU16::get);
                c.receive_max = NonZeroU16::new(most.min(SECONDARY_RECEIVE_MAX));
            }
            match kind {
                Kind::CleanStart => c.clean_start = true,
                Kind::Resume => c.clean_start = false,
                _ => {}
            }
            if let Some(id) = assigned {
                c.client_id = id.into();
            }
        })
    }

    /// Replaces the credentials by a user name from the client's certificate.
    pub fn set_username(&mut self, name: &str) {
        self.bytes = if self.v5 {
            self.edited_v5(|c| (c.username, c.password) = (Some(name.into()), None))
        } else {
            self.edited_v3(|c| (c.username, c.password) = (Some(name.into()), None))
        };
    }

    // What was decoded once can be decoded again, and encoded.
    fn edited_v3(&self, edit: impl FnOnce(&mut v3::Connect)) -> Box<[u8]> {
        let mut out = BytesMut::new();
        if let Some(mut c) = plain(&self.bytes).and_then(|(_, p)| decode_v3(&p)) {
            edit(&mut c);
            let _ = v3::Codec::default().encode(v3::Packet::Connect(Box::new(c)), &mut out);
        }
        self.with_its_protocol(&out)
    }

    fn edited_v5(&self, edit: impl FnOnce(&mut v5::Connect)) -> Box<[u8]> {
        let mut out = BytesMut::new();
        if let Some(mut c) = plain(&self.bytes).and_then(|(_, p)| decode_v5(&p)) {
            edit(&mut c);
            let _ = v5::Codec::default().encode(v5::Packet::Connect(Box::new(c)), &mut out);
        }
        self.with_its_protocol(&out)
    }

    /// An encoded CONNECT with the protocol name and level that the client's has.
    fn with_its_protocol(&self, encoded: &[u8]) -> Box<[u8]> {
        let (Some(own), Some(other)) = (protocol_of(&self.bytes), protocol_of(encoded)) else {
            return encoded.into();
        };
        let body = [&self.bytes[own], &encoded[other.end..]].concat();
        let mut packet = vec![encoded[0]];
        put_varint(body.len(), &mut packet);
        packet.extend(body);
        packet.into()
    }
}

/// Where the protocol's name and level are (MQTT 5 §3.1.2.1, §3.1.2.2).
fn protocol_of(packet: &[u8]) -> Option<Range<usize>> {
    let (_, length) = varint(packet.get(1..)?).ok()??;
    let at = 1 + length;
    let name = u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?);
    let end = at + 2 + usize::from(name) + 1;
    (end <= packet.len()).then_some(at..end)
}

/// The protocol's level, and the packet as one that is no bridge sends it; `None`: it is no CONNECT of MQTT.
fn plain(packet: &[u8]) -> Option<(u8, Vec<u8>)> {
    let protocol = protocol_of(packet)?;
    let level = packet[protocol.end - 1] & !BRIDGE;
    let is_mqtt = match &packet[protocol.start + 2..protocol.end - 1] {
        b"MQTT" => true,
        b"MQIsdp" => level == 3,
        _ => false,
    };
    let mut plain = packet.to_vec();
    plain[protocol.end - 1] = level;
    is_mqtt.then_some((level, plain))
}

fn decode_v3(packet: &[u8]) -> Option<v3::Connect> {
    let decode = |packet: &[u8]| match v3::Codec::default().decode(&mut BytesMut::from(packet)) {
        Ok(Some((v3::Packet::Connect(c), _))) => Some(*c),
        _ => None,
    };
    decode(packet).or_else(|| {
        let c = decode(&cleaned(packet)?).filter(|c| c.client_id.is_empty())?;
        Some(v3::Connect { clean_session: false, ..c })
    })
}

fn decode_v5(packet: &[u8]) -> Option<v5::Connect> {
    let decode = |packet: &[u8]| match v5::Codec::default().decode(&mut BytesMut::from(packet)) {
        Ok(Some((v5::Packet::Connect(c), _))) => Some(*c),
        _ => None,
    };
    decode(packet).or_else(|| {
        let c = decode(&cleaned(packet)?).filter(|c| c.client_id.is_empty())?;
        Some(v5::Connect { clean_start: false, ..c })
    })
}

/// The packet with clean start. The library takes an empty client identifier for malformed without it; but MQTT 5
/// allows it (§3.1.3.1), and before 5, refusing it is the broker's to do (MQTT 3.1.1 §3.1.3.1).
fn cleaned(packet: &[u8]) -> Option<Vec<u8>> {
    const CLEAN_START: u8 = 1 << 1;
    let name = packet.windows(6).take(6).position(|w| w == b"\x00\x04MQTT")?;
    let mut packet = packet.to_vec();
    *packet.get_mut(name + 7)? |= CLEAN_START;
    Some(packet)
}

/// What a broker answers CONNECT.
#[derive(Debug, Clone)]
pub struct Connack {
    /// Return or reason code; 0: accepted.
    pub code: u8,
    /// The session is an earlier one.
    pub session_present: bool,
    /// In place of the client's (MQTT 5).
    pub keepalive: Option<u16>,
    /// In place of an empty one (MQTT 5).
    pub client_id: Option<String>,
    /// Messages at QoS 1 and 2 that the broker takes at a time.
    pub receive_max: u16,
    /// The highest topic alias that it takes.
    pub alias_max: u16,
    /// Bytes of the largest packet that it takes.
    pub max_packet: usize,
}

impl Connack {
    /// Reads a whole CONNACK; `None` if it is none.
    pub fn read(packet: &[u8], v5: bool) -> Option<Self> {
        let mut bytes = BytesMut::from(packet);
        if !v5 {
            // Codes that the library does not know are passed on nevertheless.
            let [0x20, 2, flags, code] = *packet else { return None };
            return Some(Self {
                code,
                session_present: flags & 1 != 0,
                keepalive: None,
                client_id: None,
                receive_max: u16::MAX,
                alias_max: 0,
                max_packet: usize::MAX,
            });
        }
        match v5::Codec::default().decode(&mut bytes) {
            Ok(Some((v5::Packet::ConnectAck(c), _))) => Some(Self {
                code: c.reason_code.into(),
                session_present: c.session_present,
                keepalive: c.server_keepalive_sec,
                client_id: c.assigned_client_id.map(|id| id.to_string()),
                receive_max: c.receive_max.into(),
                alias_max: c.topic_alias_max,
                max_packet: c.max_packet_size.map_or(usize::MAX, |n| n as usize),
            }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// MQTT 5, will "w" = "x", user "u", password "p", receive maximum 7, alias maximum 9.
    const V5: &[u8] =
        b"\x10\x28\x00\x04MQTT\x05\xc6\x00\x3c\x06\x21\x00\x07\x22\x00\x09\x00\x02id\x00\
        \x00\x01w\x00\x01x\x00\x01u\x00\x01p";

    fn packet() -> Vec<u8> {
        let mut packet = V5.to_vec();
        packet[1] = (packet.len() - 2) as u8;
        packet
    }

    #[test]
    fn brokers_other_than_home_get_neither_will_nor_aliases() {
        let original = Connect::read(&packet()).unwrap();
        assert_eq!(
            (original.v5, original.client_id.as_str(), original.keepalive),
            (true, "id", 60)
        );
        assert_eq!((original.will.as_deref(), original.receive_max), (Some("w"), 7));
        assert_eq!(original.for_broker(Kind::Original, None)[..], packet());
        let secondary = original.for_broker(Kind::Secondary, Some("assigned"));
        let secondary = Connect::read(&secondary).unwrap();
        let seen = (secondary.will, secondary.client_id.as_str(), secondary.receive_max);
        assert_eq!(seen, (None, "assigned", 7));
        let c = decode_v5(&secondary.bytes).unwrap();
        assert_eq!((c.username.as_deref(), c.topic_alias_max), (Some("u"), 0));
        let with_will = Connect::read(&original.for_broker(Kind::WithWill, None)).unwrap();
        assert_eq!(with_will.will.as_deref(), Some("w"));
        let home = decode_v5(&original.for_broker(Kind::WithoutWill, None)).unwrap();
        assert_eq!((home.last_will, home.topic_alias_max), (None, 9));
    }

    #[test]
    fn old_protocols_are_read_and_others_refused() {
        let v31 = b"\x10\x10\x00\x06MQIsdp\x03\x00\x00\x0a\x00\x02id";
        let original = Connect::read(v31).unwrap();
        assert!(!original.v5 && original.persistent && original.client_id == "id");
        let clean = Connect::read(&original.for_broker(Kind::CleanStart, None)).unwrap();
        assert!(!clean.persistent);
        // Brokers other than home get the name and level as they came, a bridge's, too.
        for (protocol, rest) in [
            (&b"\x00\x06MQIsdp\x03"[..], &b"\x02\x00\x0a\x00\x02id"[..]),
            (b"\x00\x06MQIsdp\x83", b"\x02\x00\x0a\x00\x02id"),
            (b"\x00\x04MQTT\x84", b"\x02\x00\x0a\x00\x02id"),
            (b"\x00\x04MQTT\x85", b"\x02\x00\x0a\x00\x00\x02id"),
        ] {
            let body = [protocol, rest].concat();
            let packet = [&[0x10, body.len() as u8][..], &body].concat();
            let read = Connect::read(&packet).unwrap();
            assert_eq!(read.for_broker(Kind::Original, None)[..], packet);
            let other = read.for_broker(Kind::Secondary, None);
            assert!(other[2..].starts_with(protocol), "{other:02x?}");
            assert_eq!(usize::from(other[1]), other.len() - 2);
        }
        let v6 = b"\x10\x0e\x00\x04MQTT\x06\x02\x00\x0a\x00\x02id";
        // An empty id without clean start: what comes of it is for a broker to say.
        for (v5, level, rest) in [(false, 4, &b"\x00\x00"[..]), (true, 5, &b"\x00\x00\x00"[..])] {
            let body = [&b"\x00\x04MQTT"[..], &[level, 0, 0, 60], rest].concat();
            let packet = [&[0x10, body.len() as u8][..], &body].concat();
            let read = Connect::read(&packet).unwrap();
            assert_eq!((read.v5, read.clean, &read.client_id[..]), (v5, false, ""));
            assert_eq!(*read.for_broker(Kind::Original, None), packet);
            let other = Connect::read(&read.for_broker(Kind::Secondary, Some("given"))).unwrap();
            assert_eq!(other.client_id, if v5 { "given" } else { "" });
        }
        assert_eq!(Connect::read(v6).unwrap_err().code, 0x84);
        assert_eq!(Connect::read(b"\x10\x02\x00\x00").unwrap_err().code, 0x81);
    }
}
