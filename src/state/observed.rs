//! What `run` has seen.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::Fleet;
use crate::connectivity::{Outcome, Tested};
use crate::counter::Counter;
use crate::datapath::counts::Counters;
use crate::domain::Problem;

/// How far back counters are known, and in which steps.
const RECENT: Duration = Duration::from_secs(600);
const RECENT_STEP: Duration = Duration::from_secs(10);

/// The last time that the file was read again.
#[derive(Debug, Clone)]
pub struct Reloaded {
    pub when: SystemTime,
    /// Why it was refused.
    pub refused: Option<String>,
}

/// The last test.
#[derive(Debug, Clone)]
pub struct LastTest {
    pub when: SystemTime,
    /// What became of each message, or why there was none.
    pub result: Result<Vec<Tested>, String>,
}

/// Problems and counts since it was started.
#[derive(Debug, Default)]
pub struct Observed {
    problems: Mutex<Vec<Problem>>,
    /// Of each map, the most evictions that were seen: what is read beside packets is a little less now and then.
    evictions: Mutex<BTreeMap<String, u64>>,
    reloaded: Mutex<Option<Reloaded>>,
    tested: Mutex<Option<LastTest>>,
    /// Why ClientHellos in several segments are not read.
    hellos: Mutex<Option<String>>,
    /// The datapath's counters of the last minutes, the oldest first.
    recent: Mutex<VecDeque<(Instant, Counters)>>,
    /// Reconciliations without a problem of this host.
    pub reconciled: Counter,
    /// Reconciliations with one.
    pub failed: Counter,
    /// Parts of the chain that the watchdog put back.
    pub chain_repairs: Counter,
    /// Messages of misrouted clients that brokers of the right group have.
    pub rescued: Counter,
    /// Those that none has for sure.
    pub rescue_lost: Counter,
    /// Those at QoS 1 and 2, which their client sends again.
    pub rescue_left: Counter,
    /// What was asked for in a fleet.
    pub fleet: Fleet,
    /// Plans that put back what the balancer lacked.
    pub balancer_repairs: Counter,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Observed {
    /// What has just been read again, or why it was not.
    pub fn note_reload(&self, refused: Option<String>) {
        *held(&self.reloaded) = Some(Reloaded { when: SystemTime::now(), refused });
    }

    /// The last reload, if there was one.
    pub fn reloaded(&self) -> Option<Reloaded> {
        held(&self.reloaded).clone()
    }

    /// Whether ClientHellos in several segments are read, and why not.
    pub fn note_hellos(&self, why: Option<String>) {
        *held(&self.hellos) = why;
    }

    /// What has just been tested.
    pub fn note_test(&self, result: Result<Vec<Tested>, String>) {
        *held(&self.tested) = Some(LastTest { when: SystemTime::now(), result });
    }

    /// There are no tests any more.
    pub fn forget_test(&self) {
        *held(&self.tested) = None;
    }

    /// The last test, if there was one.
    pub fn tested(&self) -> Option<LastTest> {
        held(&self.tested).clone()
    }

    /// The counters of now.
    pub fn note_counters(&self, counters: &Counters) {
        let mut recent = held(&self.recent);
        let now = Instant::now();
        if recent.back().is_some_and(|(_, last)| last.is_beyond(counters)) {
            // Other maps: they begin at zero.
            recent.clear();
        }
        if recent.back().is_none_or(|(when, _)| now.duration_since(*when) >= RECENT_STEP) {
            recent.push_back((now, counters.clone()));
        }
        while recent.front().is_some_and(|(when, _)| now.duration_since(*when) > RECENT) {
            recent.pop_front();
        }
    }

    /// The oldest counters that are known, and how old they are.
    pub fn counters_before(&self) -> Option<(Duration, Counters)> {
        let recent = held(&self.recent);
        recent.front().map(|(when, counters)| (when.elapsed(), counters.clone()))
    }

    /// Problems of what was asked of `run`, or made by itself.
    pub fn own_problems(&self) -> Vec<Problem> {
        let mut problems = self.fleet.problems();
        if let Some(Reloaded { refused: Some(why), .. }) = self.reloaded() {
            let text =
                format!("the changed configuration file was refused, and is not in force: {why}");
            problems.push(Problem::new("reload_refused", text));
        }
        if let Some(why) = held(&self.hellos).clone() {
            let text = format!(
                "TLS clients whose server name comes in a second segment are bound without it: {why}"
            );
            problems.push(Problem::new("hellos_not_read", text));
        }
        match self.tested().map(|test| test.result) {
            Some(Err(why)) => {
                let text = format!("the last test could not be made: {why}");
                problems.push(Problem::new("test_failed", text));
            }
            Some(Ok(tested)) => {
                let lost: Vec<&Tested> =
                    tested.iter().filter(|one| one.outcome == Outcome::Lost).collect();
                if tested.iter().all(|one| one.outcome == Outcome::NotSent) {
                    let text =
                        "in the last test, no message could be sent; `mqtt-fwd test` says why";
                    problems.push(Problem::new("test_failed", text));
                }
                if let Some(first) = lost.first() {
                    let text = format!(
                        "{} of {} messages of the last test were lost, the first one {first}; `mqtt-fwd test` shows all",
                        lost.len(),
                        tested.iter().filter(|one| one.outcome != Outcome::NotSent).count()
                    );
                    problems.push(Problem::new("test_failed", text));
                }
            }
            None => {}
        }
        problems
    }

    /// The problems of the last reconciliation.
    pub fn problems(&self) -> Vec<Problem> {
        held(&self.problems).clone()
    }

    /// Evictions of a map so far, as a counter has them.
    pub fn evicted(&self, map: &str, seen: u64) -> u64 {
        let mut most = held(&self.evictions);
        let most = most.entry(map.to_owned()).or_default();
        *most = seen.max(*most);
        *most
    }

    /// The last reconciliation's result.
    pub fn reconciled(&self, problems: Vec<Problem>) {
        if problems.iter().all(Problem::is_elsewhere) {
            self.reconciled.add(1);
        } else {
            self.failed.add(1);
        }
        *held(&self.problems) = problems;
    }
}
