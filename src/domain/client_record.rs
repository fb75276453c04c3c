//! A client as the datapath has learned it, by names instead of numbers: this is what survives a reboot and
//! what people export and import.
//!
//! A record says where a client's messages belong by the names of groups, and by its last topic. If routes were
//! changed since it was written, the topic decides.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How a client is identified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IdentifiedBy {
    Address,
    ClientId,
}

impl IdentifiedBy {
    /// As records write it.
    pub fn key(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::ClientId => "client_id",
        }
    }
}

/// A client's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientRecord {
    /// The service's name.
    pub service: String,
    pub by: IdentifiedBy,
    /// Address or client id.
    pub client: String,
    /// Its last message's topic; may be missing if there are groups.
    #[serde(default)]
    pub topic: String,
    /// The groups of its recent messages, and how many of these each had (1 to 64).
    #[serde(default)]
    pub groups: BTreeMap<String, u8>,
    /// Publishes to several groups in turn.
    #[serde(default)]
    pub multi_group: bool,
    /// Subscribes, has a will of another group, or publishes more topics at once than are judged: with a relay, it
    /// belongs there.
    #[serde(default)]
    pub for_relay: bool,
    /// Its id alone is not enough to bind it.
    #[serde(default)]
    pub misjudged: bool,
    /// How often its group changed: beside a relay, one that changed is the relay's.
    #[serde(default)]
    pub group_changes: u8,
    /// Seconds since it was learned.
    #[serde(default)]
    pub age_s: u64,
}

/// The result of a restore or import.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    pub added: usize,
    /// Others took their places: the maps are too small.
    pub did_not_fit: usize,
    /// The datapath has learned of them itself.
    pub already_learned: usize,
    /// Their service or group does not exist any more.
    pub without_group: usize,
}
