//! Names for the numbers in maps.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::Datapath;
use super::ids::Entry;
use crate::config::Config;
use crate::kernel::Result;
use crate::kernel::abi::{
    self, binding_parts, limits, server_name, service, service_protocol, service_table, topic,
    words_addr,
};
pub use crate::kernel::boot_time;

/// In place of a topic or client id whose record has been evicted.
pub const EVICTED: &str = "(evicted)";

/// The services of a table that are in use.
pub(super) fn services_of(table: &service_table) -> &[service] {
    &table.service[..usize::from(table.count)]
}

/// A service's address and port.
pub(super) fn address_of(entry: &service) -> SocketAddr {
    SocketAddr::new(words_addr(entry.addr, entry.v6 != 0), u16::from_be(entry.port))
}

/// The names of services and groups.
#[derive(Debug)]
pub struct Names {
    services: BTreeMap<u16, String>,
    /// The services that speak TLS.
    tls: BTreeSet<u16>,
    groups: BTreeMap<u16, Entry>,
}

impl Names {
    /// Reads them. Services are named by the configuration, groups by the map.
    pub fn read(config: &Config, datapath: &Datapath) -> Result<Self> {
        let table = datapath.service_table()?;
        let mut services = BTreeMap::new();
        let mut v6 = BTreeMap::new();
        let mut tls = BTreeSet::new();
        for entry in services_of(&table) {
            let addr = address_of(entry);
            let configured =
                config.services.iter().find(|s| SocketAddr::new(s.addr, s.port) == addr);
            let name = configured.map_or_else(|| addr.to_string(), |s| s.name.clone());
            services.insert(entry.id, name);
            if u32::from(entry.protocol) == service_protocol::PROTOCOL_TLS.0 {
                tls.insert(entry.id);
            }
            v6.insert(entry.id, entry.v6 != 0);
        }
        let groups = datapath
            .groups()?
            .into_iter()
            .map(|(id, g)| (id, Entry::of(&g, v6.get(&g.service).copied().unwrap_or(false))))
            .collect();
        Ok(Self { services, tls, groups })
    }

    /// A service's name.
    pub fn service(&self, id: u16) -> String {
        self.services.get(&id).cloned().unwrap_or_else(|| format!("(removed {id})"))
    }

    /// Whether its clients speak TLS.
    pub(super) fn is_tls(&self, service: u16) -> bool {
        self.tls.contains(&service)
    }

    /// The group of a binding, unless its number is another group's now.
    fn group(&self, binding: u32) -> Option<&Entry> {
        let (id, epoch) = binding_parts(binding);
        self.groups.get(&id).filter(|entry| entry.epoch == epoch)
    }

    /// The name of a binding's group.
    pub fn bound(&self, binding: u32) -> String {
        self.group(binding).map_or_else(|| "(removed)".to_owned(), |entry| entry.name.clone())
    }

    /// The VIP that a binding's packets are forwarded to.
    pub fn vip(&self, binding: u32) -> Option<IpAddr> {
        self.group(binding).map(|entry| entry.vip)
    }

    /// The name of whatever group has this number now.
    pub fn group_now(&self, id: u16) -> Option<&str> {
        self.groups.get(&id).map(|entry| entry.name.as_str())
    }
}

/// How a flow was bound, and why not in a better way: codes, for which [`words`] has the text.
pub(super) fn binding_codes(
    bound_by: u8,
    fallback: u8,
    predicted: bool,
) -> (&'static str, Option<&'static str>) {
    use abi::{bound_by as By, fallback_reason as Why};

    let by = match By(u32::from(bound_by)) {
        By::BOUND_BY_MESSAGE => "message",
        By::BOUND_BY_CLIENT_ID => "client_id",
        By::BOUND_BY_ANSWERED if fallback == 0 => "message_answered",
        By::BOUND_BY_ROUTE => "route",
        By::BOUND_BY_SERVER_NAME => "server_name",
        By::BOUND_BY_ALPN => "alpn",
        By::BOUND_BY_REAL => "real",
        _ if predicted => "prediction",
        _ => "no_prediction",
    };
    let why = match Why(u32::from(fallback)) {
        Why::FALLBACK_NOT_CONNECT => Some("connect_not_for_all"),
        Why::FALLBACK_CUT => Some("connect_in_segments"),
        Why::FALLBACK_TOO_LONG => Some("connect_too_long"),
        Why::FALLBACK_MQTT5 => Some("mqtt5"),
        Why::FALLBACK_PERSISTENT => Some("persistent_session"),
        Why::FALLBACK_CREDENTIALS => Some("credentials"),
        Why::FALLBACK_SILENT => Some("silent"),
        Why::FALLBACK_NO_TOPIC => Some("no_topic"),
        Why::FALLBACK_NO_SERVER_NAME => Some("no_server_name"),
        Why::FALLBACK_NO_HELLO => Some("no_client_hello"),
        Why::FALLBACK_HELLO_CUT => Some("client_hello_cut"),
        _ => None,
    };
    (by, why)
}

/// What people read for the code of a flow's state, of what it was bound by, or of why.
pub fn words(code: &str) -> Cow<'_, str> {
    Cow::Borrowed(match code {
        "message_answered" => "message (answered)",
        "connect_not_for_all" => "no CONNECT that all brokers accept",
        "connect_in_segments" => "CONNECT in several segments",
        "connect_too_long" => "CONNECT too long",
        "mqtt5" => "MQTT 5",
        "no_topic" => "no topic decides",
        "alpn" => "ALPN",
        "no_server_name" => "no server name with a route",
        "no_client_hello" => "no ClientHello",
        "client_hello_cut" => "ClientHello's name came late",
        "real" => "the real that has it",
        "not_mqtt" => "not MQTT",
        _ => return Cow::Owned(code.replace('_', " ")),
    })
}

/// What people read for what a flow was bound by, and why.
pub fn bound_by_words(code: &str, reason: Option<&str>) -> String {
    let by = words(code);
    reason.map_or_else(|| by.to_string(), |reason| format!("{by} ({})", words(reason)))
}

/// A text of the maps, with a mark if only its beginning is kept.
pub(super) fn text_of(text: &[u8], length: u16) -> String {
    let kept = &text[..usize::from(length).min(text.len())];
    let mut all = String::from_utf8_lossy(kept).into_owned();
    if usize::from(length) > text.len() {
        all.push('…');
    }
    all
}

/// A server name, with a mark if only its end is kept.
pub(super) fn server_name_of(name: &server_name) -> String {
    server_name_text(&name.text, name.length)
}

/// The same, of a text that may have room for more.
pub(super) fn server_name_text(text: &[u8], length: u16) -> String {
    const KEPT: usize = limits::CLIENT_ROUTE_TEXT_MAX.0 as usize;
    let length = usize::from(length);
    let kept = String::from_utf8_lossy(&text[..length.min(KEPT)]).into_owned();
    if length > KEPT { format!("…{kept}") } else { kept }
}

/// Topics' texts, each read once.
pub(super) struct Topics<'a> {
    datapath: &'a Datapath,
    cached: BTreeMap<u64, String>,
}

impl<'a> Topics<'a> {
    pub(super) fn of(datapath: &'a Datapath) -> Self {
        Self { datapath, cached: BTreeMap::new() }
    }

    pub(super) fn text(&mut self, hash: u64) -> Result<String> {
        if let Some(text) = self.cached.get(&hash) {
            return Ok(text.clone());
        }
        let found: Option<topic> = self.datapath.topics.get(&hash)?;
        let text = match found {
            Some(topic) => text_of(&topic.text, topic.length),
            None if hash == 0 => String::new(),
            None => EVICTED.to_owned(),
        };
        self.cached.insert(hash, text.clone());
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_get_codes_and_people_words() {
        let is_code = |text: &str| {
            text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        };
        for (by, why) in (0..16).flat_map(|by| (0..16).map(move |why| (by, why))) {
            let (code, reason) = binding_codes(by, why, true);
            for code in [code].into_iter().chain(reason) {
                assert!(is_code(code), "{code}");
                assert!(!words(code).contains('_'), "{code}");
            }
        }
        assert_eq!(
            bound_by_words("no_prediction", Some("connect_in_segments")),
            "no prediction (CONNECT in several segments)"
        );
    }
}
