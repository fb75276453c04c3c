//! Clients, balancer and brokers in network namespaces: what really arrives.

mod connectivity;
mod delayed;
mod fleet;
mod health;
mod katran;
mod replay;
#[path = "../support/mod.rs"]
mod support;
mod tls;
mod whole;
