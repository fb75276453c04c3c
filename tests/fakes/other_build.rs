//! Loads `mqtt_fwd` as a build with other types would: a flow and a client have a field more, and
//! all others lie elsewhere. What it loads over is moved, and what loads over it later moves it
//! back: an upgrade, and a downgrade.
//!
//! `other-build` reads MQTT_FWD_CONFIG, as mqtt-fwd does, and makes the maps of flows and clients
//! twice as large.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use libbpf_rs::ObjectBuilder;
use mqtt_fwd::config::Config;
use mqtt_fwd::kernel::load;

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

/// Compiles a copy of `bpf/` in `dir`, with other types.
fn compile(dir: &Path) -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let copied = Command::new("cp").arg("-r").arg(here.join("bpf/.")).arg(dir).status()?;
    ensure!(copied.success(), "copying bpf/");
    let header = dir.join("abi/state.h");
    let mut text = std::fs::read_to_string(&header)?;
    for (from, to) in [
        ("struct flow {\n", "struct flow {\n\t__u64 new_in_front;\n"),
        ("SIZE_IS(struct flow, 128)", "SIZE_IS(struct flow, 136)"),
        // Which is what it is for.
        (
            "_Static_assert(__builtin_offsetof(struct flow, candidate_start) == 64",
            "_Static_assert(1",
        ),
        ("struct client {\n", "struct client {\n\t__u64 new_in_front;\n"),
        ("SIZE_IS(struct client, 40)", "SIZE_IS(struct client, 48)"),
    ] {
        ensure!(text.contains(from), "{from:?} is no longer in {}", header.display());
        text = text.replace(from, to);
    }
    std::fs::write(&header, text)?;
    let object = dir.join("mqtt_fwd.bpf.o");
    let compiled = Command::new(std::env::var_os("CLANG").unwrap_or_else(|| "clang".into()))
        .args(["-g", "-O2", "-target", "bpf", "-c"])
        .args(env!("MQTT_FWD_CLANG_ARGS").split(' '))
        .arg(dir.join("forward/mqtt_fwd.bpf.c"))
        .arg("-o")
        .arg(&object)
        .status()?;
    ensure!(compiled.success(), "compiling it");
    Ok(object)
}
