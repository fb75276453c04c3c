//! A wire that loses, doubles and delays segments, step by step and at random.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{ROUTES, all_right, delayed, expect_all, sessions};
use crate::support::lab::{Lab, ONE_REAL_EACH, config};
use crate::support::session::run_all;
use crate::support::wire::{Fate, Kind, Seen, Wire};

/// The nth segment of a kind of each connection.
pub fn nth_of_kind(
    kind: Kind,
    wrapped: bool,
    fate: Fate,
) -> Box<dyn FnMut(Option<Seen>) -> Fate + Send> {
    let mut met = HashSet::new();
    Box::new(move |seen| match seen {
        Some(s) if s.kind == kind && s.wrapped == wrapped && met.insert(s.port) => fate,
        _ => Fate::Pass,
    })
}

#[test]
fn each_step_may_be_lost_doubled_or_late() {
    let Some(lab) = delayed(ROUTES) else { return };
    type Rule = Box<dyn FnMut(Option<Seen>) -> Fate + Send>;
    let rules: [Arc<Mutex<Rule>>; 2] =
        std::array::from_fn(|_| Arc::new(Mutex::new(Box::new(|_| Fate::Pass) as Rule)));
    let by = |rule: &Arc<Mutex<Rule>>| -> Rule {
        let rule = rule.clone();
        Box::new(move |seen| (rule.lock().unwrap())(seen))
    };
    let _client = Wire::of_client(&lab, "c1", by(&rules[0]));
    let _balancer = Wire::of_balancer(&lab, by(&rules[1]));
    let steps = [
        ("SYN", 0, Kind::Syn, false),
        ("SYN-ACK", 0, Kind::SynAck, false),
        ("ACK", 0, Kind::Ack, false),
        ("CONNECT", 0, Kind::Connect, false),
        ("CONNECT and more", 0, Kind::ConnectAndMore, false),
        ("CONNACK", 0, Kind::Connack, false),
        ("PUBLISH", 0, Kind::Publish, false),
        ("PUBACK", 0, Kind::Puback, false),
        ("FIN", 0, Kind::Fin, false),
        ("CONNECT to the broker", 1, Kind::Connect, true),
        ("hand-over", 1, Kind::ConnectAndMore, true),
        ("PUBLISH to the broker", 1, Kind::Publish, true),
        ("ACK to the broker", 1, Kind::Ack, true),
    ];
    let fates = [
        ("lost", Fate::Lost),
        ("doubled", Fate::Twice),
        ("late", Fate::Late(Duration::from_millis(40))),
    ];
    for (step, wire, kind, wrapped) in steps {
        for (what, fate) in fates {
            *rules[wire].lock().unwrap() = nth_of_kind(kind, wrapped, fate);
            let mut all = Vec::new();
            for qos in [0, 1] {
                all.extend(sessions(&format!("{kind:?}{wrapped}{what}{qos}"), 18, 3, qos));
            }
            let results = run_all(&lab, &all, 36);
            *rules[wire].lock().unwrap() = Box::new(|_| Fate::Pass);
            for (session, result) in all.iter().zip(&results) {
                assert!(result.is_ok(), "{step} {what}: {result:?} {session:?}");
            }
            all_right(&lab, &all);
        }
    }
}

#[test]
fn a_thousand_connections_through_random_loss() {
    let Some(lab) = delayed(ROUTES) else { return };
    let percent = Arc::new(Mutex::new(0u32));
    // What happened, should something go wrong.
    type History = Arc<Mutex<Vec<(Instant, u64, Seen, Fate)>>>;
    let history = History::default();
    let rule = |percent: &Arc<Mutex<u32>>, mut state: u64| {
        let (percent, history, wire) = (percent.clone(), history.clone(), state);
        let mut fate = move || {
            // xorshift (Marsaglia): the same losses each time.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            match state % 300 {
                n if n < u64::from(*percent.lock().unwrap()) * 3 => {
                    [Fate::Lost, Fate::Lost, Fate::Twice, Fate::Late(Duration::from_millis(20))]
                        [(state >> 32) as usize % 4]
                }
                _ => Fate::Pass,
            }
        };
        Box::new(move |seen: Option<Seen>| {
            let fate = fate();
            if let Some(seen) = seen {
                history.lock().unwrap().push((Instant::now(), wire, seen, fate));
            }
            fate
        })
    };
    let _client = Wire::of_client(&lab, "c1", rule(&percent, 1883));
    let _balancer = Wire::of_balancer(&lab, rule(&percent, 8883));
    for (share, count) in [(1, 1000), (5, 400), (10, 200)] {
        for round in 0..2 {
            *percent.lock().unwrap() = share;
            let mut all = sessions(&format!("loss{share}q1r{round}"), count / 4, 3, 1);
            all.extend(sessions(&format!("loss{share}q0r{round}"), count / 4, 3, 0));
            let results = run_all(&lab, &all, 64);
            *percent.lock().unwrap() = 0;
            for error in results.iter().filter_map(|r| r.as_ref().err()) {
                let text = error.to_string();
                let port = text.strip_prefix("port ").and_then(|t| t.split(':').next());
                for (at, wire, seen, fate) in history.lock().unwrap().iter() {
                    if port.is_some_and(|port| port == seen.port.to_string()) {
                        println!("{:?} {wire} {fate:?} {seen:?}", at.elapsed());
                    }
                }
            }
            expect_all(&results);
            all_right(&lab, &all);
            history.lock().unwrap().clear();
        }
        println!("{share} %: {count} connections, all messages right");
    }
}

/// What comes behind a lost first message is of a connection that no broker has, nor the store: in a fleet, too, it is
/// waited for.
#[test]
fn a_fleet_waits_for_a_lost_first_message() {
    let text = config(ONE_REAL_EACH, ROUTES).replace("vips = 16", "vips = 32");
    let lab = Lab::up(&text, &["--balancers", "2", "--delayed", "--store"]);
    let mut met = HashSet::new();
    let rule = move |seen: Option<Seen>| match seen {
        Some(s) if s.kind == Kind::Publish && met.insert(s.port) => {
            if s.port % 2 == 0 {
                Fate::Lost
            } else {
                Fate::Late(Duration::from_millis(80))
            }
        }
        _ => Fate::Pass,
    };
    let _wire = Wire::of_client(&lab, "c1", Box::new(rule));
    let mut all = sessions("fleet-0", 36, 5, 0);
    all.extend(sessions("fleet-1", 36, 5, 1));
    expect_all(&run_all(&lab, &all, 18));
    all_right(&lab, &all);
}
