//! The embedded balancer: in the chain, and served as Katran serves.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tonic::transport::Server as GrpcServer;
use tracing::{info, warn};

use super::{Result, RunError};
use crate::balancer::embedded::Server;
use crate::config::{BalancerKind, Config};
use crate::datapath::embedded::Embedded as Maps;
use crate::grpc::{self, Listener, ServeError};
use crate::kernel::load;
use crate::reconcile::gateway;

/// Its maps, for the service and for reloads.
pub type Shared = Arc<Mutex<Maps>>;

/// Loaded, and not served yet.
#[derive(Debug)]
pub struct Embedded {
    listener: Listener,
    pub maps: Shared,
}

impl Embedded {
    /// Listens at its endpoint.
    pub fn listen(config: &Config) -> Result<Listener> {
        let endpoint = config.balancer_endpoint.clone();
        grpc::listen(&endpoint).map_err(|source| RunError::Listen { endpoint, source })
    }

    /// Puts it into the chain.
    pub fn load(config: &Config, listener: Listener) -> Result<Self> {
        load::load_balancer(&config.load_spec())?;
        let maps: Shared = Arc::new(Mutex::new(Maps::open(&config.pins())?));
        info!(endpoint = config.balancer_endpoint, "embedded balancer is in the chain");
        if let Listener::Tcp(_) = listener {
            warn!(
                endpoint = config.balancer_endpoint,
                "every user of this host can change the balancer over TCP; a unix: endpoint is for \
                 root only"
            );
        }
        Ok(Self { listener, maps })
    }

    /// Serves it.
    pub fn serve(self) -> Served {
        let router = GrpcServer::builder().add_service(Server::service(self.maps));
        Served(Some(tokio::spawn(grpc::serve(self.listener, router))))
    }
}

/// The service, or none.
#[derive(Debug, Default)]
pub struct Served(Option<JoinHandle<Result<(), ServeError>>>);

impl Served {
    /// How it ended; never, if there is none.
    pub async fn ended(&mut self) -> std::io::Result<()> {
        match &mut self.0 {
            Some(task) => task.await?.map_err(std::io::Error::other),
            None => std::future::pending().await,
        }
    }

    /// Removes the socket that it listened at.
    pub fn remove_socket(&self, endpoint: &str) {
        if let (Some(_), Some(path)) = (&self.0, endpoint.strip_prefix("unix:")) {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The embedded balancer alone, in the foreground.
pub async fn run_balancer(config: &Config) -> Result<()> {
    if config.balancer != BalancerKind::Embedded {
        return Err(RunError::NoEmbedded);
    }
    let on = |kind| signal(kind).map_err(RunError::Signals);
    let (mut term, mut int) = (on(SignalKind::terminate())?, on(SignalKind::interrupt())?);
    let balancer = Embedded::load(config, Embedded::listen(config)?)?;
    if let Some(mac) = gateway::desired(config).await? {
        balancer.maps.lock().unwrap_or_else(PoisonError::into_inner).set_mac(mac)?;
    }
    let mut served = balancer.serve();
    tokio::select! {
        _ = term.recv() => Ok(()),
        _ = int.recv() => Ok(()),
        ended = served.ended() => ended.map_err(|source| {
            RunError::Serve { endpoint: config.balancer_endpoint.clone(), source }
        }),
    }
}
