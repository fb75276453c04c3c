//! The balancer for where no Katran is at hand: its state in pinned maps, and Katran's gRPC service
//! over it.

pub mod ring;
pub mod service;
mod state;

pub use state::{Embedded, Refusal};
