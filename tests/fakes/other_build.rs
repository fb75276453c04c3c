//! Loads `mqtt_fwd` as a build with other types would: a flow and a client have a field more, and
//! all others lie elsewhere. What it loads over is moved, and what loads over it later moves it
//! back: an upgrade, and a downgrade.
//!
//! `other-build` reads MQTT_FWD_CONFIG, as mqtt-fwd does, and makes the maps of flows and clients
//! twice as large.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use libbpf_rs::ObjectBuilder;
use mqtt_fwd::config::Config;
use mqtt_fwd::kernel::load;

#[path = "edited.rs"]
mod edited;

fn main() -> Result<()> {
    mqtt_fwd::telemetry::init("info", mqtt_fwd::telemetry::Format::Text)
        .map_err(anyhow::Error::msg)?;
    let path = std::env::var_os("MQTT_FWD_CONFIG").context("MQTT_FWD_CONFIG is not set")?;
    let mut spec = Config::load(Path::new(&path))?.load_spec();
    spec.maps.flows *= 2;
    spec.maps.clients *= 2;
    let dir = tempfile::tempdir()?;
    let object = compile(dir.path())?;
    let loaded = load::load_build(&spec, ObjectBuilder::default().open_file(&object)?)?;
    println!("{:?}", loaded.moved);
    Ok(())
}

/// A copy of `bpf/` in `dir`, with other types.
fn compile(dir: &Path) -> Result<PathBuf> {
    let edits = [
        ("struct flow {\n", "struct flow {\n\t__u64 new_in_front;\n"),
        ("SIZE_IS(struct flow, 128)", "SIZE_IS(struct flow, 136)"),
        // Which is what it is for.
        (
            "_Static_assert(__builtin_offsetof(struct flow, candidate_start) == 64",
            "_Static_assert(1",
        ),
        ("struct client {\n", "struct client {\n\t__u64 new_in_front;\n"),
        ("SIZE_IS(struct client, 40)", "SIZE_IS(struct client, 48)"),
    ];
    edited::compile(dir, "forward/mqtt_fwd", "abi/state.h", &edits)
}
