//! The client's side: the `run` of an interface, and what only it does.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::proto::{self, sidecar_client::SidecarClient};
use super::{ApiError, Result, socket};
use crate::config::Config;
use crate::config::edit::Change;
use crate::instance::{self, Running};

/// For an answer from memory.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// For a `run` that loads its programs before it listens.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// For other answers: a million entries take seconds, brokers that do not answer and 100,000 new routes, too.
pub(super) const WORK_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection to a `run` that answers.
#[derive(Debug, Clone)]
pub struct Run {
    pub(super) rpc: SidecarClient<Channel>,
    pid: i32,
}

/// What a drain came to.
#[derive(Debug, Clone, Copy)]
pub struct Drained {
    /// In how many groups the real is.
    pub groups: usize,
    /// Connections that are being ended.
    pub ending: usize,
}

impl Run {
    /// The `run` that works by this configuration's file; `None`: there is none. One that does not answer is an error.
    pub async fn find(config: &Config) -> Result<Option<Self>> {
        match instance::find(config).filter(|running| running.reads(config)) {
            Some(running) => Self::connect(&config.interface, &running).await.map(Some),
            None => Ok(None),
        }
    }

    /// The same for what takes a `run`, whose part that is.
    pub async fn require(config: &Config, what: &'static str) -> Result<Self> {
        let Some(running) = instance::find(config) else {
            return Err(ApiError::NotRunning { interface: config.interface.clone(), what });
        };
        if !running.reads(config) {
            let file = config.path.clone();
            return Err(ApiError::OtherFile { pid: running.pid, config: running.config, file });
        }
        Self::connect(&config.interface, &running).await
    }

    async fn connect(interface: &str, running: &Running) -> Result<Self> {
        let pid = running.pid;
        if let Some(what) = running.waits_for.clone() {
            return Err(ApiError::Waiting { pid, what });
        }
        let not_answering = |reason: String| ApiError::NotAnswering { pid, reason };
        let endpoint = Endpoint::from_shared(format!("unix:{}", socket(interface).display()))
            .map_err(|e| not_answering(e.to_string()))?
            .timeout(WORK_TIMEOUT);
        let deadline = Instant::now() + START_TIMEOUT;
        let channel = loop {
            match endpoint.connect().await {
                Ok(channel) => break channel,
                // One that was just started does not listen yet.
                Err(error)
                    if !is_denied(&error)
                        && Instant::now() < deadline
                        && instance::find_on(interface).is_some() =>
                {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(error) if is_denied(&error) => return Err(ApiError::NotRoot { pid }),
                Err(error) => return Err(not_answering(innermost(&error))),
            }
        };
        // A configuration of 100,000 routes has several megabytes.
        let mut rpc = SidecarClient::new(channel).max_decoding_message_size(usize::MAX);
        let asked = rpc.list_problems(proto::ListProblemsRequest {});
        match tokio::time::timeout(ANSWER_TIMEOUT, asked).await {
            Ok(Ok(_)) => Ok(Self { rpc, pid }),
            Ok(Err(status)) => Err(not_answering(innermost(&status))),
            Err(_) => Err(not_answering(format!("in {} s", ANSWER_TIMEOUT.as_secs()))),
        }
    }

    /// The error that an answer's status is.
    pub(super) fn failed(&self) -> impl Fn(Status) -> ApiError + use<> {
        let pid = self.pid;
        move |status| {
            let text = status.message().to_owned();
            match status.code() {
                tonic::Code::FailedPrecondition | tonic::Code::InvalidArgument => {
                    ApiError::Refused(text)
                }
                tonic::Code::Unavailable if !text.is_empty() => ApiError::Unavailable(text),
                // tonic's own word for a timeout.
                tonic::Code::Cancelled => ApiError::NotAnswering { pid, reason: text },
                _ => ApiError::Failed(text),
            }
        }
    }

    /// The configuration in force: the file's, and what was changed since.
    pub async fn configuration(&mut self, path: &Path) -> Result<Config> {
        let reply = self.rpc.get_configuration(proto::GetConfigurationRequest {}).await;
        let reply = reply.map_err(self.failed())?.into_inner();
        Config::parse(path, &reply.toml).map_err(|error| ApiError::Failed(error.to_string()))
    }

    /// Drains a real, and ends so many of its connections per second (0: none).
    pub async fn drain(&mut self, real: IpAddr, end_per_second: u32) -> Result<Drained> {
        self.set_drain(real, true, end_per_second).await
    }

    /// The inverse of [`Run::drain`].
    pub async fn undrain(&mut self, real: IpAddr) -> Result<Drained> {
        self.set_drain(real, false, 0).await
    }

    async fn set_drain(
        &mut self,
        real: IpAddr,
        drained: bool,
        end_per_second: u32,
    ) -> Result<Drained> {
        let address = real.to_string();
        let request = proto::SetDrainRequest { address, drained, end_per_second };
        let done = self.rpc.set_drain(request).await.map_err(self.failed())?.into_inner();
        Ok(Drained { groups: done.groups as usize, ending: done.ending as usize })
    }

    /// Changes a service, or the only one, and waits until that is in force.
    pub async fn change(
        &mut self,
        service: Option<&str>,
        change: &Change,
        persist: bool,
    ) -> Result<()> {
        let changes = vec![(service, change).into()];
        let request = proto::ChangeServicesRequest { changes, persist };
        self.rpc.change_services(request).await.map_err(self.failed())?;
        Ok(())
    }

    /// Reads the file again, and waits until it is in force.
    pub async fn reload(&mut self) -> Result<()> {
        let reloaded = self.rpc.reload(Request::new(proto::ReloadRequest {})).await;
        reloaded.map_err(self.failed()).map(drop)
    }
}

/// The configuration in force on its interface: the same, unless a `run` works by this file and was asked for changes
/// since it read it.
pub async fn in_force(config: Config) -> Result<Config> {
    let Some(mut run) = Run::find(&config).await? else { return Ok(config) };
    let there = run.configuration(&config.path).await?;
    Ok(if there.text == config.text { config } else { there })
}

/// The `run` that works by a file, whatever that says now.
async fn run_by(file: &Path) -> Result<Option<Run>> {
    let Some(interface) = instance::interface_of(file) else { return Ok(None) };
    match instance::find_on(&interface) {
        Some(running) => Run::connect(&interface, &running).await.map(Some),
        None => Ok(None),
    }
}

/// What a `run` works by that has read this file, which may be wrong by this time; `None`: there is none.
pub async fn in_force_by(file: &Path) -> Result<Option<Config>> {
    match run_by(file).await? {
        Some(mut run) => run.configuration(file).await.map(Some),
        None => Ok(None),
    }
}

/// Has a file read by its `run`, if there is one. Of one that is wrong, it then knows that it was refused.
pub async fn reload_by(file: &Path) -> Result<()> {
    match run_by(file).await? {
        Some(mut run) => run.reload().await,
        None => Ok(()),
    }
}

/// Whether this process may not reach the socket.
fn is_denied(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut error = Some(error);
    while let Some(one) = error {
        let denied = |e: &std::io::Error| e.kind() == std::io::ErrorKind::PermissionDenied;
        if one.downcast_ref::<std::io::Error>().is_some_and(denied) {
            return true;
        }
        error = one.source();
    }
    false
}

/// tonic wraps "connection refused" in several layers of "transport error".
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
