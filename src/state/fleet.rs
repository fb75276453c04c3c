//! What a balancer of a fleet has asked for, and what it was told.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::counter::Counter;
use crate::domain::Problem;

/// A broker host that answers nothing for so long, though it is asked once a second, does not answer.
const DEAF: Duration = Duration::from_secs(4);

/// Upper bounds of the times to an answer, in seconds; behind the last one, all others.
pub const TIMES: [f64; 9] = [0.000_1, 0.000_2, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1];

/// A broker host, as far as it answers.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// Since when it is asked.
    since: Instant,
    /// When it last answered.
    answered: Option<Instant>,
    /// Questions, and answers to them.
    pub questions: u64,
    pub answers: u64,
}

impl Asked {
    /// Whether it does not answer, and for how long.
    pub fn deaf(&self) -> Option<Duration> {
        let silent = self.answered.unwrap_or(self.since).elapsed();
        (silent > DEAF).then_some(silent)
    }
}

/// Lines of a difference that are named.
const NAMED: usize = 3;

impl Member {
    fn problems(&self, name: &str) -> Vec<Problem> {
        let mut problems = Vec::new();
        if let Some(key) = &self.missing_key {
            let text = format!(
                "{name} uses the handover key {key}, which this balancer has not: connections that it opens are not \
                 understood here; copy its key file here"
            );
            problems.push(Problem::new("fleet_key_missing", text));
        }
        if let Some(first) = self.differences.get(..self.differences.len().min(NAMED))
            && !first.is_empty()
        {
            let more = self.differences.len() - first.len();
            let more = if more > 0 { format!("; and {more} more") } else { String::new() };
            let text = format!("{name} is configured otherwise: {}{more}", first.join("; "));
            problems.push(Problem::new("fleet_differs", text));
        }
        problems
    }
}

/// Counts since `run` was started.
#[derive(Debug, Default)]
pub struct Fleet {
    /// Connections that were asked for.
    pub asked: Counter,
    /// Of those: found at a broker host, in the store, nowhere; not found out in time.
    pub found: Counter,
    pub stored: Counter,
    pub nowhere: Counter,
    pub unanswered: Counter,
    /// Segments that were not held: too many at a time.
    pub not_held: Counter,
    /// Answers that could not be carried out.
    pub failed: Counter,
    times: Mutex<Times>,
    reals: Mutex<BTreeMap<IpAddr, Asked>>,
    /// Why nothing is asked for.
    idle: Mutex<Option<String>>,
    /// Why the store does not answer.
    store: Mutex<Option<String>>,
    /// The other members, by name.
    members: Mutex<BTreeMap<String, Member>>,
    /// When one of them was last away.
    away: Mutex<Option<Instant>>,
}

/// Another balancer of the fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Of its build.
    pub version: String,
    /// In what its configuration differs from this one's, a line each.
    pub differences: Vec<String>,
    /// Fingerprint of a key that it uses and this balancer has not.
    pub missing_key: Option<String>,
}

#[derive(Debug, Default, Clone)]
struct Times {
    counts: [u64; TIMES.len() + 1],
    sum: f64,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fleet {
    /// How long it took from a segment to what became of it.
    pub fn note_time(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let mut times = held(&self.times);
        let place = TIMES.iter().position(|bound| seconds <= *bound).unwrap_or(TIMES.len());
        times.counts[place] += 1;
        times.sum += seconds;
    }

    /// Counts by [`TIMES`], and the sum in seconds.
    pub fn times(&self) -> ([u64; TIMES.len() + 1], f64) {
        let times = held(&self.times).clone();
        (times.counts, times.sum)
    }

    /// These are asked from now on, and no others.
    pub fn asks(&self, reals: &[IpAddr]) {
        let mut known = held(&self.reals);
        known.retain(|real, _| reals.contains(real));
        for real in reals {
            let new = Asked { since: Instant::now(), answered: None, questions: 0, answers: 0 };
            known.entry(*real).or_insert(new);
        }
    }

    /// A question to a real, or its answer.
    pub fn note_question(&self, real: IpAddr) {
        if let Some(asked) = held(&self.reals).get_mut(&real) {
            asked.questions += 1;
        }
    }

    pub fn note_answer(&self, real: IpAddr) {
        if let Some(asked) = held(&self.reals).get_mut(&real) {
            asked.answers += 1;
            asked.answered = Some(Instant::now());
        }
    }

    /// All that are asked.
    pub fn reals(&self) -> BTreeMap<IpAddr, Asked> {
        held(&self.reals).clone()
    }

    /// Connections are asked for, or why not.
    pub fn note_idle(&self, why: Option<String>) {
        *held(&self.idle) = why;
    }

    /// What the store said, or why it does not.
    pub fn note_store(&self, lost: Option<String>) {
        if lost.is_some() {
            held(&self.members).clear();
        }
        *held(&self.store) = lost;
    }

    /// Why the store does not answer; `None`: it does, or there is none.
    pub fn store_lost(&self) -> Option<String> {
        held(&self.store).clone()
    }

    /// Who else is in the fleet.
    pub fn note_members(&self, members: BTreeMap<String, Member>) {
        *held(&self.members) = members;
    }

    /// A member is away: what it keeps is not in the store yet.
    pub fn note_away(&self) {
        *held(&self.away) = Some(Instant::now());
    }

    /// Since a member that is waited for was last away; `None`: none was.
    pub fn none_away_for(&self) -> Option<Duration> {
        held(&self.away).map(|last| last.elapsed())
    }

    /// The other members that are known.
    pub fn members(&self) -> BTreeMap<String, Member> {
        held(&self.members).clone()
    }

    /// Broker hosts whose connections stall when they come to this balancer.
    pub fn problems(&self) -> Vec<Problem> {
        let text = |(real, asked): (IpAddr, Asked)| {
            let silent = asked.deaf()?;
            Some(format!(
                "{real}: does not answer the fleet's questions ({} s): its connections stall if they come here from \
                 another balancer; `mqtt-fwd host status` there says whether it is asked, and `host up --fleet-key` \
                 makes it answer",
                silent.as_secs()
            ))
        };
        let texts = self.reals().into_iter().filter_map(text);
        let mut problems: Vec<_> =
            texts.map(|text| Problem::new("real_not_answering", text)).collect();
        if let Some(why) = held(&self.idle).clone() {
            let text = format!(
                "connections that move here from other balancers are not asked for, and stall: {why}"
            );
            problems.push(Problem::new("fleet_not_asking", text));
        }
        if let Some(why) = self.store_lost() {
            let text = format!(
                "the fleet's store does not answer: established connections move as before; those whose CONNECT was just \
                 answered are reset if they move ({why})"
            );
            problems.push(Problem::new("store_unreachable", text));
        }
        for (name, member) in self.members() {
            problems.extend(member.problems(&name));
        }
        problems
    }
}
