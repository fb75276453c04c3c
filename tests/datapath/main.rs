//! The real programs in this kernel, packet by packet (BPF_PROG_TEST_RUN).

mod cost;
mod differential;
mod fleet;
mod flows;
mod framing;
mod fuzz;
mod handshake;
mod hello;
mod learning;
mod limits;
mod load;
mod maps;
mod packets;
mod relay_framing;
mod rescue;
#[path = "../support/mod.rs"]
mod support;
mod writers;
