//! Routes: MQTT topic filters to groups, and how the datapath finds the one for a topic.

pub mod compile;
pub mod filter;
pub mod hash;
