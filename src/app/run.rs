//! From what is loaded to the end.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::info;

use super::balancer::{Embedded, Served};
use super::control::Control;
use super::load::Loaded;
use super::tasks::Tasks;
use super::{Result, RunError};
use crate::state::Request;
use crate::{instance, systemd};

struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
}

enum Event {
    Polled,
    Request(Request),
    Reload,
    End,
}

impl Signals {
    fn new() -> Result<Self> {
        let on = |kind| signal(kind).map_err(RunError::Signals);
        Ok(Self {
            term: on(SignalKind::terminate())?,
            int: on(SignalKind::interrupt())?,
            hup: on(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Event {
        tokio::select! {
            _ = self.term.recv() => Event::End,
            _ = self.int.recv() => Event::End,
            _ = self.hup.recv() => Event::Reload,
        }
    }
}

/// Runs until SIGTERM or SIGINT. SIGHUP reloads the configuration.
pub async fn run(loaded: Loaded) -> Result<()> {
    let Loaded { config, balancer, metrics, lock: _lock } = loaded;
    let mut signals = Signals::new()?;
    let endpoint = config.balancer_endpoint.clone();
    let maps = balancer.as_ref().map(|balancer| balancer.maps.clone());
    let mut served = balancer.map_or_else(Served::default, Embedded::serve);
    let (mut control, mut requests) = Control::new(config, maps)?;
    let mut tasks = Tasks::spawn(control.state(), metrics).await?;
    loop {
        control.renew(&mut tasks);
        // A balancer that hangs must not keep signals waiting. What is left half done by an end in
        // the middle is what a crash would leave, and the next reconciliation finds it.
        let event = tokio::select! {
            event = signals.next() => event,
            Some(request) = requests.recv() => Event::Request(request),
            ended = served.ended() => {
                return ended.map_err(|source| RunError::Serve { endpoint, source });
            }
            () = control.poll(&mut tasks) => Event::Polled,
        };
        match event {
            Event::Polled => {}
            Event::Request(request) => control.carry_out(request, &mut tasks).await,
            Event::Reload => control.reload(None, &mut tasks).await,
            Event::End => break,
        }
    }
    systemd::stopping();
    tasks.finish(&control.datapath).await;
    instance::remove(&control.state().config());
    served.remove_socket(&endpoint);
    info!("ending; forwarding goes on with what is pinned (`mqtt-fwd unload` removes it)");
    Ok(())
}
