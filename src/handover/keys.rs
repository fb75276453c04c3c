//! The key file: made on one machine, copied to all balancers and broker hosts.
//!
//! It has at most two keys, each of an epoch. All of them are accepted; cookies are made with the
//! newest whose `use_from` is past. So a new key is put everywhere first, and used then, and
//! connections that are being opened under the old one are not lost.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use siphasher::sip::SipHasher24;

use crate::domain::CookieKeys;

/// What can be wrong with it, each with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error(
        "{path}: there is no handover key; make one with `mqtt-fwd keys new`, or copy the balancer's"
    )]
    None { path: PathBuf },
    #[error("{path}: others may read this secret (mode {mode:04o}); `chmod 600 {path}`")]
    Readable { path: PathBuf, mode: u32 },
    #[error(
        "{path}: not a handover key ({why}); copy it again, or make one with `mqtt-fwd keys new`"
    )]
    Malformed { path: PathBuf, why: String },
    #[error(
        "{path}: is there already; `mqtt-fwd keys rotate` changes it without losing connections"
    )]
    Exists { path: PathBuf },
    #[error(
        "{path}: the key of epoch {epoch} is not in use before {seconds} s from now; rotate after that, \
         or connections that are opened now would be lost"
    )]
    TooEarly { path: PathBuf, epoch: u32, seconds: u64 },
    #[error("{path}: {action}: {source}")]
    Io { path: PathBuf, action: &'static str, source: std::io::Error },
    #[error("random numbers for a key: {0}")]
    Random(getrandom::Error),
}

type Result<T> = std::result::Result<T, KeyError>;

/// The file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyFile {
    /// The newest last.
    key: Vec<Key>,
}

/// One key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// Counts up; its parity is part of each cookie.
    pub epoch: u32,
    /// When it was made, seconds since 1970.
    pub made: u64,
    /// When balancers begin to use it, seconds since 1970.
    pub use_from: u64,
    /// 16 bytes in hexadecimal.
    secret: String,
}

impl Key {
    fn random(epoch: u32, now: u64, use_from: u64) -> Result<Self> {
        let mut secret = [0u8; 16];
        getrandom::fill(&mut secret).map_err(KeyError::Random)?;
        let secret = format!("{:032x}", u128::from_be_bytes(secret));
        Ok(Self { epoch, made: now, use_from, secret })
    }

    fn words(&self) -> Option<[u64; 2]> {
        let half = |text: Option<&str>| text.and_then(|t| u64::from_str_radix(t, 16).ok());
        let words = [half(self.secret.get(..16))?, half(self.secret.get(16..))?];
        // All zero is what the datapath takes for none.
        (self.secret.len() == 32 && words != [0, 0]).then_some(words)
    }

    /// What people compare on two machines; says nothing about the secret.
    pub fn fingerprint(&self) -> String {
        let [k0, k1] = self.words().unwrap_or_default();
        let hash = SipHasher24::new_with_keys(k0, k1).hash(b"mqtt-fwd handover key");
        format!("{:08x}", hash as u32)
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl KeyFile {
    /// Reads and checks it.
    pub fn read(path: &Path) -> Result<Self> {
        let io = |action| move |source| KeyError::Io { path: path.to_owned(), action, source };
        let text = match fs::read_to_string(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(KeyError::None { path: path.to_owned() });
            }
            other => other.map_err(io("reading"))?,
        };
        let mode = fs::metadata(path).map_err(io("reading"))?.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Readable { path: path.to_owned(), mode });
        }
        let malformed =
            |why: &str| KeyError::Malformed { path: path.to_owned(), why: why.to_owned() };
        let file: Self = toml::from_str(&text).map_err(|e| malformed(e.message().trim()))?;
        if file.key.is_empty() || file.key.len() > 2 {
            return Err(malformed("it has one key, or two while they are changed"));
        }
        if file.key.iter().any(|key| key.words().is_none()) {
            return Err(malformed("a secret is not 32 hexadecimal digits"));
        }
        if let [old, new] = &file.key[..]
            && new.epoch != old.epoch.wrapping_add(1)
        {
            return Err(malformed("its two epochs do not follow each other"));
        }
        Ok(file)
    }

    /// Makes the first key.
    pub fn create(path: &Path) -> Result<Self> {
        if path.exists() {
            return Err(KeyError::Exists { path: path.to_owned() });
        }
        let file = Self { key: vec![Key::random(1, now(), now())?] };
        file.write(path)?;
        Ok(file)
    }

    /// Adds a key that is used `after` seconds from now; forgets the one before the last.
    pub fn rotate(path: &Path, after: u64) -> Result<Self> {
        let mut file = Self::read(path)?;
        let last = file.key.remove(file.key.len() - 1);
        if last.use_from > now() {
            let seconds = last.use_from - now();
            return Err(KeyError::TooEarly { path: path.to_owned(), epoch: last.epoch, seconds });
        }
        let new = Key::random(last.epoch.wrapping_add(1), now(), now() + after)?;
        file.key = vec![last, new];
        file.write(path)?;
        Ok(file)
    }

    /// Whole or not at all: beside it first, then in its place.
    fn write(&self, path: &Path) -> Result<()> {
        let io = |action| move |source| KeyError::Io { path: path.to_owned(), action, source };
        let text = toml::to_string(self).map_err(|e| io("writing")(std::io::Error::other(e)))?;
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(io("making its directory"))?;
        }
        let beside = path.with_extension(format!("new{}", std::process::id()));
        let write = || -> std::io::Result<()> {
            let mut file =
                fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
            file.write_all(
                b"# mqtt-fwd: the secret that balancers and broker hosts share (delayed binding).\n\
                  # Made and changed by `mqtt-fwd keys`; the same file belongs on all of them.\n",
            )?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&beside, path)
        };
        write().map_err(|source| {
            let _ = fs::remove_file(&beside);
            io("writing")(source)
        })
    }

    /// The keys, oldest first.
    pub fn keys(&self) -> &[Key] {
        &self.key
    }

    /// The key that cookies are made with at a time.
    pub fn in_use(&self, at: u64) -> &Key {
        self.key.iter().rev().find(|key| key.use_from <= at).unwrap_or(&self.key[0])
    }

    /// What the datapath and the broker hosts hold at a time.
    pub fn cookie_keys(&self, at: u64) -> CookieKeys {
        let mut keys = CookieKeys { key: [[0; 2]; 2], epoch: self.in_use(at).epoch };
        for key in &self.key {
            keys.key[(key.epoch & 1) as usize] = key.words().unwrap_or_default();
        }
        keys
    }
}

impl CookieKeys {
    /// Keys that nobody else has.
    pub fn random() -> Result<Self> {
        let word = || getrandom::u64().map_err(KeyError::Random);
        Ok(Self { key: [[word()?, word()?], [word()?, word()?]], epoch: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn a_new_key_is_used_only_when_it_is_time() {
        let dir = dir();
        let path = dir.path().join("handover.key");
        let first = KeyFile::create(&path).unwrap();
        assert!(matches!(KeyFile::create(&path), Err(KeyError::Exists { .. })));
        let second = KeyFile::rotate(&path, 60).unwrap();
        assert_eq!(second.in_use(now()).fingerprint(), first.in_use(now()).fingerprint());
        assert_eq!(second.in_use(now() + 61).epoch, 2);
        assert!(matches!(KeyFile::rotate(&path, 60), Err(KeyError::TooEarly { .. })));
        let keys = second.cookie_keys(now());
        assert_eq!(keys.epoch, 1);
        assert!(keys.key[0] != [0, 0] && keys.key[1] != [0, 0] && keys.key[0] != keys.key[1]);
        assert_eq!(KeyFile::read(&path).unwrap(), second);
    }

    #[test]
    fn two_keys_at_most_and_the_last_one_stays() {
        let dir = dir();
        let path = dir.path().join("handover.key");
        KeyFile::create(&path).unwrap();
        for epoch in 2..6 {
            let before = KeyFile::read(&path).unwrap().in_use(now()).fingerprint();
            let file = KeyFile::rotate(&path, 0).unwrap();
            assert_eq!(file.in_use(now()).epoch, epoch);
            assert_eq!(file.keys().len(), 2);
            assert_eq!(file.keys()[0].fingerprint(), before);
        }
    }

    #[test]
    fn a_file_that_others_may_read_or_that_is_damaged_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = dir();
        let path = dir.path().join("handover.key");
        assert!(matches!(KeyFile::read(&path), Err(KeyError::None { .. })));
        KeyFile::create(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(KeyFile::read(&path), Err(KeyError::Readable { mode: 0o640, .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        for damaged in ["", "key = []", &text[..text.len() - 8], &text.replace("secret", "secre")] {
            fs::write(&path, damaged).unwrap();
            assert!(matches!(KeyFile::read(&path), Err(KeyError::Malformed { .. })), "{damaged}");
        }
    }
}
