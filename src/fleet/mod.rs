//! Several balancers as one: brokers' hosts know which connections they have, and are asked for those that this
//! balancer does not know.

pub mod key;
