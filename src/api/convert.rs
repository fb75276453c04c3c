//! The rooms' types, to and from their messages.

use std::time::UNIX_EPOCH;

use super::{ApiError, proto};
use crate::datapath::clients::{Client, MultiGroupClient};
use crate::datapath::counts::{Counter, MapUse};
use crate::datapath::events::Event;
use crate::datapath::flows::{Flow, TopicUse};
use crate::domain::client_record::{ClientRecord, IdentifiedBy, Restored};
use crate::domain::{Health, Problem, RealState};
use crate::inspect::diff::Difference;
use crate::inspect::doctor::Finding;
use crate::inspect::explain::{
    BeatenRoute, ClientExplanation, FlowExplanation, ServerNameExplanation, TopicExplanation, Trial,
};
use crate::inspect::fleet::{FleetMember, FleetReal, FleetStatus, FleetTime};
use crate::inspect::overview::{GroupOverview, Overview, RealOverview};
use crate::inspect::status::{GroupReal, GroupRow, LoadedProgram, ServiceStatus, Status};

/// Types with the fields of their messages; of those behind a semicolon, each entry is converted, and behind a bar, the
/// one that there may be.
macro_rules! same_fields {
    ($($type:ident = $message:ident { $($field:ident),* $(; $($each:ident),+)? $(| $($maybe:ident),+)? })+) => {$(
        impl From<$type> for proto::$message {
            fn from(from: $type) -> Self {
                Self {
                    $($field: from.$field,)*
                    $($($each: from.$each.into_iter().map(Into::into).collect(),)+)?
                    $($($maybe: from.$maybe.map(Into::into),)+)?
                }
            }
        }

        impl From<proto::$message> for $type {
            fn from(from: proto::$message) -> Self {
                Self {
                    $($field: from.$field,)*
                    $($($each: from.$each.into_iter().map(Into::into).collect(),)+)?
                    $($($maybe: from.$maybe.map(Into::into),)+)?
                }
            }
        }
    )+};
}

same_fields! {
    Problem = Problem { code, text }
    MapUse = MapUse { map, capacity, used, evicted }
    ServiceStatus = ServiceStatus { name, address, in_force, max_packet }
    Status = GetStatusResponse {
        interface, mode, generation, balancer, balancer_ok, multi_group_clients,
        relayed, counters, healthy, file_in_force; positions, services, maps, problems | attached, fleet
    }
    FleetStatus = FleetStatus {
        name, store, store_error, asked, found, stored, nowhere, unanswered, not_held, failed, mean_s; members, reals,
        times
    }
    FleetMember = FleetMember { name, version, differences, missing_key }
    FleetReal = FleetReal { real, answers, questions, answered }
    FleetTime = FleetTime { within_s, count }
    LoadedProgram = LoadedProgram { name, id }
    GroupReal = GroupReal { address, weight }
    Finding = Finding { about, severity, text, remedy }
    Counter = Counter { name, is_verdict, count, meaning }
    GroupRow = Group { service, group, vip, packets, bytes; reals }
    Difference = GetDifferenceResponse { changes, steps, changed }
    Flow = Flow {
        service, client, group, vip, topic, state, bound_by, fallback_reason, client_id, server_name, predicted,
        misrouted
    }
    Client = Client {
        service, client, by, topic, group, age_s, hits, misses, group_changes, multi_group, misjudged
    }
    TopicExplanation = TopicExplanation { service, topic, route, belongs_to, reals; beaten }
    ServerNameExplanation = ServerNameExplanation { service, server_name, route, belongs_to, beaten, reals }
    BeatenRoute = BeatenRoute { route, belongs_to, at_level }
    Trial = Trial { opening, group, bound_by, fallback_reason }
    GroupOverview = GroupOverview { service, group, packets_s, bytes_s, flows }
    RealOverview = RealOverview { group, real, weight, state, packets_s, bytes_s }
    TopicUse = TopicOverview { topic, group, flows, misrouted }
    MultiGroupClient = ClientOverview { client, topic, group, changes }
    Overview = Overview {
        interface, problems, packets_s, publishes_s, misrouted_s, new_flows_s, flows, clients, fleet;
        groups, reals, topics, multi_group
    }
}

impl From<Option<LoadedProgram>> for proto::Position {
    fn from(program: Option<LoadedProgram>) -> Self {
        Self { program: program.map(Into::into) }
    }
}

impl From<proto::Position> for Option<LoadedProgram> {
    fn from(position: proto::Position) -> Self {
        position.program.map(Into::into)
    }
}

impl From<RealState> for proto::Real {
    fn from(real: RealState) -> Self {
        let state = match &real.health {
            _ if real.is_out() => proto::State::Drained,
            Health::Unchecked => proto::State::Unchecked,
            Health::Up => proto::State::Up,
            Health::Down(_) if real.effective_weight > 0 => proto::State::DownInUse,
            Health::Down(_) => proto::State::Down,
        };
        Self {
            state: state.into(),
            error: if real.is_out() { String::new() } else { real.error().to_owned() },
            address: real.addr.to_string(),
            weight: real.weight,
            effective_weight: real.effective_weight,
            since_s: real.since.as_secs(),
            certificate_expires: real
                .certificate_expires
                .and_then(|at| Some(at.duration_since(UNIX_EPOCH).ok()?.as_secs())),
            service: real.service,
            group: real.group,
        }
    }
}

impl proto::State {
    /// For people.
    pub fn text(self) -> &'static str {
        match self {
            Self::Unchecked => "unchecked",
            Self::Up => "up",
            Self::Down => "down",
            Self::DownInUse => "down, in use",
            Self::Drained => "drained",
        }
    }
}

impl From<Event> for proto::Event {
    fn from(event: Event) -> Self {
        Self {
            time_us: (event.time * 1e6) as u64,
            kind: event.event,
            service: event.service,
            client: event.client,
            from_group: event.from_group.unwrap_or_default(),
            group: event.group.unwrap_or_default(),
            topic: event.topic.unwrap_or_default(),
            bound_by: event.bound_by.unwrap_or_default(),
            fallback_reason: event.fallback_reason.unwrap_or_default(),
            ended: event.ended,
            by_prediction: event.by_prediction,
            server_name: event.server_name.unwrap_or_default(),
        }
    }
}

impl From<proto::Event> for Event {
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
            fallback_reason: some(event.fallback_reason),
            ended: event.ended,
            server_name: some(event.server_name),
        }
    }
}

impl From<ClientRecord> for proto::ClientRecord {
    fn from(record: ClientRecord) -> Self {
        Self {
            service: record.service,
            by: record.by.key().to_owned(),
            client: record.client,
            topic: record.topic,
            groups: record.groups.into_iter().map(|(name, n)| (name, u32::from(n))).collect(),
            multi_group: record.multi_group,
            for_relay: record.for_relay,
            misjudged: record.misjudged,
            group_changes: u32::from(record.group_changes),
            age_s: record.age_s,
        }
    }
}

impl TryFrom<proto::ClientRecord> for ClientRecord {
    type Error = ApiError;

    fn try_from(record: proto::ClientRecord) -> Result<Self, ApiError> {
        let groups = record.groups.into_iter().map(|(name, n)| {
            let refused = |_| ApiError::Refused(format!("{n} messages of group {name:?}"));
            Ok((name.clone(), u8::try_from(n).map_err(refused)?))
        });
        Ok(Self {
            by: match record.by.as_str() {
                "address" => IdentifiedBy::Address,
                "client_id" => IdentifiedBy::ClientId,
                other => {
                    let text = format!("by {other:?} is neither address nor client_id");
                    return Err(ApiError::Refused(text));
                }
            },
            groups: groups.collect::<Result<_, ApiError>>()?,
            service: record.service,
            client: record.client,
            topic: record.topic,
            multi_group: record.multi_group,
            for_relay: record.for_relay,
            misjudged: record.misjudged,
            group_changes: u8::try_from(record.group_changes).unwrap_or(u8::MAX),
            age_s: record.age_s,
        })
    }
}

impl From<ClientExplanation> for proto::ClientExplanation {
    fn from(of: ClientExplanation) -> Self {
        Self {
            record: Some(of.record.into()),
            trials: of.trials.into_iter().map(Into::into).collect(),
            flows: of.flows.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<proto::ClientExplanation> for ClientExplanation {
    type Error = ApiError;

    fn try_from(of: proto::ClientExplanation) -> Result<Self, ApiError> {
        Ok(Self {
            record: of.record.ok_or(ApiError::Incomplete("a client's record"))?.try_into()?,
            trials: of.trials.into_iter().map(Into::into).collect(),
            flows: of.flows.into_iter().map(Into::into).collect(),
        })
    }
}

impl From<FlowExplanation> for proto::FlowExplanation {
    fn from(of: FlowExplanation) -> Self {
        Self { flow: Some(of.flow.into()), real: of.real, route: of.route.map(Into::into) }
    }
}

impl TryFrom<proto::FlowExplanation> for FlowExplanation {
    type Error = ApiError;

    fn try_from(of: proto::FlowExplanation) -> Result<Self, ApiError> {
        let flow = of.flow.ok_or(ApiError::Incomplete("a flow"))?.into();
        Ok(Self { flow, real: of.real, route: of.route.map(Into::into) })
    }
}

impl From<Restored> for proto::ImportClientsResponse {
    fn from(done: Restored) -> Self {
        Self {
            added: done.added as u64,
            already_learned: done.already_learned as u64,
            without_group: done.without_group as u64,
            did_not_fit: done.did_not_fit as u64,
        }
    }
}
