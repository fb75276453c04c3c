//! The chain of programs on the interface: what is wrong with it, and keeping it as it was loaded.

pub mod health;
mod katran_guard;
pub mod watchdog;
