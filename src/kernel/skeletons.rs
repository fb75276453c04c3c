//! What libbpf-cargo made of `bpf/`.

// Generated code: not ours to style.
#![allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    non_snake_case,
    unsafe_op_in_unsafe_fn
)]

pub mod xdp_root {
    include!(concat!(env!("OUT_DIR"), "/xdp_root.skel.rs"));
}

pub mod mqtt_fwd {
    include!(concat!(env!("OUT_DIR"), "/mqtt_fwd.skel.rs"));
}

pub mod balancer {
    include!(concat!(env!("OUT_DIR"), "/balancer.skel.rs"));
}

pub mod takeover {
    include!(concat!(env!("OUT_DIR"), "/takeover.skel.rs"));
}

pub mod wrap {
    include!(concat!(env!("OUT_DIR"), "/wrap.skel.rs"));
}

pub mod as_client {
    include!(concat!(env!("OUT_DIR"), "/as_client.skel.rs"));
}

pub mod decap {
    include!(concat!(env!("OUT_DIR"), "/decap.skel.rs"));
}
