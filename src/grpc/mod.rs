//! Serving gRPC: where, for whom, and who asks.

mod listen;
mod peer;

pub use listen::{Listener, ServeError, listen, serve};
pub use peer::Peer;
