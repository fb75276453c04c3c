//! The service's side.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tonic::{Request, Response, Status, Streaming};

use super::blocking::{Refusal, Stream, aside, stream};
use super::proto::{self, sidecar_server::Sidecar};
use super::{ApiError, change};
use crate::clients::ClientsError;
use crate::clients::validate::validate;
use crate::config::Config;
use crate::datapath::Datapath;
use crate::datapath::clients::{clients, restore, snapshot};
use crate::datapath::events::Reader;
use crate::datapath::flows::{Key, flows};
use crate::datapath::names::Names;
use crate::domain::client_record::ClientRecord;
use crate::drain;
use crate::grpc::Peer;
use crate::inspect::overview::{self, Sampler};
use crate::inspect::{Context, InspectError, diff, doctor, explain, status};
use crate::state::{self, Edits, State, Unmade};

/// Clients that are imported at once, at most: so many that memory does not matter.
const IMPORT_MAX: usize = 1_000_000;
/// From one overview to the next.
const OVERVIEW_LEAST: Duration = Duration::from_millis(100);
const OVERVIEW_USUAL: Duration = Duration::from_secs(1);

pub struct Service {
    state: State,
    /// Drains that end connections, by real.
    endings: Mutex<BTreeMap<IpAddr, AbortHandle>>,
}

impl Service {
    pub fn new(state: State) -> Self {
        Self { state, endings: Mutex::default() }
    }

    fn config(&self) -> Arc<Config> {
        self.state.config()
    }

    fn context(&self) -> Context {
        Context::of_run(self.state.clone())
    }
}

impl Service {
    /// Hands something to what works by the configuration, and waits until it is in force.
    async fn ask(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<(), Unmade>>) -> state::Request,
    ) -> Result<(), Status> {
        let (answer, answered) = oneshot::channel();
        let ending = || Status::unavailable("`run` is ending");
        self.state.requests.send(request(answer)).await.map_err(|_| ending())?;
        answered.await.map_err(|_| ending())?.map_err(|unmade| match unmade {
            Unmade::Refused(why) => Status::failed_precondition(why),
            Unmade::NotYet(why) => {
                Status::unavailable(format!("taken over, and not in force yet: {why}"))
            }
        })
    }

    /// Ends connections of a real, so many a second, in place of what went on for it before.
    fn terminate_at_rate(
        &self,
        config: Arc<Config>,
        real: IpAddr,
        flows: Vec<Key>,
        per_second: u32,
    ) {
        let mut endings = self.endings.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = endings.remove(&real) {
            before.abort();
        }
        if per_second > 0 && self.state.reals.is_drained(real) {
            let reals = Arc::clone(&self.state.reals);
            let ending = drain::terminate_at_rate(config, reals, real, flows, per_second);
            endings.insert(real, tokio::spawn(ending).abort_handle());
        }
    }
}

type Reply<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Sidecar for Service {
    async fn list_reals(
        &self,
        _: Request<proto::ListRealsRequest>,
    ) -> Reply<proto::ListRealsResponse> {
        let reals = self.state.reals.list(&self.config()).into_iter().map(Into::into).collect();
        Ok(Response::new(proto::ListRealsResponse { reals }))
    }

    async fn list_problems(
        &self,
        _: Request<proto::ListProblemsRequest>,
    ) -> Reply<proto::ListProblemsResponse> {
        let problems = self.state.observed.problems().into_iter().map(Into::into).collect();
        Ok(Response::new(proto::ListProblemsResponse { problems }))
    }

    async fn set_drain(
        &self,
        request: Request<proto::SetDrainRequest>,
    ) -> Reply<proto::SetDrainResponse> {
        let peer = Peer::of(&request);
        let request = request.into_inner();
        let addr: IpAddr = change::parse(&request.address)?;
        let config = self.config();
        let ends = request.drained && request.end_per_second > 0;
        // While its groups have it: the balancer's choice tells which flows are its.
        let flows = if ends { flows_of(Arc::clone(&config), addr).await? } else { Vec::new() };
        let groups = self
            .state
            .reals
            .set_drained(&config, addr, request.drained)
            .map_err(|e| Status::failed_precondition(e.to_string()))?;
        let what = if request.drained { "drained" } else { "undrained" };
        tracing::info!(%peer, real = %addr, ending = flows.len(), "{what}");
        let ending = flows.len() as u32;
        self.terminate_at_rate(config, addr, flows, request.end_per_second);
        self.ask(state::Request::Settle).await?;
        Ok(Response::new(proto::SetDrainResponse { groups: groups as u32, ending }))
    }

    async fn get_configuration(
        &self,
        _: Request<proto::GetConfigurationRequest>,
    ) -> Reply<proto::GetConfigurationResponse> {
        let config = self.config();
        Ok(Response::new(proto::GetConfigurationResponse {
            toml: config.text.to_string(),
            path: config.path.display().to_string(),
        }))
    }

    async fn change_services(
        &self,
        request: Request<proto::ChangeServicesRequest>,
    ) -> Reply<proto::ChangeServicesResponse> {
        let peer = Peer::of(&request);
        let request = request.into_inner();
        let edits = request.changes.into_iter().map(change::read).collect::<Result<Vec<_>, _>>()?;
        for (service, change) in &edits {
            let service = service.as_deref().unwrap_or_default();
            tracing::info!(%peer, service, persist = request.persist, "asked to {change}");
        }
        let persist = request.persist;
        self.ask(|answer| state::Request::Change(Edits { edits, persist, answer })).await?;
        Ok(Response::new(proto::ChangeServicesResponse {}))
    }

    async fn reload(&self, request: Request<proto::ReloadRequest>) -> Reply<proto::ReloadResponse> {
        tracing::info!(peer = %Peer::of(&request), "asked to read the configuration again");
        self.ask(state::Request::Reload).await?;
        Ok(Response::new(proto::ReloadResponse {}))
    }

    async fn get_difference(
        &self,
        _: Request<proto::GetDifferenceRequest>,
    ) -> Reply<proto::GetDifferenceResponse> {
        let context = self.context();
        let difference = aside(async move || diff::read(&context).await);
        Ok(Response::new(difference.await?.into()))
    }

    async fn get_status(
        &self,
        _: Request<proto::GetStatusRequest>,
    ) -> Reply<proto::GetStatusResponse> {
        let context = self.context();
        Ok(Response::new(aside(async move || status::read(&context).await).await?.into()))
    }

    async fn diagnose(&self, _: Request<proto::DiagnoseRequest>) -> Reply<proto::DiagnoseResponse> {
        let context = self.context();
        let findings =
            aside(async move || Ok::<_, InspectError>(doctor::examine(&context).await)).await?;
        let findings = findings.into_iter().map(Into::into).collect();
        Ok(Response::new(proto::DiagnoseResponse { findings }))
    }

    async fn list_counters(
        &self,
        _: Request<proto::ListCountersRequest>,
    ) -> Reply<proto::ListCountersResponse> {
        let context = self.context();
        let counters = aside(async move || status::counters(&context.datapath()?)).await?;
        let counters = counters.into_iter().map(Into::into).collect();
        Ok(Response::new(proto::ListCountersResponse { counters }))
    }

    async fn list_groups(
        &self,
        _: Request<proto::ListGroupsRequest>,
    ) -> Reply<proto::ListGroupsResponse> {
        let groups = status::groups(&self.config()).await.into_iter().map(Into::into).collect();
        Ok(Response::new(proto::ListGroupsResponse { groups }))
    }

    type ListFlowsStream = Stream<proto::ListFlowsResponse>;

    async fn list_flows(
        &self,
        _: Request<proto::ListFlowsRequest>,
    ) -> Reply<Self::ListFlowsStream> {
        let config = self.config();
        Ok(Response::new(stream(move |out| {
            let datapath = Datapath::open(&config.pins())?;
            let names = Names::read(&config, &datapath)?;
            let flows = flows(&datapath, &names)?;
            out.send_all(flows, |flows| proto::ListFlowsResponse { flows })
        })))
    }

    type ListClientsStream = Stream<proto::ListClientsResponse>;

    async fn list_clients(
        &self,
        _: Request<proto::ListClientsRequest>,
    ) -> Reply<Self::ListClientsStream> {
        let config = self.config();
        Ok(Response::new(stream(move |out| {
            let datapath = Datapath::open(&config.pins())?;
            let names = Names::read(&config, &datapath)?;
            let clients = clients(&datapath, &names)?;
            out.send_all(clients, |clients| proto::ListClientsResponse { clients })
        })))
    }

    type ExportClientsStream = Stream<proto::ClientRecords>;

    async fn export_clients(
        &self,
        _: Request<proto::ExportClientsRequest>,
    ) -> Reply<Self::ExportClientsStream> {
        let config = self.config();
        Ok(Response::new(stream(move |out| {
            let records = snapshot(&config, &Datapath::open(&config.pins())?, usize::MAX)?;
            out.send_all(records.into_iter().map(Ok), |records| proto::ClientRecords { records })
        })))
    }

    async fn import_clients(
        &self,
        request: Request<Streaming<proto::ClientRecords>>,
    ) -> Reply<proto::ImportClientsResponse> {
        let peer = Peer::of(&request);
        let mut batches = request.into_inner();
        let mut all: Vec<ClientRecord> = Vec::new();
        while let Some(batch) = batches.message().await? {
            if all.len() + batch.records.len() > IMPORT_MAX {
                let text = format!("more than {IMPORT_MAX} clients at once; nothing was imported");
                return Err(Status::invalid_argument(text));
            }
            for record in batch.records {
                let n = all.len() + 1;
                let invalid = |e: ApiError| not_imported(&format!("record {n}: {e}"));
                all.push(record.try_into().map_err(invalid)?);
            }
        }
        let config = self.config();
        validate(&config, &all).map_err(|e| Refusal::from(ClientsError::from(e)).0)?;
        tracing::info!(%peer, clients = all.len(), "asked to import clients");
        let done = aside(async move || restore(&config, &Datapath::open(&config.pins())?, all));
        Ok(Response::new(done.await?.into()))
    }

    async fn explain_topic(
        &self,
        request: Request<proto::ExplainTopicRequest>,
    ) -> Reply<proto::ExplainTopicResponse> {
        let topics = explain::topic(&self.config(), &request.into_inner().topic);
        let topics = topics.map_err(|e| Refusal::from(e).0)?.into_iter().map(Into::into).collect();
        Ok(Response::new(proto::ExplainTopicResponse { topics }))
    }

    async fn explain_server_name(
        &self,
        request: Request<proto::ExplainServerNameRequest>,
    ) -> Reply<proto::ExplainServerNameResponse> {
        let proto::ExplainServerNameRequest { server_name, protocols } = request.into_inner();
        let found = explain::server_name(&self.config(), &server_name, &protocols);
        let services = found.into_iter().map(Into::into).collect();
        Ok(Response::new(proto::ExplainServerNameResponse { services }))
    }

    async fn explain_client(
        &self,
        request: Request<proto::ExplainClientRequest>,
    ) -> Reply<proto::ExplainClientResponse> {
        let (context, client) = (self.context(), request.into_inner().client);
        let clients = aside(async move || explain::client(&context, &client)).await?;
        let clients = clients.into_iter().map(Into::into).collect();
        Ok(Response::new(proto::ExplainClientResponse { clients }))
    }

    async fn explain_flow(
        &self,
        request: Request<proto::ExplainFlowRequest>,
    ) -> Reply<proto::ExplainFlowResponse> {
        let client: SocketAddr = change::parse(&request.into_inner().client)?;
        let context = self.context();
        let flows = aside(async move || explain::flow(&context, client)).await?;
        let flows = flows.into_iter().map(Into::into).collect();
        Ok(Response::new(proto::ExplainFlowResponse { flows }))
    }

    type WatchOverviewStream = Stream<proto::Overview>;

    async fn watch_overview(
        &self,
        request: Request<proto::WatchOverviewRequest>,
    ) -> Reply<Self::WatchOverviewStream> {
        let interval = match request.into_inner().interval_ms {
            0 => OVERVIEW_USUAL,
            ms => Duration::from_millis(ms.into()).max(OVERVIEW_LEAST),
        };
        let state = self.state.clone();
        let here = tokio::runtime::Handle::current();
        Ok(Response::new(stream(move |out| {
            let now = || Context::of_run(state.clone());
            let mut sampler = Sampler::new(&now())?;
            loop {
                let started = Instant::now();
                if !out.send(here.block_on(sampler.next(&now()))?.into()) {
                    return Ok(());
                }
                let due = started + interval.max(started.elapsed() * overview::PART);
                while Instant::now() < due {
                    if out.is_closed() {
                        return Ok(());
                    }
                    std::thread::sleep(
                        OVERVIEW_LEAST.min(due.saturating_duration_since(Instant::now())),
                    );
                }
            }
        })))
    }

    type WatchEventsStream = Stream<proto::Event>;

    async fn watch_events(
        &self,
        request: Request<proto::WatchEventsRequest>,
    ) -> Reply<Self::WatchEventsStream> {
        let config = self.config();
        let mut opened = Reader::open(&config);
        // One that has hung up may not have noticed yet.
        for _ in 0..10 {
            if opened.is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            opened = Reader::open(&config);
        }
        let reader = opened.map_err(|error| Refusal::from(error).0)?;
        let reader = if request.into_inner().backlog { reader.with_backlog() } else { reader };
        Ok(Response::new(stream(move |out| {
            let gone =
                |sent: bool| if sent { ControlFlow::Continue(()) } else { ControlFlow::Break(()) };
            reader.each(|event| gone(out.send(event.into())), || gone(!out.is_closed()))?;
            Ok(())
        })))
    }
}

fn not_imported(why: &str) -> Status {
    Status::invalid_argument(format!("{why}; nothing was imported"))
}

/// The live flows of a real.
async fn flows_of(config: Arc<Config>, real: IpAddr) -> Result<Vec<Key>, Status> {
    aside(async move || {
        let datapath = Datapath::open(&config.pins())?;
        drain::flows_of(&config, &datapath, None, real)
    })
    .await
}
