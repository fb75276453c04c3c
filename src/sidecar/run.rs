//! The sidecar in the foreground: load, apply, watch, until it is told to end. Forwarding does
//! not depend on it: programs and maps are pinned and stay.

use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::Server as GrpcServer;
use tracing::{error, info, warn};

use super::datapath::Datapath;
use super::{Error, Result, apply};
use crate::balancer::client::{BalancerError, Client};
use crate::balancer::embedded::Embedded;
use crate::balancer::server::Server;
use crate::bpf::chain::{self, Chain};
use crate::bpf::loader;
use crate::config::{BalancerKind, Config};

/// Runs until SIGTERM or SIGINT. SIGHUP reads the configuration again.
pub async fn run(mut config: Config) -> Result<()> {
    let mut term = on(SignalKind::terminate())?;
    let mut int = on(SignalKind::interrupt())?;
    let mut hup = on(SignalKind::hangup())?;

    // Listening first: whoever serves there already keeps its programs in their positions.
    let incoming = match config.balancer {
        BalancerKind::Embedded => Some(listen(&config.balancer_endpoint).await?),
        BalancerKind::Katran => None,
    };
    loader::load(&config, false)?;
    let datapath = Datapath::open(&config.pins())?;
    let mut server = match incoming {
        Some(incoming) => Some(tokio::spawn(serve(&config, incoming)?)),
        None => None,
    };

    let mut watch = Watch::default();
    loop {
        watch.look(&config, &datapath).await;
        let pause = tokio::time::sleep(Duration::from_secs(config.watch_interval_s));
        let served = async {
            match &mut server {
                Some(server) => server.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            _ = hup.recv() => {
                config = reload(config);
                watch.in_force = false;
            }
            ended = served => {
                let ended = ended.map_err(std::io::Error::other).and_then(|served| {
                    served.map_err(std::io::Error::other)
                });
                return ended.map_err(|source| Error::Io {
                    what: format!("serving at {}", config.balancer_endpoint),
                    source,
                });
            }
            () = pause => {}
        }
    }
    info!("ending; forwarding goes on with what is pinned (`mqtt-fwd unload` removes it)");
    Ok(())
}

/// The embedded balancer alone, in the foreground.
pub async fn run_balancer(config: &Config) -> Result<()> {
    let mut term = on(SignalKind::terminate())?;
    let mut int = on(SignalKind::interrupt())?;
    let server = serve(config, listen(&config.balancer_endpoint).await?)?;
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

enum Incoming {
    Tcp(TcpListenerStream),
    Unix(UnixListenerStream),
}

async fn listen(endpoint: &str) -> Result<Incoming> {
    let failed = |source: std::io::Error| Error::Io {
        what: format!("listening at {endpoint} (is another balancer running?)"),
        source,
    };
    if let Some(path) = endpoint.strip_prefix("unix:") {
        // A socket that nobody listens on any more is in the way of the next one.
        if std::os::unix::net::UnixStream::connect(path).is_err() {
            let _ = std::fs::remove_file(path);
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        Ok(Incoming::Unix(UnixListenerStream::new(listener)))
    } else {
        let listener = TcpListener::bind(endpoint).await.map_err(failed)?;
        Ok(Incoming::Tcp(TcpListenerStream::new(listener)))
    }
}

/// Loads the embedded balancer; the future serves.
fn serve(
    config: &Config,
    incoming: Incoming,
) -> Result<impl Future<Output = Result<(), tonic::transport::Error>> + use<>> {
    loader::load_balancer(config, false)?;
    let balancer = Embedded::open(&config.pins())?;
    if let Some(mac) = config.gateway_mac {
        balancer.set_mac(mac).map_err(|e| Error::Service {
            service: "embedded balancer".to_owned(),
            problem: e.to_string(),
        })?;
    }
    info!(endpoint = config.balancer_endpoint, "embedded balancer is in the chain");
    let router = GrpcServer::builder().add_service(Server::service(balancer));
    Ok(async move {
        match incoming {
            Incoming::Tcp(stream) => router.serve_with_incoming(stream).await,
            Incoming::Unix(stream) => router.serve_with_incoming(stream).await,
        }
    })
}

/// A configuration that cannot be read leaves the one in force.
fn reload(config: Config) -> Config {
    match Config::load(&config.path) {
        Ok(new) if new.interface != config.interface || new.balancer != config.balancer => {
            error!("interface and balancer cannot change while running; restart for that");
            config
        }
        Ok(new) => {
            info!(path = %new.path.display(), "configuration read again");
            new
        }
        Err(e) => {
            error!("configuration not taken over: {e}");
            config
        }
    }
}

/// What was seen at the last look, so that only changes are logged.
#[derive(Default)]
struct Watch {
    client: Option<Client>,
    complaint: Option<String>,
    applied_once: bool,
    /// The whole configuration was applied, and has not changed since.
    in_force: bool,
}

impl Watch {
    async fn look(&mut self, config: &Config, datapath: &Datapath) {
        let complaint = match self.apply(config, datapath).await {
            Ok(()) => chain_complaint(config),
            Err(e) => Some(e.to_string()),
        };
        if complaint != self.complaint {
            match &complaint {
                Some(text) if self.applied_once => {
                    warn!("{text}; forwarding goes on with what is pinned");
                }
                Some(text) => warn!("{text}; trying again"),
                None => info!("all is as configured"),
            }
            self.complaint = complaint;
        }
    }

    /// Applies whatever differs: the first time everything, later what was lost or changed.
    async fn apply(&mut self, config: &Config, datapath: &Datapath) -> Result<()> {
        let mut client = match self.client.take() {
            Some(client) => client,
            None => Client::connect(&config.balancer_endpoint).await?,
        };
        let plan = if self.in_force {
            // The maps are ours; only the balancer can have changed.
            match apply::difference(config, &mut client).await {
                Ok(None) => {
                    self.client = Some(client);
                    return Ok(());
                }
                Ok(Some(difference)) => {
                    warn!("balancer: {difference} (was it restarted?)");
                    apply::apply(config, datapath, &mut client).await
                }
                Err(e) => Err(e.into()),
            }
        } else {
            apply::apply(config, datapath, &mut client).await
        };
        // After an error that is the connection's, the next look makes a new one.
        if !matches!(plan, Err(Error::Balancer(BalancerError::Unreachable { .. }))) {
            self.client = Some(client);
        }
        let plan = plan?;
        if !plan.is_empty() {
            if self.applied_once {
                warn!(steps = plan.lines().len(), "put back what was missing");
            } else {
                info!(steps = plan.lines().len(), "applied the configuration");
            }
        }
        self.applied_once = true;
        self.in_force = true;
        Ok(())
    }
}

fn chain_complaint(config: &Config) -> Option<String> {
    let pins = config.pins();
    let chain = match Chain::open(&pins) {
        Ok(Some(chain)) => chain,
        Ok(None) => return Some(format!("{} is gone", pins.root_array().display())),
        Err(e) => return Some(e.to_string()),
    };
    let ours = loader::pinned_program(&pins.program("mqtt_fwd")).map(|p| p.id);
    if chain.program(chain::MQTT_FWD).map(|p| p.id) != ours {
        return Some("mqtt_fwd is not in its position; `mqtt-fwd load` puts it back".to_owned());
    }
    if chain.program(chain::BALANCER).is_none() {
        return Some("nobody is in the balancer's position".to_owned());
    }
    None
}
