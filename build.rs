//! Compiles `bpf/` into skeletons, `proto/` into tonic code and `bpf/abi/reason.h` into a table.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use libbpf_cargo::SkeletonBuilder;
use prost::Message as _;

/// Source of each program, without `.bpf.c`; the last one is for `benches/`.
const PROGRAMS: [&str; 8] = [
    "bpf/root/xdp_root",
    "bpf/forward/mqtt_fwd",
    "bpf/balancer/balancer",
    "bpf/broker/decap",
    "bpf/broker/takeover",
    "bpf/checks/wrap",
    "bpf/checks/as_client",
    "benches/bpf/rewind",
];

fn main() -> Result<()> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // libbpf-cargo says nothing about what it read.
    println!("cargo:rerun-if-changed=bpf");
    println!("cargo:rerun-if-changed=benches/bpf");
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-env-changed=CLANG");

    // For what compiles bpf/ at run time (tests/fakes/other_build.rs, scripts/verifier).
    println!("cargo:rustc-env=MQTT_FWD_CLANG_ARGS={}", clang_args()?.join(" "));
    for program in PROGRAMS {
        compile_bpf(program, &out)?;
    }
    generate_reasons(Path::new("bpf/abi/reason.h"), &out.join("reasons.rs"))?;

    // protox, so that nobody needs protoc.
    let sidecar = protox::compile(["proto/mqtt_fwd.proto"], ["proto"])?;
    fs::write(out.join("mqtt_fwd.protoset"), sidecar.encode_to_vec())?;
    tonic_prost_build::configure().btree_map(".").compile_fds(sidecar)?;
    tonic_prost_build::configure()
        .compile_fds(protox::compile(["proto/katran.proto"], ["proto"])?)?;
    Ok(())
}

fn clang_args() -> Result<Vec<String>> {
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    // libbpf's own headers (bpf_helpers.h), where libbpf-sys has unpacked them.
    let libbpf = env::var("DEP_BPF_INCLUDE").context("libbpf-sys tells no include directory")?;
    Ok(vec![
        // Kernel 5.1: 32-bit instructions, which clang before 20 does not use unasked.
        "-mcpu=v3".to_owned(),
        // Headers are summed up as words, whatever their fields are; the kernel is built so, too.
        "-fno-strict-aliasing".to_owned(),
        "-Wall".to_owned(),
        "-Wextra".to_owned(),
        "-Werror".to_owned(),
        "-Ibpf".to_owned(),
        format!("-I{libbpf}"),
        // UAPI's <asm/types.h>, of the target, lies in Debian's multiarch directory.
        "-idirafter".to_owned(),
        format!("/usr/include/{arch}-linux-gnu"),
    ])
}

fn compile_bpf(program: &str, out: &Path) -> Result<()> {
    let source = format!("{program}.bpf.c");
    let name = program.rsplit('/').next().unwrap_or(program);
    let mut builder = SkeletonBuilder::new();
    builder.source(&source).clang_args(clang_args()?).obj(out.join(format!("{name}.bpf.o")));
    if let Ok(clang) = env::var("CLANG") {
        builder.clang(clang);
    }
    builder
        .build_and_generate(out.join(format!("{name}.skel.rs")))
        .with_context(|| format!("compiling {source}"))
}

/// Turns the `VERDICT(NAME, "text")` and `NOTE(NAME, "text")` lines into a Rust table.
fn generate_reasons(header: &Path, to: &Path) -> Result<()> {
    let text = fs::read_to_string(header)?;
    let mut rows = String::new();
    for line in text.lines().map(str::trim) {
        for (kind, is_verdict) in [("VERDICT(", true), ("NOTE(", false)] {
            let Some(rest) = line.strip_prefix(kind) else { continue };
            let Some((name, rest)) = rest.split_once(", \"") else { continue };
            let Some((description, _)) = rest.split_once("\")") else {
                bail!("{}: cannot read the line: {line}", header.display());
            };
            let label = name.to_lowercase();
            writeln!(
                rows,
                "    Reason {{ name: {label:?}, is_verdict: {is_verdict}, text: {description:?} }},"
            )?;
        }
    }
    if rows.is_empty() {
        bail!("{}: no reasons found", header.display());
    }
    fs::write(to, format!("pub const REASONS: &[Reason] = &[\n{rows}];\n"))?;
    Ok(())
}
