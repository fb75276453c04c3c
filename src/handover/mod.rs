//! Delayed binding's shared secret: balancers make cookies with it, broker hosts check them.

pub mod keys;
