//! What of a changed configuration needs other programs or maps, and what needs another process.

use std::sync::PoisonError;

use super::balancer::Shared;
use crate::config::{BalancerKind, Config, ConfigError};
use crate::datapath::embedded::Embedded;
use crate::kernel::{BpfError, load, privileges};

/// Why the configuration before stays in force.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{} cannot change while `run` runs; restart it for that", .0.join(", "))]
    Fixed(Vec<&'static str>),
    #[error(transparent)]
    Bpf(#[from] BpfError),
}

impl ReloadError {
    /// For where others read it.
    pub fn without_values(&self) -> String {
        match self {
            Self::Config(error) => error.without_values(),
            other => other.to_string(),
        }
    }
}

/// Reads the file again, and loads what it takes.
pub fn reload(config: &Config, balancer: Option<&Shared>) -> Result<Config, ReloadError> {
    let new = Config::load(&config.path)?;
    let keys = fixed_keys(config, &new);
    if !keys.is_empty() {
        return Err(ReloadError::Fixed(keys));
    }
    reload_datapath(config, &new, balancer)?;
    Ok(new)
}

/// Keys whose change needs another process.
fn fixed_keys(old: &Config, new: &Config) -> Vec<&'static str> {
    [
        ("interface", new.interface != old.interface),
        ("xdp_mode", new.xdp_mode != old.xdp_mode),
        ("metrics", new.metrics != old.metrics),
        ("bpffs", new.bpffs != old.bpffs),
        ("root_array", new.root_array != old.root_array),
        ("balancer", new.balancer != old.balancer),
        ("[maps] (without CAP_SYS_ADMIN)", new.maps != old.maps && !privileges::sees_layouts()),
        (
            "balancer_endpoint",
            new.balancer == BalancerKind::Embedded
                && new.balancer_endpoint != old.balancer_endpoint,
        ),
    ]
    .into_iter()
    .filter_map(|(key, changed)| changed.then_some(key))
    .collect()
}

/// What is fixed when a program is loaded: capacities and rates. What the maps hold is moved.
fn reload_datapath(old: &Config, new: &Config, balancer: Option<&Shared>) -> Result<(), BpfError> {
    if (old.maps, old.rates) == (new.maps, new.rates) {
        return Ok(());
    }
    load::load(&new.load_spec())?;
    if let Some(balancer) = balancer.filter(|_| old.maps.vips != new.maps.vips) {
        load::load_balancer(&new.load_spec())?;
        let reopened = Embedded::open(&new.pins())?;
        *balancer.lock().unwrap_or_else(PoisonError::into_inner) = reopened;
    }
    Ok(())
}
