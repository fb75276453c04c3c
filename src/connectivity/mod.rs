//! `mqtt-fwd test`: real messages to every broker, by every way of binding that is configured, on topics of its own
//! (`mqtt-fwd/test/GROUP/…`), and what became of each.
//!
//! ```text
//! socket ─ egress: taken ─► injected: xdp_root ─ mqtt_fwd ─ balancer ─► real ─► its answer ─► socket
//! ```

mod opening;
mod session;

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use tokio::net::TcpStream;
use tokio_rustls::rustls::pki_types::ServerName;

use self::opening::{From as Source, Here, Opened};
use self::session::{PATIENCE, Session};
use crate::balancer::client::BalancerError;
use crate::brokers::connection::BrokerStream;
use crate::brokers::tls::Connector;
use crate::config::{Binding, Config, Group, Real, Service};
use crate::datapath::names::bound_by_words;
use crate::domain::health::CheckKind;
use crate::domain::{BrokerTls, ClientRoute, ClientRouteKind, Protocol, TEST_TOPICS};
use crate::handover::HOST_ADVICE;
use crate::kernel::BpfError;
use crate::mqtt::client::{self, ConnectOptions};
use crate::run_files;

/// Why nothing can be tested.
#[derive(Debug, thiserror::Error)]
pub enum ConnectivityError {
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error(transparent)]
    Balancer(#[from] BalancerError),
    #[error("finding this host's address, or its lock in /run/mqtt-fwd: {0}")]
    Io(#[from] std::io::Error),
    #[error("another test has been running for a minute; try again when it has ended")]
    Busy,
}

type Result<T, E = ConnectivityError> = std::result::Result<T, E>;

/// For another test to end, and from one look to the next.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);
const LOCK_AGAIN: Duration = Duration::from_millis(100);
/// Connections at a time.
const AT_ONCE: usize = 8;
/// Connections for each real of a group whose reals are chosen by client id or topic.
const CHOSEN_TRIES: usize = 12;
/// Connections for each real where it cannot be chosen at all.
const SPREAD: usize = 2;
/// Connections until a prediction is right.
const TEACHING: usize = 4;
/// Seconds; a test is over before.
const KEEPALIVE: u16 = 30;

/// A message, and what became of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tested {
    pub service: String,
    pub group: String,
    /// None: it is not known which.
    pub real: Option<IpAddr>,
    /// predicted, delayed or relay.
    pub binding: &'static str,
    /// Its QoS, and its size if that matters.
    pub message: String,
    pub outcome: Outcome,
    /// From its first byte to the broker's answer, milliseconds.
    pub ms: Option<f64>,
    /// Why it was lost, or not sent.
    pub reason: Option<String>,
}

impl fmt::Display for Tested {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { service, group, message, .. } = self;
        match self.real {
            Some(real) => write!(f, "to {real} of group {group} ({service}), {message}")?,
            None => write!(f, "to group {group} ({service}), {message}")?,
        }
        self.reason.as_ref().map_or(Ok(()), |reason| write!(f, ": {reason}"))
    }
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Arrived,
    Lost,
    /// It could not be sent there.
    NotSent,
}

/// Tests all services, or one. `from`: over the network, from this address of this host, where no balancer need be.
pub async fn test(
    config: &Config,
    service: Option<&str>,
    from: Option<IpAddr>,
) -> Result<Vec<Tested>> {
    // Two would take each other's predictions.
    let _lock = match from {
        Some(_) => None,
        None => Some(lock(config).await?),
    };
    let source = match from {
        Some(from) => Source::Network(from),
        None => Source::Here(Box::new(Here::new(config).await?)),
    };
    let mut all = Vec::new();
    for one in config.services.iter().filter(|s| service.is_none_or(|name| s.name == name)) {
        if from.is_some_and(|from| from.is_ipv4() != one.addr.is_ipv4()) {
            continue;
        }
        for group in &one.groups {
            let test = Test { source: &source, service: one, group };
            let mut found = test.run().await?;
            let unused = group.reals.iter().filter(|real| real.weight == 0);
            let reason = "it gets no connections: down, drained, or of weight 0";
            found.extend(unused.map(|real| {
                test.row(Some(real.addr), "none", Err((Outcome::NotSent, reason.to_owned())))
            }));
            found.sort_by_key(|one| one.real);
            all.extend(found);
        }
    }
    Ok(all)
}

/// Waits until no other process of this host tests.
async fn lock(config: &Config) -> Result<Flock<File>> {
    let path = run_files::path("test", &config.interface, "lock");
    let end = Instant::now() + LOCK_TIMEOUT;
    loop {
        std::fs::create_dir_all(run_files::DIR)?;
        let file = File::options().create(true).append(true).open(&path)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err(_) if Instant::now() < end => tokio::time::sleep(LOCK_AGAIN).await,
            Err(_) => return Err(ConnectivityError::Busy),
        }
    }
}

/// Of one group.
#[derive(Clone, Copy)]
struct Test<'a> {
    source: &'a Source,
    service: &'a Service,
    group: &'a Group,
}

/// A connection whose first message arrived, or why it did not.
struct Connected {
    session: Session,
    client: SocketAddr,
    id: String,
    topic: String,
}

impl<'a> Test<'a> {
    async fn run(self) -> Result<Vec<Tested>> {
        let reason = match self.service.protocol {
            Protocol::Tls => self.server_name().err(),
            Protocol::Mqtt if self.is_by_topic() || self.id_prefix().is_some() => None,
            Protocol::Mqtt => Some(
                "only certain clients are of this group, and a test is none of them".to_owned(),
            ),
        };
        if let Some(reason) = reason {
            let row = |real: &Real| {
                self.row(Some(real.addr), "none", Err((Outcome::NotSent, reason.clone())))
            };
            return Ok(self.group.reals.iter().filter(|real| real.weight > 0).map(row).collect());
        }
        let reals: Vec<IpAddr> =
            self.group.reals.iter().filter(|real| real.weight > 0).map(|real| real.addr).collect();
        match (self.source, self.service.binding) {
            (Source::Here(here), Binding::Predicted) => {
                if let Err(error) = here.predict(self.service, &self.group.name) {
                    let row = |real| {
                        self.row(Some(real), "CONNECT", Err((Outcome::Lost, error.to_string())))
                    };
                    return Ok(reals.into_iter().map(row).collect());
                }
            }
            (Source::Network(_), Binding::Predicted) => self.teach().await,
            (_, Binding::Delayed) => {}
        }
        let tested = self.all(reals).await;
        if let (Source::Here(here), Binding::Predicted) = (self.source, self.service.binding) {
            here.forget(self.service)?;
        }
        Ok(tested)
    }

    /// Over the network, the first messages of a group are lost, as any new client's are.
    async fn teach(self) {
        for _ in 0..TEACHING {
            let Ok(mut connected) = self.connect(None).await else { return };
            let (session, topic) = (&mut connected.session, &connected.topic);
            let done = session.publish_qos1(topic, b"mqtt-fwd test: learn").await;
            connected.session.end().await;
            if done.is_ok() {
                return;
            }
        }
    }

    async fn all(self, reals: Vec<IpAddr>) -> Vec<Tested> {
        if self.group.affinity.chooses_real() {
            return self.until_all(&reals).await;
        }
        let wanted: Vec<Option<IpAddr>> = match self.source {
            Source::Here(_) => reals.into_iter().map(Some).collect(),
            Source::Network(_) => vec![None; SPREAD * reals.len()],
        };
        let tested = stream::iter(wanted).map(|real| self.one(real)).buffer_unordered(AT_ONCE);
        tested.collect::<Vec<_>>().await.into_iter().flatten().collect()
    }

    /// The server name that leads to the group, and whose certificates are trusted for it.
    fn server_name(self) -> Result<(ServerName<'static>, &'a BrokerTls), String> {
        let Some(tls) = &self.group.tls else {
            return Err(format!(
                "it is not known whose certificates to trust: write tls = {{ ca = \"/…\" }} in group {}",
                self.group.name
            ));
        };
        let service = self.service;
        let last_resort = service.relay.as_ref().unwrap_or(&service.default_group);
        let leads_here = |name: &str| match service.group_of_hello(name, &[]) {
            Some(route) => route.group == self.group.name,
            None => !service.refuses_unknown && *last_resort == self.group.name,
        };
        let exact = service
            .client_routes
            .iter()
            .filter(|route| route.kind == ClientRouteKind::Sni && !route.is_open)
            .filter_map(|route| ServerName::try_from(route.text.clone()).ok());
        let own = tls.server_name.clone().into_iter();
        own.chain(exact).find(|name| leads_here(&name.to_str())).map(|name| (name, tls)).ok_or_else(
            || {
                format!(
                    "no name leads to it that could be asked for: write server_name in tls = {{ … }} of group {}",
                    self.group.name
                )
            },
        )
    }

    /// TLS' handshake with the broker, where clients have one.
    async fn with_tls(self, stream: TcpStream) -> Result<BrokerStream, String> {
        if self.service.protocol == Protocol::Mqtt {
            return Ok(BrokerStream::Left(stream));
        }
        let (name, settings) = self.server_name()?;
        let settings = BrokerTls { server_name: Some(name.clone()), ..settings.clone() };
        let connector = Connector::load(&settings).map_err(|e| e.to_string())?;
        let handshake =
            tokio::time::timeout(PATIENCE, connector.connect(self.service.addr, stream));
        match handshake.await {
            Ok(Ok(stream)) => Ok(BrokerStream::Right(Box::new(stream))),
            Ok(Err(error)) => Err(format!("TLS, asking for {}: {error}", name.to_str())),
            Err(_) => Err(self.not_taken_over(&format!(
                "no ServerHello in {} s, and it did not arrive",
                PATIENCE.as_secs()
            ))),
        }
    }

    /// What client ids of the group begin with, where those lead to it, and no topic does.
    fn id_prefix(self) -> Option<&'a str> {
        if self.is_by_topic() {
            return None;
        }
        let is_its = |route: &&ClientRoute| {
            route.kind == ClientRouteKind::ClientId
                && route.is_open
                && route.group == self.group.name
        };
        self.service.client_routes.iter().find(is_its).map(|route| route.text.as_str())
    }

    /// Topics lead to it, or clients' subscriptions.
    fn is_by_topic(self) -> bool {
        let name = self.group.name.as_str();
        // What a relay behind TLS does with topics is seen by its way to each group.
        self.is_relay()
            || name == self.service.default_group
            || self.service.test_routes.iter().any(|route| route.target.name() == name)
    }

    fn is_relay(self) -> bool {
        Some(&self.group.name) == self.service.relay.as_ref()
    }

    /// Connections until each real had one: which gets one is decided by what is not known here.
    async fn until_all(self, reals: &[IpAddr]) -> Vec<Tested> {
        let mut missing: BTreeSet<IpAddr> = reals.iter().copied().collect();
        let (mut all, mut failed) = (Vec::new(), 0);
        for _ in 0..CHOSEN_TRIES * reals.len() {
            // Each that fails takes its time, and it is not known whose it is.
            if missing.is_empty() || failed > reals.len() {
                break;
            }
            let found = self.one(None).await;
            let real = found.first().and_then(|row| row.real);
            failed += usize::from(real.is_none());
            if real.is_none_or(|real| missing.remove(&real)) {
                all.extend(found);
            } else {
                // Of one that had all messages already, only what is news.
                all.extend(found.into_iter().filter(|row| row.outcome == Outcome::Lost));
            }
        }
        let reason = "no connection of the test got there, by no client id and no topic";
        all.extend(
            missing.into_iter().map(|real| {
                self.row(Some(real), "QoS 0", Err((Outcome::NotSent, reason.to_owned())))
            }),
        );
        all
    }

    /// One connection, with all messages.
    async fn one(self, real: Option<IpAddr>) -> Vec<Tested> {
        let mut connected = match self.connect(real).await {
            Ok(connected) => connected,
            Err(failure) => return vec![self.row(real, "CONNECT", Err(failure))],
        };
        let rows = if self.is_relay() {
            self.through_relay(real, &mut connected).await
        } else {
            self.to_broker(real, &mut connected).await
        };
        connected.session.end().await;
        if let Source::Here(here) = self.source {
            here.forget_id(&connected.id);
        }
        rows
    }

    async fn connect(self, real: Option<IpAddr>) -> Result<Connected, (Outcome, String)> {
        let lost = |reason| (Outcome::Lost, reason);
        let vip = SocketAddr::new(self.group.vip, self.service.port);
        let opened = self.source.open(self.service, real.map(|real| (vip, real))).await;
        let Opened { stream, client } = opened.map_err(|(is_unreachable, reason)| {
            if is_unreachable { (Outcome::NotSent, reason) } else { lost(self.no_answer(&reason)) }
        })?;
        let mut stream = self.with_tls(stream).await.map_err(lost)?;
        let nonce = getrandom::u32().map_err(|e| lost(e.to_string()))?;
        let id = format!("{}mqtt-fwd-test-{nonce:08x}", self.id_prefix().unwrap_or_default());
        let mut options = ConnectOptions {
            v5: false,
            client_id: &id,
            username: None,
            password: None,
            keep_alive: KEEPALIVE,
        };
        if let Some(CheckKind::Mqtt { v5, username, password, .. }) =
            self.service.health_check.as_ref().map(|check| &check.kind)
        {
            options.v5 = *v5;
            options.username = username.as_deref();
            options.password = password.as_deref();
        }
        let to = SocketAddr::new(self.service.addr, self.service.port);
        let connack = client::connect(&mut stream, to, &options);
        let connack = tokio::time::timeout(PATIENCE, connack).await;
        connack
            .unwrap_or_else(|_| Err(format!("no CONNACK in {} s", PATIENCE.as_secs())))
            .map_err(lost)?;
        let topic = format!("{TEST_TOPICS}/{}/{nonce:08x}", self.group.name);
        let session = Session::new(stream, options.v5);
        Ok(Connected { session, client, id, topic })
    }

    async fn to_broker(self, real: Option<IpAddr>, connected: &mut Connected) -> Vec<Tested> {
        let (session, topic) = (&mut connected.session, &connected.topic);
        let mut results: Vec<(String, Result<Duration, String>)> = Vec::new();
        let begun = Instant::now();
        let qos0 = session.publish_qos0(topic, b"mqtt-fwd test").await;
        let first = qos0.map(|()| begun.elapsed()).map_err(|reason| self.not_taken_over(&reason));
        let real = match self.source {
            Source::Here(here) => {
                here.flow(connected.client, self.service.port).and_then(|(_, it)| it).or(real)
            }
            Source::Network(_) => real,
        };
        if let Some(reason) = self.went_wrong(connected.client).filter(|_| first.is_ok()) {
            return vec![self.row(real, "QoS 0", Err((Outcome::Lost, reason)))];
        }
        results.push(("QoS 0".to_owned(), first));
        if results[0].1.is_ok() {
            let begun = Instant::now();
            let qos1 = session.publish_qos1(topic, b"mqtt-fwd test").await;
            results.push(("QoS 1".to_owned(), qos1.map(|()| begun.elapsed())));
        }
        if results.iter().all(|(_, result)| result.is_ok()) {
            let size = session.largest_payload(topic).unwrap_or(1024);
            let begun = Instant::now();
            let large = session.publish_qos1(topic, &vec![b'.'; size]).await;
            let large = large.map(|()| begun.elapsed()).map_err(|reason| {
                format!("{reason}; small ones do: does a link on the way have a smaller MTU?")
            });
            results.push((format!("QoS 1, {size} B"), large));
        }
        let row = |(message, result): (String, Result<Duration, String>)| {
            self.row(real, &message, result.map_err(|reason| (Outcome::Lost, reason)))
        };
        results.into_iter().map(row).collect()
    }

    /// To each group, and back by the relay's own subscription.
    async fn through_relay(self, real: Option<IpAddr>, connected: &mut Connected) -> Vec<Tested> {
        let nonce = connected.topic.rsplit('/').next().unwrap_or_default().to_owned();
        let session = &mut connected.session;
        let subscribed = session.subscribe(&format!("{TEST_TOPICS}/+/{nonce}")).await;
        let wrong = || self.went_wrong(connected.client);
        if let Some(reason) = subscribed.map_err(|r| self.not_taken_over(&r)).err().or_else(wrong) {
            return vec![self.row(real, "SUBSCRIBE", Err((Outcome::Lost, reason)))];
        }
        let mut rows = Vec::new();
        let others = self.service.groups.iter().map(|group| Test { group, ..self });
        for group in others.filter(|other| !other.is_relay() && other.is_by_topic()) {
            let group = group.group;
            let topic = format!("{TEST_TOPICS}/{}/{nonce}", group.name);
            let begun = Instant::now();
            let mut result = session.publish_qos1(&topic, b"mqtt-fwd test").await;
            if result.is_ok() {
                result = session.message(&topic).await;
            }
            let result = result.map(|()| begun.elapsed());
            let message = format!("QoS 1 to {}, and back", group.name);
            rows.push(self.row(real, &message, result.map_err(|reason| (Outcome::Lost, reason))));
        }
        rows
    }

    /// That a flow is not of the group; over the network, nobody can tell.
    fn went_wrong(self, client: SocketAddr) -> Option<String> {
        let Source::Here(here) = self.source else { return None };
        let Some((flow, _)) = here.flow(client, self.service.port) else {
            return Some(
                "the datapath knows nothing of the connection: is another balancer in front?"
                    .to_owned(),
            );
        };
        (flow.group != self.group.name).then(|| {
            let by = bound_by_words(&flow.bound_by, flow.fallback_reason.as_deref());
            format!("it went to group {}, bound by {by}", flow.group)
        })
    }

    fn no_answer(self, reason: &str) -> String {
        match (self.source, self.service.binding) {
            (Source::Network(_), _) => {
                format!("{reason}: do routers send {} to a balancer?", self.service.addr)
            }
            (_, Binding::Delayed) => format!(
                "{reason}: it is sent to the balancer's gateway, which has to bring it back here: is that right \
                 (`mqtt-fwd katran mac`)?"
            ),
            (_, Binding::Predicted) => format!(
                "{reason}: does its host unwrap (`mqtt-fwd host status` there), is the gateway right (`mqtt-fwd katran \
                 mac`), and does it have a route to this host?"
            ),
        }
    }

    fn not_taken_over(self, reason: &str) -> String {
        if self.service.binding != Binding::Delayed || !reason.contains("did not arrive") {
            return reason.to_owned();
        }
        format!("{reason}: its host does not take the connection over: {HOST_ADVICE}")
    }

    fn row(
        self,
        real: Option<IpAddr>,
        message: &str,
        result: Result<Duration, (Outcome, String)>,
    ) -> Tested {
        let binding = match self.service.binding {
            _ if self.is_relay() => "relay",
            Binding::Predicted => "predicted",
            Binding::Delayed => "delayed",
        };
        let (outcome, ms, reason) = match result {
            Ok(took) => (Outcome::Arrived, Some(took.as_secs_f64() * 1000.0), None),
            Err((outcome, reason)) => (outcome, None, Some(reason)),
        };
        Tested {
            service: self.service.name.clone(),
            group: self.group.name.clone(),
            real,
            binding,
            message: message.to_owned(),
            outcome,
            ms,
            reason,
        }
    }
}
