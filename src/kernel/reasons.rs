//! The reasons that the datapath counts, from the same list that it uses (`bpf/reason.h`).

/// One counter of the `counters` map; its place in [`REASONS`] is its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reason {
    /// Name in tables, metrics and docs.
    pub name: &'static str,
    /// Exactly one a packet (a verdict), or any number (a note).
    pub is_verdict: bool,
    /// What it means.
    pub text: &'static str,
}

#[allow(missing_docs, clippy::pedantic)]
mod generated {
    use super::Reason;
    include!(concat!(env!("OUT_DIR"), "/reasons.rs"));
}

pub use generated::REASONS;

#[cfg(test)]
mod tests {
    use super::REASONS;
    use crate::kernel::abi::reason;

    #[test]
    fn the_table_is_the_enum() {
        assert_eq!(REASONS.len(), reason::REASONS.0 as usize);
        assert_eq!(REASONS[reason::REASON_NOT_IP.0 as usize].name, "not_ip");
        assert_eq!(REASONS[reason::REASON_EVENT_LOST_BOUND.0 as usize].name, "event_lost_bound");
        let first_note = REASONS.iter().position(|r| !r.is_verdict).unwrap();
        assert_eq!(first_note, reason::REASON_PUBLISH.0 as usize);
    }
}
