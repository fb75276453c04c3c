//! The fleet, as this balancer sees it.

use serde::Serialize;

use super::Context;
use crate::state::{State, TIMES};

/// Who is in it, who is asked, and what became of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FleetStatus {
    /// This balancer's name.
    pub name: String,
    /// The others, as the store knows them; without one, none are known.
    pub members: Vec<FleetMember>,
    /// Broker hosts that are asked.
    pub reals: Vec<FleetReal>,
    /// Address of the store; none: there is none.
    pub store: Option<String>,
    /// Why it does not answer.
    pub store_error: Option<String>,
    /// Connections that were asked for, and what became of those: at a broker host, in the store, nowhere, not found
    /// out in time.
    pub asked: u64,
    pub found: u64,
    pub stored: u64,
    pub nowhere: u64,
    pub unanswered: u64,
    /// Segments that were not held: too many at a time.
    pub not_held: u64,
    /// Answers that could not be carried out.
    pub failed: u64,
    /// Seconds from a segment to what became of it, on average.
    pub mean_s: Option<f64>,
    /// How many took no longer than so many seconds.
    pub times: Vec<FleetTime>,
}

/// Another balancer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FleetMember {
    pub name: String,
    /// Of its build.
    pub version: String,
    /// In what its configuration differs, a line each.
    pub differences: Vec<String>,
    /// Fingerprint of a key that it uses and this balancer has not.
    pub missing_key: Option<String>,
}

/// A broker host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FleetReal {
    pub real: String,
    pub answers: bool,
    pub questions: u64,
    pub answered: u64,
}

/// A part of the answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FleetTime {
    /// Seconds; infinite: all.
    pub within_s: f64,
    pub count: u64,
}

/// `None`: this balancer is alone, or it is not seen from here.
pub fn status(context: &Context) -> Option<FleetStatus> {
    context.run.as_ref().and_then(of_run)
}

/// The same of `run` itself.
pub fn of_run(state: &State) -> Option<FleetStatus> {
    let config = state.config();
    let configured = config.fleet.as_ref()?;
    let fleet = &state.observed.fleet;
    let member = |(name, member): (String, crate::state::Member)| FleetMember {
        name,
        version: member.version,
        differences: member.differences,
        missing_key: member.missing_key,
    };
    let real = |(real, asked): (std::net::IpAddr, crate::state::Asked)| FleetReal {
        real: real.to_string(),
        answers: asked.deaf().is_none(),
        questions: asked.questions,
        answered: asked.answers,
    };
    let (counts, sum) = fleet.times();
    let bounds = TIMES.into_iter().chain([f64::INFINITY]);
    let mut so_far = 0;
    let times: Vec<_> = bounds
        .zip(counts)
        .map(|(within_s, count)| {
            so_far += count;
            FleetTime { within_s, count: so_far }
        })
        .collect();
    Some(FleetStatus {
        name: configured.name.clone(),
        members: fleet.members().into_iter().map(member).collect(),
        reals: fleet.reals().into_iter().map(real).collect(),
        store: configured.store.as_ref().map(crate::domain::fleet::Store::address),
        store_error: fleet.store_lost(),
        asked: fleet.asked.get(),
        found: fleet.found.get(),
        stored: fleet.stored.get(),
        nowhere: fleet.nowhere.get(),
        unanswered: fleet.unanswered.get(),
        not_held: fleet.not_held.get(),
        failed: fleet.failed.get(),
        mean_s: (so_far > 0).then(|| sum / so_far as f64),
        times,
    })
}

impl FleetStatus {
    /// Its members.
    pub fn who(&self) -> String {
        let others: Vec<_> = self.members.iter().map(|member| member.name.as_str()).collect();
        match (&self.store, others.as_slice()) {
            (None, _) => format!("{}, without a store", self.name),
            (Some(_), []) => format!("{}, no other member is known", self.name),
            (Some(_), others) => format!("{} with {}", self.name, others.join(", ")),
        }
    }

    /// In a line, for people.
    pub fn summary(&self) -> String {
        let answering = self.reals.iter().filter(|real| real.answers).count();
        format!(
            "{}; {answering} of {} reals answer; asked for {}: {} at reals, {} in the store, {} nowhere, {} not \
             found out",
            self.who(),
            self.reals.len(),
            self.asked,
            self.found,
            self.stored,
            self.nowhere,
            self.unanswered
        )
    }
}
