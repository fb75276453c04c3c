//! The sidecar's own gRPC service: what other processes ask `run` for. At a Unix socket of root's; if configured, over
//! TCP, with certificates on both sides.

mod aside;
mod change;
mod client;
mod messages;
mod remote;
mod service;
mod views;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::mpsc;
use tonic::transport::Server as GrpcServer;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

pub use self::client::{all_problems, change, in_effect, in_force, problems, reals, set_drain};
use self::proto::FILE_DESCRIPTOR_SET;
pub use self::remote::Remote;
use self::service::Service;
pub use self::views::{
    Overviews, Reports, clients, counters, diagnose, difference, explain_client, explain_flow,
    explain_topic, export_clients, flows, groups, import_clients, reload, status,
};
use super::changes::Request;
use super::checks::Reals;
use super::observed::Observed;
use super::problem::Problem;
use super::{Error, Result};
use crate::config::Config;
use crate::grpc::{self, Listener, ServeError};
use crate::run_files;

/// Generated from `proto/mqtt_fwd.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("mqtt_fwd.v1");

    /// What gRPC reflection tells of it.
    pub const FILE_DESCRIPTOR_SET: &[u8] =
        include_bytes!(concat!(env!("OUT_DIR"), "/mqtt_fwd.protoset"));
}

impl proto::State {
    /// For people.
    pub fn text(self) -> &'static str {
        match self {
            Self::Unchecked => "unchecked",
            Self::Up => "up",
            Self::Down => "down",
            Self::DownInUse => "down, in use",
            Self::Drained => "drained",
        }
    }
}

/// Where the `run` of an interface listens.
fn socket(config: &Config) -> PathBuf {
    run_files::path("run", &config.interface, "sock")
}

/// Listens.
pub fn listen(config: &Config) -> Result<Listener> {
    let endpoint = format!("unix:{}", socket(config).display());
    grpc::listen(&endpoint)
        .map_err(|source| Error::Io { what: format!("listening at {endpoint}"), source })
}

/// What the service shows and changes.
#[derive(Debug, Clone)]
pub struct Shown {
    pub config: Arc<Mutex<Arc<Config>>>,
    pub reals: Arc<Reals>,
    pub observed: Arc<Observed>,
    /// Where `run` takes changes from.
    pub changes: mpsc::Sender<Request>,
}

/// Serves until the listener fails, with the standard services for health and reflection beside it.
pub async fn serve(listener: Listener, shown: Shown) -> Result<(), ServeError> {
    serve_by(GrpcServer::builder(), listener, shown).await
}

async fn serve_by(
    mut server: GrpcServer,
    listener: Listener,
    shown: Shown,
) -> Result<(), ServeError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("this build's own descriptors are sound");
    let observed = Arc::clone(&shown.observed);
    let router = server
        .add_service(proto::sidecar_server::SidecarServer::new(Service::new(shown)))
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
