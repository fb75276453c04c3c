//! What the process itself takes (proc(5)), by the names that Prometheus' own client libraries use.

use std::fs;

use super::{Family, number};

/// Fields of /proc/self/stat behind the command, which may have spaces in it: state is the first.
const UTIME: usize = 11;
const STIME: usize = 12;
const START: usize = 19;

fn sysconf(name: libc::c_int) -> f64 {
    // SAFETY: it has no preconditions.
    unsafe { libc::sysconf(name) as f64 }
}

/// What can be read of it.
pub fn families() -> Vec<Family> {
    let mut all = Vec::new();
    let mut gauge = |name, help, value: Option<f64>| {
        all.extend(value.map(|value| Family::gauge(name, help).with(&[], value)));
    };
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<f64> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().map(|n| n.parse().unwrap_or(0.0)).collect())
        .unwrap_or_default();
    let field = |at: usize| fields.get(at).copied();
    let ticks = sysconf(libc::_SC_CLK_TCK);
    let boot = fs::read_to_string("/proc/stat").ok().and_then(|text| {
        text.lines().find_map(|line| line.strip_prefix("btime ")?.parse::<f64>().ok())
    });
    gauge(
        "process_start_time_seconds",
        "When the process was started, seconds since 1970",
        boot.zip(field(START)).map(|(boot, start)| boot + start / ticks),
    );
    let resident = fs::read_to_string("/proc/self/statm").ok();
    let resident = resident.and_then(|text| text.split_whitespace().nth(1)?.parse::<f64>().ok());
    gauge(
        "process_resident_memory_bytes",
        "Memory of the process, without that of its maps",
        resident.map(|pages| pages * sysconf(libc::_SC_PAGESIZE)),
    );
    gauge(
        "process_open_fds",
        "Open file descriptors",
        fs::read_dir("/proc/self/fd").ok().map(|all| number(all.count() as u64)),
    );
    if let Some((user, system)) = field(UTIME).zip(field(STIME)) {
        let help = "CPU time of the process, without that of XDP programs";
        let cpu = Family::counter("process_cpu_seconds", help);
        all.push(cpu.with(&[], (user + system) / ticks));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_it_is_known_here() {
        let text = super::super::text(families());
        for name in ["cpu_seconds_total", "resident_memory_bytes", "open_fds", "start_time_seconds"]
        {
            let value =
                text.lines().find_map(|line| line.strip_prefix(&format!("process_{name} ")));
            assert!(value.is_some_and(|n| n.parse::<f64>().unwrap() >= 0.0), "{name}: {text}");
        }
    }
}
