//! An MQTT load generator and sink. `mqtt-load publish` is an open loop, `mqtt-load sink` a broker that
//! only counts. Messages carry the time they were due, so latencies are free of coordinated omission.

#[path = "../../tests/support/mqtt.rs"]
#[allow(dead_code)]
mod mqtt;
mod publish;
mod sink;

use clap::Parser;

#[derive(Debug, Parser)]
#[command(name = "mqtt-load", about = "Publishes by the clock, and counts what arrives")]
enum Cli {
    /// Publish over many connections, at a fixed rate
    Publish(publish::Publish),
    /// Accept connections and count messages; prints JSON at SIGTERM, and at SIGUSR1 with latencies since the last
    Sink(sink::Sink),
}

fn main() -> std::io::Result<()> {
    match Cli::parse() {
        Cli::Publish(args) => args.run(),
        Cli::Sink(args) => args.run(),
    }
}

/// Moves this thread into a named network namespace; "": stays.
fn enter(namespace: &str) -> std::io::Result<()> {
    if namespace.is_empty() {
        return Ok(());
    }
    let file = std::fs::File::open(format!("/run/netns/{namespace}"))?;
    nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET)?;
    Ok(())
}

/// Nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share.
fn now_ns() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .expect("CLOCK_MONOTONIC is always there");
    time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
}
