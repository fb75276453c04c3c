//! The same service for other hosts: over TCP, with certificates on both sides.

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use tokio::task::AbortHandle;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tracing::{error, info};

use super::{ApiError, Result, serve_by};
use crate::domain::Api;
use crate::grpc::Listener;
use crate::state::State;

/// For TLS' handshake. Whoever stays silent holds one of a bounded number of places.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// Serves as long as it lives.
#[derive(Debug)]
pub struct Remote(AbortHandle);

impl Drop for Remote {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Remote {
    /// Reads certificates and listens. What served before ends only if the certificates are good, and its
    /// connections with it.
    pub async fn serve(api: &Api, state: State, before: &mut Option<Self>) -> Result<Self> {
        let server = Server::builder()
            .tls_config(tls(api)?)
            .map_err(|e| failed(&api.certificate.certificate, std::io::Error::other(e)))?;
        drop(before.take());
        let listener = bind(api).await?;
        info!(addr = %api.listen, "serving the API to holders of a certificate");
        let task = tokio::spawn(async move {
            if let Err(error) = serve_by(server, Listener::Tcp(listener), state).await {
                error!("the API is no longer served to other hosts: {error}");
            }
        });
        Ok(Self(task.abort_handle()))
    }
}

/// Whoever listened there before may take a moment to be gone.
async fn bind(api: &Api) -> Result<TcpListener> {
    let mut tries = 0;
    loop {
        match TcpListener::bind(api.listen) {
            Ok(listener) => return Ok(listener),
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse && tries < 20 => tries += 1,
            Err(source) => return Err(ApiError::ListenRemote { addr: api.listen, source }),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn tls(api: &Api) -> Result<ServerTlsConfig> {
    let certificate = read(&api.certificate.certificate)?;
    let key = read(&api.certificate.key)?;
    let client_ca = read(&api.client_ca)?;
    Ok(ServerTlsConfig::new()
        .identity(Identity::from_pem(certificate, key))
        .client_ca_root(Certificate::from_pem(client_ca))
        .timeout(HANDSHAKE))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| failed(path, source))
}

fn failed(path: &Path, source: std::io::Error) -> ApiError {
    ApiError::Certificate { path: path.to_owned(), source }
}
