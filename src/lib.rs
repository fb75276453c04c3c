//! MQTT load balancing by topic, at XDP speed, in front of Katran.
//!
//! `README.md` says what it is for, `docs/` how it works.

pub mod balancer;
pub mod broker_host;
pub mod cli;
pub mod config;
pub mod control;
pub mod counter;
pub mod datapath;
pub mod domain;
pub mod grpc;
pub mod handover;
pub mod kernel;
pub mod metrics;
pub mod relay;
pub mod routes;
pub mod run_files;
pub mod service;
pub mod telemetry;
