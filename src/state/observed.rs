//! What `run` has seen.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::counter::Counter;
use crate::domain::Problem;

/// Problems and counts since it was started.
#[derive(Debug, Default)]
pub struct Observed {
    problems: Mutex<Vec<Problem>>,
    /// Of each map, the most evictions that were seen: what is read beside packets is a little less now and then.
    evictions: Mutex<BTreeMap<String, u64>>,
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
    /// Plans that put back what the balancer lacked.
    pub balancer_repairs: Counter,
}

impl Observed {
    /// The problems of the last reconciliation.
    pub fn problems(&self) -> Vec<Problem> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Evictions of a map so far, as a counter has them.
    pub fn evicted(&self, map: &str, seen: u64) -> u64 {
        let mut most = self.evictions.lock().unwrap_or_else(PoisonError::into_inner);
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
        *self.problems.lock().unwrap_or_else(PoisonError::into_inner) = problems;
    }
}
