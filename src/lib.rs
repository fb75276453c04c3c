//! MQTT load balancing by topic, at XDP speed, in front of Katran.
//!
//! `README.md` says what it is for, `docs/` how it works.

pub mod api;
pub mod app;
pub mod balancer;
pub mod broker_host;
pub mod brokers;
pub mod chain;
pub mod cli;
pub mod clients;
pub mod config;
pub mod connectivity;
pub mod counter;
pub mod datapath;
pub mod domain;
pub mod drain;
pub mod fleet;
pub mod grpc;
pub mod handover;
pub mod health_checks;
pub mod inspect;
pub mod instance;
pub mod kernel;
pub mod metrics;
pub mod mqtt;
mod reader;
pub mod reconcile;
pub mod relay;
pub mod replay;
pub mod rescue;
pub mod routes;
pub mod run_files;
pub mod state;
pub mod systemd;
pub mod telemetry;
