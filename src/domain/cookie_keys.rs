//! Keys of SYN cookies, which balancers make and broker hosts check.

/// Keys of SYN cookies. Cookies are made with `key[epoch & 1]`; the other one, of the epoch before or the
/// next, is only checked against. All zero: there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CookieKeys {
    pub key: [[u64; 2]; 2],
    pub epoch: u32,
}
