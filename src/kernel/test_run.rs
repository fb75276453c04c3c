//! Packets given to a program by hand (BPF_PROG_TEST_RUN), and programs that always say the same.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

/// Room behind a packet for what is put in front of it, and for an answer.
const HEADROOM: usize = 512;

/// What a program did.
#[derive(Debug)]
pub struct Run {
    /// What it returned, of the last run.
    pub verdict: u32,
    /// The frame as it was then.
    pub frame: Vec<u8>,
    /// Nanoseconds a run.
    pub ns: u32,
}

/// Runs a program `repeat` times on a frame that goes nowhere.
pub fn run(program: BorrowedFd<'_>, frame: &[u8], repeat: u32) -> io::Result<Run> {
    let mut out = vec![0; frame.len() + HEADROOM];
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as u64,
        data_in: frame.as_ptr().cast(),
        data_size_in: frame.len() as u32,
        data_out: out.as_mut_ptr().cast(),
        data_size_out: out.len() as u32,
        repeat: repeat.cast_signed(),
        ..Default::default()
    };
    // SAFETY: pointers are valid for the lengths given, for the whole call.
    let failed =
        unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &raw mut options) };
    if failed != 0 {
        return Err(io::Error::from_raw_os_error(-failed));
    }
    out.truncate(options.data_size_out as usize);
    Ok(Run { verdict: options.retval, frame: out, ns: options.duration })
}

/// Gives a frame to an XDP program as if it had come in on the interface (Linux 5.18): what it says is done.
pub fn inject(program: BorrowedFd<'_>, interface: i32, frame: &[u8]) -> io::Result<()> {
    inject_copies(program, interface, frame, 1)
}

/// Several copies of a frame.
pub fn inject_copies(
    program: BorrowedFd<'_>,
    interface: i32,
    frame: &[u8],
    copies: u32,
) -> io::Result<()> {
    let mut context = libbpf_sys::xdp_md {
        data: 0,
        data_end: frame.len() as u32,
        ingress_ifindex: interface.cast_unsigned(),
        ..Default::default()
    };
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as u64,
        data_in: frame.as_ptr().cast(),
        data_size_in: frame.len() as u32,
        ctx_in: (&raw mut context).cast(),
        ctx_size_in: size_of::<libbpf_sys::xdp_md>() as u32,
        repeat: copies.cast_signed(),
        flags: libbpf_sys::BPF_F_TEST_XDP_LIVE_FRAMES,
        ..Default::default()
    };
    // SAFETY: frame, context and options live through the call, and have the sizes given.
    let failed =
        unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &raw mut options) };
    if failed == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-failed)) }
}

/// Loads `r0 = verdict; exit`. All programs of an array have to have the same types.
pub fn constant(
    verdict: u32,
    kind: libbpf_sys::bpf_prog_type,
    attach: libbpf_sys::bpf_attach_type,
) -> io::Result<OwnedFd> {
    let instructions = [
        libbpf_sys::bpf_insn {
            code: (libbpf_sys::BPF_ALU64 | libbpf_sys::BPF_MOV | libbpf_sys::BPF_K) as u8,
            imm: verdict.cast_signed(),
            ..Default::default()
        },
        libbpf_sys::bpf_insn {
            code: (libbpf_sys::BPF_JMP | libbpf_sys::BPF_EXIT) as u8,
            ..Default::default()
        },
    ];
    let mut options = libbpf_sys::bpf_prog_load_opts {
        sz: size_of::<libbpf_sys::bpf_prog_load_opts>() as u64,
        expected_attach_type: attach,
        ..Default::default()
    };
    // SAFETY: pointers are valid for the lengths given, for the whole call.
    let fd = unsafe {
        libbpf_sys::bpf_prog_load(
            kind,
            c"sentinel".as_ptr(),
            c"GPL".as_ptr(),
            instructions.as_ptr(),
            instructions.len() as u64,
            &raw mut options,
        )
    };
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(-fd));
    }
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
