//! What questions and answers of a fleet are authenticated with: made of the handover keys, which all of its hosts
//! have, and of no use for cookies.

use siphasher::sip::SipHasher24;

use crate::domain::CookieKeys;
use crate::kernel::decap::AskKeys;

/// The keys of questions, where there is a key of that parity.
pub fn ask_keys(keys: &CookieKeys) -> AskKeys {
    keys.key.map(|[k0, k1]| {
        if [k0, k1] == [0, 0] {
            return [0, 0];
        }
        let derive = |label: &[u8]| SipHasher24::new_with_keys(k0, k1).hash(label);
        [derive(b"mqtt-fwd fleet 0"), derive(b"mqtt-fwd fleet 1")]
    })
}
