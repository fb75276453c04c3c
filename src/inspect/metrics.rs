//! What `run` measures of datapath, balancer and itself.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::balancer::client::{BalancerError, Client};
use crate::config::Config;
use crate::connectivity::Outcome;
use crate::datapath::Datapath;
use crate::datapath::clients::multi_group_count;
use crate::domain::problem::CODES;
use crate::domain::{Health, Problem};
use crate::handover::keys::{KeyFile, now};
use crate::inspect::fleet;
use crate::inspect::overview::group_traffic;
use crate::kernel::pins::{PROGRAMS, Pins};
use crate::kernel::{chain, driver};
use crate::metrics::{Family, Source, build_info, number};
use crate::state::{Observed, State};

/// Everything that is asked at a scrape.
#[derive(Debug)]
pub struct Metrics(pub State);

impl Source for Metrics {
    async fn families(&self) -> Vec<Family> {
        let config = self.0.config();
        let mut all = vec![build_info()];
        all.extend(self.sidecar());
        all.extend(self.own(&config));
        all.extend(self.checks(&config));
        all.extend(self.fleet());
        all.extend(balancer(&config).await);
        let observed = Arc::clone(&self.0.observed);
        let datapath =
            tokio::task::spawn_blocking(move || (datapath(&config, &observed), programs(&config)))
                .await;
        if let Ok((datapath, programs)) = datapath {
            all.extend(datapath);
            all.extend(programs);
        }
        all
    }

    fn health(&self) -> (bool, Vec<String>) {
        let problems = self.0.observed.problems();
        let usable = problems.iter().all(Problem::is_elsewhere);
        (usable, problems.into_iter().map(|problem| problem.text).collect())
    }
}

impl Metrics {
    fn sidecar(&self) -> Vec<Family> {
        let o = &self.0.observed;
        let problems = o.problems();
        let mut codes = Family::gauge("problem", "1: there is a problem of this code");
        for (code, _) in CODES {
            let there = problems.iter().any(|problem| problem.code == code);
            codes.push(&[("code", code)], u32::from(there));
        }
        vec![
            Family::gauge("problems", "Problems at present; `mqtt-fwd status` names them")
                .with(&[], number(problems.len() as u64)),
            codes,
            Family::counter("reconciliations", "Comparisons with the balancer, by result")
                .with(&[("result", "ok")], number(o.reconciled.get()))
                .with(&[("result", "failed")], number(o.failed.get())),
            Family::counter("repairs", "Times that something removed by others was put back")
                .with(&[("what", "chain")], number(o.chain_repairs.get()))
                .with(&[("what", "balancer")], number(o.balancer_repairs.get())),
            Family::counter("rescues", "Messages of misrouted clients, by what became of them")
                .with(&[("result", "published")], number(o.rescued.get()))
                .with(&[("result", "lost")], number(o.rescue_lost.get()))
                .with(&[("result", "left_to_client")], number(o.rescue_left.get())),
        ]
    }

    /// What `run` last did by itself or was told: reloads, tests, keys.
    fn own(&self, config: &Config) -> Vec<Family> {
        let mut all = Vec::new();
        let mut gauge =
            |name, help, value: f64| all.push(Family::gauge(name, help).with(&[], value));
        if let Some(reloaded) = self.0.observed.reloaded() {
            let taken = u32::from(reloaded.refused.is_none());
            let help = "1: the file was taken over when it was last read again; 0: it was refused";
            gauge("config_last_reload_successful", help, taken.into());
            let help = "When that was, seconds since 1970";
            gauge("config_last_reload_timestamp_seconds", help, seconds(reloaded.when));
        }
        if config.uses_delayed_binding()
            && let Ok(file) = KeyFile::read(&config.handover_key)
        {
            let help = "Epoch of the handover key in use";
            gauge("handover_key_epoch", help, file.in_use(now()).epoch.into());
        }
        let Some(test) = self.0.observed.tested() else { return all };
        let help =
            "When messages were last sent to every broker (test_interval), seconds since 1970";
        gauge("test_timestamp_seconds", help, seconds(test.when));
        let mut messages =
            Family::gauge("test_messages", "Messages of that test, by what became of them");
        let tested = test.result.unwrap_or_default();
        for (label, outcome) in
            [("arrived", Outcome::Arrived), ("lost", Outcome::Lost), ("not_sent", Outcome::NotSent)]
        {
            let count = tested.iter().filter(|one| one.outcome == outcome).count();
            messages.push(&[("outcome", label)], number(count as u64));
        }
        all.push(messages);
        all
    }

    /// What was asked for in a fleet; nothing without one.
    fn fleet(&self) -> Vec<Family> {
        let Some(fleet) = fleet::of_run(&self.0) else { return Vec::new() };
        let mut connections = Family::counter(
            "fleet_connections",
            "Connections of other balancers that were asked for, by where they were",
        );
        for (place, count) in [
            ("real", fleet.found),
            ("store", fleet.stored),
            ("nowhere", fleet.nowhere),
            ("unanswered", fleet.unanswered),
        ] {
            connections.push(&[("place", place)], number(count));
        }
        let mut within = Family::counter(
            "fleet_found_within",
            "Those that were found out within so many seconds of their segment",
        );
        for time in &fleet.times {
            let seconds = time.within_s.to_string().replace("inf", "+Inf");
            within.push(&[("seconds", &seconds)], number(time.count));
        }
        let mut answers =
            Family::gauge("fleet_real_answers", "1: the broker host answers questions");
        for real in &fleet.reals {
            answers.push(&[("real", &real.real)], u32::from(real.answers));
        }
        let lost = "Segments that were not held, as there were too many, or not sent on";
        let mut all = vec![
            connections,
            within,
            answers,
            Family::gauge("fleet_members", "Other balancers that are known")
                .with(&[], number(fleet.members.len() as u64)),
            Family::counter("fleet_segments_dropped", lost)
                .with(&[], number(fleet.not_held + fleet.failed)),
        ];
        if fleet.store.is_some() {
            all.push(
                Family::gauge("fleet_store_up", "1: the fleet's store answers")
                    .with(&[], u32::from(fleet.store_error.is_none())),
            );
        }
        all
    }

    fn checks(&self, config: &Config) -> Vec<Family> {
        let mut up = Family::gauge("real_up", "1: the real's checks succeed; 0: they fail");
        let mut used = Family::gauge("real_in_use", "1: the real gets new connections");
        let mut expires = Family::gauge(
            "real_certificate_expiry_seconds",
            "When the first of the certificates expires that the real shows, in Unix time",
        );
        for real in self.0.reals.list(config) {
            let addr = real.addr.to_string();
            let labels =
                [("service", &*real.service), ("group", &*real.group), ("real", addr.as_str())];
            match real.health {
                Health::Unchecked => {}
                Health::Up => up.push(&labels, 1),
                Health::Down(_) => up.push(&labels, 0),
            }
            used.push(&labels, u32::from(real.effective_weight > 0));
            if let Some(at) = real.certificate_expires {
                expires.push(&labels, seconds(at));
            }
        }
        vec![up, used, expires]
    }
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn datapath(config: &Config, observed: &Observed) -> Vec<Family> {
    let Ok(datapath) = Datapath::open(&config.pins()) else { return Vec::new() };
    let mut packets = Family::counter("packets", "Packets by what became of them");
    let mut notes = Family::counter("events", "What else the datapath met, by reason");
    for (reason, count) in datapath.counters().unwrap_or_default().iter() {
        if reason.is_verdict {
            packets.push(&[("verdict", reason.name)], number(count));
        } else {
            notes.push(&[("reason", reason.name)], number(count));
        }
    }
    let mut entries = Family::gauge("map_entries", "Entries in use of a map");
    let mut capacity = Family::gauge("map_capacity", "Entries that a map can have");
    let mut evicted = Family::counter("map_evictions", "Entries that gave way to others");
    for map in datapath.map_uses().unwrap_or_default() {
        let labels = [("map", map.map.as_str())];
        entries.push(&labels, number(map.used));
        capacity.push(&labels, map.capacity);
        evicted.push(&labels, number(observed.evicted(&map.map, map.evicted)));
    }
    let mut all = vec![packets, notes, entries, capacity, evicted];
    if let Ok(count) = multi_group_count(&datapath) {
        let help = "Clients that publish to several groups in turn";
        all.push(Family::gauge("multi_group_clients", help).with(&[], number(count)));
    }
    if let Some(misses) = chain::balancer_misses(&config.pins()) {
        let help = "Packets of groups that the balancer dropped, as it knew no service for them";
        all.push(Family::counter("balancer_misses", help).with(&[], number(misses)));
    }
    if let Some(traffic) = chain::real_traffic(&config.pins()) {
        let mut packets =
            Family::counter("real_packets", "Packets to a real, by the balancer's count");
        let mut bytes = Family::counter("real_bytes", "Their bytes");
        let groups = config.services.iter().flat_map(|service| &service.groups);
        let reals: BTreeSet<IpAddr> =
            groups.flat_map(|group| &group.reals).map(|real| real.addr).collect();
        for (real, sum) in traffic.into_iter().filter(|(real, _)| reals.contains(real)) {
            let real = real.to_string();
            packets.push(&[("real", &real)], number(sum.0));
            bytes.push(&[("real", &real)], number(sum.1));
        }
        all.extend([packets, bytes]);
    }
    if let Ok(generation) = datapath.generation() {
        let help = "Generation of services and routes in force";
        all.push(Family::gauge("generation", help).with(&[], generation));
    }
    all
}

/// Time in our programs, where the kernel measures it (sysctl kernel.bpf_stats_enabled), and what the
/// driver could not send.
fn programs(config: &Config) -> Vec<Family> {
    let pins: Pins = config.pins();
    let mut runs =
        Family::counter("bpf_runs", "Runs of a program, if kernel.bpf_stats_enabled is 1");
    let mut time = Family::counter("bpf_run_seconds", "Time in a program, with what it calls");
    for name in PROGRAMS {
        if let Some((_, info)) = pins.pinned_program(name)
            && info.runs > 0
        {
            runs.push(&[("program", name)], number(info.runs));
            time.push(&[("program", name)], info.run_time.as_secs_f64());
        }
    }
    let mut driver_counts = Family::counter(
        "driver_xdp",
        "The interface driver's own XDP counters (ethtool -S), summed over queues",
    );
    for (name, count) in driver::xdp_counters(&config.interface).unwrap_or_default() {
        driver_counts.push(&[("counter", &name)], number(count));
    }
    vec![runs, time, driver_counts]
}

/// Packets and bytes of each group, as the balancer counts them.
async fn balancer(config: &Config) -> Vec<Family> {
    let mut up = Family::gauge("balancer_up", "1: the balancer answers");
    let mut packets =
        Family::counter("group_packets", "Packets of a group, by the balancer's count");
    let mut bytes = Family::counter("group_bytes", "Their bytes");
    let asked = async {
        let mut client = Client::connect(&config.balancer_endpoint).await?;
        for service in &config.services {
            for group in &service.groups {
                let sum = group_traffic(&mut client, service, group).await?;
                let labels = [("service", &*service.name), ("group", &*group.name)];
                packets.push(&labels, number(sum.0));
                bytes.push(&labels, number(sum.1));
            }
        }
        Ok::<(), BalancerError>(())
    };
    let answers = asked.await.is_ok();
    up.push(&[], u32::from(answers));
    vec![up, packets, bytes]
}
