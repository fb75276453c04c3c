//! Whether messages get where they belong: forwarding that goes on to the wrong brokers is not healthy.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::datapath::counts::Counters;
use crate::domain::Problem;

/// How far back it looks.
const WINDOW: Duration = Duration::from_secs(60);
/// Fewer are what a few new clients cost, each its first message.
const LEAST: u64 = 10;
/// The tolerated share is 1/SHARE.
const SHARE: u64 = 100;

/// The datapath's counters at a time.
#[derive(Debug, Clone, Copy)]
struct Sample {
    time: Instant,
    right: u64,
    misrouted: u64,
    lost: u64,
    unjudged: u64,
    /// Packets that the balancer dropped, since it knew no service for their group.
    dropped: u64,
}

/// The last minute's counters.
#[derive(Debug, Default)]
pub struct Misrouting {
    samples: VecDeque<Sample>,
}

impl Misrouting {
    /// Takes the counters of now, and the balancer's of dropped packets. Returns what is wrong.
    pub fn add(&mut self, counters: &Counters, dropped: u64, time: Instant) -> Vec<Problem> {
        let [publish, mispredicted, ended, lost, unjudged] =
            ["publish", "mispredicted", "flow_ended", "publish_lost", "unjudged"]
                .map(|name| counters.get(name));
        // The message that ended its flow counts as mispredicted, too.
        let misrouted = mispredicted.saturating_sub(ended);
        let now = Sample { time, right: publish, misrouted, lost, unjudged, dropped };
        let restarted = |last: &Sample| last.right > now.right || last.dropped > now.dropped;
        if self.samples.back().is_some_and(restarted) {
            // Other maps: they begin at zero.
            self.samples.clear();
        }
        self.samples.push_back(now);
        while self.samples.front().is_some_and(|s| time.duration_since(s.time) > WINDOW) {
            self.samples.pop_front();
        }
        let Some(first) = self.samples.front() else { return Vec::new() };
        let mut problems = Vec::new();
        let dropped = now.dropped.saturating_sub(first.dropped);
        if dropped > 0 {
            problems.push(Problem::new(
                "balancer_misses",
                format!(
                    "in the last minute, the balancer dropped {dropped} packets: the map vip_inner_dst that it uses \
                     has no service for their group's VIP; if it is not the one that `mqtt-fwd` fills, restart the balancer"
                ),
            ));
        }
        let misrouted = now.misrouted.saturating_sub(first.misrouted);
        let lost = now.lost.saturating_sub(first.lost);
        let unjudged = now.unjudged.saturating_sub(first.unjudged);
        let wrong = misrouted + lost + unjudged;
        let all = now.right.saturating_sub(first.right) + wrong;
        if wrong < LEAST || wrong * SHARE <= all {
            return problems;
        }
        problems.push(Problem::new(
            "misrouted",
            format!(
                "of {all} messages in the last minute, {misrouted} were at a broker of another group, {lost} at \
                 none, and {unjudged} stayed with their connection, as too many topics came in a segment; \
                 `mqtt-fwd clients` marks clients with several groups, which take a relay"
            ),
        ));
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::reasons::REASONS;

    fn counters(values: &[(&str, u64)]) -> Counters {
        let value = |name: &str| values.iter().find(|(n, _)| *n == name).map_or(0, |(_, v)| *v);
        Counters::of(REASONS.iter().map(|reason| value(reason.name)).collect())
    }

    #[test]
    fn more_than_one_in_a_hundred_is_said_for_a_minute() {
        let mut misrouting = Misrouting::default();
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        assert_eq!(misrouting.add(&counters(&[("publish", 1000)]), 0, at(0)), []);
        // Each flow that was ended had one mispredicted message: 9 are few, 10 of 1,000 allowed.
        let few = counters(&[("publish", 1009), ("mispredicted", 14), ("flow_ended", 5)]);
        assert_eq!(misrouting.add(&few, 0, at(1)), []);
        let allowed = counters(&[("publish", 1990), ("mispredicted", 15), ("flow_ended", 5)]);
        assert_eq!(misrouting.add(&allowed, 0, at(2)), []);
        let more = counters(&[("publish", 1990), ("mispredicted", 15), ("flow_ended", 4)]);
        let problem = misrouting.add(&more, 0, at(3)).remove(0);
        assert!(problem.text.contains("of 1001 messages in the last minute, 11 were"), "{problem}");
        assert_eq!(misrouting.add(&more, 0, at(64)), []);
        // Whatever was not judged may be anywhere.
        let unjudged = counters(&[("publish", 2000), ("mispredicted", 15), ("unjudged", 60)]);
        let problem = misrouting.add(&unjudged, 0, at(66)).remove(0);
        assert!(problem.text.contains("60 stayed with their connection"), "{problem}");
        // New maps count from zero.
        assert_eq!(misrouting.add(&counters(&[("publish", 5)]), 7, at(67)), []);
        // A packet that the balancer drops is one too many.
        let dropped = misrouting.add(&counters(&[("publish", 6)]), 8, at(68)).remove(0);
        assert!(dropped.text.contains("dropped 1 packets"), "{dropped}");
        assert_eq!(misrouting.add(&counters(&[("publish", 6)]), 8, at(130)), []);
    }
}
