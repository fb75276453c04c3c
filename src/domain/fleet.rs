//! Several balancers as one: what does not depend on how they find each other.

/// This balancer, as one of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fleet {
    /// Its name, which no other has.
    pub name: String,
    /// UDP port of the broker hosts that answers who has a connection.
    pub ask_port: u16,
    /// Where connections without a broker, learned clients and members are kept; `None`: nowhere.
    pub store: Option<Store>,
}

/// A Valkey or Redis server.
#[derive(Clone, PartialEq, Eq)]
pub struct Store {
    /// As `redis://` and `rediss://` URLs name it; may hold a password.
    pub url: String,
    /// Certificates that it is trusted by; `None`: the host's.
    pub ca: Option<std::path::PathBuf>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.address())
    }
}

impl Store {
    /// Without user and password.
    pub fn address(&self) -> String {
        match (self.url.split_once("://"), self.url.rsplit_once('@')) {
            (Some((scheme, _)), Some((_, host))) => format!("{scheme}://{host}"),
            _ => self.url.clone(),
        }
    }
}
