//! Routes to an automaton over topic levels, so that matching costs what the topic's levels
//! cost, however many routes there are.
//!
//! A trie of filters is nondeterministic: `a/+` and `+/b` are both alive after `a`. Subset
//! construction makes it deterministic. A state is the list of what is alive, most specific
//! first; that order is kept by each step, so the first that accepts is the most specific.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::walk;
use crate::domain::Service;
use crate::domain::filter::{Level, TopicFilter};

/// Number of the state from which nothing matches.
pub const DEAD: u32 = 0;

/// A compiled set of filters. Values are indices of the filters it was made of.
#[derive(Debug, Clone)]
pub struct Automaton {
    /// State 0 is [`DEAD`].
    pub states: Vec<State>,
    /// The edges, each for one level's text.
    pub edges: Vec<Edge>,
    /// State before the first level.
    pub start: u32,
    /// The same, for topics that begin with `$`.
    pub start_dollar: u32,
}

/// What is known after some levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// Next state for a level without an edge of its own.
    pub other: u32,
    /// The filter that matches a topic which ends here.
    pub accepts: Option<usize>,
}

/// `state` with `level` next leads to `next`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edge {
    /// From.
    pub state: u32,
    /// By.
    pub level: String,
    /// To.
    pub next: u32,
}

/// The filters' combinations need more states than there is room for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the routes need more than {limit} states; raise maps.route_states, or use fewer of the \
     wildcards that combine the most: {}",
    .worst.join(", ")
)]
pub struct TooManyStates {
    /// The limit.
    pub limit: u32,
    /// The filters that are alive in the most states.
    pub worst: Vec<String>,
}

#[derive(Default)]
struct Node {
    literal: BTreeMap<String, usize>,
    one: Option<usize>,
    rest: Option<usize>,
    ends: Option<usize>,
    /// Some filter that passes here, to name it.
    filter: usize,
}

/// Something alive: a place in the trie, or a `#` that matches whatever comes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Alive {
    At(usize),
    Rest(usize),
}

/// The most states that fit into the maps, for [`Automaton::compile`].
pub type Limit = u32;

impl Automaton {
    /// Compiles filters; they must differ.
    pub fn compile(filters: &[&TopicFilter], limit: Limit) -> Result<Self, TooManyStates> {
        Compiler { trie: trie(filters), ..Compiler::default() }.run(filters, limit)
    }

    /// The filter for a topic.
    pub fn route(&self, edges: &HashMap<(u32, &[u8]), u32>, topic: &str) -> Option<usize> {
        let next = |state: u32, level: &[u8]| {
            edges.get(&(state, level)).copied().unwrap_or(self.states[state as usize].other)
        };
        let state = walk(self.start, self.start_dollar, topic.as_bytes(), next);
        self.states[state as usize].accepts
    }

    /// The filters that some topic leads to.
    pub fn used(&self) -> BTreeSet<usize> {
        let states = self.states.iter().enumerate();
        // Every topic has a level, so none ends where the first begins.
        states.filter(|(i, _)| *i != self.start as usize).filter_map(|(_, s)| s.accepts).collect()
    }

    /// The edges by what they are looked up by.
    pub fn edge_index(&self) -> HashMap<(u32, &[u8]), u32> {
        self.edges.iter().map(|e| ((e.state, e.level.as_bytes()), e.next)).collect()
    }
}

fn trie(filters: &[&TopicFilter]) -> Vec<Node> {
    let mut nodes = vec![Node::default()];
    for (index, filter) in filters.iter().enumerate() {
        let mut at = 0;
        let mut ended = false;
        for level in filter.levels() {
            let fresh = nodes.len();
            let next = match level {
                Level::Literal(text) => *nodes[at].literal.entry(text.clone()).or_insert(fresh),
                Level::One => *nodes[at].one.get_or_insert(fresh),
                Level::Rest => {
                    nodes[at].rest = Some(index);
                    ended = true;
                    break;
                }
            };
            if next == fresh {
                nodes.push(Node { filter: index, ..Node::default() });
            }
            at = next;
        }
        if !ended {
            nodes[at].ends = Some(index);
        }
    }
    nodes
}

#[derive(Default)]
struct Compiler {
    trie: Vec<Node>,
    numbers: HashMap<Vec<Alive>, u32>,
    todo: Vec<(u32, Vec<Alive>)>,
    states: Vec<State>,
    edges: Vec<Edge>,
}

impl Compiler {
    fn run(mut self, filters: &[&TopicFilter], limit: Limit) -> Result<Automaton, TooManyStates> {
        self.number(Vec::new());
        self.todo.clear();
        let start = self.number(vec![Alive::At(0)]);
        let start_dollar = self.start_dollar();

        while let Some((number, alive)) = self.todo.pop() {
            let other_alive = self.step(&alive, None);
            let other = self.number(other_alive);
            self.states[number as usize].other = other;
            let levels: BTreeSet<String> = alive
                .iter()
                .filter_map(|a| match a {
                    Alive::At(node) => Some(self.trie[*node].literal.keys()),
                    Alive::Rest(_) => None,
                })
                .flatten()
                // Topics that begin with '$' start at start_dollar.
                .filter(|level| number != start || !level.starts_with('$'))
                .cloned()
                .collect();
            for level in levels {
                let next_alive = self.step(&alive, Some(&level));
                let next = self.number(next_alive);
                if next != other {
                    self.edges.push(Edge { state: number, level, next });
                }
            }
            if self.states.len() > limit as usize || self.edges.len() > limit as usize {
                return Err(TooManyStates { limit, worst: self.worst(filters) });
            }
        }
        Ok(Automaton { states: self.states, edges: self.edges, start, start_dollar })
    }

    /// Wildcards do not match the first level of `$` topics, literals do.
    fn start_dollar(&mut self) -> u32 {
        let literals: Vec<(String, usize)> = self.trie[0]
            .literal
            .iter()
            .filter(|(level, _)| level.starts_with('$'))
            .map(|(level, node)| (level.clone(), *node))
            .collect();
        if literals.is_empty() {
            return DEAD;
        }
        let number = self.states.len() as u32;
        self.states.push(State { other: DEAD, accepts: None });
        for (level, node) in literals {
            let next = self.number(vec![Alive::At(node)]);
            self.edges.push(Edge { state: number, level, next });
        }
        number
    }

    /// What is alive after one more level, in order.
    fn step(&self, alive: &[Alive], level: Option<&str>) -> Vec<Alive> {
        let mut next = Vec::new();
        for a in alive {
            match a {
                Alive::At(node) => {
                    let node = &self.trie[*node];
                    next.extend(level.and_then(|l| node.literal.get(l)).map(|n| Alive::At(*n)));
                    next.extend(node.one.map(Alive::At));
                    next.extend(node.rest.map(Alive::Rest));
                }
                Alive::Rest(filter) => next.push(Alive::Rest(*filter)),
            }
        }
        // What is less specific than a '#' that matches anyhow can never be chosen.
        if let Some(i) = next.iter().position(|a| matches!(a, Alive::Rest(_))) {
            next.truncate(i + 1);
        }
        next
    }

    fn number(&mut self, alive: Vec<Alive>) -> u32 {
        if let Some(number) = self.numbers.get(&alive) {
            return *number;
        }
        let number = self.states.len() as u32;
        let accepts = alive.iter().find_map(|a| match a {
            Alive::At(node) => self.trie[*node].ends.or(self.trie[*node].rest),
            Alive::Rest(filter) => Some(*filter),
        });
        self.states.push(State { other: DEAD, accepts });
        self.numbers.insert(alive.clone(), number);
        self.todo.push((number, alive));
        number
    }

    fn worst(&self, filters: &[&TopicFilter]) -> Vec<String> {
        let mut count: HashMap<usize, u32> = HashMap::new();
        for alive in self.numbers.keys() {
            for a in alive {
                let filter = match a {
                    Alive::At(node) => self.trie[*node].filter,
                    Alive::Rest(filter) => *filter,
                };
                *count.entry(filter).or_default() += 1;
            }
        }
        let mut order: Vec<_> = count.into_iter().collect();
        order.sort_by_key(|(filter, n)| (std::cmp::Reverse(*n), *filter));
        order
            .iter()
            .take(3)
            .map(|(filter, _)| format!("{:?}", filters[*filter].to_string()))
            .collect()
    }
}

/// Why a service's routes cannot be used as they are.
pub fn problems(service: &Service, limit: Limit) -> Vec<String> {
    let filters: Vec<&TopicFilter> = service.routes.iter().map(|r| &r.filter).collect();
    let automaton = match Automaton::compile(&filters, limit) {
        Ok(automaton) => automaton,
        Err(e) => return vec![e.to_string()],
    };
    let used = automaton.used();
    let mut never: Vec<_> = filters
        .iter()
        .enumerate()
        .filter(|(i, _)| !used.contains(i))
        .map(|(_, filter)| filter.to_string())
        .collect();
    never.sort();
    never.dedup();
    never
        .into_iter()
        // The same filter twice is reported where it is read.
        .filter(|f| service.routes.iter().filter(|r| r.filter.to_string() == *f).count() == 1)
        .map(|filter| {
            format!(
                "topic {filter:?} can never match: more specific routes take all of its topics; \
                 remove it"
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::filter::most_specific;

    fn compile(texts: &[&str]) -> (Vec<TopicFilter>, Automaton) {
        let filters: Vec<TopicFilter> = texts.iter().map(|t| t.parse().unwrap()).collect();
        let automaton = Automaton::compile(&filters.iter().collect::<Vec<_>>(), 100_000).unwrap();
        (filters, automaton)
    }

    fn never(texts: &[&str]) -> Vec<usize> {
        let (filters, automaton) = compile(texts);
        let used = automaton.used();
        (0..filters.len()).filter(|i| !used.contains(i)).collect()
    }

    #[test]
    fn routes_that_can_never_match_are_found() {
        assert_eq!(never(&["#", "+/#"]), [0]);
        assert_eq!(never(&["a/#", "a", "a/+/#"]), [0]);
        assert_eq!(never(&["a/#", "a/+/#"]), [] as [usize; 0]);
        assert_eq!(never(&["#", "a", "+/b"]), [] as [usize; 0]);
        // Only '$' topics are left to "$SYS/#", and no wildcard takes them from it.
        assert_eq!(never(&["+/#", "$SYS/#"]), [] as [usize; 0]);
    }

    #[test]
    fn a_hundred_thousand_literal_routes_are_as_many_states() {
        let filters: Vec<TopicFilter> =
            (0..100_000).map(|i| format!("site/{}/{i}", i % 100).parse().unwrap()).collect();
        let automaton = Automaton::compile(&filters.iter().collect::<Vec<_>>(), 200_000).unwrap();
        assert!(automaton.states.len() < 101_000, "{}", automaton.states.len());
        let edges = automaton.edge_index();
        assert_eq!(automaton.route(&edges, "site/7/77707"), Some(77_707));
        assert_eq!(automaton.route(&edges, "site/8/77707"), None);
    }

    #[test]
    fn too_many_states_name_the_routes() {
        // The classic: the position of a wildcard doubles the states with each level.
        let texts: Vec<String> = (0..16)
            .map(|i| {
                let mut levels = vec!["+"; 16];
                levels[i] = "a";
                levels.join("/")
            })
            .collect();
        let filters: Vec<TopicFilter> = texts.iter().map(|t| t.parse().unwrap()).collect();
        let error = Automaton::compile(&filters.iter().collect::<Vec<_>>(), 1000).unwrap_err();
        assert_eq!(error.limit, 1000);
        assert_eq!(error.worst.len(), 3);
    }

    fn level() -> impl Strategy<Value = &'static str> {
        prop_oneof![Just("a"), Just("b"), Just("c"), Just(""), Just("$s")]
    }

    fn filter_text() -> impl Strategy<Value = String> {
        let level = prop_oneof![3 => level(), 1 => Just("+")];
        (prop::collection::vec(level, 1..5), any::<bool>()).prop_map(|(mut levels, rest)| {
            if rest {
                levels.push("#");
            }
            levels.join("/")
        })
    }

    proptest! {
        #[test]
        fn the_automaton_finds_what_the_definition_says(
            texts in prop::collection::btree_set(filter_text(), 0..12),
            topics in prop::collection::vec(prop::collection::vec(level(), 1..6), 1..40),
        ) {
            let texts: Vec<&str> =
                texts.iter().map(String::as_str).filter(|t| !t.is_empty()).collect();
            let (filters, automaton) = compile(&texts);
            let edges = automaton.edge_index();
            for topic in topics.iter().map(|levels| levels.join("/")) {
                if topic.is_empty() {
                    continue;
                }
                let expected = most_specific(&filters, &topic);
                let found = automaton.route(&edges, &topic).map(|i| &filters[i]);
                prop_assert_eq!(found, expected, "topic {}", topic);
            }
        }
    }
}
