//! The control loop: polls everything, puts back what was lost, and carries out requests.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};

use super::Result;
use super::balancer::Shared;
use super::reload::reload;
use super::tasks::Tasks;
use crate::config::{Config, differences};
use crate::datapath::Datapath;
use crate::datapath::flows::{Termination, terminate};
use crate::health_checks::{self, Reals};
use crate::inspect::misrouting::Misrouting;
use crate::kernel::chain;
use crate::reconcile::watch::Reconciler;
use crate::state::{Answer, Edits, Observed, Request, State, Unmade};
use crate::{drain, systemd};

/// Differences of a reload that are logged.
const LOGGED_DIFFERENCES: usize = 20;

/// Longest time between two signs of life for the service manager.
const ALIVE: Duration = Duration::from_secs(10);

/// The configuration as it is in effect: with these weights.
struct InEffect {
    config: Config,
    weights: Vec<u32>,
}

impl InEffect {
    fn of(state: &State) -> Self {
        let config = state.in_effect();
        Self { weights: state.reals.weights(&state.config()), config }
    }
}

/// The one that changes the configuration in force.
pub struct Control {
    config: watch::Sender<Arc<Config>>,
    state: State,
    in_effect: InEffect,
    pub datapath: Datapath,
    balancer: Option<Shared>,
    reconciler: Reconciler,
    misrouting: Misrouting,
    /// Reals that are down, and whose connections were reset for that.
    reset: BTreeSet<(String, IpAddr)>,
    /// Who waits for the configuration to be in force.
    waiting: Vec<Answer>,
    /// The service manager knows that the configuration is in force.
    ready: bool,
}

impl Control {
    /// With what is loaded. Requests come out of the receiver.
    pub fn new(
        config: Config,
        balancer: Option<Shared>,
    ) -> Result<(Self, mpsc::Receiver<Request>)> {
        let (sender, requests) = mpsc::channel(1);
        let datapath = Datapath::open(&config.pins())?;
        let (observed, reals) = (Arc::new(Observed::default()), Arc::new(Reals::new(&config)));
        let (config, in_force) = watch::channel(Arc::new(config));
        let state = State::new(in_force, reals, observed, sender);
        let control = Self {
            in_effect: InEffect::of(&state),
            datapath,
            reconciler: Reconciler::new(balancer.is_some(), Arc::clone(&state.observed)),
            misrouting: Misrouting::default(),
            reset: BTreeSet::new(),
            waiting: Vec::new(),
            ready: false,
            config,
            state,
            balancer,
        };
        Ok((control, requests))
    }

    /// What others are shown.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Takes up other weights, and opens the maps again if others are pinned meanwhile.
    pub fn renew(&mut self, tasks: &mut Tasks) {
        let config = self.state.config();
        if self.state.reals.weights(&config) != self.in_effect.weights {
            self.reset_dead();
            self.apply_all();
        }
        let pins = config.pins();
        if !self.datapath.is_pinned(&pins)
            && let Ok(datapath) = Datapath::open(&pins)
        {
            self.datapath = datapath;
            tasks.maps_changed();
            self.reconciler.configuration_changed();
        }
        tasks.renew();
    }

    /// Polls everything, puts back what was lost, and waits until it is time to do it again.
    pub async fn poll(&mut self, tasks: &mut Tasks) {
        let config = self.state.config();
        let mut problems = self.state.reals.problems(&config);
        self.forgive_reload(&config);
        problems.extend(self.state.observed.own_problems());
        let counters = self.datapath.counters().unwrap_or_default();
        self.state.observed.note_counters(&counters);
        let dropped = chain::balancer_misses(&config.pins()).unwrap_or_default();
        problems.extend(self.misrouting.add(&counters, dropped, Instant::now()));
        let nothing_arrives = self.state.reals.nothing_arrives(&config);
        let (config_now, datapath) = (&self.in_effect.config, &self.datapath);
        self.reconciler.reconcile(config_now, datapath, problems, nothing_arrives).await;
        if !self.ready {
            systemd::ready();
            self.ready = true;
        }
        let outcome = self.reconciler.outcome();
        for answer in self.waiting.drain(..) {
            let _ = answer.send(outcome.clone().map_err(Unmade::NotYet));
        }
        tasks.keep_clients(&self.datapath);
        let pause = config.reconcile_interval;
        let step = self.state.reals.next_step(&config);
        rest(pause.min(step.unwrap_or(pause)), &self.state).await;
    }

    /// Carries out a request; answers once it is in force, by the next poll.
    pub async fn carry_out(&mut self, request: Request, tasks: &mut Tasks) {
        match request {
            Request::Change(edits) => self.change(edits, tasks),
            Request::Reload(answer) => self.reload(Some(answer), tasks).await,
            Request::Settle(answer) => self.waiting.push(answer),
        }
    }

    /// Reads the file again. One that cannot be read, or changes what cannot change, leaves the configuration in
    /// force.
    pub async fn reload(&mut self, answer: Option<Answer>, tasks: &mut Tasks) {
        systemd::reloading();
        self.ready = false;
        match reload(&self.state.config(), self.balancer.as_ref()) {
            Ok(new) => {
                info!(path = %new.path.display(), "configuration reloaded");
                log_differences(&self.state.config(), &new);
                self.state.observed.note_reload(None);
                self.reset_dead();
                self.config.send_replace(Arc::new(new));
                match tasks.reloaded().await {
                    Ok(()) => self.waiting.extend(answer),
                    Err(why) => {
                        error!("{why}");
                        self.state.observed.note_reload(Some(why.clone()));
                        if let Some(answer) = answer {
                            let _ = answer.send(Err(Unmade::Refused(why)));
                        }
                    }
                }
            }
            Err(why) => {
                let reason = why.without_values();
                error!("configuration not reloaded, the previous one stays in force: {reason}");
                self.state.observed.note_reload(Some(why.without_values()));
                if let Some(answer) = answer {
                    let _ = answer.send(Err(Unmade::Refused(why.to_string())));
                }
            }
        }
        self.apply_all();
    }

    /// A file that was refused, and says again what is in force, needs no reload.
    fn forgive_reload(&self, config: &Config) {
        let observed = &self.state.observed;
        let was_refused = observed.reloaded().is_some_and(|last| last.refused.is_some());
        if was_refused
            && std::fs::read_to_string(&config.path).is_ok_and(|text| *text == *config.text)
        {
            observed.note_reload(None);
        }
    }

    fn change(&mut self, edits: Edits, tasks: &mut Tasks) {
        let config = self.state.config();
        match edits.carry_out(&config, &self.datapath) {
            Ok(new) => {
                self.reset_dead();
                self.waiting.push(edits.answer);
                // Checks of what did not change go on: a site that changes something all the time has them, too.
                let checks_differ = health_checks::wanted(&config) != health_checks::wanted(&new);
                self.config.send_replace(Arc::new(new));
                if checks_differ {
                    tasks.checks_changed();
                }
                self.apply_all();
            }
            Err(error) => {
                let _ = edits.answer.send(Err(Unmade::Refused(error.to_string())));
            }
        }
    }

    /// The next poll finds all that differs.
    fn apply_all(&mut self) {
        self.in_effect = InEffect::of(&self.state);
        self.reconciler.configuration_changed();
    }

    /// Resets the connections of reals that just went down. Their groups have them still, so the balancer's choice
    /// tells which flows are theirs.
    fn reset_dead(&mut self) {
        let config = self.state.config();
        let dead = self.state.reals.to_reset(&config);
        for (service, real) in dead.difference(&self.reset) {
            let reset = tokio::task::block_in_place(|| {
                let flows = drain::flows_of(&config, &self.datapath, Some(service), *real)?;
                terminate(&self.datapath, &flows, Termination::Reset)
            });
            match reset {
                Ok(0) => {}
                Ok(connections) => {
                    info!(service, %real, connections, "down: its clients are reset as they send");
                }
                Err(error) => warn!(service, %real, %error, "down, and its connections stay"),
            }
        }
        self.reset = dead;
    }
}

/// What a reload has changed, as far as anybody would read it.
fn log_differences(old: &Config, new: &Config) {
    let all = differences(old, new);
    for difference in all.iter().take(LOGGED_DIFFERENCES) {
        info!("{difference}");
    }
    if let Some(more @ 1..) = all.len().checked_sub(LOGGED_DIFFERENCES) {
        info!("and {more} more differences");
    }
}

/// Waits until the next poll is due, or other reals are to be used.
async fn rest(pause: Duration, state: &State) {
    let end = tokio::time::Instant::now() + pause;
    loop {
        systemd::alive(&match state.observed.problems().as_slice() {
            [] => "all is as configured".to_owned(),
            [first, ..] => first.to_string(),
        });
        let next = end.min(tokio::time::Instant::now() + ALIVE);
        tokio::select! {
            () = state.reals.changed() => return,
            () = tokio::time::sleep_until(next) => {}
        }
        if next == end {
            return;
        }
    }
}
