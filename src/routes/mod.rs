//! Routes by topic: compiled to an automaton, hashed and walked; and the broker of a slot.

pub mod compile;
pub mod hash;
pub mod ring;

/// Walks an automaton along a topic's levels, as `bpf/forward/route/route.h` does. `next` is the state after one more
/// level. Topics that begin with `$` begin at another state (MQTT 3.1.1 §4.7.2).
pub fn walk(start: u32, start_dollar: u32, topic: &[u8], next: impl Fn(u32, &[u8]) -> u32) -> u32 {
    let start = if topic.first() == Some(&b'$') { start_dollar } else { start };
    topic.split(|byte| *byte == b'/').fold(start, next)
}
