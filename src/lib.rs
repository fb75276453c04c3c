//! MQTT load balancing by topic, at XDP speed, in front of Katran.
//!
//! `README.md` says what it is for, `docs/` how it works.

pub mod balancer;
pub mod bpf;
pub mod cli;
pub mod config;
pub mod real;
pub mod routes;
pub mod sidecar;
pub mod telemetry;
