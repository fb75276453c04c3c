//! Connections that brokers do not take over: their clients wait, while all else looks well.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use crate::config::Config;
use crate::datapath::Datapath;
use crate::datapath::names::Names;
use crate::domain::Problem;
use crate::handover::HOST_ADVICE;
use crate::kernel;

/// In seconds: how long TCP repeats before it is a problem, and for how long it is one if nobody else comes.
const AGE: RangeInclusive<u64> = 2..=30;

/// A problem for each group that has such connections.
pub fn problems(config: &Config, datapath: &Datapath) -> kernel::Result<Vec<Problem>> {
    if !config.uses_delayed_binding() {
        return Ok(Vec::new());
    }
    let stuck = datapath.stuck_handovers(&Names::read(config, datapath)?, AGE)?;
    let mut groups: BTreeMap<(String, String), usize> = BTreeMap::new();
    for one in stuck {
        *groups.entry((one.service, one.group)).or_default() += 1;
    }
    let hosts = |service: &str, group: &str| {
        let service = config.services.iter().find(|s| s.name == service);
        let reals =
            service.and_then(|s| s.group(group)).map(|g| g.reals.as_slice()).unwrap_or_default();
        reals.iter().map(|real| real.addr.to_string()).collect::<Vec<_>>().join(", ")
    };
    let problem = |((service, group), count): ((String, String), usize)| {
        let text = format!(
            "{count} connections that were given to group {group} ({service}) are not taken over there, and their \
             clients wait: on {}, {HOST_ADVICE}",
            hosts(&service, &group)
        );
        Problem::new("handover_stuck", text)
    };
    Ok(groups.into_iter().map(problem).collect())
}
