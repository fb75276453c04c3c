//! A client's CONNECT, and what is made of it for brokers beside its first.

use bytes::BytesMut;
use rmqtt_codec::{v3, v5};
use tokio_util::codec::{Decoder as _, Encoder as _};

use super::scan::Malformed;

/// What a CONNECT says that the relay has to know. The bytes themselves are kept, too.
#[derive(Debug, Clone)]
#[allow(clippy::struct_excessive_bools)] // they are independent of each other
pub struct Hello {
    /// MQTT 5.
    pub v5: bool,
    /// May be empty.
    pub client_id: String,
    /// Its session outlives the connection.
    pub persistent: bool,
    /// It asks for a new session.
    pub clean: bool,
    /// In seconds; 0: none.
    pub keepalive: u16,
    /// By an exchange of AUTH with its first broker (MQTT 5).
    pub authenticates: bool,
    /// Topic of its will.
    pub will: Option<String>,
    /// Deliveries at QoS 1 and 2 that it takes at a time.
    pub receive_max: u16,
    /// The packet.
    pub bytes: Box<[u8]>,
}

/// Deliveries at QoS 1 and 2 that a broker beside the first has under way.
const WAITING_MAX: u16 = 32;

/// How to connect to a broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// With the client's own bytes.
    Own,
    /// The same without its will, which is another broker's.
    Home,
    /// With the will, and without topic aliases, which only one broker can number.
    Will,
    /// Without either.
    Beside,
    /// As [`Kind::Beside`], with a new session in place of the one that is there.
    Anew,
    /// As [`Kind::Beside`], with the session as it is.
    Resume,
}

fn refused(code: u8, what: &'static str) -> Malformed {
    Malformed { code, what }
}

impl Hello {
    /// Reads a whole CONNECT.
    pub fn read(packet: &[u8]) -> Result<Self, Malformed> {
        let no_connect = refused(0x81, "CONNECT that cannot be read");
        // The level is behind the protocol's name (MQTT 5 §3.1.2.2).
        let name = packet.windows(7).take(6).find_map(|w| match w {
            [0, 4, b'M', b'Q', b'T', b'T', level] => Some(*level),
            [0, 6, b'M', b'Q', b'I', b's', b'd'] => Some(3),
            _ => None,
        });
        match name {
            Some(3 | 4) => {
                let Some(c) = decode_v3(packet) else { return Err(no_connect) };
                Ok(Self {
                    v5: false,
                    client_id: c.client_id.to_string(),
                    persistent: !c.clean_session,
                    clean: c.clean_session,
                    keepalive: c.keep_alive,
                    authenticates: false,
                    will: c.last_will.map(|w| w.topic.to_string()),
                    receive_max: u16::MAX,
                    bytes: packet.into(),
                })
            }
            Some(5) => {
                let Some(c) = decode_v5(packet) else { return Err(no_connect) };
                Ok(Self {
                    v5: true,
                    client_id: c.client_id.to_string(),
                    persistent: c.session_expiry_interval_secs > 0 || !c.clean_start,
                    clean: c.clean_start,
                    keepalive: c.keep_alive,
                    authenticates: c.auth_method.is_some(),
                    will: c.last_will.map(|w| w.topic.to_string()),
                    receive_max: c.receive_max.map_or(u16::MAX, u16::from),
                    bytes: packet.into(),
                })
            }
            Some(_) => Err(refused(0x84, "protocol level other than 3, 4 and 5")),
            None => Err(no_connect),
        }
    }

    /// The CONNECT for a broker. An identifier that the first broker gave is used with the others.
    pub fn connect(&self, kind: Kind, assigned: Option<&str>) -> Box<[u8]> {
        if kind == Kind::Own {
            return self.bytes.clone();
        }
        let mut out = BytesMut::new();
        let anew = kind == Kind::Anew;
        // It was read before, and is written as it was read: neither fails.
        if self.v5 {
            if let Some(mut c) = decode_v5(&self.bytes).map(Box::new) {
                if kind != Kind::Will {
                    c.last_will = None;
                }
                if kind != Kind::Home {
                    c.topic_alias_max = 0;
                    // So many of each broker may have to wait for room at the client.
                    let most = c.receive_max.map_or(WAITING_MAX, |n| n.get().min(WAITING_MAX));
                    c = Box::new(c.receive_max(most));
                }
                c.clean_start = (c.clean_start || anew) && kind != Kind::Resume;
                if let Some(id) = assigned {
                    c.client_id = id.into();
                }
                let _ = v5::Codec::default().encode(v5::Packet::Connect(c), &mut out);
            }
        } else if let Some(mut c) = decode_v3(&self.bytes) {
            if kind != Kind::Will {
                c.last_will = None;
            }
            c.clean_session |= anew;
            let _ = v3::Codec::default().encode(v3::Packet::Connect(Box::new(c)), &mut out);
        }
        out[..].into()
    }

    /// With the user name that a certificate says, in place of the client's own.
    pub fn set_username(&mut self, name: &str) {
        let mut out = BytesMut::new();
        if self.v5 {
            if let Some(mut c) = decode_v5(&self.bytes) {
                c.username = Some(name.into());
                c.password = None;
                let _ = v5::Codec::default().encode(v5::Packet::Connect(Box::new(c)), &mut out);
            }
        } else if let Some(mut c) = decode_v3(&self.bytes) {
            c.username = Some(name.into());
            c.password = None;
            let _ = v3::Codec::default().encode(v3::Packet::Connect(Box::new(c)), &mut out);
        }
        self.bytes = out[..].into();
    }
}

fn decode_v3(packet: &[u8]) -> Option<v3::Connect> {
    match v3::Codec::default().decode(&mut BytesMut::from(packet)) {
        Ok(Some((v3::Packet::Connect(c), _))) => Some(*c),
        _ => None,
    }
}

fn decode_v5(packet: &[u8]) -> Option<v5::Connect> {
    match v5::Codec::default().decode(&mut BytesMut::from(packet)) {
        Ok(Some((v5::Packet::Connect(c), _))) => Some(*c),
        _ => None,
    }
}

/// What a broker answers CONNECT.
#[derive(Debug, Clone)]
pub struct Welcome {
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

impl Welcome {
    /// Reads a whole CONNACK; `None` if it is none.
    pub fn read(packet: &[u8], v5: bool) -> Option<Self> {
        let mut bytes = BytesMut::from(packet);
        if !v5 {
            // Codes that the library does not know are passed on all the same.
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
    fn the_will_is_for_one_broker_and_the_rest_for_all() {
        let hello = Hello::read(&packet()).unwrap();
        assert_eq!((hello.v5, hello.client_id.as_str(), hello.keepalive), (true, "id", 60));
        assert_eq!((hello.will.as_deref(), hello.receive_max), (Some("w"), 7));
        assert_eq!(hello.connect(Kind::Own, None)[..], packet());
        let beside = Hello::read(&hello.connect(Kind::Beside, Some("given"))).unwrap();
        assert_eq!(
            (beside.will, beside.client_id.as_str(), beside.receive_max),
            (None, "given", 7)
        );
        let c = decode_v5(&beside.bytes).unwrap();
        assert_eq!((c.username.as_deref(), c.topic_alias_max), (Some("u"), 0));
    }

    #[test]
    fn old_protocols_are_read_and_others_refused() {
        let v31 = b"\x10\x10\x00\x06MQIsdp\x03\x00\x00\x0a\x00\x02id";
        let hello = Hello::read(v31).unwrap();
        assert!(!hello.v5 && hello.persistent && hello.client_id == "id");
        let anew = Hello::read(&hello.connect(Kind::Anew, None)).unwrap();
        assert!(!anew.persistent);
        let v6 = b"\x10\x0e\x00\x04MQTT\x06\x02\x00\x0a\x00\x02id";
        assert_eq!(Hello::read(v6).unwrap_err().code, 0x84);
        assert_eq!(Hello::read(b"\x10\x02\x00\x00").unwrap_err().code, 0x81);
    }
}
