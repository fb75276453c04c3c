//! Errors of the configuration, for the person who has to correct it.

use std::fmt;
use std::path::PathBuf;

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{path}: {source}; name the file with --config or MQTT_FWD_CONFIG")]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not text.
    #[error("{path}: line {line} is not valid UTF-8; save the file as UTF-8")]
    NotText {
        /// Which.
        path: PathBuf,
        /// The first such line.
        line: usize,
    },
    /// It is not TOML.
    #[error("{path}: not valid TOML: {}", excerpt(.source))]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Where and what.
        source: Box<toml::de::Error>,
    },
    /// It is TOML, but not a configuration.
    #[error("{}", list(.path, .problems))]
    Invalid {
        /// Which.
        path: PathBuf,
        /// All that is wrong with it.
        problems: Vec<Problem>,
    },
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The line, counted from 1, of the key or of what it should be in.
    pub line: Option<usize>,
    /// Path of the key, such as `service[0].group[1].vip`.
    pub key: String,
    /// Its value as written; empty if it is missing.
    pub value: String,
    /// What is wrong, and what to write.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.value.is_empty() {
            write!(f, "{}: {}", self.key, self.text)
        } else {
            write!(f, "{} = {}: {}", self.key, self.value, self.text)
        }
    }
}

/// What may be a secret, by the key's name or the line that it is in.
pub fn is_secret(text: &str) -> bool {
    ["password", "secret"].iter().any(|word| text.contains(word))
}

/// With the line that it is about, unless that has a secret.
fn excerpt(error: &toml::de::Error) -> String {
    let text = error.to_string();
    if is_secret(&text) { error.message().to_owned() } else { text }
}

impl ConfigError {
    /// For where others read it: without anything of the file but names of keys.
    pub fn without_values(&self) -> String {
        match self {
            Self::Syntax { path, source } => {
                format!("{}: not valid TOML: {}", path.display(), source.message())
            }
            Self::Invalid { path, problems } => {
                let named = |p: &Problem| Problem { value: String::new(), ..p.clone() };
                list(path, &problems.iter().map(named).collect::<Vec<_>>())
            }
            Self::Unreadable { .. } | Self::NotText { .. } => self.to_string(),
        }
    }
}

fn list(path: &std::path::Path, problems: &[Problem]) -> String {
    let line = |p: &Problem| match p.line {
        Some(line) => format!("{}:{line}: {p}", path.display()),
        None => format!("{}: {p}", path.display()),
    };
    problems.iter().map(line).collect::<Vec<_>>().join("\n")
}
