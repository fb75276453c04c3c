//! Where and for whom `run` serves its API beside its socket.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::Certificate;

/// Where `run` serves its API to other hosts, and for whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Api {
    /// Where it listens.
    pub listen: SocketAddr,
    /// What it shows.
    pub certificate: Certificate,
    /// CA certificates (PEM) that those of its clients are verified with.
    pub client_ca: PathBuf,
}
