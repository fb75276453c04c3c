//! Certificates and keys in files, and TLS towards the brokers of a group.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::net::TcpStream;
use tokio_rustls::rustls::client::ClientConfig;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{self, RootCertStore};
use tokio_rustls::{TlsConnector, client};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::domain::BrokerTls;

/// A certificate or key that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file.
    #[error("{}: {why}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Certificate and key do not match, or are of an unsupported kind.
    #[error("{} and its key: {source}", .path.display())]
    Pair {
        /// The certificate.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

/// An error of a file.
pub fn file(path: &Path, why: impl std::fmt::Display) -> TlsError {
    TlsError::File { path: path.to_owned(), why: why.to_string() }
}

/// The certificates of a PEM file, at least one.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let all = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| file(path, e))?;
    if all.is_empty() {
        return Err(file(path, "there is no certificate in it (-----BEGIN CERTIFICATE-----)"));
    }
    Ok(all)
}

/// The key of a PEM file.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|e| file(path, e))
}

/// The authorities of a PEM file.
pub fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|e| file(path, e))?;
    }
    Ok(roots)
}

/// When the first of a chain's certificates expires.
pub fn expires(chain: &[CertificateDer<'_>]) -> Option<SystemTime> {
    let of = |certificate: &CertificateDer<'_>| {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let seconds = u64::try_from(parsed.validity().not_after.timestamp()).ok()?;
        Some(UNIX_EPOCH + Duration::from_secs(seconds))
    };
    chain.iter().filter_map(of).min()
}

/// TLS towards the brokers of a group.
#[derive(Clone)]
pub struct Connector {
    tls: TlsConnector,
    /// In their certificates; `None`: their addresses.
    name: Option<ServerName<'static>>,
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connector").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Connector {
    /// Reads authorities, and the certificate that is shown to brokers.
    pub fn load(settings: &BrokerTls) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the provider knows TLS 1.2 and 1.3")
            .with_root_certificates(authorities(&settings.ca)?);
        let config = match &settings.certificate {
            None => builder.with_no_client_auth(),
            Some(own) => {
                let chain = certificates(&own.certificate)?;
                let path = own.certificate.clone();
                builder
                    .with_client_auth_cert(chain, private_key(&own.key)?)
                    .map_err(|source| TlsError::Pair { path, source })?
            }
        };
        let name = settings.server_name.clone();
        Ok(Self { tls: TlsConnector::from(Arc::new(config)), name })
    }

    /// TLS' handshake with a broker at that address.
    pub async fn connect(
        &self,
        addr: IpAddr,
        stream: TcpStream,
    ) -> io::Result<client::TlsStream<TcpStream>> {
        let name = self.name.clone().unwrap_or_else(|| ServerName::IpAddress(addr.into()));
        self.tls.connect(name, stream).await
    }
}
