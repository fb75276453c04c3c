//! The client's side of what `run` shows. `None` of any: there is no `run` that works by this configuration file, or one
//! that is too old; so whoever asks looks at the maps itself.

use std::net::SocketAddr;
use std::time::Duration;

use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::client::{connect, failed};
use super::proto::{self, sidecar_client::SidecarClient};
use crate::config::Config;
use crate::control::events::Report;
use crate::control::known::{Known, Restored};
use crate::control::{Result, instance};

/// For an answer: a million entries take seconds, brokers that do not answer, too.
const PATIENCE: Duration = Duration::from_secs(60);
/// Records in a message.
const BATCH: usize = 1000;

async fn ask<T>(
    config: &Config,
    question: impl AsyncFnOnce(SidecarClient<Channel>) -> Result<T, Status>,
) -> Result<Option<T>> {
    if !instance::find(config).is_some_and(|running| running.reads(config)) {
        return Ok(None);
    }
    let Some(client) = connect(config, PATIENCE).await else { return Ok(None) };
    match question(client).await {
        Ok(answer) => Ok(Some(answer)),
        Err(status) if status.code() == Code::Unimplemented => Ok(None),
        Err(status) => Err(failed(status)),
    }
}

async fn all<T, E>(
    mut batches: Streaming<T>,
    entries: impl Fn(T) -> Vec<E>,
) -> Result<Vec<E>, Status> {
    let mut all = Vec::new();
    while let Some(batch) = batches.message().await? {
        all.extend(entries(batch));
    }
    Ok(all)
}

/// Is everything where it should be?
pub async fn status(config: &Config) -> Result<Option<proto::GetStatusResponse>> {
    ask(config, async |mut run| Ok(run.get_status(proto::GetStatusRequest {}).await?.into_inner()))
        .await
}

/// What stands in packets' way.
pub async fn diagnose(config: &Config) -> Result<Option<Vec<proto::Finding>>> {
    ask(config, async |mut run| {
        Ok(run.diagnose(proto::DiagnoseRequest {}).await?.into_inner().findings)
    })
    .await
}

/// What packets met.
pub async fn counters(config: &Config) -> Result<Option<Vec<proto::Counter>>> {
    ask(config, async |mut run| {
        Ok(run.list_counters(proto::ListCountersRequest {}).await?.into_inner().counters)
    })
    .await
}

/// Groups with their reals and traffic.
pub async fn groups(config: &Config) -> Result<Option<Vec<proto::Group>>> {
    ask(config, async |mut run| {
        Ok(run.list_groups(proto::ListGroupsRequest {}).await?.into_inner().groups)
    })
    .await
}

/// All flows.
pub async fn flows(config: &Config) -> Result<Option<Vec<proto::Flow>>> {
    ask(config, async |mut run| {
        let batches = run.list_flows(proto::ListFlowsRequest {}).await?.into_inner();
        all(batches, |batch| batch.flows).await
    })
    .await
}

/// All clients.
pub async fn clients(config: &Config) -> Result<Option<Vec<proto::Client>>> {
    ask(config, async |mut run| {
        let batches = run.list_clients(proto::ListClientsRequest {}).await?.into_inner();
        all(batches, |batch| batch.clients).await
    })
    .await
}

/// What is known of all clients.
pub async fn export_clients(config: &Config) -> Result<Option<Vec<proto::ClientRecord>>> {
    ask(config, async |mut run| {
        let batches = run.export_clients(proto::ExportClientsRequest {}).await?.into_inner();
        all(batches, |batch| batch.records).await
    })
    .await
}

/// Makes clients known.
pub async fn import_clients(config: &Config, known: &[Known]) -> Result<Option<Restored>> {
    let batches: Vec<_> = known
        .chunks(BATCH)
        .map(|batch| proto::ClientRecords {
            records: batch.iter().cloned().map(Into::into).collect(),
        })
        .collect();
    ask(config, async |mut run| {
        let done = run.import_clients(tokio_stream::iter(batches)).await?.into_inner();
        Ok(Restored {
            added: done.added as usize,
            known_already: done.known_already as usize,
            without_group: done.without_group as usize,
        })
    })
    .await
}

/// The route that a topic takes.
pub async fn explain_topic(
    config: &Config,
    topic: &str,
) -> Result<Option<Vec<proto::TopicExplanation>>> {
    let request = proto::ExplainTopicRequest { topic: topic.to_owned() };
    ask(config, async |mut run| Ok(run.explain_topic(request).await?.into_inner().topics)).await
}

/// What a client's next connections would come to.
pub async fn explain_client(
    config: &Config,
    client: &str,
) -> Result<Option<Vec<proto::ClientExplanation>>> {
    let request = proto::ExplainClientRequest { client: client.to_owned() };
    ask(config, async |mut run| Ok(run.explain_client(request).await?.into_inner().clients)).await
}

/// What a connection is bound to.
pub async fn explain_flow(
    config: &Config,
    client: SocketAddr,
) -> Result<Option<Vec<proto::FlowExplanation>>> {
    let request = proto::ExplainFlowRequest { client: client.to_string() };
    ask(config, async |mut run| Ok(run.explain_flow(request).await?.into_inner().flows)).await
}

/// What of the file is not in force.
pub async fn difference(config: &Config) -> Result<Option<proto::GetDifferenceResponse>> {
    ask(config, async |mut run| {
        Ok(run.get_difference(proto::GetDifferenceRequest {}).await?.into_inner())
    })
    .await
}

/// Reads the file again, and waits until it is in force.
pub async fn reload(config: &Config) -> Result<Option<()>> {
    ask(config, async |mut run| run.reload(proto::ReloadRequest {}).await.map(drop)).await
}

/// All at a glance, again and again.
#[derive(Debug)]
pub struct Overviews(Streaming<proto::Overview>);

impl Overviews {
    /// Asks for them.
    pub async fn of(config: &Config, interval: Duration) -> Result<Option<Self>> {
        let interval_ms = interval.as_millis() as u32;
        ask(config, async |mut run| {
            let request = proto::WatchOverviewRequest { interval_ms };
            Ok(Self(run.watch_overview(request).await?.into_inner()))
        })
        .await
    }

    /// The next one, once it is due; `None`: `run` has ended.
    pub async fn next(&mut self) -> Result<Option<proto::Overview>> {
        self.0.message().await.map_err(failed)
    }
}

/// What the datapath reports.
#[derive(Debug)]
pub struct Reports(Streaming<proto::Event>);

impl Reports {
    /// From now on, or with those that nobody has read yet.
    pub async fn of(config: &Config, backlog: bool) -> Result<Option<Self>> {
        ask(config, async |mut run| {
            let request = proto::WatchEventsRequest { backlog };
            Ok(Self(run.watch_events(request).await?.into_inner()))
        })
        .await
    }

    /// The next one, once there is one; `None`: `run` has ended.
    pub async fn next(&mut self) -> Result<Option<Report>> {
        Ok(self.0.message().await.map_err(failed)?.map(Into::into))
    }
}
