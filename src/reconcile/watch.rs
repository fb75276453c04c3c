//! Compares balancer and chain with the configuration, again and again, and puts back what was
//! lost or changed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::{ReconcileError, Result, apply, gateway};
use crate::balancer::client::{BalancerError, Client};
use crate::balancer::flags::GROUP_FLAG;
use crate::balancer::{embedded, listeners};
use crate::chain::health;
use crate::config::{BalancerKind, Config};
use crate::datapath::Datapath;
use crate::datapath::plan::MapPlan;
use crate::domain::vip::mac_text;
use crate::domain::{Mac, Problem, Vip};
use crate::handover::{silent, stuck};
use crate::kernel::xdp;
use crate::state::Observed;

/// All that the balancer holds is compared once in so many comparisons; in between only which VIPs there
/// are, for that is what a restart loses, and one call instead of two a group.
const WHOLE_EVERY: u32 = 5;

/// Of two servers, each gets half of the connections: these reach both all but one time in 128.
const CONNECTIONS_PER_COMPARISON: u32 = 8;

/// Longest time between two attempts.
const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// A plan that was refused, and when it is tried again.
struct Backoff {
    pause: Duration,
    until: Instant,
    problem: Problem,
}

/// What was seen the last time, so that only changes are logged.
#[derive(Default)]
#[allow(clippy::struct_excessive_bools)] // what was seen, each by itself
pub struct Reconciler {
    client: Option<Client>,
    problem: Option<String>,
    applied_once: bool,
    /// By the last reconciliation.
    just_applied: bool,
    /// What differs now is what somebody asked for.
    changed: bool,
    /// The whole configuration was applied, and has not changed since.
    in_force: bool,
    /// Comparisons since it was.
    comparisons: u32,
    /// The balancer is this process's, and so are all changes of it: their number when they were
    /// last compared.
    own_changes: Option<u64>,
    observed: Arc<Observed>,
    backoff: Option<Backoff>,
    /// The gateway of the last reconciliation.
    gateway: Option<Mac>,
    /// The interface's, likewise.
    mtu: Option<u32>,
    /// A group that the balancer had under another text the last time.
    not_canonical: Option<Vip>,
}

impl Reconciler {
    /// With a balancer that this process serves itself, or another.
    pub fn new(own_balancer: bool, observed: Arc<Observed>) -> Self {
        Self { changed: true, own_changes: own_balancer.then_some(0), observed, ..Self::default() }
    }

    /// The configuration was changed: the next reconciliation applies all of it.
    pub fn configuration_changed(&mut self) {
        self.in_force = false;
        self.changed = true;
        self.backoff = None;
        // It may name another address.
        self.client = None;
    }

    /// Whether the configuration is in force after the last reconciliation; else why not.
    pub fn outcome(&self) -> Result<(), String> {
        if self.in_force {
            return Ok(());
        }
        Err(self.problem.clone().unwrap_or_else(|| "not yet".to_owned()))
    }

    /// Once: compares, and puts back.
    ///
    /// `problems`: what is wrong besides. `nothing_arrives`: no check succeeds of those that go as clients' packets do.
    pub async fn reconcile(
        &mut self,
        config: &Config,
        datapath: &Datapath,
        mut problems: Vec<Problem>,
        nothing_arrives: bool,
    ) {
        // 100,000 routes take some hundred megabytes to compile, once; all of that is free.
        if std::mem::take(&mut self.just_applied) {
            give_memory_back();
        }
        let gateway = gateway::desired(config).await;
        problems.extend(health::problems(config));
        let gateway = gateway.unwrap_or_else(|error| {
            problems.push(Problem::new("gateway_unknown", error.to_string()));
            None
        });
        if let Err(error) = silent::bind(config, datapath) {
            problems.push(Problem::new("apply_failed", error.to_string()));
        }
        match stuck::problems(config, datapath) {
            Ok(found) => problems.extend(found),
            Err(error) => problems.push(Problem::new("apply_failed", error.to_string())),
        }
        // Without any, clients of delayed binding would be bound by address: then what was in force stays.
        let mut missing_keys = None;
        if let Err(error) = silent::put_keys(config, datapath) {
            if datapath.has_cookie_keys().unwrap_or_default() {
                problems.push(Problem::new("handover_key", error.to_string()));
            } else {
                missing_keys = Some(Problem::new("apply_failed", error.to_string()));
            }
        }
        let alone = problems.iter().all(Problem::is_elsewhere);
        let applied = match missing_keys {
            Some(problem) => Err(problem),
            None => self.try_apply(config, gateway, datapath, alone).await,
        };
        if let Err(problem) = applied {
            problems.insert(0, problem);
        }
        problems.extend(self.other_gateway(config, gateway, nothing_arrives).await);
        let texts: Vec<&str> = problems.iter().map(|problem| problem.text.as_str()).collect();
        let problem = Some(texts.join("; ")).filter(|text| !text.is_empty());
        self.observed.reconciled(problems);
        if problem != self.problem {
            match &problem {
                Some(text) => warn!("{text}"),
                None => info!("all is as configured"),
            }
            self.problem = problem;
        }
    }

    /// That the balancer sends elsewhere than this host would. There may be a reason for that, which checks that go
    /// the same way tell by succeeding.
    async fn other_gateway(
        &mut self,
        config: &Config,
        configured: Option<Mac>,
        nothing_arrives: bool,
    ) -> Option<Problem> {
        if !nothing_arrives {
            return None;
        }
        let next_hop = mac_text(gateway::learned(config).await?);
        let (has, remedy) = match (configured, &mut self.client) {
            (Some(mac), _) => {
                (mac_text(mac), "correct gateway_mac in the configuration, or remove it".to_owned())
            }
            (None, Some(client)) => {
                (client.mac().await.ok()?, format!("`mqtt-fwd katran mac {next_hop}` corrects it"))
            }
            (None, None) => return None,
        };
        (has != next_hop).then(|| {
            let text = format!(
                "the balancer sends to gateway {has}, and this host's next hop to the reals is {next_hop}: {remedy}"
            );
            Problem::new("gateway_differs", text)
        })
    }

    /// Applies, unless that was refused a moment ago. `alone`: there is no other problem of this host.
    async fn try_apply(
        &mut self,
        config: &Config,
        gateway: Option<Mac>,
        datapath: &Datapath,
        alone: bool,
    ) -> Result<(), Problem> {
        if let Some(backoff) = self.backoff.as_ref().filter(|b| Instant::now() < b.until) {
            return Err(backoff.problem.clone());
        }
        let Err(error) = self.apply(config, gateway, datapath).await else {
            self.backoff = None;
            return Ok(());
        };
        if let ReconcileError::Balancer(BalancerError::NotCanonical { vip, .. }) = error {
            self.not_canonical = Some(vip);
        }
        let unreachable =
            matches!(error, ReconcileError::Balancer(BalancerError::Unreachable { .. }));
        let next = if unreachable && self.applied_once && alone {
            "forwarding goes on with what is pinned"
        } else {
            "trying again"
        };
        let code = match &error {
            _ if unreachable => "balancer_unreachable",
            ReconcileError::Balancer(_) => "balancer_differs",
            _ => "apply_failed",
        };
        let problem = Problem::new(code, format!("{error}; {next}"));
        if !unreachable {
            let before = self.backoff.take().map_or(Duration::ZERO, |backoff| backoff.pause);
            let pause = (before * 2).clamp(Duration::from_secs(1), BACKOFF_MAX);
            let until = Instant::now() + pause;
            self.backoff = Some(Backoff { pause, until, problem: problem.clone() });
        }
        Err(problem)
    }

    /// Applies whatever differs: the first time everything, later what was lost or changed.
    async fn apply(
        &mut self,
        config: &Config,
        gateway: Option<Mac>,
        datapath: &Datapath,
    ) -> Result<()> {
        let changes = embedded::changes();
        let same_gateway = self.gateway == gateway;
        self.gateway = gateway;
        // The largest packet that fits once it is wrapped follows from it.
        let mtu = xdp::interface_mtu(&config.interface)?;
        if self.mtu.replace(mtu).is_some_and(|before| before != mtu) {
            info!(mtu, "the interface's MTU changed");
            self.in_force = false;
            self.changed = true;
        }
        if self.in_force {
            let missing = MapPlan::missing_service_vips(config, datapath)?;
            if !missing.is_empty() {
                warn!(vips = missing.len(), "the map vip_inner_dst was without group VIPs");
                self.in_force = false;
            }
        }
        if self.in_force && self.own_changes == Some(changes) && same_gateway {
            return Ok(());
        }
        // An error drops the connection, and the next time makes a new one.
        let mut client = match self.client.take() {
            Some(client) => client,
            None => Client::connect(&config.balancer_endpoint).await?,
        };
        if self.in_force {
            // The maps are ours; only the balancer can have changed.
            self.comparisons += 1;
            let whole = self.own_changes.is_some() || self.comparisons.is_multiple_of(WHOLE_EVERY);
            let (to_repair, difference) = compare_balancer(config, gateway, client, whole).await?;
            client = to_repair;
            self.rewrite_canonical(&mut client).await?;
            let Some(difference) = difference else {
                self.client = Some(client);
                if whole {
                    self.own_changes = self.own_changes.map(|_| changes);
                }
                return Ok(());
            };
            warn!("balancer: {difference}");
        }
        let plan = apply::apply(config, gateway, datapath, &mut client).await?;
        self.rewrite_canonical(&mut client).await?;
        self.client = Some(client);
        if !plan.is_empty() {
            if self.changed {
                info!(steps = plan.lines().len(), "applied the configuration");
            } else {
                self.observed.balancer_repairs.add(1);
                warn!(steps = plan.lines().len(), "put back what was missing");
            }
        }
        self.just_applied = true;
        self.applied_once = true;
        self.changed = false;
        self.in_force = true;
        Ok(())
    }
}

impl Reconciler {
    /// The other text is gone, and with it the entry that both had in the datapath.
    async fn rewrite_canonical(&mut self, client: &mut Client) -> Result<(), BalancerError> {
        if let Some(vip) = self.not_canonical {
            client.modify_vip(vip, GROUP_FLAG, true).await?;
            info!(%vip, "rewrote the VIP after removing its non-canonical form");
            self.not_canonical = None;
        }
        Ok(())
    }
}

/// What was freed goes back to the system: glibc keeps what lies between things that live.
fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it has no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// What the balancer lacks, if anything, and the connection on which to repair it.
async fn compare_balancer(
    config: &Config,
    gateway: Option<Mac>,
    mut client: Client,
    whole: bool,
) -> Result<(Client, Option<String>), BalancerError> {
    if let Some(difference) = compare(config, gateway, &mut client, whole).await? {
        return Ok((client, Some(difference)));
    }
    if config.balancer == BalancerKind::Embedded {
        return Ok((client, None));
    }
    // A second server at this address: the connection at hand stays with the first, while the
    // position in the chain is the second's. A new connection may come to either.
    let several = listeners::recent(&config.balancer_endpoint).len() > 1;
    for _ in 0..if several { CONNECTIONS_PER_COMPARISON } else { 1 } {
        let mut other = Client::connect(&config.balancer_endpoint).await?;
        if let Some(difference) = compare(config, gateway, &mut other, whole).await? {
            let text = format!("{difference} on a second server at the same address");
            return Ok((other, Some(text)));
        }
    }
    Ok((client, None))
}

async fn compare(
    config: &Config,
    gateway: Option<Mac>,
    client: &mut Client,
    whole: bool,
) -> Result<Option<String>, BalancerError> {
    if whole {
        apply::difference(config, gateway, client).await
    } else {
        apply::missing_vip(config, client).await
    }
}
