//! Several balancers as one: brokers' hosts know which connections they have, and are asked for those that this
//! balancer does not know.

mod asker;
mod asking;
pub mod key;
mod learned;
mod leave;
mod members;
mod store;

pub use asker::{AskError, Asker};
pub use leave::{LeaveError, leave};
