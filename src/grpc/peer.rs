//! Who sent a request.

use std::fmt;
use std::net::SocketAddr;

use tonic::Request;
use tonic::transport::server::UdsConnectInfo;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// The sender of a request, as far as the connection tells.
#[derive(Debug)]
pub enum Peer {
    /// This process itself, over a Unix socket.
    Own,
    Process {
        uid: u32,
        pid: i32,
    },
    Host {
        addr: SocketAddr,
        /// Of its certificate, verified: the subject.
        subject: Option<String>,
    },
    Unknown,
}

impl Peer {
    /// Of a request.
    pub fn of<T>(request: &Request<T>) -> Self {
        if let Some(addr) = request.remote_addr() {
            return Self::Host { addr, subject: subject(request) };
        }
        let info = request.extensions().get::<UdsConnectInfo>();
        match info.and_then(|info| info.peer_cred) {
            Some(peer) if peer.pid() == Some(std::process::id().cast_signed()) => Self::Own,
            Some(peer) => Self::Process { uid: peer.uid(), pid: peer.pid().unwrap_or_default() },
            None => Self::Unknown,
        }
    }
}

fn subject<T>(request: &Request<T>) -> Option<String> {
    let certificates = request.peer_certs()?;
    let (_, certificate) = X509Certificate::from_der(certificates.first()?).ok()?;
    Some(certificate.subject().to_string())
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => write!(f, "this process"),
            Self::Process { uid, pid } => write!(f, "uid {uid}, pid {pid}"),
            Self::Host { addr, subject: Some(subject) } => write!(f, "{subject} ({addr})"),
            Self::Host { addr, subject: None } => write!(f, "{addr}"),
            Self::Unknown => write!(f, "unknown"),
        }
    }
}
