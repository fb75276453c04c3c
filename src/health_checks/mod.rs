//! Health checks of brokers, and what an operator took out of use: together they say which reals get
//! new connections.

mod answered;
mod path;
mod probe;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::{info, warn};

use self::path::{Path, PathError};
use self::probe::{Expires, Target};

use crate::config::{Binding, Config, Group, Real, Service};
use crate::domain::health::{CheckKind, CheckPath, HealthCheck};
use crate::domain::{BrokerTls, Health, Problem, Protocol, RealState};
use crate::run_files;

/// A broker of a service: the same host may be one of several.
type Key = (String, IpAddr);

/// Why a real is not drained, or put back.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    #[error("no group has a real {0}; `mqtt-fwd reals` lists them")]
    NoSuchReal(IpAddr),
    #[error(
        "group {group} ({service}) has no other real that gets connections; add one, or undrain one"
    )]
    LastReal { service: String, group: String },
    #[error("{path}: {source}; nothing was changed")]
    NotSaved { path: PathBuf, source: std::io::Error },
}

/// From one attempt to attach what wraps checks to the next.
const ATTACH_AGAIN: Duration = Duration::from_secs(2);

/// How long before a broker's certificate expires that is a problem.
const EXPIRES_SOON_DAYS: u32 = 14;

/// Weights are so many times as large while a real of their group starts slowly, which gives room for its steps.
const STEPS: u32 = 10;

#[derive(Debug, Clone)]
struct Checked {
    health: Health,
    since: Instant,
    /// It was down before.
    is_back: bool,
    /// Results in a row that say otherwise.
    against: u32,
    /// When the first of its certificates does (TLS).
    expires: Expires,
}

#[derive(Debug, Default)]
struct Inner {
    checked: BTreeMap<Key, Checked>,
    drained: BTreeSet<IpAddr>,
    /// Those of the configuration that this process began with: in use until a check says otherwise. One that is added
    /// later gets connections once a check has succeeded.
    initial: BTreeSet<Key>,
    /// Why checks cannot be made.
    not_made: Option<String>,
}

/// The states of all reals.
#[derive(Debug, Default)]
pub struct Reals {
    inner: Mutex<Inner>,
    changed: Notify,
    file: PathBuf,
}

impl Reals {
    /// With those that were drained before.
    pub fn new(config: &Config) -> Self {
        let file = run_files::path("drained", &config.interface, "json");
        let drained = run_files::read_note(&file).unwrap_or_default();
        let of_service = |service: &Service| {
            let reals = service.groups.iter().flat_map(|group| &group.reals);
            reals.map(|real| (service.name.clone(), real.addr)).collect::<Vec<_>>()
        };
        let initial = config.services.iter().flat_map(of_service).collect();
        let inner = Inner { drained, initial, ..Inner::default() };
        Self { inner: Mutex::new(inner), changed: Notify::new(), file }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until other reals are to be used than before.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The configuration with weight 0 for reals that must not get new connections.
    pub fn in_effect(&self, config: &Config) -> Config {
        let inner = self.inner();
        let mut config = config.clone();
        for service in &mut config.services {
            for group in &mut service.groups {
                let weights = inner.weights(&service.name, service.health_check.as_ref(), group);
                for (real, weight) in group.reals.iter_mut().zip(weights) {
                    real.weight = weight;
                }
            }
        }
        config
    }

    /// How long until a real that starts slowly is to get more; `None`: there is none.
    pub fn next_step(&self, config: &Config) -> Option<Duration> {
        let inner = self.inner();
        let all = config.services.iter().flat_map(|service| {
            let reals = service.groups.iter().flat_map(|group| &group.reals);
            reals.map(move |real| (service, real.addr))
        });
        all.filter_map(|(s, addr)| inner.step(&s.name, s.health_check.as_ref(), addr).1).min()
    }

    /// What all reals of a configuration have at the balancer, in its order.
    pub fn weights(&self, config: &Config) -> Vec<u32> {
        self.list(config).into_iter().map(|real| real.effective_weight).collect()
    }

    /// All of a configuration, in its order.
    pub fn list(&self, config: &Config) -> Vec<RealState> {
        let inner = self.inner();
        let groups = config.services.iter().flat_map(|s| s.groups.iter().map(move |g| (s, g)));
        let reals = |(service, group): (&Service, &Group)| {
            let weights = inner.weights(&service.name, service.health_check.as_ref(), group);
            let state = |(real, weight): (&Real, u32)| {
                let checked = inner.checked.get(&(service.name.clone(), real.addr));
                RealState {
                    service: service.name.clone(),
                    group: group.name.clone(),
                    addr: real.addr,
                    weight: real.weight,
                    drained: inner.drained.contains(&real.addr),
                    health: checked.map_or(Health::Unchecked, |c| c.health.clone()),
                    effective_weight: weight,
                    since: checked.map_or(Duration::ZERO, |c| c.since.elapsed()),
                    certificate_expires: checked.and_then(|c| c.expires),
                }
            };
            group.reals.iter().zip(weights).map(state).collect::<Vec<_>>()
        };
        groups.flat_map(reals).collect()
    }

    /// Whether there are checks that go the way of clients' packets, and none of them succeeds.
    pub fn nothing_arrives(&self, config: &Config) -> bool {
        let goes_that_way = |name: &str| {
            let service = config.services.iter().find(|service| service.name == name);
            let check = service.and_then(|service| service.health_check.as_ref());
            check.is_some_and(|check| check.path == CheckPath::Encapsulated)
        };
        let all = self.list(config);
        let checked = || all.iter().filter(|real| goes_that_way(&real.service));
        checked().any(|real| matches!(real.health, Health::Down(_)))
            && !checked().any(|real| real.health == Health::Up)
    }

    /// Whether a real is not to be used, if there is another.
    pub fn is_out(&self, service: &str, addr: IpAddr) -> bool {
        let inner = self.inner();
        let checked = inner.checked.get(&(service.to_owned(), addr));
        inner.drained.contains(&addr)
            || checked.is_some_and(|c| matches!(c.health, Health::Down(_)))
    }

    /// Those that are down and not used, and whose connections are to be reset for that.
    pub fn to_reset(&self, config: &Config) -> BTreeSet<(String, IpAddr)> {
        let resets = |name: &str| {
            let service = config.services.iter().find(|service| service.name == name);
            service.and_then(|s| s.health_check.as_ref()).is_some_and(|check| check.resets)
        };
        self.list(config)
            .into_iter()
            .filter(|real| matches!(real.health, Health::Down(_)) && real.effective_weight == 0)
            .filter(|real| resets(&real.service))
            .map(|real| (real.service, real.addr))
            .collect()
    }

    /// Whether a real is taken out of use by an operator.
    pub fn is_drained(&self, addr: IpAddr) -> bool {
        self.inner().drained.contains(&addr)
    }

    /// What is wrong with them, for `status`.
    pub fn problems(&self, config: &Config) -> Vec<Problem> {
        let not_made = self.inner().not_made.clone();
        let not_made = not_made.map(|error| {
            let text = format!("brokers are not checked, and stay as they were: {error}");
            Problem::new("not_checked", text)
        });
        let down = self.list(config).into_iter().filter_map(|real| match real.health {
            Health::Down(error) => Some(Problem::new(
                "real_down",
                format!(
                    "real {} of group {} ({}) is down: {error}",
                    real.addr, real.group, real.service
                ),
            )),
            _ => None,
        });
        let expiring = self.list(config).into_iter().filter_map(|real| {
            let at = real.certificate_expires?;
            let left = at.duration_since(SystemTime::now()).unwrap_or_default();
            const DAY: Duration = Duration::from_secs(24 * 3600);
            let days = left.as_secs() / DAY.as_secs();
            (left < EXPIRES_SOON_DAYS * DAY).then(|| {
                let text = format!(
                    "real {} of group {} ({}) shows a certificate that expires in {}, at {}: renew it",
                    real.addr,
                    real.group,
                    real.service,
                    if days == 1 { "1 day".to_owned() } else { format!("{days} days") },
                    humantime::format_rfc3339_seconds(at)
                );
                Problem::new("certificate_expires", text)
            })
        });
        not_made.into_iter().chain(down).chain(expiring).collect()
    }

    /// That checks cannot be made, and why; `None`: they can.
    fn not_made(&self, error: Option<&PathError>) {
        let now = error.map(ToString::to_string);
        let before = std::mem::replace(&mut self.inner().not_made, now.clone());
        if let Some(error) = now.filter(|now| before.as_ref() != Some(now)) {
            warn!("brokers are not checked: {error}");
        }
    }

    /// Takes a real out of use, or back. Returns in how many groups it is.
    pub fn set_drained(
        &self,
        config: &Config,
        addr: IpAddr,
        drained: bool,
    ) -> Result<usize, DrainError> {
        let groups: Vec<(&Service, &Group)> = config
            .services
            .iter()
            .flat_map(|service| service.groups.iter().map(move |group| (service, group)))
            .filter(|(_, group)| group.reals.iter().any(|real| real.addr == addr))
            .collect();
        if groups.is_empty() {
            return Err(DrainError::NoSuchReal(addr));
        }
        let mut inner = self.inner();
        let mut wanted = inner.drained.clone();
        if drained {
            wanted.insert(addr);
        } else {
            wanted.remove(&addr);
        }
        let empty = groups.iter().find(|(_, group)| {
            group.reals.iter().all(|r| r.weight == 0 || wanted.contains(&r.addr))
        });
        if let Some((service, group)) = empty.filter(|_| drained) {
            return Err(DrainError::LastReal {
                service: service.name.clone(),
                group: group.name.clone(),
            });
        }
        self.save(&wanted)?;
        inner.drained = wanted;
        drop(inner);
        self.changed.notify_one();
        Ok(groups.len())
    }

    fn save(&self, drained: &BTreeSet<IpAddr>) -> Result<(), DrainError> {
        if drained.is_empty() {
            let _ = std::fs::remove_file(&self.file);
            return Ok(());
        }
        run_files::write_note(&self.file, drained)
            .map_err(|source| DrainError::NotSaved { path: self.file.clone(), source })
    }

    /// One check's result.
    fn seen(&self, key: &Key, check: &HealthCheck, result: Result<Expires, String>) {
        let mut inner = self.inner();
        let checked = inner.checked.entry(key.clone()).or_insert_with(|| Checked {
            health: Health::Unchecked,
            since: Instant::now(),
            is_back: false,
            against: 0,
            expires: None,
        });
        if let Ok(expires) = result {
            checked.expires = expires;
        }
        let (agrees, needed) = match (&checked.health, &result) {
            (Health::Unchecked, Ok(_)) => (false, 1),
            (Health::Unchecked | Health::Up, Err(_)) => (false, check.fall),
            (Health::Down(_), Ok(_)) => (false, check.rise),
            (Health::Up, Ok(_)) | (Health::Down(_), Err(_)) => (true, 0),
        };
        if agrees {
            checked.against = 0;
            return;
        }
        checked.against += 1;
        if checked.against < needed {
            return;
        }
        let first = checked.health == Health::Unchecked;
        checked.is_back = !first;
        checked.health = match result {
            Ok(_) => Health::Up,
            Err(error) => Health::Down(error),
        };
        checked.against = 0;
        checked.since = Instant::now();
        let (service, addr) = key;
        match &checked.health {
            Health::Down(error) => warn!(service, real = %addr, "down: {error}"),
            _ if first => {}
            _ => info!(service, real = %addr, "up again"),
        }
        let is_up = checked.health == Health::Up;
        let same_use = first && is_up && inner.initial.contains(key);
        drop(inner);
        if !same_use {
            self.changed.notify_one();
        }
    }
}

impl Inner {
    /// The weights of a group's reals: 0 for those not to be used. A group that would be empty keeps those
    /// that are down: the checks may be wrong, and without a real nothing is forwarded.
    fn weights(&self, service: &str, check: Option<&HealthCheck>, group: &Group) -> Vec<u32> {
        let is_checked = check.is_some() && self.not_made.is_none();
        let down = |addr: IpAddr| {
            let key = (service.to_owned(), addr);
            match self.checked.get(&key).map(|c| &c.health) {
                Some(Health::Down(_)) => true,
                Some(Health::Up) => false,
                _ => is_checked && !self.initial.contains(&key),
            }
        };
        let usable = |real: &Real| real.weight > 0 && !self.drained.contains(&real.addr);
        let any_up = group.reals.iter().any(|real| usable(real) && !down(real.addr));
        let any_left = group.reals.iter().any(usable);
        let weight = |real: &Real| {
            let drained = any_left && self.drained.contains(&real.addr);
            if drained || (any_up && down(real.addr)) { 0 } else { real.weight }
        };
        let steps: Vec<u32> =
            group.reals.iter().map(|real| self.step(service, check, real.addr).0).collect();
        let scale = if steps.iter().all(|step| *step == STEPS) { STEPS } else { 1 };
        group.reals.iter().zip(steps).map(|(real, step)| weight(real) * step / scale).collect()
    }

    /// At which of [`STEPS`] a real is, from 1 on, and how long until the next.
    fn step(
        &self,
        service: &str,
        check: Option<&HealthCheck>,
        addr: IpAddr,
    ) -> (u32, Option<Duration>) {
        let slow = check.map_or(Duration::ZERO, |check| check.slow_start) / STEPS;
        let checked = self.checked.get(&(service.to_owned(), addr));
        let started =
            checked.filter(|c| c.is_back && c.health == Health::Up).map(|c| c.since.elapsed());
        match started {
            Some(elapsed) if elapsed < slow * (STEPS - 1) => {
                let done = (elapsed.as_nanos() / slow.as_nanos()) as u32;
                (1 + done, Some((slow * (done + 1)).saturating_sub(elapsed)))
            }
            _ => (STEPS, None),
        }
    }
}

/// One real's check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    key: Key,
    to: SocketAddr,
    proxy: bool,
    /// Clients' connections are answered at the balancer.
    delayed: bool,
    /// TLS is spoken, as its group has it.
    tls: Option<BrokerTls>,
    check: HealthCheck,
}

impl Wanted {
    fn is_encapsulated(&self) -> bool {
        self.check.path == CheckPath::Encapsulated
    }
}

/// All checks of a configuration.
pub fn wanted(config: &Config) -> Vec<Wanted> {
    let mut all: Vec<Wanted> = Vec::new();
    for service in &config.services {
        let Some(check) = &service.health_check else { continue };
        let direct = check.path == CheckPath::Direct;
        for group in &service.groups {
            // Relays listen at the service's address only.
            if direct && Some(&group.name) == service.relay.as_ref() {
                continue;
            }
            for real in &group.reals {
                let key = (service.name.clone(), real.addr);
                if all.iter().all(|other| other.key != key) {
                    let addr = if direct { real.addr } else { service.addr };
                    let tls = group.tls.clone().filter(|_| {
                        service.protocol == Protocol::Tls && check.kind != CheckKind::Tcp
                    });
                    let of_tls = tls.as_ref().filter(|_| direct).map(|tls| tls.port);
                    let port = check.port.or(of_tls).unwrap_or(service.port);
                    let to = SocketAddr::new(addr, port);
                    let proxy = group.proxy_protocol;
                    // What takes a connection over is its first message; clients' have the service's port.
                    let delayed = service.binding == Binding::Delayed
                        && check.kind != CheckKind::Tcp
                        && to == SocketAddr::new(service.addr, service.port);
                    all.push(Wanted { key, to, proxy, delayed, tls, check: check.clone() });
                }
            }
        }
    }
    all
}

/// Checks all reals of a configuration until it is dropped.
pub async fn run(config: Arc<Config>, reals: Arc<Reals>) {
    let wanted = wanted(&config);
    reals.inner().checked.retain(|key, _| wanted.iter().any(|check| check.key == *key));
    reals.not_made(None);
    let (wrapped, direct): (Vec<_>, Vec<_>) = wanted.into_iter().partition(Wanted::is_encapsulated);
    let mut tasks = JoinSet::new();
    let mut check = |wanted: Wanted, path: Option<Arc<Path>>| {
        let reals = Arc::clone(&reals);
        tasks.spawn(async move { repeat(&wanted, path.as_deref(), &reals).await });
    };
    // First those that need nothing: what the others wait for may never come.
    for wanted in direct {
        check(wanted, None);
    }
    if !wrapped.is_empty() {
        let path = Arc::new(attached(&config, &reals).await);
        for wanted in wrapped {
            check(wanted, Some(Arc::clone(&path)));
        }
    }
    while tasks.join_next().await.is_some() {}
}

/// The program that wraps checks. Without it there are none: connections to the service would be a client's.
async fn attached(config: &Arc<Config>, reals: &Reals) -> Path {
    loop {
        match Path::new(Arc::clone(config)) {
            Ok(path) => return path,
            Err(error) => reals.not_made(Some(&error)),
        }
        tokio::time::sleep(ATTACH_AGAIN).await;
    }
}

async fn repeat(wanted: &Wanted, path: Option<&Path>, reals: &Reals) {
    let Wanted { key, to, proxy, delayed, tls, check } = wanted;
    let target =
        Target { real: key.1, to: *to, proxy: *proxy, path, delayed: *delayed, tls: tls.as_ref() };
    // Not all at the same moment.
    let spread = getrandom::u32().map_or(0.0, f64::from) / f64::from(u32::MAX);
    tokio::time::sleep(check.interval.mul_f64(spread)).await;
    let mut clock = tokio::time::interval(check.interval);
    clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        clock.tick().await;
        match probe::probe(target, check).await {
            Ok(result) => {
                reals.seen(key, check, result);
                if path.is_some() {
                    reals.not_made(None);
                }
            }
            Err(error) => reals.not_made(Some(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(rise: u32, fall: u32) -> HealthCheck {
        HealthCheck { rise, fall, ..HealthCheck::tcp() }
    }

    fn group(addrs: [IpAddr; 2], weight: u32) -> Group {
        Group {
            name: "g".to_owned(),
            vip: IpAddr::from([10, 0, 1, 1]),
            affinity: crate::domain::Affinity::None,
            proxy_protocol: false,
            tls: None,
            reals: addrs.map(|addr| Real { addr, weight, vip: None }).to_vec(),
        }
    }

    #[test]
    fn a_real_that_is_back_starts_slowly_and_the_others_keep_their_shares() {
        let reals = Reals::default();
        let check = HealthCheck { slow_start: Duration::from_secs(10), ..check(1, 1) };
        let addrs = [1, 2].map(|n| IpAddr::from([10, 0, 0, n]));
        let group = group(addrs, 3);
        let key = ("s".to_owned(), addrs[0]);
        reals.inner().initial = addrs.map(|addr| ("s".to_owned(), addr)).into();
        let weights = || reals.inner().weights("s", Some(&check), &group);
        reals.seen(&key, &check, Ok(None));
        assert_eq!(weights(), [3, 3], "at its first check it does not come back");
        reals.seen(&key, &check, Err("refused".to_owned()));
        assert_eq!(weights(), [0, 3]);
        reals.seen(&key, &check, Ok(None));
        assert_eq!(weights(), [3, 30]);
        let age = |seconds| {
            let earlier = Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
            reals.inner().checked.get_mut(&key).unwrap().since = earlier;
        };
        age(5);
        assert_eq!(weights(), [18, 30]);
        age(9);
        assert_eq!(weights(), [3, 3]);
    }

    #[test]
    fn a_real_that_is_added_gets_connections_once_a_check_succeeds() {
        let addrs = [1, 2].map(|n| IpAddr::from([10, 0, 0, n]));
        let key = |n: usize| ("s".to_owned(), addrs[n]);
        let reals = Reals::default();
        reals.inner().initial.insert(key(0));
        let group = group(addrs, 1);
        let check = check(2, 3);
        let weights = |check| reals.inner().weights("s", check, &group);
        assert_eq!(weights(Some(&check)), [1, 0]);
        assert_eq!(weights(None), [1, 1], "nobody would find out");
        reals.seen(&key(1), &check, Err("refused".to_owned()));
        assert_eq!(weights(Some(&check)), [1, 0]);
        reals.seen(&key(1), &check, Ok(None));
        assert_eq!(weights(Some(&check)), [1, 1]);
        // Better one that nobody knows than none.
        for _ in 0..3 {
            reals.seen(&key(0), &check, Err("refused".to_owned()));
        }
        assert_eq!(weights(Some(&check)), [0, 1]);
    }

    #[test]
    fn a_real_falls_and_rises_by_results_in_a_row() {
        let reals = Reals::default();
        let key = ("s".to_owned(), IpAddr::from([10, 0, 0, 1]));
        let check = check(2, 3);
        let health = || reals.inner().checked[&key].health.clone();
        let bad = || Err("refused".to_owned());
        reals.seen(&key, &check, Ok(None));
        assert_eq!(health(), Health::Up);
        for result in [bad(), bad(), Ok(None), bad(), bad()] {
            reals.seen(&key, &check, result);
            assert_eq!(health(), Health::Up);
        }
        reals.seen(&key, &check, bad());
        assert_eq!(health(), Health::Down("refused".to_owned()));
        reals.seen(&key, &check, Ok(None));
        assert!(matches!(health(), Health::Down(_)));
        reals.seen(&key, &check, Ok(None));
        assert_eq!(health(), Health::Up);
    }
}
