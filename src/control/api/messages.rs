//! What is shown, to and from its messages.

use super::proto;
use crate::control::checks::{RealState, State};
use crate::control::events::Report;
use crate::control::known::Restored;

impl From<RealState> for proto::Real {
    fn from(real: RealState) -> Self {
        let (state, error) = match real.state {
            _ if real.drained && real.effective_weight == 0 => {
                (proto::State::Drained, String::new())
            }
            State::Unchecked => (proto::State::Unchecked, String::new()),
            State::Up => (proto::State::Up, String::new()),
            State::Down(error) if real.effective_weight > 0 => (proto::State::DownInUse, error),
            State::Down(error) => (proto::State::Down, error),
        };
        Self {
            service: real.service,
            group: real.group,
            address: real.addr.to_string(),
            weight: real.weight,
            effective_weight: real.effective_weight,
            state: state.into(),
            error,
            since_s: real.since.as_secs(),
        }
    }
}

impl From<Report> for proto::Event {
    fn from(report: Report) -> Self {
        Self {
            time_us: (report.time * 1e6) as u64,
            kind: report.event,
            service: report.service,
            client: report.client,
            from_group: report.from_group.unwrap_or_default(),
            group: report.group.unwrap_or_default(),
            topic: report.topic.unwrap_or_default(),
            bound_by: report.bound_by.unwrap_or_default(),
            why: report.why.unwrap_or_default(),
            ended: report.ended,
            by_prediction: report.by_prediction,
        }
    }
}

impl From<proto::Event> for Report {
    fn from(event: proto::Event) -> Self {
        let some = |text: String| Some(text).filter(|text| !text.is_empty());
        Self {
            time: event.time_us as f64 / 1e6,
            event: event.kind,
            service: event.service,
            client: event.client,
            from_group: some(event.from_group),
            group: some(event.group),
            topic: some(event.topic),
            by_prediction: event.by_prediction,
            bound_by: some(event.bound_by),
            why: some(event.why),
            ended: event.ended,
        }
    }
}

impl From<Restored> for proto::ImportClientsResponse {
    fn from(done: Restored) -> Self {
        Self {
            added: done.added as u64,
            known_already: done.known_already as u64,
            without_group: done.without_group as u64,
        }
    }
}
