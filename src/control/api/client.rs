//! The client's side of what only `run` has and does: what other commands ask it for.

use std::time::Duration;

use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::proto::{self, sidecar_client::SidecarClient};
use super::socket;
use crate::config::edit::Change;
use crate::config::{Config, Real};
use crate::control::problem::Problem;
use crate::control::{Error, Result};

/// For an answer from what `run` has at hand.
const PATIENCE: Duration = Duration::from_secs(5);
/// For a change to come into force: 100,000 routes take some seconds.
const CHANGE_PATIENCE: Duration = Duration::from_secs(60);

/// A connection to the `run` of an interface; `None`: there is none.
pub(super) async fn connect(config: &Config, patience: Duration) -> Option<SidecarClient<Channel>> {
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket(config).display())).ok()?;
    let channel = endpoint.timeout(patience).connect().await.ok()?;
    // A configuration of 100,000 routes has several megabytes.
    Some(SidecarClient::new(channel).max_decoding_message_size(usize::MAX))
}

async fn connected(
    config: &Config,
    patience: Duration,
    what: &str,
) -> Result<SidecarClient<Channel>> {
    connect(config, patience).await.ok_or_else(|| {
        Error::Busy(format!("no `run` is at work on {}; it is what {what}", config.interface))
    })
}

/// All reals as `run` sees them; `None`: there is no `run`.
pub async fn reals(config: &Config) -> Result<Option<Vec<proto::Real>>> {
    let Some(mut client) = connect(config, PATIENCE).await else { return Ok(None) };
    let reply = client.list_reals(proto::ListRealsRequest {}).await.map_err(failed)?;
    Ok(Some(reply.into_inner().reals))
}

/// All that `run` found wrong at its last look; `None`: there is no `run`.
pub async fn all_problems(config: &Config) -> Option<Vec<Problem>> {
    let mut client = connect(config, PATIENCE).await?;
    let reply = client.list_problems(proto::ListProblemsRequest {}).await.ok()?.into_inner();
    Some(reply.problems.into_iter().map(|p| Problem { code: p.code, text: p.text }).collect())
}

/// What only `run` knows to be wrong: what it has watched for a while.
pub async fn problems(config: &Config) -> Vec<Problem> {
    let all = all_problems(config).await.unwrap_or_default();
    all.into_iter().filter(Problem::is_elsewhere).collect()
}

/// Drains a real, or ends that.
pub async fn set_drain(
    config: &Config,
    request: proto::SetDrainRequest,
) -> Result<proto::SetDrainResponse> {
    let mut client = connected(config, CHANGE_PATIENCE, "drains").await?;
    Ok(client.set_drain(request).await.map_err(failed)?.into_inner())
}

/// Changes a service, or the only one, and waits until that is in force.
pub async fn change(
    config: &Config,
    service: Option<&str>,
    change: &Change,
    persist: bool,
) -> Result<()> {
    let mut client = connected(config, CHANGE_PATIENCE, "changes services").await?;
    let changes = vec![(service, change).into()];
    let request = proto::ChangeServicesRequest { changes, persist };
    client.change_services(request).await.map_err(failed)?;
    Ok(())
}

/// The configuration that `run` works by, which may have been changed since it was read; `None`: there is no
/// `run`, or it works by another file.
pub async fn in_force(config: &Config) -> Option<Config> {
    let mut client = connect(config, PATIENCE).await?;
    let reply = client.get_configuration(proto::GetConfigurationRequest {}).await.ok()?;
    let reply = reply.into_inner();
    let same = |path: &std::path::Path| std::fs::canonicalize(path).ok();
    if same(reply.path.as_ref()) != same(&config.path) {
        return None;
    }
    if *reply.toml == *config.text {
        return Some(config.clone());
    }
    Config::parse(&config.path, &reply.toml).ok()
}

/// The configuration as `run` has it in effect: with the weights that reals have by their checks and drains. Without
/// `run`, as it is.
pub async fn in_effect(config: &Config) -> Config {
    let mut config = config.clone();
    for real in reals(&config).await.ok().flatten().unwrap_or_default() {
        let groups = config.services.iter_mut().filter(|s| s.name == real.service);
        for group in groups.flat_map(|s| &mut s.groups).filter(|g| g.name == real.group) {
            // Another weight is one that `run` does not know yet.
            let same = |r: &&mut Real| {
                r.addr.to_string() == real.address
                    && (r.weight == real.weight || real.effective_weight == 0)
            };
            for r in group.reals.iter_mut().filter(same) {
                r.weight = real.effective_weight;
            }
        }
    }
    config
}

#[allow(clippy::needless_pass_by_value)] // for map_err
pub(super) fn failed(status: Status) -> Error {
    let text = status.message().to_owned();
    match status.code() {
        tonic::Code::FailedPrecondition | tonic::Code::InvalidArgument => Error::Refused(text),
        tonic::Code::Unavailable if !text.is_empty() => Error::Busy(text),
        _ => Error::Io { what: "asking `run`".to_owned(), source: std::io::Error::other(text) },
    }
}
