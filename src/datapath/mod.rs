//! The datapath as user space sees it: its maps, in domain types. The types of `bpf/abi/` stay in here.

pub mod clients;
pub mod counts;
pub mod embedded;
pub mod events;
pub mod flows;
pub mod handovers;
pub mod ids;
pub mod image;
pub mod misses;
pub mod names;
pub mod plan;
pub mod real_of_flow;
pub mod rescues;
mod tables;

pub use handovers::Silent;
pub use tables::Datapath;
