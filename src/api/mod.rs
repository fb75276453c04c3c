//! The sidecar's own gRPC service: what other processes ask `run` for. At a Unix socket of root's; if configured, over
//! TCP, with certificates on both sides.

mod blocking;
mod change;
mod client;
mod convert;
mod queries;
mod remote;
mod server;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tonic::transport::Server as GrpcServer;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

pub use self::client::{Drained, Run, in_force, in_force_by, reload_by};
use self::proto::FILE_DESCRIPTOR_SET;
pub use self::queries::{Events, Overviews};
pub use self::remote::Remote;
use self::server::Service;
use crate::config::Config;
use crate::domain::Problem;
use crate::grpc::{self, Listener, ServeError};
use crate::run_files;
use crate::state::{Observed, State};

/// Generated from `proto/mqtt_fwd.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("mqtt_fwd.v1");

    /// What gRPC reflection tells of it.
    pub const FILE_DESCRIPTOR_SET: &[u8] =
        include_bytes!(concat!(env!("OUT_DIR"), "/mqtt_fwd.protoset"));
}

/// Why the API is not served, or did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// Not now.
    #[error("{0}")]
    Unavailable(String),
    #[error("`run`: {0}")]
    Failed(String),
    #[error("`mqtt-fwd run` is not running on {interface}; {what} needs it")]
    NotRunning { interface: String, what: &'static str },
    #[error("`run` (pid {pid}) works by {config}, and not by {file}")]
    OtherFile { pid: i32, config: PathBuf, file: PathBuf },
    #[error(
        "`run` (pid {pid}) does not answer ({reason}); `journalctl -u mqtt-fwd` may say why, and \
         restarting it loses nothing: forwarding goes on with what is pinned"
    )]
    NotAnswering { pid: i32, reason: String },
    #[error("`run` (pid {pid}) does nothing yet: it waits for {what}")]
    Waiting { pid: i32, what: String },
    #[error("`run` (pid {pid}) answers root only: use sudo")]
    NotRoot { pid: i32 },
    #[error("an answer of `run` lacks {0}; is it of another version than this binary?")]
    Incomplete(&'static str),
    #[error("listening at {at}: {source}")]
    Listen { at: String, source: std::io::Error },
    #[error("{path} (api): {source}")]
    Certificate { path: PathBuf, source: std::io::Error },
    #[error("listening at {addr} (api): {source}")]
    ListenRemote { addr: SocketAddr, source: std::io::Error },
}

/// Result of anything that asks `run`.
pub type Result<T, E = ApiError> = std::result::Result<T, E>;

/// Where the `run` of an interface listens.
fn socket(interface: &str) -> PathBuf {
    run_files::path("run", interface, "sock")
}

/// Listens.
pub fn listen(config: &Config) -> Result<Listener> {
    let at = format!("unix:{}", socket(&config.interface).display());
    grpc::listen(&at).map_err(|source| ApiError::Listen { at, source })
}

/// Serves until the listener fails, with the standard services for health and reflection beside it.
pub async fn serve(listener: Listener, state: State) -> Result<(), ServeError> {
    serve_by(GrpcServer::builder(), listener, state).await
}

async fn serve_by(
    mut server: GrpcServer,
    listener: Listener,
    state: State,
) -> Result<(), ServeError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("this build's own descriptors are sound");
    let observed = Arc::clone(&state.observed);
    let router = server
        .add_service(proto::sidecar_server::SidecarServer::new(Service::new(state)))
        .add_service(health_service)
        .add_service(reflection);
    tokio::select! {
        served = grpc::serve(listener, router) => served,
        () = report_health(health, &observed) => Ok(()),
    }
}

/// Tells whether this host forwards as it should, as `/health` does over HTTP.
async fn report_health(health: HealthReporter, observed: &Observed) {
    let mut clock = tokio::time::interval(Duration::from_secs(1));
    loop {
        clock.tick().await;
        let here = |problem: &Problem| !problem.is_elsewhere();
        let status = if observed.problems().iter().any(here) {
            ServingStatus::NotServing
        } else {
            ServingStatus::Serving
        };
        health.set_service_status("", status).await;
        health.set_service_status("mqtt_fwd.v1.Sidecar", status).await;
    }
}
