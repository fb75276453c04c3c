//! The brokers of a service, for whoever connects to them from here: the relay, and the rescue of misrouted messages.

pub mod connection;
pub mod router;
pub mod tls;
