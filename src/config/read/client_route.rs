//! Routes by what a client says first: CONNECT or ClientHello.

use super::super::Binding;
use super::super::reader::Reader;
use crate::domain::{ANY, ClientRoute, ClientRouteKind, Protocol, limits};

const KINDS: [ClientRouteKind; 4] = [
    ClientRouteKind::ClientId,
    ClientRouteKind::Username,
    ClientRouteKind::Sni,
    ClientRouteKind::Alpn,
];

/// A pattern's text, and whether it is open.
type Parse = fn(&str) -> Result<(String, bool), String>;

/// Which of them a route is; `None`: by topic.
pub(super) fn kind_of(r: &Reader<'_>) -> Option<ClientRouteKind> {
    KINDS.into_iter().find(|kind| r.has(kind.key()))
}

/// A route of such a kind.
pub(super) fn client_route(
    r: &Reader<'_>,
    kind: ClientRouteKind,
    (binding, protocol): (Binding, Protocol),
    known: &dyn Fn(&str) -> Result<String, String>,
) -> Option<ClientRoute> {
    let key = kind.key();
    for other in ["topic"].into_iter().chain(KINDS.map(ClientRouteKind::key)) {
        if r.has(other) && other != key {
            r.problem(other, format!("a route looks at one thing, and this one has {key} already"));
        }
    }
    match (kind.protocol(), protocol) {
        (Protocol::Mqtt, Protocol::Tls) => r.problem(
            key,
            "cannot be read: clients of this service say it within TLS (protocol = \"tls\"); route by sni or alpn",
        ),
        (Protocol::Tls, Protocol::Mqtt) => r.problem(
            key,
            "is of TLS, which the clients of this service do not speak; write protocol = \"tls\" in it",
        ),
        _ => {}
    }
    if binding == Binding::Predicted {
        let what = if kind.protocol() == Protocol::Tls { "ClientHello" } else { "CONNECT" };
        r.problem(
            key,
            format!(
                "needs binding = \"delayed\": with \"predicted\", the group is chosen before {what}"
            ),
        );
    }
    let (example, parse): (_, Parse) = match kind {
        ClientRouteKind::Sni => ("*.plant7.example", server_name),
        ClientRouteKind::Alpn => ("mqtt", protocol_name),
        ClientRouteKind::ClientId | ClientRouteKind::Username => ("plant7-*", prefix),
    };
    let text = r.required(key, example, parse);
    let group = r.required("group", "default", |name| {
        if name == ANY {
            return Err("a client has to belong somewhere; name a group".to_owned());
        }
        known(name)
    });
    let ((text, is_open), group) = (text?, group?);
    Some(ClientRoute { kind, text, is_open, group })
}

/// An exact text has a byte more in the datapath.
fn is_short(text: &str, is_open: bool) -> Result<(), String> {
    let most = limits::CLIENT_ROUTE_TEXT;
    if text.len() > most || (text.is_empty() && !is_open) {
        return Err(format!("must be 1 to {most} bytes long"));
    }
    Ok(())
}

/// A text, or what it begins with.
fn prefix(text: &str) -> Result<(String, bool), String> {
    let (text, is_open) = match text.strip_suffix('*') {
        Some(text) => (text, true),
        None => (text, false),
    };
    is_short(text, is_open)?;
    if text.contains(['*', '\0']) {
        return Err("a * stands for the rest, so only at the end".to_owned());
    }
    Ok((text.to_owned(), is_open))
}

/// A host name (RFC 6066 §3), or what it ends with.
fn server_name(text: &str) -> Result<(String, bool), String> {
    let lower = text.to_ascii_lowercase();
    let (text, is_open) = match lower.strip_prefix('*') {
        Some(text) => (text, true),
        None => (&*lower, false),
    };
    is_short(text, is_open)?;
    if text.contains('*') || (is_open && !text.is_empty() && !text.starts_with('.')) {
        return Err(
            "a * stands for whole labels in front: \"*.plant7.example\", or \"*\" for any name"
                .to_owned(),
        );
    }
    if !text.is_ascii() {
        return Err("is written as clients send it, in ASCII (RFC 5890): \"xn--…\"".to_owned());
    }
    if text.parse::<std::net::IpAddr>().is_ok() || text.contains(':') {
        return Err("is no host name; clients send none for addresses (RFC 6066 §3)".to_owned());
    }
    let labels = if is_open { text.strip_prefix('.').unwrap_or(text) } else { text };
    let is_label = |label: &str| {
        let is_letter = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        !label.is_empty() && label.len() <= 63 && label.chars().all(is_letter)
    };
    if !labels.is_empty() && !labels.split('.').all(is_label) {
        return Err("is no host name, without a dot at its end (RFC 6066 §3)".to_owned());
    }
    Ok((text.to_owned(), is_open))
}

/// As ClientHello offers it, byte by byte (RFC 7301 §3.1).
fn protocol_name(text: &str) -> Result<(String, bool), String> {
    is_short(text, false)?;
    if text.contains('\0') {
        return Err("must not have a byte of value 0".to_owned());
    }
    Ok((text.to_owned(), false))
}
