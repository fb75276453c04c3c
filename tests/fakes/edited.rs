//! Compiles a copy of `bpf/` that was edited.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// The object of `source` (in `bpf/`, without `.bpf.c`), made in `dir` with texts of `header` replaced.
pub fn compile(dir: &Path, source: &str, header: &str, edits: &[(&str, &str)]) -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let copied = Command::new("cp").arg("-r").arg(here.join("bpf/.")).arg(dir).status()?;
    ensure!(copied.success(), "copying bpf/");
    let header = dir.join(header);
    let mut text =
        std::fs::read_to_string(&header).with_context(|| header.display().to_string())?;
    for (from, to) in edits {
        ensure!(text.contains(from), "{from:?} is no longer in {}", header.display());
        text = text.replace(from, to);
    }
    std::fs::write(&header, text)?;
    let object = dir.join("edited.bpf.o");
    let compiled = Command::new(std::env::var_os("CLANG").unwrap_or_else(|| "clang".into()))
        .args(["-g", "-O2", "-target", "bpf", "-c"])
        .args(env!("MQTT_FWD_CLANG_ARGS").split(' '))
        .arg(dir.join(format!("{source}.bpf.c")))
        .arg("-o")
        .arg(&object)
        .status()?;
    ensure!(compiled.success(), "compiling {source}");
    Ok(object)
}
