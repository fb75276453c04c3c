//! Problems, for people and for programs.

use std::fmt;

/// A problem: its code stays the same from release to release, its text need not.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// One of [`CODES`].
    pub code: String,
    /// The problem, and what to do about it.
    pub text: String,
}

impl Problem {
    /// Whether this host forwards regardless: the fault lies behind it, and is the same from any other
    /// balancer, or is about what comes next.
    pub fn is_elsewhere(&self) -> bool {
        ELSEWHERE.contains(&self.code.as_str())
    }

    /// Whether anybody can look for it, so that what `run` found a moment ago need not be so any more.
    pub fn is_seen_from_outside(&self) -> bool {
        SEEN_FROM_OUTSIDE.contains(&self.code.as_str())
    }

    /// Of a code and a text.
    pub fn new(code: &str, text: impl Into<String>) -> Self {
        debug_assert!(CODES.iter().any(|(known, _)| *known == code), "{code}");
        Self { code: code.to_owned(), text: text.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Codes of faults that this host forwards regardless of.
pub const ELSEWHERE: [&str; 11] = [
    "real_down",
    "certificate_expires",
    "not_checked",
    "misrouted",
    "handover_stuck",
    "handover_key",
    "reload_refused",
    "test_failed",
    "real_not_answering",
    "store_unreachable",
    "fleet_differs",
];

/// Codes of what any process of this host finds by looking; of the others, only `run` knows.
const SEEN_FROM_OUTSIDE: [&str; 13] = [
    "chain_missing",
    "chain_unreadable",
    "root_missing",
    "root_foreign",
    "mqtt_fwd_missing",
    "balancer_missing",
    "balancer_unpatched",
    "balancer_orphaned",
    "balancer_unreachable",
    "balancer_differs",
    "several_servers",
    "service_not_in_force",
    "run_not_answering",
];

/// All codes, with what they mean.
pub const CODES: [(&str, &str); 31] = [
    ("chain_missing", "the program array is not pinned"),
    ("chain_unreadable", "the program array cannot be read"),
    ("root_missing", "no XDP program is on the interface, or there is no interface"),
    ("root_foreign", "the XDP program on the interface does not use the chain"),
    ("mqtt_fwd_missing", "mqtt_fwd is not in its position"),
    ("balancer_missing", "no program is in the balancer's position"),
    ("balancer_unpatched", "the balancer does not put service addresses back"),
    ("balancer_orphaned", "the program in the balancer's position is of a server that is gone"),
    ("balancer_unreachable", "the balancer does not answer"),
    ("balancer_differs", "the balancer holds something else than is configured, or refuses it"),
    ("balancer_misses", "the balancer dropped packets of groups, as it knew no service for them"),
    ("several_servers", "several servers listen at the balancer's address"),
    ("service_not_in_force", "a service of the configuration is not in force"),
    ("gateway_unknown", "the gateway towards the reals is not known"),
    (
        "gateway_differs",
        "the balancer sends to another gateway than this host has towards the reals, and no check says that it works",
    ),
    ("run_not_answering", "`run` is there and does not answer"),
    ("apply_failed", "the configuration could not be applied"),
    ("real_down", "a real's checks fail"),
    ("certificate_expires", "a real shows a certificate that expires within 14 days"),
    (
        "real_not_answering",
        "a broker host does not answer a fleet's questions: its connections stall if they move here",
    ),
    (
        "fleet_not_asking",
        "connections that move here from other balancers are not asked for, and stall",
    ),
    (
        "hellos_not_read",
        "TLS clients whose server name comes in a second segment are bound without it",
    ),
    ("store_unreachable", "a fleet's store does not answer"),
    ("fleet_differs", "another balancer of the fleet is configured otherwise"),
    (
        "fleet_key_missing",
        "another balancer of the fleet uses a handover key that this one has not",
    ),
    ("not_checked", "checks of reals cannot be made"),
    ("handover_stuck", "brokers do not take over connections that they were given"),
    ("handover_key", "the handover key file cannot be used; the keys from before are"),
    (
        "reload_refused",
        "the configuration file was changed and refused: it is not what is in force",
    ),
    (
        "test_failed",
        "messages of the last test (`test_interval`) were lost, or it could not be made",
    ),
    (
        "misrouted",
        "more than 1 % of the last minute's messages, and 10, were not at their group's brokers, or not judged",
    ),
];
