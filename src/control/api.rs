//! The sidecar's own gRPC service, at a Unix socket of root's: what other commands of this host ask
//! `run` for.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tonic::transport::{Endpoint, Server as GrpcServer};
use tonic::{Request, Response, Status};

use self::proto::sidecar_client::SidecarClient;
use self::proto::sidecar_server::{Sidecar, SidecarServer};
use super::checks::{Reals, State};
use super::observed::Observed;
use super::problem::Problem;
use super::{Error, Result};
use crate::config::Config;
use crate::grpc::{self, Listener, Peer, ServeError};
use crate::run_files;

/// Generated from `proto/mqtt_fwd.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("mqtt_fwd.v1");
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

/// Serves until the listener fails.
pub async fn serve(
    listener: Listener,
    config: Arc<Mutex<Arc<Config>>>,
    reals: Arc<Reals>,
    observed: Arc<Observed>,
) -> std::result::Result<(), ServeError> {
    let service = SidecarServer::new(Service { config, reals, observed });
    grpc::serve(listener, GrpcServer::builder().add_service(service)).await
}

struct Service {
    config: Arc<Mutex<Arc<Config>>>,
    reals: Arc<Reals>,
    observed: Arc<Observed>,
}

impl Service {
    fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[tonic::async_trait]
impl Sidecar for Service {
    async fn list_reals(
        &self,
        _: Request<proto::ListRealsRequest>,
    ) -> Result<Response<proto::ListRealsResponse>, Status> {
        let real = |real: super::checks::RealState| {
            let (state, error) = match real.state {
                _ if real.drained && !real.in_use => (proto::State::Drained, String::new()),
                State::Unchecked => (proto::State::Unchecked, String::new()),
                State::Up => (proto::State::Up, String::new()),
                State::Down(error) if real.in_use => (proto::State::DownInUse, error),
                State::Down(error) => (proto::State::Down, error),
            };
            proto::Real {
                service: real.service,
                group: real.group,
                address: real.addr.to_string(),
                weight: real.weight,
                state: state.into(),
                error,
                since_s: real.since.as_secs(),
            }
        };
        let reals = self.reals.list(&self.config()).into_iter().map(real).collect();
        Ok(Response::new(proto::ListRealsResponse { reals }))
    }

    async fn list_problems(
        &self,
        _: Request<proto::ListProblemsRequest>,
    ) -> Result<Response<proto::ListProblemsResponse>, Status> {
        let problem = |p: Problem| proto::Problem { code: p.code, text: p.text };
        let problems = self.observed.problems().into_iter().map(problem).collect();
        Ok(Response::new(proto::ListProblemsResponse { problems }))
    }

    async fn set_drain(
        &self,
        request: Request<proto::SetDrainRequest>,
    ) -> Result<Response<proto::SetDrainResponse>, Status> {
        let peer = Peer::of(&request);
        let request = request.into_inner();
        let addr: IpAddr = request.address.parse().map_err(|_| {
            Status::invalid_argument(format!("{:?} is not an IP address", request.address))
        })?;
        let groups = self
            .reals
            .set_drained(&self.config(), addr, request.drained)
            .map_err(|e| Status::failed_precondition(e.to_string()))?;
        let what = if request.drained { "drained" } else { "undrained" };
        tracing::info!(%peer, real = %addr, "{what}");
        Ok(Response::new(proto::SetDrainResponse { groups: groups as u32 }))
    }
}

/// A connection to the `run` of an interface; `None`: there is none.
pub async fn connect(config: &Config) -> Option<SidecarClient<tonic::transport::Channel>> {
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket(config).display())).ok()?;
    let channel = endpoint.timeout(std::time::Duration::from_secs(5)).connect().await.ok()?;
    Some(SidecarClient::new(channel))
}

/// All reals as `run` sees them; `None`: there is no `run`.
pub async fn reals(config: &Config) -> Result<Option<Vec<proto::Real>>> {
    let Some(mut client) = connect(config).await else { return Ok(None) };
    let reply = client.list_reals(proto::ListRealsRequest {}).await.map_err(failed)?;
    Ok(Some(reply.into_inner().reals))
}

/// What only `run` knows to be wrong: what it has watched for a while.
pub async fn problems(config: &Config) -> Vec<Problem> {
    let Some(mut client) = connect(config).await else { return Vec::new() };
    let Ok(reply) = client.list_problems(proto::ListProblemsRequest {}).await else {
        return Vec::new();
    };
    let all = reply.into_inner().problems.into_iter();
    all.map(|p| Problem { code: p.code, text: p.text }).filter(Problem::is_elsewhere).collect()
}

/// Drains a real, or ends that. Returns in how many groups it is.
pub async fn set_drain(config: &Config, addr: IpAddr, drained: bool) -> Result<u32> {
    let mut client = connect(config).await.ok_or_else(|| {
        Error::Busy(format!("no `run` is at work on {}; it is what drains", config.interface))
    })?;
    let request = proto::SetDrainRequest { address: addr.to_string(), drained };
    Ok(client.set_drain(request).await.map_err(failed)?.into_inner().groups)
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn failed(status: Status) -> Error {
    if status.code() == tonic::Code::FailedPrecondition {
        return Error::Refused(status.message().to_owned());
    }
    Error::Io {
        what: "asking `run`".to_owned(),
        source: std::io::Error::other(status.message().to_owned()),
    }
}

/// The configuration as `run` has it in effect: without reals that are down or drained. Without
/// `run`, as it is.
pub async fn in_effect(config: &Config) -> Config {
    let mut config = config.clone();
    let reals = reals(&config).await.ok().flatten().unwrap_or_default();
    let unused = [proto::State::Down, proto::State::Drained];
    for real in reals.iter().filter(|real| unused.contains(&real.state())) {
        let groups = config.services.iter_mut().filter(|s| s.name == real.service);
        for group in groups.flat_map(|s| &mut s.groups).filter(|g| g.name == real.group) {
            for r in group.reals.iter_mut().filter(|r| r.addr.to_string() == real.address) {
                r.weight = 0;
            }
        }
    }
    config
}
