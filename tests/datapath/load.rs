//! Every program loads in this kernel; and what the verifier had to look at has not grown.
//!
//! VERIFIER_TABLE=print prints a table for tests/verifier.txt, of every clang that is installed.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::process::Command;

use libbpf_rs::skel::{OpenSkel as _, SkelBuilder as _};
use libbpf_sys::bpf_insn;
use mqtt_fwd::kernel::skeletons::as_client::AsClientSkelBuilder;
use mqtt_fwd::kernel::skeletons::balancer::BalancerSkelBuilder;
use mqtt_fwd::kernel::skeletons::decap::DecapSkelBuilder;
use mqtt_fwd::kernel::skeletons::mqtt_fwd::MqttFwdSkelBuilder;
use mqtt_fwd::kernel::skeletons::takeover::TakeoverSkelBuilder;
use mqtt_fwd::kernel::skeletons::wrap::WrapSkelBuilder;
use mqtt_fwd::kernel::skeletons::xdp_root::XdpRootSkelBuilder;
use mqtt_fwd::kernel::takeover;

/// By how much a figure may grow before somebody has to look.
const GROWTH: f64 = 1.10;

const SOURCES: [&str; 7] = [
    "root/xdp_root",
    "forward/mqtt_fwd",
    "balancer/balancer",
    "broker/decap",
    "broker/takeover",
    "checks/as_client",
    "checks/wrap",
];

#[test]
fn every_program_loads() {
    macro_rules! load {
        ($builder:ident) => {
            let mut storage = MaybeUninit::uninit();
            let open = $builder::default().open(&mut storage).unwrap();
            drop(open.load().unwrap_or_else(|e| panic!("{}: {e}", stringify!($builder))));
        };
    }
    load!(XdpRootSkelBuilder);
    load!(MqttFwdSkelBuilder);
    load!(BalancerSkelBuilder);
    load!(DecapSkelBuilder);
    // Attaching it takes Linux 6.6; elsewhere, `status` says that there are no checks.
    load!(WrapSkelBuilder);
    load!(AsClientSkelBuilder);
    // Linux 6.9: elsewhere, `host up` says that delayed binding is not to be had.
    if takeover::supported() {
        load!(TakeoverSkelBuilder);
    }
}

/// Bytes of stack that a chain of calls may have (`MAX_BPF_STACK`).
const STACK_MAX: u32 = 512;
/// Of those, for the next feature.
const STACK_FREE: u32 = 96;

/// What the verifier says of an object's programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Verified {
    /// Instructions that it looked at, of all programs; a million each at most.
    instructions: u32,
    /// Bytes of stack of the deepest chain of calls, as Linux 6.1 counts them.
    stack: u32,
}

/// Loads an object, and reads the verifier's logs of all its programs.
fn verify(object: &Path) -> Verified {
    const LOG: usize = 1 << 16;
    let path = CString::new(object.to_str().unwrap()).unwrap();
    let mut logs: Vec<Vec<u8>> = Vec::new();
    let options = libbpf_sys::bpf_object_open_opts {
        sz: size_of::<libbpf_sys::bpf_object_open_opts>() as u64,
        kernel_log_level: 4, // BPF_LOG_STATS
        ..Default::default()
    };
    // SAFETY: path, options and logs are valid until the object is closed; a log's bytes stay where
    // they are when the vector of logs grows.
    unsafe {
        let opened = libbpf_sys::bpf_object__open_file(path.as_ptr(), &raw const options);
        assert!(!opened.is_null(), "{}", object.display());
        let mut map = libbpf_sys::bpf_object__next_map(opened, std::ptr::null());
        while !map.is_null() {
            // No pins, and nothing large: only the programs count here.
            libbpf_sys::bpf_map__set_pin_path(map, std::ptr::null());
            map = libbpf_sys::bpf_object__next_map(opened, map);
        }
        let mut program = libbpf_sys::bpf_object__next_program(opened, std::ptr::null_mut());
        while !program.is_null() {
            logs.push(vec![0; LOG]);
            let log = logs.last_mut().unwrap();
            libbpf_sys::bpf_program__set_log_buf(program, log.as_mut_ptr().cast(), LOG as u64);
            program = libbpf_sys::bpf_object__next_program(opened, program);
        }
        let error = libbpf_sys::bpf_object__load(opened);
        let text = |log: &Vec<u8>| {
            let said = String::from_utf8_lossy(log);
            said[..said.find('\0').unwrap_or(said.len())].to_owned()
        };
        let said: Vec<String> = logs.iter().map(text).collect();
        assert_eq!(error, 0, "{}: {}", object.display(), said.concat());
        let mut all = Verified { instructions: 0, stack: 0 };
        let mut program = std::ptr::null_mut();
        for log in &said {
            program = libbpf_sys::bpf_object__next_program(opened, program);
            let instructions = std::slice::from_raw_parts(
                libbpf_sys::bpf_program__insns(program),
                libbpf_sys::bpf_program__insn_cnt(program) as usize,
            );
            all.instructions += number("processed", log).unwrap();
            all.stack = all.stack.max(deepest_chain(instructions, &depths(log)));
        }
        libbpf_sys::bpf_object__close(opened);
        logs.clear();
        all
    }
}

fn number(after: &str, log: &str) -> Option<u32> {
    let rest = log.split_once(after)?.1.trim_start();
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Bytes of stack of each function, in their order.
fn depths(log: &str) -> Vec<u32> {
    let line = log.lines().find_map(|l| l.trim().strip_prefix("stack depth")).unwrap();
    line.trim().split('+').map(|n| n.parse().unwrap()).collect()
}

/// The stack of the deepest chain of calls as Linux 6.1 counts it: each function takes a multiple
/// of 32 bytes. Since 6.9 it is 16, so that a program may load here and not there.
fn deepest_chain(instructions: &[bpf_insn], depths: &[u32]) -> u32 {
    const CALL: u8 = 0x85;
    const LOAD_64: u8 = 0x18;
    const PSEUDO_CALL: u8 = 1;
    const PSEUDO_FUNC: u8 = 4;
    const LOOP: i32 = 181; // bpf_loop
    /// What this kernel adds to a function as it makes a loop of a call of `bpf_loop`.
    const INLINED_LOOP: u32 = 24;

    let called = |at: usize| {
        let i = &instructions[at];
        let function = (i.code == CALL && i.src_reg() == PSEUDO_CALL)
            || (i.code == LOAD_64 && i.src_reg() == PSEUDO_FUNC);
        function.then(|| at.checked_add_signed(i.imm as isize + 1).unwrap())
    };
    let mut starts: BTreeSet<usize> = (0..instructions.len()).filter_map(called).collect();
    starts.insert(0);
    assert_eq!(starts.len(), depths.len(), "a depth for each function");
    let starts: Vec<usize> = starts.into_iter().collect();
    let body = |function: usize| {
        starts[function]..starts.get(function + 1).copied().unwrap_or(instructions.len())
    };
    let own = |function: usize| {
        let loops = body(function).any(|at| {
            let i = &instructions[at];
            i.code == CALL && i.src_reg() == 0 && i.imm == LOOP
        });
        let depth = depths[function] - if loops { INLINED_LOOP } else { 0 };
        depth.max(1).next_multiple_of(32)
    };
    // Nothing calls itself, so what is called can be counted first.
    let mut chain: Vec<Option<u32>> = vec![None; starts.len()];
    while chain[0].is_none() {
        for function in 0..starts.len() {
            let callees = body(function).filter_map(called);
            let below = callees.map(|at| chain[starts.binary_search(&at).unwrap()]);
            if let Some(below) = below.collect::<Option<Vec<u32>>>() {
                chain[function] = Some(own(function) + below.into_iter().max().unwrap_or(0));
            }
        }
    }
    chain[0].unwrap()
}

fn clang_major(clang: &str) -> Option<u32> {
    let output = Command::new(clang).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.split("version ").nth(1)?.split('.').next()?.parse::<u32>().ok()
}

fn compile(clang: &str, source: &str, dir: &Path) -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let object = dir.join(format!("{}.o", source.replace('/', "-")));
    let compiled = Command::new(clang)
        .args(["-g", "-O2", "-target", "bpf", "-c"])
        .args(env!("MQTT_FWD_CLANG_ARGS").split(' '))
        .current_dir(here)
        .arg(here.join("bpf").join(format!("{source}.bpf.c")))
        .arg("-o")
        .arg(&object)
        .status()
        .unwrap();
    assert!(compiled.success(), "{clang} {source}");
    object
}

#[test]
fn the_verifier_has_not_more_to_look_at_than_before() {
    // In scripts/kernels there is no compiler, and another kernel's verifier counts differently.
    let table = include_str!("../verifier.txt");
    let expected: BTreeMap<(String, u32), Verified> = table
        .lines()
        .filter(|line| !line.starts_with('#') && !line.trim().is_empty())
        .map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let n = |i: usize| fields[i].parse().unwrap();
            ((fields[0].to_owned(), n(1)), Verified { instructions: n(2), stack: n(3) })
        })
        .collect();
    let print = std::env::var_os("VERIFIER_TABLE").is_some();
    let dir = tempfile::tempdir().unwrap();
    let mut seen = BTreeMap::new();
    for clang in ["clang", "clang-14", "clang-16", "clang-19"] {
        let Some(major) = clang_major(clang) else { continue };
        for source in SOURCES {
            let key = (source.to_owned(), major);
            if seen.contains_key(&key) || (!print && !expected.contains_key(&key)) {
                continue;
            }
            seen.insert(key, verify(&compile(clang, source, dir.path())));
        }
    }
    for ((source, clang), now) in &seen {
        println!("{source:20} {clang:5} {:12} {:6}", now.instructions, now.stack);
        assert!(
            now.stack <= STACK_MAX - STACK_FREE,
            "{source}, clang {clang}: {} bytes of stack leave less than {STACK_FREE} of {STACK_MAX} free",
            now.stack
        );
        let Some(before) = expected.get(&(source.clone(), *clang)) else { continue };
        if print {
            continue;
        }
        for (what, now, before) in [
            ("instructions", now.instructions, before.instructions),
            ("bytes of stack", now.stack, before.stack),
        ] {
            assert!(
                f64::from(now) <= f64::from(before) * GROWTH,
                "{source}, clang {clang}: {now} {what}, {before} before; if it is worth it, write \
                 it to tests/verifier.txt (VERIFIER_TABLE=print prints the table)"
            );
        }
    }
}
