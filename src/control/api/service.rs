//! The service's side.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::proto::{self, sidecar_server::Sidecar};
use super::{Shown, change};
use crate::config::Config;
use crate::control::changes::{self, NotMade};
use crate::control::checks::{RealState, State};
use crate::control::events::{self, Report};
use crate::control::problem::Problem;
use crate::control::release;
use crate::datapath::Datapath;
use crate::grpc::Peer;

/// Events that wait for a reader of the stream; the ring buffer keeps those behind them.
const EVENTS_AHEAD: usize = 1024;

pub struct Service {
    shown: Shown,
    /// Drains that end connections, by real.
    endings: Mutex<BTreeMap<IpAddr, AbortHandle>>,
}

impl Service {
    pub fn new(shown: Shown) -> Self {
        Self { shown, endings: Mutex::default() }
    }

    fn config(&self) -> Arc<Config> {
        Arc::clone(&self.shown.config.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

type Reply<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Sidecar for Service {
    async fn list_reals(
        &self,
        _: Request<proto::ListRealsRequest>,
    ) -> Reply<proto::ListRealsResponse> {
        let reals = self.shown.reals.list(&self.config()).into_iter().map(Into::into).collect();
        Ok(Response::new(proto::ListRealsResponse { reals }))
    }

    async fn list_problems(
        &self,
        _: Request<proto::ListProblemsRequest>,
    ) -> Reply<proto::ListProblemsResponse> {
        let problem = |p: Problem| proto::Problem { code: p.code, text: p.text };
        let problems = self.shown.observed.problems().into_iter().map(problem).collect();
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
            .shown
            .reals
            .set_drained(&config, addr, request.drained)
            .map_err(|e| Status::failed_precondition(e.to_string()))?;
        let what = if request.drained { "drained" } else { "undrained" };
        tracing::info!(%peer, real = %addr, ending = flows.len(), "{what}");
        let ending = flows.len() as u32;
        let mut endings = self.endings.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = endings.remove(&addr) {
            before.abort();
        }
        if ends {
            let reals = Arc::clone(&self.shown.reals);
            let per_second = request.end_per_second;
            let ending = release::end_slowly(config, reals, addr, flows, per_second);
            endings.insert(addr, tokio::spawn(ending).abort_handle());
        }
        drop(endings);
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
        let (answer, answered) = oneshot::channel();
        let ending = || Status::unavailable("`run` is ending");
        let request = changes::Request { edits, persist: request.persist, answer };
        self.shown.changes.send(request).await.map_err(|_| ending())?;
        answered.await.map_err(|_| ending())?.map_err(|not_made| match not_made {
            NotMade::Refused(why) => Status::failed_precondition(why),
            NotMade::NotYet(why) => Status::unavailable(why),
        })?;
        Ok(Response::new(proto::ChangeServicesResponse {}))
    }

    type WatchEventsStream = ReceiverStream<Result<proto::Event, Status>>;

    async fn watch_events(
        &self,
        _: Request<proto::WatchEventsRequest>,
    ) -> Reply<Self::WatchEventsStream> {
        let config = self.config();
        let (sender, stream) = mpsc::channel(EVENTS_AHEAD);
        let reader = events::Reader::open(&config)
            .map_err(|error| Status::failed_precondition(error.to_string()))?;
        tokio::task::spawn_blocking(move || {
            let gone =
                |sent: bool| if sent { ControlFlow::Continue(()) } else { ControlFlow::Break(()) };
            let ended = reader.each(
                |report| gone(sender.blocking_send(Ok(report.into())).is_ok()),
                || gone(!sender.is_closed()),
            );
            if let Err(error) = ended {
                let _ = sender.blocking_send(Err(Status::internal(error.to_string())));
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// The live flows of a real.
async fn flows_of(config: Arc<Config>, real: IpAddr) -> Result<Vec<release::Key>, Status> {
    let list = move || {
        let datapath = Datapath::open(&config.pins())?;
        release::flows_of(&config, &datapath, None, real)
    };
    let listed = tokio::task::spawn_blocking(list).await;
    listed
        .map_err(|e| Status::internal(e.to_string()))?
        .map_err(|e| Status::internal(e.to_string()))
}

impl From<RealState> for proto::Real {
    fn from(real: RealState) -> Self {
        let (state, error) = match real.state {
            _ if real.drained && real.effective_weight == 0 => {
                (proto::State::Drained, String::new())
            }
            State::Unchecked => (proto::State::Unchecked, String::new()),
            State::Up => (proto::State::Up, String::new()),
            State::Down(error) if real.effective_weight > 0 => (proto::State::DownInUse, error),
            State::Down(error) => (proto::State::Down, error),
        };
        Self {
            service: real.service,
            group: real.group,
            address: real.addr.to_string(),
            weight: real.weight,
            effective_weight: real.effective_weight,
            state: state.into(),
            error,
            since_s: real.since.as_secs(),
        }
    }
}

impl From<Report> for proto::Event {
    fn from(report: Report) -> Self {
        Self {
            time_us: (report.time * 1e6) as u64,
            kind: report.event.to_owned(),
            service: report.service,
            client: report.client,
            from_group: report.from_group.unwrap_or_default(),
            group: report.group.unwrap_or_default(),
            topic: report.topic.unwrap_or_default(),
            bound_by: report.bound_by.unwrap_or_default().to_owned(),
            why: report.why.unwrap_or_default().to_owned(),
            ended: report.ended,
        }
    }
}
