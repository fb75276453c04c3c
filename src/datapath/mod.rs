//! The datapath as user space sees it: its tables, what they hold for a configuration, its events.

pub mod events;
pub mod ids;
pub mod image;
mod tables;

pub use tables::Datapath;
