//! `change` and `diff`: services at run time, and what of the file is not in force.

use std::net::IpAddr;

use clap::{Args, Subcommand, ValueEnum};

use super::block_on;
use super::error::Error;
use super::table::line;
use crate::api::Run;
use crate::config::edit::{self, Change as Edit, RouteKey};
use crate::config::{Config, address};
use crate::instance;

#[derive(Debug, Args)]
pub struct Change {
    #[command(subcommand)]
    what: What,

    /// Of this service; needed only if there are several
    #[arg(long, global = true, value_name = "NAME")]
    service: Option<String>,

    /// Also write it to the configuration file; else it is gone once `run` ends or reads the file again
    #[arg(long, global = true)]
    persist: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum By {
    Topic,
    #[value(name = "client_id")]
    ClientId,
    Username,
    Sni,
    Alpn,
}

impl By {
    fn key(self) -> &'static str {
        match self {
            Self::Topic => "topic",
            Self::ClientId => "client_id",
            Self::Username => "username",
            Self::Sni => "sni",
            Self::Alpn => "alpn",
        }
    }
}

#[derive(Debug, Args)]
struct Route {
    /// A topic filter; of --by client_id or username, a text or a prefix that ends in "*"; of --by sni, a host name or
    /// "*." and its end; of --by alpn, a protocol
    pattern: String,
    /// What the route goes by
    #[arg(long, value_enum, default_value = "topic")]
    by: By,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Route what matches to a group
    AddRoute {
        #[command(flatten)]
        route: Route,
        /// The group's name, or "any"
        group: String,
    },
    /// Take a route out; what matched it follows the others, or goes to the default group
    RemoveRoute {
        #[command(flatten)]
        route: Route,
    },
    /// Add a group of brokers
    AddGroup {
        name: String,
        /// The group VIP: an address that only the balancer knows
        #[arg(value_parser = address)]
        vip: IpAddr,
        #[arg(required = true, value_parser = address)]
        reals: Vec<IpAddr>,
    },
    /// Take a group out that no route leads to
    RemoveGroup { name: String },
    /// Add a broker to a group
    AddReal {
        group: String,
        #[arg(value_parser = address)]
        real: IpAddr,
        #[arg(long, default_value_t = 1)]
        weight: u32,
        /// The VIP with this real alone, where the group's affinity needs one
        #[arg(long, value_parser = address)]
        vip: Option<IpAddr>,
    },
    /// Take a broker out of a group; `drain` lets its connections end first
    RemoveReal {
        group: String,
        #[arg(value_parser = address)]
        real: IpAddr,
    },
    /// Change a broker's weight, its share of new connections; 0: none
    SetWeight {
        group: String,
        #[arg(value_parser = address)]
        real: IpAddr,
        weight: u32,
    },
}

impl Change {
    pub fn run(self, config: &Config) -> Result<(), Error> {
        let (service, file) = (self.service.as_deref(), config.path.display());
        let change = self.what.into();
        if instance::find(config).is_some() {
            block_on(async {
                let mut run = Run::require(config, "changing services").await?;
                run.change(service, &change, self.persist).await
            })?;
            line(&if self.persist {
                format!("in force, and in {file}")
            } else {
                format!("in force; not in {file} (--persist writes it there, too)")
            });
            return Ok(());
        }
        if !self.persist {
            return Err(Error::Failed(format!(
                "`mqtt-fwd run` is not running on {}; --persist changes {file}",
                config.interface
            )));
        }
        let text = edit::edit(&config.text, service, &change)?;
        let new = Config::parse(&config.path, &text)?;
        edit::replace_file(&config.path, &new.text)
            .map_err(|source| Error::Io { what: format!("writing {file}"), source })?;
        line(&format!("in {file}; `mqtt-fwd apply` brings it into force"));
        Ok(())
    }
}

impl From<Route> for RouteKey {
    fn from(route: Route) -> Self {
        Self { by: route.by.key(), pattern: route.pattern }
    }
}

impl From<What> for Edit {
    fn from(what: What) -> Self {
        match what {
            What::AddRoute { route, group } => Self::AddRoute { route: route.into(), group },
            What::RemoveRoute { route } => Self::RemoveRoute { route: route.into() },
            What::AddGroup { name, vip, reals } => Self::AddGroup { group: name, vip, reals },
            What::RemoveGroup { name } => Self::RemoveGroup { group: name },
            What::AddReal { group, real, weight, vip } => {
                Self::AddReal { group, real, weight, vip }
            }
            What::RemoveReal { group, real } => Self::RemoveReal { group, real },
            What::SetWeight { group, real, weight } => Self::SetWeight { group, real, weight },
        }
    }
}
