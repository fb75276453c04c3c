//! The sidecar in the foreground: load, apply, watch, until it is told to end. Forwarding does
//! not depend on it: programs and maps are pinned and stay.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::Flock;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::transport::Server as GrpcServer;
use tracing::{debug, error, info, warn};

use super::changes::{Answer, Edits, NotMade, Request};
use super::checks::{self, Reals};
use super::metrics::Metrics;
use super::misrouting::Misrouting;
use super::observed::Observed;
use super::reconcile::watch::Reconciler;
use super::release::{self, How};
use super::rescue::Rescuer;
use super::{Error, Result, api, gateway, instance, keeper, known};
use crate::balancer::embedded::Embedded;
use crate::balancer::embedded::service::Server;
use crate::config::{BalancerKind, Config};
use crate::datapath::Datapath;
use crate::domain::Service;
use crate::grpc::{self, Listener, ServeError};
use crate::kernel::{load, privileges};
use crate::{metrics, service};

/// The embedded balancer, for its service and for reloads.
type Shared = Arc<Mutex<Embedded>>;

/// What is in place before the first thread starts.
#[derive(Debug)]
pub struct Loaded {
    config: Config,
    listener: Option<Listener>,
    balancer: Option<Shared>,
    _only: Flock<File>,
}

/// Loads, and then gives up the privileges that only loading takes. Those are a thread's own, so
/// this comes before all threads.
pub fn load(config: Config) -> Result<Loaded> {
    let only = instance::lock(&config)?;
    // Listening first: whoever serves there already keeps its programs in their positions.
    let listener = match config.balancer {
        BalancerKind::Embedded => Some(listen(&config.balancer_endpoint)?),
        BalancerKind::Katran => None,
    };
    load::load(&config.load_spec())?;
    let balancer = listener.as_ref().map(|l| load_balancer(&config, l)).transpose()?;
    match privileges::drop_others(config.balancer == BalancerKind::Katran) {
        Ok(kept) => debug!("capabilities kept: {}", kept.join(", ")),
        Err(error) => warn!(%error, "capabilities that are not needed could not be dropped"),
    }
    Ok(Loaded { config, listener, balancer, _only: only })
}

/// Runs until SIGTERM or SIGINT. SIGHUP reloads the configuration.
pub async fn run(loaded: Loaded) -> Result<()> {
    let Loaded { config, listener, balancer, _only } = loaded;
    let mut term = on(SignalKind::terminate())?;
    let mut int = on(SignalKind::interrupt())?;
    let mut hup = on(SignalKind::hangup())?;

    let mut server = listener
        .zip(balancer.as_ref())
        .map(|(listener, balancer)| tokio::spawn(serve(listener, balancer)));
    let mut sidecar = Sidecar::new(config, balancer)?;
    let (asking, mut changes) = mpsc::channel(1);
    let shown = sidecar.shown(asking);
    let _served = sidecar.serve(shown.clone())?;
    let mut remote = None;
    if let Some(api) = &sidecar.config.api {
        remote = Some(api::Remote::serve(api, shown.clone(), &mut None).await?);
    }
    loop {
        sidecar.renew();
        // A balancer that hangs must not keep signals waiting. What is left half done by an end in
        // the middle is what a crash would leave, and the next reconciliation finds it.
        let next = tokio::select! {
            _ = term.recv() => Next::End,
            _ = int.recv() => Next::End,
            _ = hup.recv() => Next::Reload(None),
            Some(request) = changes.recv() => match request {
                Request::Change(edits) => Next::Change(edits),
                Request::Reload(answer) => Next::Reload(Some(answer)),
                Request::Settle(answer) => Next::Settle(answer),
            },
            served = served(&mut server) => return served.map_err(|source| Error::Io {
                what: format!("serving at {}", sidecar.config.balancer_endpoint),
                source,
            }),
            next = sidecar.watch() => next,
        };
        match next {
            Next::End => break,
            Next::Look => {}
            Next::Reload(answer) => {
                sidecar.reload(answer);
                serve_remotely(&sidecar.config, &shown, &mut remote).await;
            }
            Next::Change(edits) => sidecar.change(edits),
            // By the next look, which finds what was changed.
            Next::Settle(answer) => sidecar.waiting.push(answer),
        }
    }
    service::stopping();
    let endpoint = sidecar.config.balancer_endpoint.clone();
    sidecar.end().await;
    if let (Some(_), Some(path)) = (&server, endpoint.strip_prefix("unix:")) {
        let _ = std::fs::remove_file(path);
    }
    info!("ending; forwarding goes on with what is pinned (`mqtt-fwd unload` removes it)");
    Ok(())
}

/// What comes after a look at everything.
enum Next {
    Look,
    Reload(Option<Answer>),
    Change(Edits),
    Settle(Answer),
    End,
}

/// What watches a configuration.
struct Sidecar {
    config: Arc<Config>,
    /// The same, for tasks.
    shared: Arc<Mutex<Arc<Config>>>,
    /// The same, with the reals that are in use, and these weights.
    in_effect: Config,
    weights: Vec<u32>,
    datapath: Datapath,
    balancer: Option<Shared>,
    observed: Arc<Observed>,
    reals: Arc<Reals>,
    reconciler: Reconciler,
    misrouting: Misrouting,
    rescuer: Option<Rescuer>,
    /// Reals that are down, and whose connections were let go for that.
    released: BTreeSet<(String, IpAddr)>,
    /// Keeper and checks.
    tasks: [Task; 2],
    /// From when on the file's clients have been taken up.
    saving: Option<Task>,
    /// Who waits for the configuration to be in force.
    waiting: Vec<Answer>,
    /// The service manager knows that the configuration was taken over.
    ready: bool,
}

impl Sidecar {
    fn new(config: Config, balancer: Option<Shared>) -> Result<Self> {
        let config = Arc::new(config);
        let observed = Arc::new(Observed::default());
        let reals = Arc::new(Reals::new(&config));
        Ok(Self {
            shared: Arc::new(Mutex::new(Arc::clone(&config))),
            weights: reals.weights(&config),
            in_effect: reals.in_effect(&config),
            datapath: Datapath::open(&config.pins())?,
            reconciler: Reconciler::new(balancer.is_some(), Arc::clone(&observed)),
            misrouting: Misrouting::default(),
            rescuer: None,
            released: BTreeSet::new(),
            tasks: tasks(&config, &reals, &observed),
            saving: None,
            waiting: Vec::new(),
            ready: false,
            config,
            balancer,
            observed,
            reals,
        })
    }

    /// What the API shows, and where it puts changes.
    fn shown(&self, changes: mpsc::Sender<Request>) -> api::Shown {
        api::Shown {
            config: Arc::clone(&self.shared),
            reals: Arc::clone(&self.reals),
            observed: Arc::clone(&self.observed),
            changes,
        }
    }

    /// Serves the API and, if configured, metrics, as long as the tasks live.
    fn serve(&self, shown: api::Shown) -> Result<(Task, Option<Task>)> {
        let api = Task::spawn(api::serve(api::listen(&self.config)?, shown));
        let metrics = |addr| serve_metrics(addr, &self.shared, &self.reals, &self.observed);
        Ok((api, self.config.metrics.map(metrics).transpose()?))
    }

    /// Opens the maps anew if others are pinned by now, takes up other weights, and starts what has ended.
    fn renew(&mut self) {
        if self.reals.weights(&self.config) != self.weights {
            self.release_dead();
            self.look_at_all();
        }
        let pins = self.config.pins();
        if !self.datapath.is_pinned(&pins)
            && let Ok(datapath) = Datapath::open(&pins)
        {
            self.datapath = datapath;
            self.rescuer = None;
            self.reconciler.configuration_changed();
        }
        if self.rescuer.as_ref().is_some_and(Rescuer::has_ended) {
            self.rescuer = None;
        }
        if self.rescuer.is_none() && self.config.services.iter().any(Service::rescues) {
            self.rescuer = rescue(&self.shared, &self.reals, &self.observed);
        }
    }

    /// Looks at everything, puts back what was lost, and waits until it is time for the next look.
    async fn watch(&mut self) -> Next {
        let mut problems = self.reals.problems(&self.config);
        let counters = self.datapath.counters().unwrap_or_default();
        problems.extend(self.misrouting.look(&counters, Instant::now()));
        self.reconciler.reconcile(&self.in_effect, &self.datapath, problems).await;
        if !self.ready {
            service::ready();
            self.ready = true;
        }
        let outcome = self.reconciler.outcome();
        for answer in self.waiting.drain(..) {
            let _ = answer.send(outcome.clone().map_err(NotMade::NotYet));
        }
        if self.saving.is_none() && known::take_up(&self.config, &self.datapath) {
            self.saving = Some(Task::spawn(save_clients(Arc::clone(&self.shared))));
        }
        let pause = Duration::from_secs(self.config.watch_interval_s);
        let step = self.reals.next_step(&self.config);
        rest(pause.min(step.unwrap_or(pause)), &self.reals, &self.observed).await;
        Next::Look
    }

    /// The next look finds all that differs.
    fn look_at_all(&mut self) {
        self.weights = self.reals.weights(&self.config);
        self.in_effect = self.reals.in_effect(&self.config);
        self.reconciler.configuration_changed();
    }

    /// Of reals that just went down. Their groups have them still, so the balancer's choice tells which flows are
    /// theirs.
    fn release_dead(&mut self) {
        let dead = self.reals.to_reset(&self.config);
        for (service, real) in dead.difference(&self.released) {
            let released = tokio::task::block_in_place(|| {
                let flows = release::flows_of(&self.config, &self.datapath, Some(service), *real)?;
                release::end(&self.datapath, &flows, How::Reset)
            });
            match released {
                Ok(0) => {}
                Ok(connections) => {
                    info!(service, %real, connections, "down: its clients are reset as they send");
                }
                Err(error) => warn!(service, %real, %error, "down, and its connections stay"),
            }
        }
        self.released = dead;
    }

    fn reload(&mut self, answer: Option<Answer>) {
        service::reloading();
        self.ready = false;
        match reload(&self.config, self.balancer.as_ref()) {
            Ok(new) => {
                info!(path = %new.path.display(), "configuration reloaded");
                self.release_dead();
                self.take(new);
                self.tasks = tasks(&self.config, &self.reals, &self.observed);
                self.waiting.extend(answer);
            }
            Err(why) => {
                error!("configuration not reloaded, the previous one stays in force: {why}");
                if let Some(answer) = answer {
                    let _ = answer.send(Err(NotMade::Refused(why)));
                }
            }
        }
        self.look_at_all();
    }

    fn change(&mut self, edits: Edits) {
        match edits.carry_out(&self.config, &self.datapath) {
            Ok(new) => {
                self.release_dead();
                self.waiting.push(edits.answer);
                // Checks go on that nothing is changed of: a site that changes something all the time has them, too.
                let checks_differ = checks::wanted(&self.config) != checks::wanted(&new);
                self.take(new);
                if checks_differ {
                    self.tasks[1] = checking(&self.config, &self.reals);
                }
                self.look_at_all();
            }
            Err(error) => {
                let _ = edits.answer.send(Err(NotMade::Refused(error.to_string())));
            }
        }
    }

    fn take(&mut self, new: Config) {
        self.config = Arc::new(new);
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&self.config);
    }

    async fn end(self) {
        drop(self.tasks);
        if let Some(rescuer) = self.rescuer {
            rescuer.finish().await;
        }
        if self.saving.is_some() {
            known::keep(&self.config, &self.datapath);
        }
        instance::remove(&self.config);
    }
}

/// Serves the API to other hosts as configured by now, with the certificates that are there by now.
async fn serve_remotely(config: &Config, shown: &api::Shown, remote: &mut Option<api::Remote>) {
    let Some(api) = &config.api else {
        *remote = None;
        return;
    };
    match api::Remote::serve(api, shown.clone(), remote).await {
        Ok(new) => *remote = Some(new),
        Err(error) => error!("certificates of [api] not taken over: {error}"),
    }
}

/// What keeps the chain, and what checks the brokers.
fn tasks(config: &Arc<Config>, reals: &Arc<Reals>, observed: &Arc<Observed>) -> [Task; 2] {
    [Task::spawn(keeper::keep(Arc::clone(config), Arc::clone(observed))), checking(config, reals)]
}

fn checking(config: &Arc<Config>, reals: &Arc<Reals>) -> Task {
    Task::spawn(checks::run(Arc::clone(config), Arc::clone(reals)))
}

/// Writes down what is known of clients, now and then.
async fn save_clients(config: Arc<Mutex<Arc<Config>>>) {
    loop {
        let now = || Arc::clone(&config.lock().unwrap_or_else(PoisonError::into_inner));
        tokio::time::sleep(Duration::from_secs(now().clients_save_s)).await;
        let config = now();
        let saving = tokio::task::spawn_blocking(move || match Datapath::open(&config.pins()) {
            Ok(datapath) => known::keep(&config, &datapath),
            Err(error) => debug!(%error, "clients not saved"),
        });
        let _ = saving.await;
    }
}

fn rescue(
    config: &Arc<Mutex<Arc<Config>>>,
    reals: &Arc<Reals>,
    observed: &Arc<Observed>,
) -> Option<Rescuer> {
    Rescuer::start(Arc::clone(config), Arc::clone(reals), Arc::clone(observed))
        .inspect_err(|error| warn!(%error, "misrouted messages are not rescued"))
        .ok()
}

/// Longest time between two signs of life for the service manager.
const ALIVE: Duration = Duration::from_secs(10);

/// Waits until the next look is due, or other reals are to be used.
async fn rest(pause: Duration, reals: &Reals, observed: &Observed) {
    let end = tokio::time::Instant::now() + pause;
    loop {
        service::alive(&match observed.problems().as_slice() {
            [] => "all is as configured".to_owned(),
            [first, ..] => first.to_string(),
        });
        let next = end.min(tokio::time::Instant::now() + ALIVE);
        tokio::select! {
            () = reals.changed() => return,
            () = tokio::time::sleep_until(next) => {}
        }
        if next == end {
            return;
        }
    }
}

/// A task that ends with the value.
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

fn serve_metrics(
    addr: SocketAddr,
    config: &Arc<Mutex<Arc<Config>>>,
    reals: &Arc<Reals>,
    observed: &Arc<Observed>,
) -> Result<Task> {
    let listener = metrics::bind(addr)
        .map_err(|source| Error::Io { what: format!("listening at {addr} (metrics)"), source })?;
    info!(%addr, "serving /metrics and /health");
    let source = Metrics {
        config: Arc::clone(config),
        reals: Arc::clone(reals),
        observed: Arc::clone(observed),
    };
    Ok(Task::spawn(metrics::serve(listener, source)))
}

/// The embedded balancer alone, in the foreground.
pub async fn run_balancer(config: &Config) -> Result<()> {
    let mut term = on(SignalKind::terminate())?;
    let mut int = on(SignalKind::interrupt())?;
    let listener = listen(&config.balancer_endpoint)?;
    let balancer = load_balancer(config, &listener)?;
    let server = serve(listener, &balancer);
    if let Some(mac) = gateway::wanted(config).await? {
        let balancer = balancer.lock().unwrap_or_else(PoisonError::into_inner);
        balancer.set_mac(mac).map_err(|e| Error::Embedded(format!("embedded balancer: {e}")))?;
    }
    tokio::select! {
        _ = term.recv() => Ok(()),
        _ = int.recv() => Ok(()),
        ended = server => ended.map_err(|e| Error::Io {
            what: format!("serving at {}", config.balancer_endpoint),
            source: std::io::Error::other(e),
        }),
    }
}

fn on(kind: SignalKind) -> Result<tokio::signal::unix::Signal> {
    signal(kind).map_err(|source| Error::Io { what: "signal handler".to_owned(), source })
}

fn listen(endpoint: &str) -> Result<Listener> {
    grpc::listen(endpoint).map_err(|source| Error::Io {
        what: format!("listening at {endpoint} (is another balancer running?)"),
        source,
    })
}

fn load_balancer(config: &Config, listener: &Listener) -> Result<Shared> {
    load::load_balancer(&config.load_spec())?;
    let balancer: Shared = Arc::new(Mutex::new(Embedded::open(&config.pins())?));
    info!(endpoint = config.balancer_endpoint, "embedded balancer is in the chain");
    if let Listener::Tcp(_) = listener {
        warn!(
            endpoint = config.balancer_endpoint,
            "every user of this host can change the balancer over TCP; a unix: endpoint is for \
             root only"
        );
    }
    Ok(balancer)
}

fn serve(
    listener: Listener,
    balancer: &Shared,
) -> impl Future<Output = std::result::Result<(), ServeError>> + use<> {
    let router = GrpcServer::builder().add_service(Server::service(Arc::clone(balancer)));
    grpc::serve(listener, router)
}

/// How the embedded balancer's service ended, if there is one.
async fn served(server: &mut Option<JoinHandle<Result<(), ServeError>>>) -> std::io::Result<()> {
    match server {
        Some(server) => server.await?.map_err(std::io::Error::other),
        None => std::future::pending().await,
    }
}

/// A configuration that cannot be read, or changes what cannot change, leaves the one in force: why.
fn reload(config: &Config, balancer: Option<&Shared>) -> Result<Config, String> {
    let new = Config::load(&config.path).map_err(|error| error.to_string())?;
    let fixed = fixed_keys(config, &new);
    if !fixed.is_empty() {
        return Err(format!(
            "{} cannot change while `run` runs; restart it for that",
            fixed.join(", ")
        ));
    }
    reload_datapath(config, &new, balancer).map_err(|error| error.to_string())?;
    Ok(new)
}

/// Keys whose change needs another process.
fn fixed_keys(old: &Config, new: &Config) -> Vec<&'static str> {
    [
        ("interface", new.interface != old.interface),
        ("xdp_mode", new.xdp_mode != old.xdp_mode),
        ("metrics", new.metrics != old.metrics),
        ("bpffs", new.bpffs != old.bpffs),
        ("root_array", new.root_array != old.root_array),
        ("balancer", new.balancer != old.balancer),
        ("[maps] (without CAP_SYS_ADMIN)", new.maps != old.maps && !privileges::sees_layouts()),
        (
            "balancer_endpoint",
            new.balancer == BalancerKind::Embedded
                && new.balancer_endpoint != old.balancer_endpoint,
        ),
    ]
    .into_iter()
    .filter_map(|(key, changed)| changed.then_some(key))
    .collect()
}

/// What is fixed when a program is loaded: capacities and rates. What the maps hold is moved.
fn reload_datapath(old: &Config, new: &Config, balancer: Option<&Shared>) -> Result<()> {
    if (old.maps, old.rates) == (new.maps, new.rates) {
        return Ok(());
    }
    load::load(&new.load_spec())?;
    if let Some(balancer) = balancer.filter(|_| old.maps.vips != new.maps.vips) {
        load::load_balancer(&new.load_spec())?;
        let reopened = Embedded::open(&new.pins())?;
        *balancer.lock().unwrap_or_else(PoisonError::into_inner) = reopened;
    }
    Ok(())
}
