//! The broker of a topic, and the brokers of a subscription.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use super::connection::BrokerInfo;
use super::tls::{Connector, TlsError};
use crate::config::Config;
use crate::domain::filter::{Level, TopicFilter};
use crate::domain::{Route, Service, TEST_TOPICS, Target, rendezvous};
use crate::routes::compile::{Automaton, State, TooManyStates};
use crate::routes::walk;

/// States that are visited for what is behind one state, at most.
const REACHABLE_MAX: u32 = 4096;
/// Slots of a group's table: a prime, and many times the number of brokers.
const SLOTS: u32 = 1021;

/// Index of a broker in its table.
pub type Broker = u16;

/// States of the automaton that may be visited for topic filters: whoever writes them chooses how many there are. Once
/// it is spent, filters are sent to all groups, which misses nothing.
#[derive(Debug)]
pub struct Budget(u32);

impl Budget {
    /// For one packet, or one client at a change of routes: a fraction of a millisecond.
    pub fn of_packet() -> Self {
        Self(4096)
    }

    /// Whether there is none left.
    pub fn is_spent(&self) -> bool {
        self.0 == 0
    }

    /// False: there is none left.
    fn spend(&mut self, states: usize) -> bool {
        self.0 = self.0.saturating_sub(u32::try_from(states).unwrap_or(u32::MAX));
        self.0 > 0
    }
}

/// A group of brokers.
#[derive(Debug)]
struct Group {
    /// With address and weight.
    brokers: Vec<(Broker, IpAddr, u32)>,
    /// The broker of each slot; a topic's hash chooses the slot.
    slots: Vec<Broker>,
}

/// A table that cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// Too many routes.
    #[error(transparent)]
    Routes(#[from] TooManyStates),
    /// A group's TLS files.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Routes and brokers of a service.
#[derive(Debug)]
pub struct Router {
    automaton: Vec<State>,
    edges: HashMap<u32, HashMap<Box<[u8]>, u32>>,
    start: u32,
    start_dollar: u32,
    /// Where topics of tests pass, and no others: wildcards do not lead there, or they would take their filters to
    /// all groups.
    tests: Option<u32>,
    /// The group of each route; `None`: an "any" route.
    targets: Vec<Option<usize>>,
    groups: Vec<Group>,
    default: usize,
    brokers: Vec<Arc<BrokerInfo>>,
    /// Groups of the topics whose walk passes a state, computed on demand.
    reachable: Mutex<HashMap<u32, BTreeSet<usize>>>,
}

impl Router {
    /// Builds the table of a service; the relay's own group is left out.
    pub fn new(config: &Config, service: &Service) -> Result<Self, RouterError> {
        let filters: Vec<&TopicFilter> = service.all_routes().map(|r| &r.filter).collect();
        let automaton = Automaton::compile(&filters, config.maps.route_states)?;
        let mut edges: HashMap<u32, HashMap<Box<[u8]>, u32>> = HashMap::new();
        for edge in automaton.edges {
            let level = edge.level.into_bytes().into_boxed_slice();
            edges.entry(edge.state).or_default().insert(level, edge.next);
        }
        let mut brokers = Vec::new();
        let mut groups = Vec::new();
        let mut numbers = HashMap::new();
        for group in service.groups.iter().filter(|g| Some(&g.name) != service.relay.as_ref()) {
            numbers.insert(group.name.as_str(), groups.len());
            let mut weighted = Vec::new();
            let tls = group.tls.as_ref().map(Connector::load).transpose()?;
            let port = group.tls.as_ref().map_or(service.port, |tls| tls.port);
            for real in &group.reals {
                weighted.push((brokers.len() as Broker, real.addr, real.weight));
                brokers.push(Arc::new(BrokerInfo {
                    addr: SocketAddr::new(real.addr, port),
                    group: group.name.clone(),
                    proxy_protocol: group.proxy_protocol,
                    tls: tls.clone(),
                }));
            }
            let slots = rendezvous::fill(&weighted, SLOTS);
            groups.push(Group { brokers: weighted, slots });
        }
        let targets = service
            .all_routes()
            .map(|route| match &route.target {
                Target::Group(name) => numbers.get(name.as_str()).copied(),
                Target::Any => None,
            })
            .collect();
        let (test, _) = TEST_TOPICS.split_once('/').unwrap_or((TEST_TOPICS, ""));
        let is_test =
            |route: &Route| route.filter.levels().first() == Some(&Level::Literal(test.into()));
        let tests = if service.routes.iter().any(is_test) {
            None
        } else {
            edges.get(&automaton.start).and_then(|edges| edges.get(test.as_bytes())).copied()
        };
        Ok(Self {
            tests,
            automaton: automaton.states,
            edges,
            start: automaton.start,
            start_dollar: automaton.start_dollar,
            targets,
            default: numbers.get(service.default_group.as_str()).copied().unwrap_or(0),
            groups,
            brokers,
            reachable: Mutex::default(),
        })
    }

    /// A broker by its index.
    pub fn broker(&self, broker: Broker) -> &Arc<BrokerInfo> {
        &self.brokers[usize::from(broker)]
    }

    /// The index of a broker, by its address.
    pub fn find(&self, addr: SocketAddr) -> Option<Broker> {
        self.brokers.iter().position(|b| b.addr == addr).map(|i| i as Broker)
    }

    /// All brokers.
    pub fn all(&self) -> impl Iterator<Item = Broker> {
        0..self.brokers.len() as Broker
    }

    /// The broker of a topic, the same for all clients. `None`: an "any" route, which follows the
    /// client.
    pub fn broker_of(&self, topic: &str, is_down: impl Fn(Broker) -> bool) -> Option<Broker> {
        let group = self.group_of(topic)?;
        Some(self.pick(group, topic.as_bytes(), is_down))
    }

    /// A client's home: its broker in the default group.
    pub fn home_of(&self, client_id: &[u8], is_down: impl Fn(Broker) -> bool) -> Broker {
        self.pick(self.default, client_id, is_down)
    }

    /// The broker of a group for a key, preferably one that is up.
    fn pick(&self, group: usize, key: &[u8], is_down: impl Fn(Broker) -> bool) -> Broker {
        let Group { slots, brokers } = &self.groups[group];
        // As the datapath does with affinity = "topic" (struct topic, bpf/abi/state.h): a topic has one broker.
        let slot = (rendezvous::place(key) % slots.len() as u64) as usize;
        let first = slots[slot];
        if !is_down(first) || brokers.len() == 1 {
            return first;
        }
        let up: Vec<_> = brokers.iter().filter(|b| !is_down(b.0)).copied().collect();
        rendezvous::best(&up, slot as u32).unwrap_or(first)
    }

    fn group_of(&self, topic: &str) -> Option<usize> {
        let next = |state, level: &[u8]| self.next(state, level);
        let state = walk(self.start, self.start_dollar, topic.as_bytes(), next);
        match self.automaton[state as usize].accepts {
            Some(route) => self.targets[route],
            None => Some(self.default),
        }
    }

    fn next(&self, state: u32, level: &[u8]) -> u32 {
        let edge = self.edges.get(&state).and_then(|edges| edges.get(level));
        edge.copied().unwrap_or(self.automaton[state as usize].other)
    }

    /// The brokers that may have messages for a topic filter of SUBSCRIBE.
    pub fn brokers_for(&self, filter: &str, budget: &mut Budget) -> Vec<Broker> {
        // An invalid filter is refused by a broker; one is enough.
        let Ok(filter) = TopicFilter::parse(unshared(filter)) else { return vec![0] };
        match self.groups_for(&filter, budget) {
            Some(groups) => {
                groups.iter().flat_map(|g| self.groups[*g].brokers.iter().map(|b| b.0)).collect()
            }
            None => self.all().collect(),
        }
    }

    /// `None`: the budget is spent.
    fn groups_for(&self, filter: &TopicFilter, budget: &mut Budget) -> Option<BTreeSet<usize>> {
        let first = filter.levels().first();
        let dollar = matches!(first, Some(Level::Literal(l)) if l.starts_with('$'));
        let mut states = BTreeSet::from([if dollar { self.start_dollar } else { self.start }]);
        let mut groups = BTreeSet::new();
        for level in filter.levels() {
            let mut after = BTreeSet::new();
            for state in &states {
                let visits = match level {
                    Level::Literal(_) | Level::Rest => 1,
                    Level::One => 1 + self.edges.get(state).map_or(0, HashMap::len),
                };
                if !budget.spend(visits) {
                    return None;
                }
                match level {
                    Level::Literal(text) => {
                        after.insert(self.next(*state, text.as_bytes()));
                    }
                    Level::One => {
                        let unlike = |next: &u32| Some(*next) != self.tests;
                        after.extend(self.after(*state).filter(unlike));
                    }
                    // "a/#" also matches "a" (MQTT 3.1.1 §4.7.1.2).
                    Level::Rest => groups.extend(self.reachable(*state, budget)),
                }
            }
            if matches!(level, Level::Rest) {
                return Some(groups);
            }
            states = after;
        }
        for state in states {
            self.accepted(state, &mut groups);
        }
        Some(groups)
    }

    /// The states that one more level can lead to.
    fn after(&self, state: u32) -> impl Iterator<Item = u32> + '_ {
        let edges = self.edges.get(&state).into_iter().flat_map(|e| e.values().copied());
        edges.chain([self.automaton[state as usize].other])
    }

    fn accepted(&self, state: u32, groups: &mut BTreeSet<usize>) {
        match self.automaton[state as usize].accepts.map(|route| self.targets[route]) {
            Some(Some(group)) => drop(groups.insert(group)),
            // An "any" route: the message can be at any group.
            Some(None) => groups.extend(0..self.groups.len()),
            None => drop(groups.insert(self.default)),
        }
    }

    /// The groups of all topics that pass a state; beyond some thousand states, all groups.
    fn reachable(&self, from: u32, budget: &mut Budget) -> BTreeSet<usize> {
        let mut cached = self.reachable.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(groups) = cached.get(&from) {
            return groups.clone();
        }
        let mut groups = BTreeSet::new();
        let (mut seen, mut todo) = (BTreeSet::from([from]), vec![from]);
        seen.extend(self.tests);
        let mut visits = Budget(REACHABLE_MAX);
        while let Some(state) = todo.pop() {
            self.accepted(state, &mut groups);
            if groups.len() == self.groups.len() {
                break;
            }
            let edges = 1 + self.edges.get(&state).map_or(0, HashMap::len);
            if !visits.spend(edges) {
                groups = (0..self.groups.len()).collect();
                break;
            }
            todo.extend(self.after(state).filter(|next| seen.insert(*next)));
        }
        budget.spend((REACHABLE_MAX - visits.0) as usize);
        cached.insert(from, groups.clone());
        groups
    }
}

/// The filter of a shared subscription, $share/NAME/FILTER (MQTT 5 §4.8.2); others as they are.
pub fn unshared(filter: &str) -> &str {
    match filter.strip_prefix("$share/") {
        Some(rest) => rest.split_once('/').map_or(rest, |(_, filter)| filter),
        None => filter,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    fn table(routes: &[(&str, &str)]) -> Router {
        let routes: Vec<_> = routes
            .iter()
            .map(|(topic, group)| format!("{{ topic = {topic:?}, group = {group:?} }}"))
            .collect();
        let text = format!(
            r#"
interface = "lo"
balancer = "katran"
[[service]]
name = "mqtt"
address = "10.1.50.200"
default_group = "d"
relay = "relay"
group = [
    {{ name = "a", vip = "10.1.50.1", reals = [{{ address = "10.1.3.1" }}, {{ address = "10.1.3.2" }}] }},
    {{ name = "relay", vip = "10.1.50.9", reals = [{{ address = "10.1.3.9" }}] }},
    {{ name = "b", vip = "10.1.50.2", reals = [{{ address = "10.1.3.3" }}, {{ address = "10.1.3.4" }}] }},
    {{ name = "d", vip = "10.1.50.3", reals = [{{ address = "10.1.3.5" }}, {{ address = "10.1.3.6" }}] }},
]
route = [{}]
"#,
            routes.join(", ")
        );
        let config = Config::parse(Path::new("test.toml"), &text).unwrap_or_else(|e| panic!("{e}"));
        Router::new(&config, &config.services[0]).unwrap()
    }

    fn group(table: &Router, broker: Broker) -> &str {
        &table.broker(broker).group
    }

    #[test]
    fn a_topic_has_one_broker_of_its_group_and_another_when_that_is_down() {
        let t = table(&[("a/#", "a"), ("b/+", "b"), ("birth", "any")]);
        let up = |_| false;
        for (topic, expected) in [("a/1", "a"), ("b/x", "b"), ("b/x/y", "d"), ("else", "d")] {
            let broker = t.broker_of(topic, up).unwrap();
            assert_eq!(group(&t, broker), expected, "{topic}");
            assert_eq!(t.broker_of(topic, up), Some(broker));
            let other = t.broker_of(topic, |b| b == broker).unwrap();
            assert_ne!(other, broker);
            assert_eq!(group(&t, other), expected);
            assert_eq!(t.broker_of(topic, |_| true), Some(broker), "none is up: the first");
        }
        assert_eq!(t.broker_of("birth", up), None);
        let brokers: BTreeSet<_> =
            (0..100).filter_map(|i| t.broker_of(&format!("a/{i}"), up)).collect();
        assert_eq!(brokers.len(), 2, "topics are spread over the group");
    }

    #[test]
    fn a_subscription_goes_to_all_groups_that_it_can_match() {
        let t = table(&[("a/#", "a"), ("b/+", "b"), ("a/b/c", "b"), ("$SYS/#", "a")]);
        for (filter, expected) in [
            ("a/x", "a"),
            ("a/b/c", "b"),
            ("a/b/+", "ab"),
            ("a/#", "ab"),
            ("b/x/#", "bd"),
            ("#", "abd"),
            ("+", "ad"), // "a/#" matches "a"
            ("+/x", "abd"),
            ("$SYS/#", "a"),
            ("$SYS/x", "a"),
            ("$share/n/b/1", "b"),
            ("other/+/x", "d"),
        ] {
            let groups: BTreeSet<_> = t
                .brokers_for(filter, &mut Budget::of_packet())
                .into_iter()
                .map(|b| group(&t, b))
                .collect();
            assert_eq!(groups.into_iter().collect::<String>(), expected, "{filter}");
        }
        assert_eq!(t.brokers_for("#", &mut Budget::of_packet()).len(), 6);
        let any = table(&[("birth/#", "any")]);
        assert_eq!(
            any.brokers_for("birth/x", &mut Budget::of_packet()).len(),
            6,
            "wherever its publisher is"
        );
    }

    #[test]
    fn only_who_names_them_gets_messages_of_tests() {
        let t = table(&[("x/y", "a"), ("z", "b")]);
        let groups = |filter: &str| {
            let brokers = t.brokers_for(filter, &mut Budget::of_packet()).into_iter();
            brokers.map(|b| group(&t, b)).collect::<BTreeSet<_>>().into_iter().collect::<String>()
        };
        assert_eq!(groups("mqtt-fwd/test/b/1"), "b");
        assert_eq!(groups("mqtt-fwd/test/+/1"), groups("mqtt-fwd/#"));
        assert!(groups("mqtt-fwd/#").contains('a') && groups("mqtt-fwd/#").contains('b'));
        // No other topic of a or b has four levels.
        assert_eq!(groups("+/+/+/1"), "d");
        // Where no topic leads, none of a test does.
        let t = table(&[("x/y", "a")]);
        let brokers = t.brokers_for("mqtt-fwd/test/b/1", &mut Budget::of_packet());
        assert!(brokers.into_iter().all(|b| group(&t, b) == "d"));
    }

    #[test]
    fn filters_beyond_the_budget_go_to_all_groups_and_cost_nothing() {
        let routes: Vec<_> = (0..500).map(|i| format!("r{i}/x/+/y{i}")).collect();
        let routes: Vec<_> = routes.iter().map(|route| (route.as_str(), "a")).collect();
        let t = table(&routes);
        let mut budget = Budget::of_packet();
        let start = std::time::Instant::now();
        for n in 0..13_000 {
            let brokers = t.brokers_for("+/+/+/+", &mut budget);
            // "+/+/+/+" can match topics of a and of the default group; b has no route.
            assert_eq!(brokers.len(), if n == 0 { 4 } else { 6 }, "{n}");
            if n == 0 {
                budget = Budget(1);
            }
        }
        // Without a bound, 25 s.
        assert!(start.elapsed() < std::time::Duration::from_secs(1), "{:?}", start.elapsed());
    }

    fn level() -> impl Strategy<Value = &'static str> {
        prop_oneof![Just("a"), Just("b"), Just(""), Just("$s")]
    }

    fn text(wild: bool) -> impl Strategy<Value = String> {
        let one = prop_oneof![3 => level(), u32::from(wild) => Just("+")];
        (prop::collection::vec(one, 1..4), any::<bool>()).prop_map(move |(mut levels, rest)| {
            if rest && wild {
                levels.push("#");
            }
            levels.join("/")
        })
    }

    proptest! {
        /// A subscription reaches every broker where a matching message can be published.
        #[test]
        fn no_subscription_misses_a_topic(
            routes in prop::collection::btree_map(text(true), prop_oneof![Just("a"), Just("b"), Just("any")], 0..8),
            filter in text(true),
            topics in prop::collection::vec(text(false), 1..30),
        ) {
            let routes: Vec<_> =
                routes.iter().filter(|(t, _)| !t.is_empty()).map(|(t, g)| (t.as_str(), *g)).collect();
            prop_assume!(!filter.is_empty());
            // Sets with routes that can never match are refused; they are not tested here.
            let Ok(t) = std::panic::catch_unwind(|| table(&routes)) else { return Ok(()) };
            let subscribed = t.brokers_for(&filter, &mut Budget::of_packet());
            let filter: TopicFilter = filter.parse().unwrap();
            for topic in topics.iter().filter(|t| !t.is_empty() && filter.matches(t)) {
                match t.broker_of(topic, |_| false) {
                    Some(broker) => prop_assert!(subscribed.contains(&broker), "{filter} {topic}"),
                    None => prop_assert_eq!(subscribed.len(), 6),
                }
            }
        }
    }
}
