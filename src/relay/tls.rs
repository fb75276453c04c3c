//! TLS towards clients, with certificates by name, reload and client certificates.

use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{self, ServerConfig};
use tokio_rustls::server::TlsStream;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::brokers::tls::{TlsError, authorities, certificates, file, private_key};
use crate::domain::{Certificate, CertificateName, RelayTls};

/// A listener's TLS.
#[derive(Debug)]
pub struct Tls {
    settings: RelayTls,
    websocket: bool,
    config: RwLock<Arc<ServerConfig>>,
}

/// A certificate that clients may ask for by name (SNI, RFC 6066 §3).
#[derive(Debug)]
struct Named {
    /// DNS names of its subject, lower case; `*.` stands for one label (RFC 9525 §6.3).
    names: Vec<String>,
    key: Arc<CertifiedKey>,
}

impl Named {
    fn load(certificate: &Certificate, provider: &CryptoProvider) -> Result<Self, TlsError> {
        let path = &certificate.certificate;
        let chain = certificates(path)?;
        let (_, parsed) = X509Certificate::from_der(&chain[0]).map_err(|e| file(path, e))?;
        let names = parsed.subject_alternative_name().map_err(|e| file(path, e))?;
        let names = names.iter().flat_map(|names| &names.value.general_names);
        let names = names
            .filter_map(|name| match name {
                GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
                _ => None,
            })
            .collect();
        let key = CertifiedKey::from_der(chain, private_key(&certificate.key)?, provider)
            .map_err(|source| TlsError::Pair { path: path.clone(), source })?;
        Ok(Self { names, key: Arc::new(key) })
    }

    fn is_for(&self, wanted: &str) -> bool {
        let rest = wanted.split_once('.').map(|(_, rest)| rest);
        self.names.iter().any(|name| match name.strip_prefix("*.") {
            Some(name) => rest == Some(name),
            None => name == wanted,
        })
    }
}

/// The first is for those that ask for none of the others.
#[derive(Debug)]
struct ByName(Vec<Named>);

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let wanted = hello.server_name().map(str::to_ascii_lowercase);
        let named = wanted.and_then(|wanted| self.0.iter().find(|c| c.is_for(&wanted)));
        named.or(self.0.first()).map(|c| Arc::clone(&c.key))
    }
}

fn server(settings: &RelayTls, websocket: bool) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let all = settings.certificates.iter().map(|c| Named::load(c, &provider));
    let all = ByName(all.collect::<Result<_, _>>()?);
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .expect("the provider knows TLS 1.2 and 1.3");
    let builder = match &settings.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = Arc::new(authorities(path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                .build()
                .map_err(|e| file(path, e))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(all));
    // ALPN, for clients that send it.
    let protocol: &[u8] = if websocket { b"http/1.1" } else { b"mqtt" };
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(config)
}

impl Tls {
    /// Reads certificate and key. What is spoken in TLS is what ALPN offers.
    pub fn load(settings: &RelayTls, websocket: bool) -> Result<Self, TlsError> {
        let config = RwLock::new(Arc::new(server(settings, websocket)?));
        Ok(Self { settings: settings.clone(), websocket, config })
    }

    /// Reloads them, for new connections.
    pub fn reload(&self) -> Result<(), TlsError> {
        let new = Arc::new(server(&self.settings, self.websocket)?);
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    /// TLS' handshake.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let config = Arc::clone(&self.config.read().unwrap_or_else(PoisonError::into_inner));
        TlsAcceptor::from(config).accept(stream).await
    }

    /// The name of clients' certificates that brokers get as their user name.
    pub fn names_users(&self) -> Option<CertificateName> {
        self.settings.username_from_certificate
    }

    /// That name of a client's certificate. `None`: it has none that can be read, so this client is nobody.
    pub fn username(stream: &TlsStream<TcpStream>, which: CertificateName) -> Option<String> {
        let certificate = stream.get_ref().1.peer_certificates()?.first()?;
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        let alternative = |is: fn(&GeneralName<'_>) -> Option<String>| {
            let names = certificate.subject_alternative_name().ok()??;
            names.value.general_names.iter().find_map(is)
        };
        let name = match which {
            CertificateName::CommonName => {
                certificate.subject().iter_common_name().next()?.as_str().ok().map(str::to_owned)
            }
            CertificateName::SanDns => alternative(|name| match name {
                GeneralName::DNSName(name) => Some((*name).to_owned()),
                _ => None,
            }),
            CertificateName::SanUri => alternative(|name| match name {
                GeneralName::URI(name) => Some((*name).to_owned()),
                _ => None,
            }),
            CertificateName::SanEmail => alternative(|name| match name {
                GeneralName::RFC822Name(name) => Some((*name).to_owned()),
                _ => None,
            }),
        };
        name.filter(|name| !name.is_empty())
    }
}
