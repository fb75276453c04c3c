//! Maglev's consistent hashing (Eisenbud et al., NSDI 2016, §3.4), weighted as Katran weighs.

use std::net::IpAddr;

use siphasher::sip::SipHasher13;

/// Slots of a ring: prime, so that every permutation visits all of them (`RING_SIZE` of `bpf/abi/balancer.h`).
pub const SIZE: usize = 65_537;

/// A real in a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// What the slots hold.
    pub number: u32,
    /// What the permutation depends on, so that a real keeps its slots whoever else comes and goes.
    pub addr: IpAddr,
    /// Slots taken in the first turn; the relation between them is the relation of shares.
    pub weight: u32,
}

/// Fills a ring. Without members it is all zeros, which is no real.
pub fn fill(members: &[Member]) -> Vec<u32> {
    let mut ring = vec![0; SIZE];
    if members.is_empty() {
        return ring;
    }
    // The order of members must not matter.
    let mut order: Vec<&Member> = members.iter().collect();
    order.sort_by_key(|m| m.addr);
    let mut walks: Vec<Walk> = order.iter().map(|m| Walk::new(m.addr)).collect();

    let mut free = SIZE;
    loop {
        for (member, walk) in order.iter().zip(&mut walks) {
            // Katran gives the weight once and equal turns after it. Every turn keeps the
            // relation for groups whose weights do not add up to the ring.
            for _ in 0..member.weight.max(1) {
                let slot = loop {
                    let slot = walk.next_slot();
                    if ring[slot] == 0 {
                        break slot;
                    }
                };
                ring[slot] = member.number;
                free -= 1;
                if free == 0 {
                    return ring;
                }
            }
        }
    }
}

/// A member's preferences: slots from `at` on in steps of `skip`.
struct Walk {
    at: usize,
    skip: usize,
}

impl Walk {
    fn new(addr: IpAddr) -> Self {
        let bytes = match addr {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        let hash = |key| SipHasher13::new_with_keys(key, 0).hash(&bytes) as usize;
        Self { at: hash(1) % SIZE, skip: hash(2) % (SIZE - 1) + 1 }
    }

    fn next_slot(&mut self) -> usize {
        let slot = self.at;
        self.at = (self.at + self.skip) % SIZE;
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(number: u32, weight: u32) -> Member {
        Member { number, addr: IpAddr::from([10, 1, 3, number as u8]), weight }
    }

    fn share(ring: &[u32], number: u32) -> f64 {
        ring.iter().filter(|n| **n == number).count() as f64 / SIZE as f64
    }

    #[test]
    fn shares_follow_the_weights() {
        let ring = fill(&[member(1, 1), member(2, 1), member(3, 2)]);
        assert!(!ring.contains(&0));
        for (number, expected) in [(1, 0.25), (2, 0.25), (3, 0.5)] {
            let share = share(&ring, number);
            assert!((share - expected).abs() < 0.005, "{number}: {share}");
        }
    }

    #[test]
    fn the_order_of_members_does_not_matter() {
        assert_eq!(fill(&[member(1, 1), member(2, 3)]), fill(&[member(2, 3), member(1, 1)]));
    }

    #[test]
    fn a_leaving_member_moves_little_but_its_own_slots() {
        let before = fill(&[member(1, 1), member(2, 1), member(3, 1), member(4, 1)]);
        let after = fill(&[member(1, 1), member(2, 1), member(3, 1)]);
        let moved = before.iter().zip(&after).filter(|(b, a)| **b != 4 && b != a).count();
        assert!(moved < SIZE / 10, "{moved} of {SIZE}");
        assert!(!after.contains(&4));
    }

    #[test]
    fn nobody_is_no_real() {
        assert!(fill(&[]).iter().all(|n| *n == 0));
    }
}
