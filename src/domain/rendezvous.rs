//! Which real each slot of a group's table has: weighted rendezvous hashing (Thaler, Ravishankar;
//! Schindelhauer, Schomaker: "Weighted distributed hash tables"). A slot goes to the real with the
//! highest score, and a real's scores depend on nothing but itself: one that goes gives its slots to
//! others, and no other slot changes.

use std::net::IpAddr;

use siphasher::sip::SipHasher13;

/// The real of each of so many slots, by its number; empty without reals.
pub fn fill(reals: &[(u16, IpAddr, u32)], slots: u32) -> Vec<u16> {
    (0..slots).filter_map(|slot| best(reals, slot)).collect()
}

/// What chooses the slot of a topic, the same in the datapath (`struct topic`, bpf/abi/state.h) and in the relay, so that
/// a topic has one broker: SipHash-1-3 of its first bytes, with a key of zero.
pub fn place(text: &[u8]) -> u64 {
    let kept = &text[..text.len().min(super::limits::TOPIC_TEXT)];
    SipHasher13::new_with_keys(0, 0).hash(kept).max(1)
}

/// The real of a slot; `None`: there is none.
pub fn best(reals: &[(u16, IpAddr, u32)], slot: u32) -> Option<u16> {
    reals
        .iter()
        .map(|(number, addr, weight)| (score(slot, *addr, *weight), *addr, *number))
        .max_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)))
        .map(|(_, _, number)| number)
}

fn score(slot: u32, addr: IpAddr, weight: u32) -> f64 {
    let bytes = match addr {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let hash = SipHasher13::new_with_keys(u64::from(slot), 0).hash(&bytes);
    // Uniform in (0, 1): 53 bits, and never 0.
    let uniform = ((hash >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    -f64::from(weight) / uniform.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOTS: u32 = 1021;

    fn real(number: u16, weight: u32) -> (u16, IpAddr, u32) {
        (number, IpAddr::from([10, 1, 3, number as u8]), weight)
    }

    #[test]
    fn shares_follow_the_weights() {
        let slots = fill(&[real(1, 1), real(2, 1), real(3, 2)], SLOTS);
        for (number, expected) in [(1, 0.25), (2, 0.25), (3, 0.5)] {
            let share = slots.iter().filter(|n| **n == number).count() as f64 / slots.len() as f64;
            assert!((share - expected).abs() < 0.05, "{number}: {share}");
        }
    }

    #[test]
    fn a_real_that_goes_moves_its_own_slots_only() {
        let all: Vec<_> = (1..=6).map(|n| real(n, 1 + u32::from(n) % 3)).collect();
        let before = fill(&all, SLOTS);
        for gone in 1..=6 {
            let left: Vec<_> = all.iter().filter(|r| r.0 != gone).copied().collect();
            for (was, is) in before.iter().zip(fill(&left, SLOTS)) {
                assert!(*was == gone || *was == is, "{was} became {is} when {gone} went");
            }
        }
        assert!(fill(&[], SLOTS).is_empty());
    }
}
