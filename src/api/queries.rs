//! The client's side of what `run` shows.

use std::net::SocketAddr;
use std::time::Duration;

use tonic::{Status, Streaming};

use super::client::Run;
use super::{ApiError, Result, proto};
use crate::datapath::clients::Client;
use crate::datapath::counts::Counter;
use crate::datapath::events::Event;
use crate::datapath::flows::Flow;
use crate::domain::client_record::{ClientRecord, Restored};
use crate::inspect::diff::Difference;
use crate::inspect::doctor::Finding;
use crate::inspect::explain::{
    ClientExplanation, FlowExplanation, ServerNameExplanation, TopicExplanation,
};
use crate::inspect::overview::Overview;
use crate::inspect::status::{GroupRow, Status as OverallStatus};

/// Records in a message.
const BATCH: usize = 1000;

async fn all<T, M, E: From<M>>(
    mut batches: Streaming<T>,
    entries: impl Fn(T) -> Vec<M>,
) -> Result<Vec<E>, Status> {
    let mut all = Vec::new();
    while let Some(batch) = batches.message().await? {
        all.extend(entries(batch).into_iter().map(E::from));
    }
    Ok(all)
}

fn each<M, T: From<M>>(messages: Vec<M>) -> Vec<T> {
    messages.into_iter().map(T::from).collect()
}

fn try_each<M, T: TryFrom<M, Error = ApiError>>(messages: Vec<M>) -> Result<Vec<T>> {
    messages.into_iter().map(T::try_from).collect()
}

impl Run {
    /// Is everything where it should be?
    pub async fn status(&mut self) -> Result<OverallStatus> {
        let reply = self.rpc.get_status(proto::GetStatusRequest {}).await;
        Ok(reply.map_err(self.failed())?.into_inner().into())
    }

    /// What stands in packets' way.
    pub async fn diagnose(&mut self) -> Result<Vec<Finding>> {
        let reply = self.rpc.diagnose(proto::DiagnoseRequest {}).await;
        Ok(each(reply.map_err(self.failed())?.into_inner().findings))
    }

    /// What packets met.
    pub async fn counters(&mut self) -> Result<Vec<Counter>> {
        let reply = self.rpc.list_counters(proto::ListCountersRequest {}).await;
        Ok(each(reply.map_err(self.failed())?.into_inner().counters))
    }

    /// All reals.
    pub async fn reals(&mut self) -> Result<Vec<proto::Real>> {
        let reply = self.rpc.list_reals(proto::ListRealsRequest {}).await;
        Ok(reply.map_err(self.failed())?.into_inner().reals)
    }

    /// Groups with their reals and traffic.
    pub async fn groups(&mut self) -> Result<Vec<GroupRow>> {
        let reply = self.rpc.list_groups(proto::ListGroupsRequest {}).await;
        Ok(each(reply.map_err(self.failed())?.into_inner().groups))
    }

    /// All flows.
    pub async fn flows(&mut self) -> Result<Vec<Flow>> {
        let reply = self.rpc.list_flows(proto::ListFlowsRequest {}).await;
        let batches = reply.map_err(self.failed())?.into_inner();
        all(batches, |batch| batch.flows).await.map_err(self.failed())
    }

    /// All clients.
    pub async fn clients(&mut self) -> Result<Vec<Client>> {
        let reply = self.rpc.list_clients(proto::ListClientsRequest {}).await;
        let batches = reply.map_err(self.failed())?.into_inner();
        all(batches, |batch| batch.clients).await.map_err(self.failed())
    }

    /// All clients' records.
    pub async fn export_clients(&mut self) -> Result<Vec<ClientRecord>> {
        let reply = self.rpc.export_clients(proto::ExportClientsRequest {}).await;
        let batches = reply.map_err(self.failed())?.into_inner();
        let records: Vec<proto::ClientRecord> =
            all(batches, |batch| batch.records).await.map_err(self.failed())?;
        try_each(records)
    }

    /// Puts clients' records into the maps.
    pub async fn import_clients(&mut self, records: &[ClientRecord]) -> Result<Restored> {
        let batch = |batch: &[ClientRecord]| proto::ClientRecords {
            records: batch.iter().cloned().map(Into::into).collect(),
        };
        let batches: Vec<_> = records.chunks(BATCH).map(batch).collect();
        let reply = self.rpc.import_clients(tokio_stream::iter(batches)).await;
        let done = reply.map_err(self.failed())?.into_inner();
        Ok(Restored {
            added: done.added as usize,
            already_learned: done.already_learned as usize,
            without_group: done.without_group as usize,
            did_not_fit: done.did_not_fit as usize,
        })
    }

    /// The route that a topic takes.
    pub async fn explain_topic(&mut self, topic: &str) -> Result<Vec<TopicExplanation>> {
        let request = proto::ExplainTopicRequest { topic: topic.to_owned() };
        let reply = self.rpc.explain_topic(request).await;
        Ok(each(reply.map_err(self.failed())?.into_inner().topics))
    }

    /// The route that a ClientHello takes.
    pub async fn explain_server_name(
        &mut self,
        name: &str,
        protocols: &[String],
    ) -> Result<Vec<ServerNameExplanation>> {
        let request = proto::ExplainServerNameRequest {
            server_name: name.to_owned(),
            protocols: protocols.to_vec(),
        };
        let reply = self.rpc.explain_server_name(request).await;
        Ok(each(reply.map_err(self.failed())?.into_inner().services))
    }

    /// A client's record, and the outcome of its next connections.
    pub async fn explain_client(&mut self, client: &str) -> Result<Vec<ClientExplanation>> {
        let request = proto::ExplainClientRequest { client: client.to_owned() };
        let reply = self.rpc.explain_client(request).await;
        try_each(reply.map_err(self.failed())?.into_inner().clients)
    }

    /// What a connection is bound to.
    pub async fn explain_flow(&mut self, client: SocketAddr) -> Result<Vec<FlowExplanation>> {
        let request = proto::ExplainFlowRequest { client: client.to_string() };
        let reply = self.rpc.explain_flow(request).await;
        try_each(reply.map_err(self.failed())?.into_inner().flows)
    }

    /// What of the file is not in force.
    pub async fn difference(&mut self) -> Result<Difference> {
        let reply = self.rpc.get_difference(proto::GetDifferenceRequest {}).await;
        Ok(reply.map_err(self.failed())?.into_inner().into())
    }

    /// All at a glance, again and again.
    pub async fn overviews(&mut self, interval: Duration) -> Result<Overviews> {
        let interval_ms = interval.as_millis() as u32;
        let reply = self.rpc.watch_overview(proto::WatchOverviewRequest { interval_ms }).await;
        Ok(Overviews { stream: reply.map_err(self.failed())?.into_inner(), run: self.clone() })
    }

    /// Events from now on, or with those that nobody has read yet.
    pub async fn events(&mut self, backlog: bool) -> Result<Events> {
        let reply = self.rpc.watch_events(proto::WatchEventsRequest { backlog }).await;
        Ok(Events { stream: reply.map_err(self.failed())?.into_inner(), run: self.clone() })
    }
}

/// Overviews of a `run`.
#[derive(Debug)]
pub struct Overviews {
    stream: Streaming<proto::Overview>,
    run: Run,
}

impl Overviews {
    /// The next one, once it is due; `None`: `run` has ended.
    pub async fn next(&mut self) -> Result<Option<Overview>> {
        let next = self.stream.message().await.map_err(self.run.failed())?;
        Ok(next.map(Overview::from))
    }
}

/// Events of a `run`.
#[derive(Debug)]
pub struct Events {
    stream: Streaming<proto::Event>,
    run: Run,
}

impl Events {
    /// The next one, once there is one; `None`: `run` has ended.
    pub async fn next(&mut self) -> Result<Option<Event>> {
        Ok(self.stream.message().await.map_err(self.run.failed())?.map(Event::from))
    }
}
