//! Delayed binding in the lab: real TCP stacks and real brokers.

mod checks;
mod clients;
mod loss;
mod routes;
mod trouble;

use crate::support::lab::{Lab, ONE_REAL_EACH, config};
use crate::support::session::{SERVICE, SERVICE6, STYLES, Session, run_all};
use mqtt_fwd::kernel::takeover;

/// A lab whose services bind late; `None` where this kernel cannot take connections over.
fn delayed(routes: &[(&str, &str)]) -> Option<Lab> {
    if !takeover::supported() {
        eprintln!("skipped: this kernel has no bpf_sk_assign_tcp_reqsk (Linux 6.9)");
        return None;
    }
    let text = config(ONE_REAL_EACH, routes).replace("flows = 1000", "flows = 10000");
    Some(Lab::up(&text, &["--delayed"]))
}

const ROUTES: &[(&str, &str)] = &[("m/temp", "a"), ("m/hum", "b"), ("birth/#", "any")];

/// Topics and the reals of their groups.
const TOPICS: [(&str, u32); 3] = [("m/temp", 1), ("m/hum", 2), ("m/other", 3)];

/// Each message of these sessions is where its topic belongs: once, or with QoS 1 at least once.
fn all_right(lab: &Lab, sessions: &[Session]) {
    let messages: Vec<_> = sessions.iter().flat_map(|s| &s.messages).collect();
    let all = lab.arrivals_of(&messages);
    for session in sessions {
        let real = TOPICS.iter().find(|(topic, _)| *topic == session.topic).unwrap().1;
        for message in &session.messages {
            let at = &all[message];
            assert!(at.iter().all(|r| *r == real), "{message}: {at:?} instead of {real}");
            assert!(session.qos == 1 || at.len() == 1, "{message} {} times", at.len());
        }
    }
}

/// Sessions of all styles and topics, IPv4 and IPv6, with and without client ids.
fn sessions(tag: &str, count: usize, messages: usize, qos: u8) -> Vec<Session> {
    (0..count)
        .map(|i| {
            let service = if i % 2 == 0 { SERVICE } else { SERVICE6 };
            let (topic, _) = TOPICS[i % TOPICS.len()];
            // A third has no id; the others are known the next time.
            let id = if i % 3 == 2 { String::new() } else { format!("d{qos}-{i}") };
            Session {
                style: STYLES[(i / 3) % 3],
                topic: topic.to_owned(),
                messages: (0..messages).map(|m| format!("{tag}-{i}-{m}")).collect(),
                qos,
                ..Session::new("c1", service, &id)
            }
        })
        .collect()
}

fn expect_all(results: &[std::io::Result<()>]) {
    let failed: Vec<_> =
        results.iter().enumerate().filter_map(|(i, r)| r.as_ref().err().map(|e| (i, e))).collect();
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn every_message_of_every_kind_of_client_is_where_its_topic_belongs_once() {
    let Some(lab) = delayed(ROUTES) else { return };
    for (tag, qos) in [("zero", 0), ("one", 1), ("zero-again", 0), ("one-again", 1)] {
        let sessions = sessions(tag, 150, 5, qos);
        expect_all(&run_all(&lab, &sessions, 8));
        all_right(&lab, &sessions);
    }
    let counters = lab.mqtt_fwd(&["counters"]);
    for way in ["bound_message", "bound_client_id", "bound_answered"] {
        assert!(counters.contains(way), "{counters}");
    }
    assert!(!counters.contains("mispredicted"), "{counters}");
}
