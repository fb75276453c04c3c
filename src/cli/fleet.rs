//! `fleet`: who is in it, who answers, and what became of connections of other balancers.

use super::error::Error;
use super::from_run_or;
use super::table::{self, Output, line};
use crate::config::Config;
use crate::inspect::fleet::FleetStatus;

pub fn fleet(config: &Config, output: Output) -> Result<(), Error> {
    if config.fleet.is_none() {
        return Err(Error::NoFleet);
    }
    let status =
        from_run_or(config, async |mut run| Ok(run.status().await?.fleet), async || Ok(None))?;
    let Some(fleet) = status else { return Err(Error::NoRun) };
    if output.json {
        table::json(&fleet);
    } else {
        print(&fleet);
    }
    Ok(())
}

fn print(fleet: &FleetStatus) {
    let store = match (&fleet.store, &fleet.store_error) {
        (None, _) => "no store: connections whose CONNECT was just answered are reset if they move"
            .to_owned(),
        (Some(address), None) => format!("store {address}: answers"),
        (Some(_), Some(error)) => format!("store {error}"),
    };
    line(&format!("{}: {store}", fleet.name));
    line("");
    table::print(
        &["member", "version", "differs"],
        fleet.members.iter().map(|member| {
            let mut differs = member.differences.clone();
            differs.extend(member.missing_key.iter().map(|key| format!("uses key {key}")));
            let differs = if differs.is_empty() { "-".to_owned() } else { differs.join("; ") };
            vec![member.name.clone(), member.version.clone(), differs]
        }),
    );
    line("");
    table::print(
        &["real", "state", ">questions", ">answers"],
        fleet.reals.iter().map(|real| {
            let answers = if real.answers { "answers" } else { "DOES NOT ANSWER" };
            let numbers = [real.questions, real.answered].map(|n| n.to_string());
            [&[real.real.clone(), answers.to_owned()][..], &numbers].concat()
        }),
    );
    line("");
    let rows = [
        ("at reals", fleet.found),
        ("in the store", fleet.stored),
        ("nowhere", fleet.nowhere),
        ("not found out in time", fleet.unanswered),
    ];
    table::print(
        &["connections of other balancers", ">count"],
        rows.into_iter().map(|(what, count)| vec![what.to_owned(), count.to_string()]),
    );
    let all = fleet.times.last().map_or(0, |time| time.count);
    if let Some(mean) = fleet.mean_s
        && let Some(ms) = fleet.times.iter().find(|time| time.within_s >= 0.001)
    {
        line("");
        line(&format!(
            "found out after {:.2} ms on average, {:.1} % within 1 ms",
            mean * 1000.0,
            100.0 * ms.count as f64 / all.max(1) as f64
        ));
    }
}
