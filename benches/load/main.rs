//! A load generator and a sink for MQTT: `mqtt-load publish` sends by the clock, whatever becomes of
//! what it sent before (open loop), and `mqtt-load sink` is a broker that only counts. Every message
//! carries when it was due, so the sink's latencies have no coordinated omission in them.

mod publish;
mod sink;

use clap::Parser;

#[derive(Debug, Parser)]
#[command(name = "mqtt-load", about = "Publishes by the clock, and counts what arrives")]
enum Cli {
    /// Open connections, and publish over all of them in turn
    Publish(publish::Publish),
    /// Take connections and count messages; prints a line of JSON at SIGTERM
    Sink(sink::Sink),
}

fn main() -> std::io::Result<()> {
    match Cli::parse() {
        Cli::Publish(args) => args.run(),
        Cli::Sink(args) => args.run(),
    }
}

/// Nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share.
fn now_ns() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .expect("CLOCK_MONOTONIC is always there");
    time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
}
