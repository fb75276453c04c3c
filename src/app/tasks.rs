//! What goes on beside the control loop, each in a task of its own, with the state.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tracing::{debug, info, warn};

use super::Result;
use crate::api::{self, Remote};
use crate::config::Service;
use crate::connectivity::ConnectivityError;
use crate::datapath::Datapath;
use crate::fleet::Asker;
use crate::handover::hellos::{self, Hellos};
use crate::inspect::metrics::Metrics;
use crate::rescue::Rescuer;
use crate::state::State;
use crate::{chain, clients, connectivity, health_checks, metrics};

/// From a start or reload to the first test.
const TEST_DELAY: Duration = Duration::from_secs(10);

/// A task that ends with the value.
#[derive(Debug)]
struct Task(JoinHandle<()>);

impl Task {
    fn spawn<T: 'static>(work: impl Future<Output = T> + Send + 'static) -> Self {
        Self(tokio::spawn(async {
            work.await;
        }))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// All of them.
#[derive(Debug)]
pub struct Tasks {
    state: State,
    _api: Task,
    _metrics: Option<Task>,
    remote: Option<Remote>,
    watchdog: Task,
    checks: Task,
    tests: Option<Task>,
    rescuer: Option<Rescuer>,
    asker: Option<Asker>,
    hellos: Option<Hellos>,
    /// From when on the file's clients have been loaded.
    saving: Option<Task>,
}

impl Tasks {
    /// Starts them.
    pub async fn spawn(state: &State, metrics: Option<TcpListener>) -> Result<Self> {
        let config = state.config();
        let api = api::serve(api::listen(&config)?, state.clone());
        let metrics = metrics.map(|listener| serve_metrics(listener, state));
        let remote = match &config.api {
            Some(api) => Some(Remote::serve(api, state.clone(), &mut None).await?),
            None => None,
        };
        Ok(Self {
            _api: Task::spawn(api),
            _metrics: metrics,
            remote,
            watchdog: watchdog(state),
            checks: checks(state),
            tests: tests(state),
            rescuer: None,
            asker: None,
            hellos: None,
            saving: None,
            state: state.clone(),
        })
    }

    /// Starts what has ended, and what the configuration now wants.
    pub fn renew(&mut self) {
        if self.rescuer.as_ref().is_some_and(Rescuer::has_ended) {
            self.rescuer = None;
        }
        let wanted = self.state.config().services.iter().any(Service::rescues);
        if self.asker.as_ref().is_some_and(Asker::has_ended) {
            self.asker = None;
        }
        if self.state.config().fleet.is_none() {
            self.asker = None;
            self.state.observed.fleet.note_idle(None);
        } else if self.asker.is_none() {
            let started = Asker::start(&self.state);
            let fleet = &self.state.observed.fleet;
            fleet.note_idle(started.as_ref().err().map(ToString::to_string));
            self.asker = started.ok();
        }
        if self.hellos.as_ref().is_some_and(Hellos::has_ended)
            || !hellos::are_wanted(&self.state.config())
        {
            self.hellos = None;
        }
        if !hellos::are_wanted(&self.state.config()) {
            self.state.observed.note_hellos(None);
        } else if self.hellos.is_none() {
            let started = Hellos::start(&self.state);
            self.state.observed.note_hellos(started.as_ref().err().map(ToString::to_string));
            self.hellos = started.ok();
        }
        if self.rescuer.is_none() && wanted {
            self.rescuer = Rescuer::start(&self.state)
                .inspect_err(|error| warn!(%error, "misrouted messages are not rescued"))
                .ok();
        }
    }

    /// Other maps are pinned.
    pub fn maps_changed(&mut self) {
        self.rescuer = None;
        self.asker = None;
        self.hellos = None;
    }

    /// The file was read again.
    ///
    /// The error: what of it was not taken over.
    pub async fn reloaded(&mut self) -> Result<(), String> {
        // With the port and the keys that are configured now.
        self.asker = None;
        self.watchdog = watchdog(&self.state);
        self.checks = checks(&self.state);
        self.tests = tests(&self.state);
        let Some(api) = self.state.config().api.clone() else {
            self.remote = None;
            return Ok(());
        };
        let new = Remote::serve(&api, self.state.clone(), &mut self.remote).await;
        let new = new.map_err(|e| format!("certificates of [api] were not taken over: {e}"))?;
        self.remote = Some(new);
        Ok(())
    }

    /// Other reals are checked, or otherwise.
    pub fn checks_changed(&mut self) {
        self.checks = checks(&self.state);
    }

    /// Loads clients' records once services are in force, and saves them from then on.
    pub fn keep_clients(&mut self, datapath: &Datapath) {
        if self.saving.is_none() && clients::load_at_start(&self.state.config(), datapath) {
            self.saving = Some(Task::spawn(save_clients(self.state.clone())));
        }
    }

    /// Ends them, and what they have in hand.
    pub async fn finish(self, datapath: &Datapath) {
        drop((self.watchdog, self.checks, self.tests));
        if let Some(rescuer) = self.rescuer {
            rescuer.finish().await;
        }
        if self.saving.is_some() {
            clients::save(&self.state.config(), datapath);
        }
    }
}

fn watchdog(state: &State) -> Task {
    Task::spawn(chain::watchdog::run(state.config(), Arc::clone(&state.observed)))
}

fn checks(state: &State) -> Task {
    Task::spawn(health_checks::run(state.config(), Arc::clone(&state.reals)))
}

/// Tests as configured.
fn tests(state: &State) -> Option<Task> {
    let Some(interval) = state.config().test_interval else {
        state.observed.forget_test();
        return None;
    };
    let state = state.clone();
    Some(Task::spawn(async move {
        // What was just configured comes into force first, and brokers are checked.
        tokio::time::sleep(interval.min(TEST_DELAY)).await;
        loop {
            let result = connectivity::test(&state.in_effect(), None, None).await;
            // Somebody tests by hand: that is no fault.
            if !matches!(result, Err(ConnectivityError::Busy)) {
                state.observed.note_test(result.map_err(|error| error.to_string()));
            }
            tokio::time::sleep(interval).await;
        }
    }))
}

fn serve_metrics(listener: TcpListener, state: &State) -> Task {
    if let Ok(addr) = listener.local_addr() {
        info!(%addr, "serving /metrics and /health");
    }
    Task::spawn(metrics::serve(listener, Metrics(state.clone())))
}

async fn save_clients(state: State) {
    loop {
        tokio::time::sleep(state.config().clients_save_interval).await;
        let config = state.config();
        let saving = tokio::task::spawn_blocking(move || match Datapath::open(&config.pins()) {
            Ok(datapath) => clients::save(&config, &datapath),
            Err(error) => debug!(%error, "clients not saved"),
        });
        let _ = saving.await;
    }
}
