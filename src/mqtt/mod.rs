//! MQTT on the wire, as far as it is read and written here: by the relay, health checks, rescue, replay and explain.

pub mod client;
pub mod connect;
pub mod proxy_header;
pub mod wire;
