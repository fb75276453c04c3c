//! From the configuration to what the datapath and the balancer hold.
//!
//! ```text
//! Config ─ image ─┐                       ┌─ balancer (gRPC)
//!                 ├─ plan ─ apply ────────┤
//! maps, balancer ─┘  (what differs)       └─ maps (one switch)
//! ```

pub mod apply;
pub mod plan;
pub mod watch;
