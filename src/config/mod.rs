//! The configuration: one TOML file, read and checked as a whole before anything is touched.

mod differences;
pub mod edit;
mod error;
mod read;
mod reader;
pub mod schema;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use differences::differences;
pub use error::{ConfigError, Problem, is_secret};
pub use read::{address, endpoint, mac};

use crate::domain::fleet::Fleet;
use crate::kernel::load::LoadSpec;
use crate::kernel::pins::Pins;

pub use crate::domain::{
    Api, BalancerKind, Binding, Encapsulation, Group, MapSizes, OnMisprediction, Rates, Real,
    RelayLimits, Route, Service, Target, XdpMode,
};

/// A validated configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where it was read from.
    pub path: PathBuf,
    /// What was read.
    pub text: Arc<str>,
    /// The interface that clients' packets come in on.
    pub interface: String,
    /// Native or generic XDP.
    pub xdp_mode: XdpMode,
    /// Mount point of bpffs.
    pub bpffs: PathBuf,
    /// Path of the chain's program array, if not Katran's convention.
    pub root_array: Option<PathBuf>,
    /// Which balancer.
    pub balancer: BalancerKind,
    /// Where its gRPC service listens: `host:port` or `unix:/path`.
    pub balancer_endpoint: String,
    /// What it puts around packets.
    pub encapsulation: Encapsulation,
    /// MAC address of the gateway towards the reals (embedded balancer).
    pub gateway_mac: Option<[u8; 6]>,
    /// Where metrics are served; `None`: nowhere.
    pub metrics: Option<std::net::SocketAddr>,
    /// Where other hosts reach `run`; `None`: nowhere.
    pub api: Option<Api>,
    /// The key that delayed binding shares with the broker hosts.
    pub handover_key: PathBuf,
    /// The file that clients' records are saved to, for a reboot; `None`: none.
    pub clients_file: Option<PathBuf>,
    /// From one time that it is written to the next.
    pub clients_save_interval: Duration,
    /// Between two reconciliations with the balancer.
    pub reconcile_interval: Duration,
    /// Between two tests of `run`, as `mqtt-fwd test` makes them; `None`: it makes none.
    pub test_interval: Option<Duration>,
    /// How much the datapath reports and stores in a second.
    pub rates: Rates,
    /// Map capacities.
    pub maps: MapSizes,
    /// What the relay's clients may cost.
    pub relay: RelayLimits,
    /// This balancer as one of several; `None`: it is alone.
    pub fleet: Option<Fleet>,
    /// The services, at least one.
    pub services: Vec<Service>,
}

impl Config {
    /// Where its interface's programs and maps are pinned.
    pub fn pins(&self) -> Pins {
        Pins::new(&self.bpffs, &self.interface, self.root_array.as_deref())
    }

    /// What the loader has to know of it.
    pub fn load_spec(&self) -> LoadSpec {
        LoadSpec {
            interface: self.interface.clone(),
            xdp_mode: self.xdp_mode,
            pins: self.pins(),
            maps: self.maps,
            rates: self.rates,
        }
    }

    /// Reads and checks a file. Every problem of it is reported, not only the first.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |source| ConfigError::Unreadable { path: path.to_owned(), source };
        // Opening a FIFO waits for a writer.
        let found = std::fs::metadata(path).map_err(unreadable)?;
        if !found.is_file() {
            return Err(unreadable(std::io::Error::other("it is not a regular file")));
        }
        let bytes = std::fs::read(path).map_err(unreadable)?;
        let text = String::from_utf8(bytes).map_err(|e| ConfigError::NotText {
            path: path.to_owned(),
            line: e.as_bytes()[..e.utf8_error().valid_up_to()].split(|b| *b == b'\n').count(),
        })?;
        Self::parse(path, &text)
    }

    /// Checks the text of a file named `path`.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let table = toml::de::DeTable::parse(text).map_err(|source| ConfigError::Syntax {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        read::config(path, text, table.get_ref())
    }

    /// Whether any service uses delayed binding.
    pub fn uses_delayed_binding(&self) -> bool {
        self.services.iter().any(|service| service.binding == Binding::Delayed)
    }
}
