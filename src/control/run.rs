//! The sidecar in the foreground: load, apply, watch, until it is told to end. Forwarding does
//! not depend on it: programs and maps are pinned and stay.

use std::fs::File;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::Flock;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tonic::transport::Server as GrpcServer;
use tracing::{debug, error, info, warn};

use super::checks::{self, Reals};
use super::metrics::Metrics;
use super::misrouting::Misrouting;
use super::observed::Observed;
use super::reconcile::watch::Reconciler;
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
    let mut config = Arc::new(config);
    let mut term = on(SignalKind::terminate())?;
    let mut int = on(SignalKind::interrupt())?;
    let mut hup = on(SignalKind::hangup())?;

    let mut datapath = Datapath::open(&config.pins())?;
    let mut server = listener
        .zip(balancer.as_ref())
        .map(|(listener, balancer)| tokio::spawn(serve(listener, balancer)));
    let observed = Arc::new(Observed::default());
    let reals = Arc::new(Reals::new(&config));
    let shared = Arc::new(Mutex::new(Arc::clone(&config)));
    let _api = Task::spawn(api::serve(
        api::listen(&config)?,
        Arc::clone(&shared),
        Arc::clone(&reals),
        Arc::clone(&observed),
    ));
    let _metrics =
        config.metrics.map(|addr| serve_metrics(addr, &shared, &reals, &observed)).transpose()?;
    let keeping = |config: &Config| {
        let own_balancer = config.balancer == BalancerKind::Embedded;
        Task::spawn(keeper::keep(config.load_spec(), own_balancer, Arc::clone(&observed)))
    };
    let checking =
        |config: &Arc<Config>| Task::spawn(checks::run(Arc::clone(config), Arc::clone(&reals)));
    let mut misrouting = Misrouting::default();
    let mut ready = false;
    // From when on the file's clients have been taken up.
    let mut saving: Option<Task> = None;
    let mut in_effect = reals.in_effect(&config);
    let mut tasks = [keeping(&config), checking(&config)];
    let mut reconciler = Reconciler::new(server.is_some(), Arc::clone(&observed));
    let mut rescuer: Option<Rescuer> = None;
    loop {
        if let Some(new) = remade(&datapath, &config) {
            datapath = new;
            rescuer = None;
            reconciler.configuration_changed();
        }
        rescuer = rescuer.filter(|rescuer| !rescuer.has_ended());
        if rescuer.is_none() && config.services.iter().any(Service::rescues) {
            rescuer = rescue(&shared, &reals, &observed);
        }
        let mut problems = reals.problems(&config);
        let counters = datapath.counters().unwrap_or_default();
        problems.extend(misrouting.look(&counters, Instant::now()));
        let pause = Duration::from_secs(config.watch_interval_s);
        // A balancer that hangs must not keep signals waiting. What is left half done by an end in
        // the middle is what a crash would leave, and the next reconciliation finds it.
        let work = async {
            reconciler.reconcile(&in_effect, &datapath, problems).await;
            if !ready {
                service::ready();
            }
            if saving.is_none() && known::take_up(&config, &datapath) {
                saving = Some(Task::spawn(save_clients(Arc::clone(&shared))));
            }
            rest(pause, &reals, &observed).await
        };
        tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            _ = hup.recv() => {
                service::reloading();
                ready = false;
                if let Some(new) = reload(&config, balancer.as_ref()) {
                    config = Arc::new(new);
                    *shared.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&config);
                    tasks = [keeping(&config), checking(&config)];
                }
                in_effect = reals.in_effect(&config);
                reconciler.configuration_changed();
            }
            served = served(&mut server) => return served.map_err(|source| Error::Io {
                what: format!("serving at {}", config.balancer_endpoint),
                source,
            }),
            changed = work => {
                ready = true;
                if changed {
                    in_effect = reals.in_effect(&config);
                    reconciler.configuration_changed();
                }
            }
        }
    }
    service::stopping();
    drop(tasks);
    if let Some(rescuer) = rescuer {
        rescuer.finish().await;
    }
    if saving.is_some() {
        known::keep(&config, &datapath);
    }
    if let (Some(_), Some(path)) = (&server, config.balancer_endpoint.strip_prefix("unix:")) {
        let _ = std::fs::remove_file(path);
    }
    instance::remove(&config);
    info!("ending; forwarding goes on with what is pinned (`mqtt-fwd unload` removes it)");
    Ok(())
}

/// The maps, if others are pinned by now.
fn remade(datapath: &Datapath, config: &Config) -> Option<Datapath> {
    let pins = config.pins();
    if datapath.is_pinned(&pins) { None } else { Datapath::open(&pins).ok() }
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

/// Waits until the next reconciliation is due. Returns whether other reals are to be used by then, which
/// is waited for no longer.
async fn rest(pause: Duration, reals: &Reals, observed: &Observed) -> bool {
    let end = tokio::time::Instant::now() + pause;
    loop {
        service::alive(&match observed.problems().as_slice() {
            [] => "all is as configured".to_owned(),
            [first, ..] => first.to_string(),
        });
        let next = end.min(tokio::time::Instant::now() + ALIVE);
        tokio::select! {
            () = reals.changed() => return true,
            () = tokio::time::sleep_until(next) => {}
        }
        if next == end {
            return false;
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

/// A configuration that cannot be read, or changes what cannot change, leaves the one in force.
fn reload(config: &Config, balancer: Option<&Shared>) -> Option<Config> {
    let new = match Config::load(&config.path) {
        Ok(new) => new,
        Err(error) => {
            error!("configuration not reloaded, the previous one stays in force: {error}");
            return None;
        }
    };
    let fixed = fixed_keys(config, &new);
    if !fixed.is_empty() {
        error!(
            "configuration not reloaded: {} cannot change while `run` runs; restart it for that",
            fixed.join(", ")
        );
        return None;
    }
    if let Err(error) = reload_datapath(config, &new, balancer) {
        error!("configuration not reloaded, the previous one stays in force: {error}");
        return None;
    }
    info!(path = %new.path.display(), "configuration reloaded");
    Some(new)
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
