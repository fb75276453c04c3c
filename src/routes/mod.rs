//! Routes: MQTT topic filters to targets, and how the datapath finds the one for a topic.

pub mod compile;
pub mod hash;
