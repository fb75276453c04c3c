//! What the tests of the datapath share.

#![allow(dead_code)] // every test binary uses its own part

pub mod authority;
pub mod conn;
pub mod datapath;
pub mod katran_object;
pub mod lab;
pub mod model;
pub mod mqtt;
pub mod net;
pub mod other_stack;
pub mod packet;
pub mod pool;
pub mod server;
pub mod session;
pub mod tls;
pub mod wire;
