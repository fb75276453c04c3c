//! Changes of services, to and from their messages.

use std::fmt::Display;
use std::net::IpAddr;
use std::str::FromStr;

use tonic::Status;

use super::proto::{self, change::Change as What, route::By};
use crate::config::edit::{Change, RouteKey};

impl From<(Option<&str>, &Change)> for proto::Change {
    fn from((service, change): (Option<&str>, &Change)) -> Self {
        let what = match change.clone() {
            Change::AddRoute { route, group } => {
                What::AddRoute(proto::AddRoute { route: Some(route.into()), group })
            }
            Change::RemoveRoute { route } => {
                What::RemoveRoute(proto::RemoveRoute { route: Some(route.into()) })
            }
            Change::AddGroup { group, vip, reals } => What::AddGroup(proto::AddGroup {
                name: group,
                vip: vip.to_string(),
                reals: reals.iter().map(IpAddr::to_string).collect(),
            }),
            Change::RemoveGroup { group } => What::RemoveGroup(proto::RemoveGroup { name: group }),
            Change::AddReal { group, real, weight, vip } => What::AddReal(proto::AddReal {
                group,
                address: real.to_string(),
                weight,
                vip: vip.map(|vip| vip.to_string()).unwrap_or_default(),
            }),
            Change::RemoveReal { group, real } => {
                What::RemoveReal(proto::RemoveReal { group, address: real.to_string() })
            }
            Change::SetWeight { group, real, weight } => {
                What::SetWeight(proto::SetWeight { group, address: real.to_string(), weight })
            }
        };
        Self { service: service.unwrap_or_default().to_owned(), change: Some(what) }
    }
}

impl From<RouteKey> for proto::Route {
    fn from(route: RouteKey) -> Self {
        let by = match route.by {
            "client_id" => By::ClientId(route.pattern),
            "username" => By::Username(route.pattern),
            "sni" => By::Sni(route.pattern),
            "alpn" => By::Alpn(route.pattern),
            _ => By::Topic(route.pattern),
        };
        Self { by: Some(by) }
    }
}

/// A message's change, and of which service.
pub fn read(message: proto::Change) -> Result<(Option<String>, Change), Status> {
    let service = Some(message.service).filter(|name| !name.is_empty());
    let change = match message.change.ok_or_else(|| Status::invalid_argument("an empty change"))? {
        What::AddRoute(add) => Change::AddRoute { route: route(add.route)?, group: add.group },
        What::RemoveRoute(remove) => Change::RemoveRoute { route: route(remove.route)? },
        What::AddGroup(add) => Change::AddGroup {
            group: add.name,
            vip: parse(&add.vip)?,
            reals: add.reals.iter().map(|real| parse(real)).collect::<Result<_, _>>()?,
        },
        What::RemoveGroup(remove) => Change::RemoveGroup { group: remove.name },
        What::AddReal(add) => Change::AddReal {
            group: add.group,
            real: parse(&add.address)?,
            weight: add.weight,
            vip: if add.vip.is_empty() { None } else { Some(parse(&add.vip)?) },
        },
        What::RemoveReal(remove) => {
            Change::RemoveReal { group: remove.group, real: parse(&remove.address)? }
        }
        What::SetWeight(set) => {
            Change::SetWeight { group: set.group, real: parse(&set.address)?, weight: set.weight }
        }
    };
    Ok((service, change))
}

fn route(message: Option<proto::Route>) -> Result<RouteKey, Status> {
    let by = message.and_then(|route| route.by);
    let (by, pattern) = match by.ok_or_else(|| Status::invalid_argument("an empty route"))? {
        By::Topic(pattern) => ("topic", pattern),
        By::ClientId(pattern) => ("client_id", pattern),
        By::Username(pattern) => ("username", pattern),
        By::Sni(pattern) => ("sni", pattern),
        By::Alpn(pattern) => ("alpn", pattern),
    };
    Ok(RouteKey { by, pattern })
}

pub fn parse<T: FromStr<Err: Display>>(text: &str) -> Result<T, Status> {
    text.parse().map_err(|e| Status::invalid_argument(format!("{text:?}: {e}")))
}
