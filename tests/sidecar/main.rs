//! The binary as its users see it: commands, the chain, changes, operation.

mod broker_host;
mod chain;
mod change;
mod cli;
mod fleet_host;
mod fleet_store;
mod neighbours;
mod operation;
mod sockets;
#[path = "../support/mod.rs"]
mod support;
mod truth;
mod views;
