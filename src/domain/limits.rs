//! Limits of the datapath that a configuration has to keep. `kernel::abi` asserts that they are those of
//! `bpf/abi/config.h`.

/// Services are compared one by one on every packet.
pub const SERVICES: usize = 16;
/// Bytes of a service's or group's name.
pub const NAME: usize = 31;
/// Group VIPs of all services.
pub const GROUP_VIPS: u32 = 4096;
/// Levels of a route's topic filter.
pub const ROUTE_LEVELS: usize = 16;
/// Bytes of a client id or user name in a route.
pub const CLIENT_ROUTE_TEXT: usize = 127;
/// Bytes of a topic that are kept for people.
pub const TOPIC_TEXT: usize = 256;
/// Bytes of a client id that are kept for people.
pub const CLIENT_ID_TEXT: usize = 64;
/// Messages that a client's record weighs.
pub const WEIGHT: u8 = 64;
