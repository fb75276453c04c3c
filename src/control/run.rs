//! The sidecar in the foreground: load, apply, watch, until it is told to end. Forwarding does
//! not depend on it: programs and maps are pinned and stay.

use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::Server as GrpcServer;
use tracing::{error, info, warn};

use super::reconcile::watch::Reconciler;
use super::{Error, Result, instance};
use crate::balancer::embedded::service::Server;
use crate::balancer::embedded::{Embedded, Refusal};
use crate::config::{BalancerKind, Config};
use crate::datapath::Datapath;
use crate::kernel::load;

/// Runs until SIGTERM or SIGINT. SIGHUP reads the configuration again.
pub async fn run(mut config: Config) -> Result<()> {
    let mut term = on(SignalKind::terminate())?;
    let mut int = on(SignalKind::interrupt())?;
    let mut hup = on(SignalKind::hangup())?;

    let _only = instance::lock(&config)?;
    // Listening first: whoever serves there already keeps its programs in their positions.
    let incoming = match config.balancer {
        BalancerKind::Embedded => Some(listen(&config.balancer_endpoint).await?),
        BalancerKind::Katran => None,
    };
    load::load(&config.load_spec())?;
    let mut datapath = Datapath::open(&config.pins())?;
    let mut server = match incoming {
        Some(incoming) => Some(tokio::spawn(serve(&config, incoming)?)),
        None => None,
    };

    let mut reconciler = Reconciler::new(server.is_some());
    loop {
        if !datapath.is_pinned(&config.pins())
            && let Ok(new) = Datapath::open(&config.pins())
        {
            warn!("other maps are pinned than before (unload and load?); going on with those");
            datapath = new;
            reconciler.configuration_changed();
        }
        reconciler.reconcile(&config, &datapath).await;
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
                reconciler.configuration_changed();
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
    load::load_balancer(&config.load_spec())?;
    let balancer = Embedded::open(&config.pins())?;
    let failed = |e: Refusal| Error::Embedded(format!("embedded balancer: {e}"));
    if let Some(mac) = config.gateway_mac {
        balancer.set_mac(mac).map_err(failed)?;
    }
    info!(endpoint = config.balancer_endpoint, "embedded balancer is in the chain");
    let mut builder = GrpcServer::builder();
    let router = builder.add_service(Server::service(balancer));
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
            if new.maps != config.maps {
                warn!("sizes in [maps] count from the next `mqtt-fwd load` on");
            }
            info!(path = %new.path.display(), "configuration read again");
            new
        }
        Err(e) => {
            error!("configuration not taken over: {e}");
            config
        }
    }
}
