//! What concerns the balancer: the embedded one, its double that is as silent as Katran, and a Katran, if one was built.

mod contract;
mod object;
mod patches;
mod server;
#[path = "../support/mod.rs"]
mod support;
