//! Packet identifiers of deliveries: every broker numbers its own, and towards the client they must
//! be unique.

use std::collections::HashMap;

/// Index of a broker connection in its session.
pub type Slot = u16;

/// In place of the index of a lost connection.
pub const GONE: Slot = Slot::MAX;

/// Deliveries at QoS 1 and 2 that the client has not completed.
#[derive(Debug, Default)]
pub struct Deliveries {
    by_client: HashMap<u16, (Slot, u16)>,
    by_broker: HashMap<(Slot, u16), u16>,
    last: u16,
}

impl Deliveries {
    /// Their number.
    pub fn len(&self) -> usize {
        self.by_client.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_client.is_empty()
    }

    /// The client-side identifier of a broker's, if it has one.
    pub fn known(&self, slot: Slot, id: u16) -> Option<u16> {
        self.by_broker.get(&(slot, id)).copied()
    }

    /// Allocates a client-side identifier: the broker's own if it is free, so that resumed sessions keep
    /// theirs. `None`: all 65,535 are in use.
    pub fn assign(&mut self, slot: Slot, id: u16) -> Option<u16> {
        if let Some(known) = self.known(slot, id) {
            return Some(known);
        }
        if self.by_client.len() >= usize::from(u16::MAX) {
            return None;
        }
        let mut free = id;
        while self.by_client.contains_key(&free) {
            self.last = self.last.wrapping_add(1).max(1);
            free = self.last;
        }
        self.by_client.insert(free, (slot, id));
        self.by_broker.insert((slot, id), free);
        Some(free)
    }

    /// Broker connection and broker-side identifier of a client-side one.
    pub fn owner(&self, client: u16) -> Option<(Slot, u16)> {
        self.by_client.get(&client).copied()
    }

    /// Frees a client-side identifier.
    pub fn done(&mut self, client: u16) {
        if let Some(owner) = self.by_client.remove(&client)
            && owner.0 != GONE
        {
            self.by_broker.remove(&owner);
        }
    }

    /// A broker connection was lost. The client does not know, so its deliveries keep their identifiers
    /// until they are acknowledged.
    pub fn forget(&mut self, slot: Slot) {
        for owner in self.by_client.values_mut().filter(|owner| owner.0 == slot) {
            owner.0 = GONE;
        }
        self.by_broker.retain(|owner, _| owner.0 != slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_differ_and_are_given_back() {
        let mut d = Deliveries::default();
        assert_eq!(d.assign(0, 1), Some(1));
        let other = d.assign(1, 1).unwrap();
        assert_ne!(other, 1);
        assert_eq!(d.assign(1, 1), Some(other), "sent again: the same");
        assert_eq!((d.owner(1), d.owner(other)), (Some((0, 1)), Some((1, 1))));
        d.done(1);
        assert_eq!((d.owner(1), d.known(0, 1), d.len()), (None, None, 1));
        d.forget(1);
        assert_eq!(d.owner(other), Some((GONE, 1)), "the client still has it");
        d.done(other);
        assert!(d.is_empty());
        for id in 1..=u16::MAX {
            assert!(d.assign(2, id).is_some());
        }
        assert_eq!(d.assign(3, 5), None, "all are taken");
    }
}
