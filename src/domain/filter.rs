//! MQTT topic filters (MQTT 3.1.1 §4.7) and which of several is the most specific.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

/// A level of a topic filter.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Level {
    /// Just this text.
    Literal(String),
    /// `+`: any one level.
    One,
    /// `#`: any levels from here on, none too.
    Rest,
}

/// A valid topic filter.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TopicFilter {
    levels: Vec<Level>,
}

/// Why a text is no topic filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    #[error("a topic filter must not be empty (MQTT 3.1.1 §4.7.3)")]
    Empty,
    #[error("longer than 65535 bytes (MQTT 3.1.1 §4.7.3)")]
    TooLong,
    #[error("must not have a null character (MQTT 3.1.1 §4.7.3)")]
    Null,
    #[error("'#' must be the last level, and alone in it, as in \"sport/#\" (MQTT 3.1.1 §4.7.1.2)")]
    MisplacedRest,
    #[error("'+' must be alone in its level, as in \"sport/+/score\" (MQTT 3.1.1 §4.7.1.3)")]
    MisplacedOne,
    #[error("shared subscriptions are not routes; write the filter behind $share/NAME/ alone")]
    Shared,
}

impl TopicFilter {
    /// Checks and takes apart a filter.
    pub fn parse(text: &str) -> Result<Self, FilterError> {
        if text.is_empty() {
            return Err(FilterError::Empty);
        }
        if text.len() > usize::from(u16::MAX) {
            return Err(FilterError::TooLong);
        }
        if text.contains('\0') {
            return Err(FilterError::Null);
        }
        if text.starts_with("$share/") {
            return Err(FilterError::Shared);
        }
        let count = text.split('/').count();
        let levels = text
            .split('/')
            .enumerate()
            .map(|(i, level)| match level {
                "#" if i + 1 == count => Ok(Level::Rest),
                "+" => Ok(Level::One),
                _ if level.contains('#') => Err(FilterError::MisplacedRest),
                _ if level.contains('+') => Err(FilterError::MisplacedOne),
                _ => Ok(Level::Literal(level.to_owned())),
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { levels })
    }

    /// The levels.
    pub fn levels(&self) -> &[Level] {
        &self.levels
    }

    /// Whether the filter matches a topic. The plain definition: what the compiled routes are
    /// tested against.
    pub fn matches(&self, topic: &str) -> bool {
        // MQTT 3.1.1 §4.7.2: a leading wildcard does not match a topic that begins with '$'.
        if topic.starts_with('$') && !matches!(self.levels[0], Level::Literal(_)) {
            return false;
        }
        let mut topic_levels = topic.split('/');
        for level in &self.levels {
            match (level, topic_levels.next()) {
                (Level::Rest, _) => return true,
                (Level::One, Some(_)) => {}
                (Level::Literal(text), Some(there)) if text == there => {}
                _ => return false,
            }
        }
        topic_levels.next().is_none()
    }

    /// Which of two filters that match the same topic counts: level by level from the left, a
    /// literal before `+` before `#`. The more specific is the greater.
    pub fn specificity(&self, other: &Self) -> Ordering {
        // A filter that ends where the other has `#` is the more specific: it matches only
        // this topic.
        let rank = |level: Option<&Level>| match level {
            Some(Level::Literal(_)) | None => 2,
            Some(Level::One) => 1,
            Some(Level::Rest) => 0,
        };
        let length = self.levels.len().max(other.levels.len());
        (0..length)
            .map(|i| rank(self.levels.get(i)).cmp(&rank(other.levels.get(i))))
            .find(|o| o.is_ne())
            .unwrap_or(Ordering::Equal)
    }
}

impl fmt::Display for TopicFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, level) in self.levels.iter().enumerate() {
            if i > 0 {
                f.write_str("/")?;
            }
            f.write_str(match level {
                Level::Literal(text) => text,
                Level::One => "+",
                Level::Rest => "#",
            })?;
        }
        Ok(())
    }
}

impl FromStr for TopicFilter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        Self::parse(text)
    }
}

/// The most specific of the filters that match, by trying all of them.
pub fn most_specific<'a>(
    filters: impl IntoIterator<Item = &'a TopicFilter>,
    topic: &str,
) -> Option<&'a TopicFilter> {
    filters.into_iter().filter(|f| f.matches(topic)).max_by(|a, b| a.specificity(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(text: &str) -> TopicFilter {
        text.parse().unwrap()
    }

    #[test]
    fn the_standards_own_examples() {
        // MQTT 3.1.1 §4.7.1.2, §4.7.1.3, §4.7.2.1
        let table = [
            ("sport/tennis/player1/#", "sport/tennis/player1", true),
            ("sport/tennis/player1/#", "sport/tennis/player1/ranking", true),
            ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", true),
            ("sport/#", "sport", true),
            ("#", "anything/at/all", true),
            ("sport/tennis/+", "sport/tennis/player1", true),
            ("sport/tennis/+", "sport/tennis/player1/ranking", false),
            ("sport/+", "sport", false),
            ("sport/+", "sport/", true),
            ("+/+", "/finance", true),
            ("/+", "/finance", true),
            ("+", "/finance", false),
            ("#", "$SYS/uptime", false),
            ("+/monitor/Clients", "$SYS/monitor/Clients", false),
            ("$SYS/#", "$SYS/uptime", true),
            ("$SYS/monitor/+", "$SYS/monitor/Clients", true),
        ];
        for (text, topic, expected) in table {
            assert_eq!(filter(text).matches(topic), expected, "{text} on {topic}");
        }
    }

    #[test]
    fn malformed_filters_are_refused() {
        let table = [
            ("", FilterError::Empty),
            ("sport/tennis#", FilterError::MisplacedRest),
            ("sport/tennis/#/ranking", FilterError::MisplacedRest),
            ("sport+", FilterError::MisplacedOne),
            ("a\0b", FilterError::Null),
            ("$share/g/a", FilterError::Shared),
        ];
        for (text, expected) in table {
            assert_eq!(TopicFilter::parse(text), Err(expected), "{text:?}");
        }
        assert_eq!(TopicFilter::parse(&"x".repeat(65_536)), Err(FilterError::TooLong));
    }

    #[test]
    fn specificity_goes_level_by_level_from_the_left() {
        for (more, less) in
            [("a/b", "a/+"), ("a/+", "a/#"), ("a/+/+", "+/b/c"), ("a/#", "+/b/c"), ("a", "a/#")]
        {
            assert_eq!(filter(more).specificity(&filter(less)), Ordering::Greater, "{more} {less}");
            assert_eq!(filter(less).specificity(&filter(more)), Ordering::Less, "{less} {more}");
        }
    }
}
