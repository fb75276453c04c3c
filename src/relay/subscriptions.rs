//! Splits SUBSCRIBE and UNSUBSCRIBE among brokers, and merges SUBACK and UNSUBACK.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU16;

use bytes::BytesMut;
use rmqtt_codec::{v3, v5};
use tokio_util::codec::{Decoder as _, Encoder as _};

use super::ids::Slot;
use crate::mqtt::wire::{self, Malformed};

/// A client's subscription.
#[derive(Debug, Clone)]
pub struct Subscription {
    /// The topic filter.
    filter: String,
    /// Quality of service, and MQTT 5's options.
    options: v5::SubscriptionOptions,
    /// MQTT 5's subscription identifier.
    id: Option<std::num::NonZeroU32>,
}

/// Topic filters of one packet: the brokers of each are looked up while others wait.
const FILTERS_MAX: usize = 1000;

/// A SUBSCRIBE or UNSUBSCRIBE.
#[derive(Debug)]
pub enum Request {
    /// SUBSCRIBE.
    Subscribe(Vec<Subscription>, v5::UserProperties),
    /// UNSUBSCRIBE, with topic filters.
    Unsubscribe(Vec<String>, v5::UserProperties),
}

fn unreadable() -> Malformed {
    Malformed { code: 0x81, what: "SUBSCRIBE or UNSUBSCRIBE that cannot be read" }
}

impl Request {
    /// Decodes a complete packet: its identifier, and the request.
    pub fn read(packet: &[u8], is_v5: bool) -> Result<(u16, Self), Malformed> {
        let mut bytes = BytesMut::from(packet);
        let (id, request) =
            if is_v5 {
                match v5::Codec::default().decode(&mut bytes) {
                    Ok(Some((v5::Packet::Subscribe(s), _))) => {
                        let all = s.topic_filters.into_iter().map(|(filter, options)| {
                            Subscription { filter: filter.to_string(), options, id: s.id }
                        });
                        (s.packet_id, Self::Subscribe(all.collect(), s.user_properties))
                    }
                    Ok(Some((v5::Packet::Unsubscribe(u), _))) => {
                        let filters = u.topic_filters.iter().map(ToString::to_string).collect();
                        (u.packet_id, Self::Unsubscribe(filters, u.user_properties))
                    }
                    _ => return Err(unreadable()),
                }
            } else {
                match v3::Codec::default().decode(&mut bytes) {
                    Ok(Some((v3::Packet::Subscribe { packet_id, topic_filters }, _))) => {
                        let all = topic_filters.into_iter().map(|(filter, qos)| Subscription {
                            filter: filter.to_string(),
                            options: v5::SubscriptionOptions { qos, ..Default::default() },
                            id: None,
                        });
                        (packet_id, Self::Subscribe(all.collect(), Vec::new()))
                    }
                    Ok(Some((v3::Packet::Unsubscribe { packet_id, topic_filters }, _))) => {
                        let filters = topic_filters.iter().map(ToString::to_string).collect();
                        (packet_id, Self::Unsubscribe(filters, Vec::new()))
                    }
                    _ => return Err(unreadable()),
                }
            };
        if request.len() > FILTERS_MAX {
            let what = "SUBSCRIBE or UNSUBSCRIBE with more topic filters than are taken at once";
            return Err(Malformed { code: 0x97, what });
        }
        if request.len() == 0 {
            return Err(Malformed { code: 0x82, what: "SUBSCRIBE without a topic filter" });
        }
        Ok((id.get(), request))
    }

    /// Number of topic filters.
    pub fn len(&self) -> usize {
        match self {
            Self::Subscribe(all, _) => all.len(),
            Self::Unsubscribe(all, _) => all.len(),
        }
    }

    /// A topic filter.
    pub fn filter(&self, i: usize) -> &str {
        match self {
            Self::Subscribe(all, _) => &all[i].filter,
            Self::Unsubscribe(all, _) => &all[i],
        }
    }

    /// Encodes the packet for one broker, with those topic filters.
    pub fn packet(&self, id: u16, some: &[usize], is_v5: bool) -> Vec<u8> {
        match self {
            Self::Subscribe(all, properties) => {
                let some: Vec<&Subscription> = some.iter().map(|i| &all[*i]).collect();
                subscribe(id, &some, properties.clone(), is_v5)
            }
            Self::Unsubscribe(all, properties) => {
                let filters = some.iter().map(|i| all[*i].as_str().into()).collect();
                let packet_id = nonzero(id);
                if is_v5 {
                    let user_properties = properties.clone();
                    let u = v5::Unsubscribe { packet_id, user_properties, topic_filters: filters };
                    encode_v5(v5::Packet::Unsubscribe(u))
                } else {
                    encode_v3(v3::Packet::Unsubscribe { packet_id, topic_filters: filters })
                }
            }
        }
    }
}

fn nonzero(id: u16) -> NonZeroU16 {
    NonZeroU16::new(id).unwrap_or(NonZeroU16::MAX)
}

fn subscribe(
    id: u16,
    some: &[&Subscription],
    user_properties: v5::UserProperties,
    is_v5: bool,
) -> Vec<u8> {
    let packet_id = nonzero(id);
    if is_v5 {
        let topic_filters = some.iter().map(|s| (s.filter.as_str().into(), s.options)).collect();
        let id = some.first().and_then(|s| s.id);
        let s = v5::Subscribe { packet_id, id, user_properties, topic_filters };
        encode_v5(v5::Packet::Subscribe(s))
    } else {
        let topic_filters =
            some.iter().map(|s| (s.filter.as_str().into(), s.options.qos)).collect();
        encode_v3(v3::Packet::Subscribe { packet_id, topic_filters })
    }
}

// Only packets beyond the protocol's maximum size cannot be encoded, and these were decoded.
fn encode_v3(packet: v3::Packet) -> Vec<u8> {
    let mut out = BytesMut::new();
    let _ = v3::Codec::default().encode(packet, &mut out);
    out.to_vec()
}

fn encode_v5(packet: v5::Packet) -> Vec<u8> {
    let mut out = BytesMut::new();
    let _ = v5::Codec::default().encode(packet, &mut out);
    out.to_vec()
}

/// A request that some brokers have not answered.
#[derive(Debug)]
struct Open {
    unsubscribe: bool,
    /// The topic filters of a SUBSCRIBE.
    filters: Vec<String>,
    /// Reason code for each topic filter.
    codes: Vec<Option<u8>>,
    /// Brokers that have not answered, with the indices of their topic filters.
    waiting: Vec<(Slot, Vec<usize>)>,
}

/// A client's subscriptions.
#[derive(Debug, Default)]
pub struct Subscriptions {
    all: HashMap<String, Subscription>,
    /// Total length of the topic filters.
    bytes: usize,
    open: HashMap<u16, Open>,
}

/// SUBACK if no broker could be asked (MQTT 3.1.1 §3.9.3).
const UNSPECIFIED_ERROR: u8 = 0x80;
const NO_SUBSCRIPTION_EXISTED: u8 = 0x11;

impl Subscriptions {
    /// Whether there are neither subscriptions nor unanswered requests.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty() && self.open.is_empty()
    }

    /// Whether a request would exceed this number of subscriptions, or 256 B of topic filter for each.
    pub fn exceeds(&self, request: &Request, most: usize) -> bool {
        const TEXT: usize = 256;
        let Request::Subscribe(new, _) = request else { return false };
        let bytes: usize = new.iter().map(|s| s.filter.len()).sum();
        self.all.len() + new.len() > most || self.bytes + bytes > most.max(1000) * TEXT
    }

    /// Bytes that they take.
    pub fn memory(&self) -> usize {
        // The topic filter is there twice.
        2 * self.bytes + self.all.len() * size_of::<(String, Subscription)>() * 2
    }

    fn forget(&mut self, filter: &str) {
        if self.all.remove(filter).is_some() {
            self.bytes -= filter.len();
        }
    }

    /// Whether a request with this identifier is unanswered.
    pub fn is_open(&self, id: u16) -> bool {
        self.open.contains_key(&id)
    }

    /// All topic filters.
    pub fn filters(&self) -> impl Iterator<Item = &str> {
        self.all.keys().map(String::as_str)
    }

    /// Records a request, and the brokers that will answer it.
    pub fn begin(&mut self, id: u16, request: &Request, waiting: Vec<(Slot, Vec<usize>)>) {
        let (unsubscribe, filters) = match request {
            Request::Subscribe(all, _) => {
                for s in all {
                    if self.all.insert(s.filter.clone(), s.clone()).is_none() {
                        self.bytes += s.filter.len();
                    }
                }
                (false, all.iter().map(|s| s.filter.clone()).collect())
            }
            Request::Unsubscribe(filters, _) => {
                for filter in filters {
                    self.forget(filter);
                }
                (true, Vec::new())
            }
        };
        let codes = vec![None; request.len()];
        self.open.insert(id, Open { unsubscribe, filters, codes, waiting });
    }

    /// Handles a broker's SUBACK or UNSUBACK. Returns the client's when it was the last.
    pub fn answered(&mut self, slot: Slot, id: u16, codes: &[u8], is_v5: bool) -> Option<Vec<u8>> {
        let open = self.open.get_mut(&id)?;
        let at = open.waiting.iter().position(|(s, _)| *s == slot)?;
        let (_, filters) = open.waiting.swap_remove(at);
        for (n, filter) in filters.into_iter().enumerate() {
            // UNSUBACK has no codes before MQTT 5.
            let code = codes.get(n).copied().unwrap_or(0);
            open.codes[filter] = Some(match open.codes[filter] {
                None => code,
                Some(before) if open.unsubscribe => before.min(code),
                // A failure wins; else the lowest QoS granted.
                Some(before) if before.max(code) >= UNSPECIFIED_ERROR => before.max(code),
                Some(before) => before.min(code),
            });
        }
        self.finished(id, is_v5)
    }

    /// A broker was lost, and will not answer.
    pub fn broker_lost(&mut self, slot: Slot, is_v5: bool) -> Vec<Vec<u8>> {
        let ids: Vec<u16> = self.open.keys().copied().collect();
        for open in self.open.values_mut() {
            open.waiting.retain(|(s, _)| *s != slot);
        }
        ids.into_iter().filter_map(|id| self.finished(id, is_v5)).collect()
    }

    /// The client's SUBACK or UNSUBACK, once all brokers have answered.
    pub fn finished(&mut self, id: u16, is_v5: bool) -> Option<Vec<u8>> {
        if !self.open.get(&id)?.waiting.is_empty() {
            return None;
        }
        let Open { unsubscribe, filters, codes, .. } = self.open.remove(&id)?;
        let missing = if unsubscribe { NO_SUBSCRIPTION_EXISTED } else { UNSPECIFIED_ERROR };
        let codes: Vec<u8> = codes.into_iter().map(|c| c.unwrap_or(missing)).collect();
        for (filter, code) in filters.iter().zip(&codes) {
            if *code >= UNSPECIFIED_ERROR {
                self.forget(filter);
            }
        }
        let mut body = Vec::with_capacity(codes.len() + 3);
        body.extend(id.to_be_bytes());
        if is_v5 {
            body.push(0); // no properties
        }
        if is_v5 || !unsubscribe {
            body.extend(codes);
        }
        let mut out = vec![if unsubscribe { 0xb0 } else { 0x90 }];
        wire::put_varint(body.len(), &mut out);
        out.extend(body);
        Some(out)
    }

    /// SUBSCRIBE packets for a broker that lost its subscriptions, one for each subscription identifier.
    pub fn again(
        &self,
        mut wanted: impl FnMut(&str) -> bool,
        mut id: impl FnMut() -> u16,
        is_v5: bool,
    ) -> Vec<u8> {
        let mut by_id: BTreeMap<_, Vec<&Subscription>> = BTreeMap::new();
        for one in self.all.values().filter(|s| wanted(&s.filter)) {
            by_id.entry(one.id).or_default().push(one);
        }
        let mut out = Vec::new();
        for mut same in by_id.into_values() {
            same.sort_by(|a, b| a.filter.cmp(&b.filter));
            out.extend(subscribe(id(), &same, Vec::new(), is_v5));
        }
        out
    }
}

/// The reason codes of a complete SUBACK or UNSUBACK.
pub fn codes(packet: &[u8], header: usize, is_v5: bool) -> &[u8] {
    let body = packet.get(header + 2..).unwrap_or_default();
    if !is_v5 {
        return body;
    }
    match wire::varint(body) {
        Ok(Some((properties, at))) => body.get(at + properties..).unwrap_or_default(),
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> (u16, Request) {
        // "a" at QoS 0, "b" at 1, "c" at 2.
        let packet = b"\x82\x0e\x00\x05\x00\x01a\x00\x00\x01b\x01\x00\x01c\x02";
        Request::read(packet, false).unwrap()
    }

    #[test]
    fn the_clients_answer_has_what_all_brokers_grant() {
        let (id, request) = three();
        assert_eq!((id, request.len(), request.filter(2)), (5, 3, "c"));
        let mut s = Subscriptions::default();
        s.begin(id, &request, vec![(0, vec![0, 2]), (1, vec![1, 2])]);
        assert_eq!(s.answered(0, 5, &[0, 2], false), None);
        let answer = s.answered(1, 5, &[0x80, 1], false).unwrap();
        assert_eq!(answer, b"\x90\x05\x00\x05\x00\x80\x01");
        assert!(!s.is_empty());
    }

    #[test]
    fn a_broker_that_goes_is_not_waited_for() {
        let (id, request) = three();
        let mut s = Subscriptions::default();
        s.begin(id, &request, vec![(0, vec![0]), (1, vec![1, 2])]);
        assert_eq!(s.answered(0, 5, &[0], false), None);
        assert_eq!(s.broker_lost(1, false), [b"\x90\x05\x00\x05\x00\x80\x80"]);
    }

    #[test]
    fn what_is_subscribed_can_be_subscribed_again() {
        let (id, request) = three();
        let mut s = Subscriptions::default();
        s.begin(id, &request, vec![(0, vec![0, 1, 2])]);
        let again = s.again(|filter| filter != "b", || 9, false);
        assert_eq!(again, b"\x82\x0a\x00\x09\x00\x01a\x00\x00\x01c\x02");
        assert_eq!(request.packet(7, &[1], false), b"\x82\x06\x00\x07\x00\x01b\x01");
        let unsubscribe = Request::read(b"\xa2\x08\x00\x06\x00\x01a\x00\x01c", false).unwrap().1;
        s.begin(6, &unsubscribe, vec![(0, vec![0, 1])]);
        assert_eq!(s.answered(0, 6, &[], false).unwrap(), b"\xb0\x02\x00\x06");
        assert_eq!(s.again(|_| true, || 9, false), b"\x82\x06\x00\x09\x00\x01b\x01");
    }
}
