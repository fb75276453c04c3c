//! What a person may get wrong in a record.

use std::net::IpAddr;

use crate::config::{Binding, Config};
use crate::domain::client_record::{ClientRecord, IdentifiedBy};
use crate::domain::limits;

/// A record that is refused.
#[derive(Debug, thiserror::Error)]
#[error("record {number} ({client}): {reason}")]
pub struct InvalidRecord {
    /// Counted from 1.
    pub number: usize,
    pub client: String,
    pub reason: Reason,
}

/// Why it is.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    #[error("no service {name:?}; there are {there}")]
    NoService { name: String, there: String },
    #[error("service {service:?} has no group {group:?}")]
    NoGroup { service: String, group: String },
    #[error("neither a topic nor groups say where it belongs")]
    NoPlace,
    #[error("{topic:?} is no topic name of up to {} bytes", limits::TOPIC_TEXT)]
    Topic { topic: String },
    #[error("is no IP address; for a client id, write by = client_id")]
    NoAddress,
    #[error("is of another IP version than service {service:?}")]
    IpVersion { service: String },
    #[error(
        "service {service:?} identifies clients by address; client ids need binding = \"delayed\""
    )]
    ByAddress { service: String },
    #[error("a client id must be 1 to {} bytes long", limits::CLIENT_ID_TEXT)]
    ClientId,
}

/// Checks all of them.
pub fn validate(config: &Config, records: &[ClientRecord]) -> Result<(), InvalidRecord> {
    (1..).zip(records).try_for_each(|(number, record)| {
        let invalid = |reason| InvalidRecord { number, client: record.client.clone(), reason };
        check(config, record).map_err(invalid)
    })
}

fn check(config: &Config, record: &ClientRecord) -> Result<(), Reason> {
    let Some(service) = config.services.iter().find(|s| s.name == record.service) else {
        let there: Vec<_> = config.services.iter().map(|s| format!("{:?}", s.name)).collect();
        return Err(Reason::NoService { name: record.service.clone(), there: there.join(", ") });
    };
    let of_service = || service.name.clone();
    if let Some(group) = record.groups.keys().find(|name| service.group(name).is_none()) {
        return Err(Reason::NoGroup { service: of_service(), group: group.clone() });
    }
    if record.topic.is_empty() && record.groups.is_empty() && !record.for_relay {
        return Err(Reason::NoPlace);
    }
    if record.topic.contains(['+', '#', '\0']) || record.topic.len() > limits::TOPIC_TEXT {
        return Err(Reason::Topic { topic: record.topic.clone() });
    }
    match record.by {
        IdentifiedBy::Address => match record.client.parse::<IpAddr>() {
            Err(_) => Err(Reason::NoAddress),
            Ok(addr) if addr.is_ipv4() != service.addr.is_ipv4() => {
                Err(Reason::IpVersion { service: of_service() })
            }
            Ok(_) => Ok(()),
        },
        IdentifiedBy::ClientId if service.binding == Binding::Predicted => {
            Err(Reason::ByAddress { service: of_service() })
        }
        IdentifiedBy::ClientId
            if record.client.is_empty() || record.client.len() > limits::CLIENT_ID_TEXT =>
        {
            Err(Reason::ClientId)
        }
        IdentifiedBy::ClientId => Ok(()),
    }
}
