//! Packet identifiers of messages on their way to a client: every broker numbers its own, the client
//! needs them to differ.

use std::collections::HashMap;

/// Number of a broker's connection in its session.
pub type Slot = u16;

/// That of a connection that is gone.
pub const GONE: Slot = Slot::MAX;

/// Messages that a client has not acknowledged yet.
#[derive(Debug, Default)]
pub struct Deliveries {
    by_client: HashMap<u16, (Slot, u16)>,
    by_broker: HashMap<(Slot, u16), u16>,
    last: u16,
}

impl Deliveries {
    /// How many.
    pub fn len(&self) -> usize {
        self.by_client.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_client.is_empty()
    }

    /// The identifier that the client knows a broker's by, if it does.
    pub fn known(&self, slot: Slot, id: u16) -> Option<u16> {
        self.by_broker.get(&(slot, id)).copied()
    }

    /// An identifier for a broker's: the same if it is free, so that sessions that are taken up again
    /// find theirs. `None`: all are taken.
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

    /// Whose a client's identifier is.
    pub fn owner(&self, client: u16) -> Option<(Slot, u16)> {
        self.by_client.get(&client).copied()
    }

    /// The client is done with one.
    pub fn done(&mut self, client: u16) {
        if let Some(owner) = self.by_client.remove(&client)
            && owner.0 != GONE
        {
            self.by_broker.remove(&owner);
        }
    }

    /// A broker's connection is gone. The client does not know, so what it was sent keeps its
    /// identifiers until it has acknowledged them.
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
