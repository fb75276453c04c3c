//! The hashes that the datapath takes of topics (`bpf/siphash.h`), keyed with a secret of the load.

use siphasher::sip::SipHasher13;

/// Keys of the two hashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keys {
    /// For topic levels, in routes.
    pub route: [u64; 2],
    /// For whole topics, in predictions.
    pub topic: [u64; 2],
}

impl Keys {
    /// Of a level's text.
    pub fn level(&self, level: &[u8]) -> u64 {
        nonzero(SipHasher13::new_with_keys(self.route[0], self.route[1]).hash(level))
    }

    /// Of a topic of a service: the same topic of two services is two topics.
    pub fn topic(&self, service: u16, topic: &[u8]) -> u64 {
        let key0 = self.topic[0] ^ u64::from(service);
        nonzero(SipHasher13::new_with_keys(key0, self.topic[1]).hash(topic))
    }
}

/// The datapath keeps 0 for "no topic".
fn nonzero(hash: u64) -> u64 {
    hash.max(1)
}
