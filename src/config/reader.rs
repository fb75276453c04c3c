//! Reads TOML tables key by key and collects what is wrong, instead of stopping at the first.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Problem;
use super::error::is_secret;

/// The file that is being read: its text, what is wrong with it, and where its keys are.
pub struct Source<'a> {
    text: &'a str,
    /// Where lines begin but the first: a file may have a hundred thousand routes.
    line_starts: Vec<usize>,
    problems: RefCell<Vec<Problem>>,
    lines: RefCell<HashMap<String, usize>>,
    /// What was asked for, by path, without the numbers of lists; none: nobody wants to know.
    asked: Option<RefCell<BTreeMap<String, Asked>>>,
}

/// What a key may be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Text,
    /// Such as "300ms".
    Duration,
    Choice(Vec<String>),
    Number(RangeOf),
    Flag,
    Texts,
    Table,
    Tables,
}

/// From and to.
pub type RangeOf = (i64, i64);

/// A key that was asked for.
#[derive(Debug, Clone)]
pub struct Asked {
    pub kind: Kind,
    pub required: bool,
}

impl<'a> Source<'a> {
    pub fn new(text: &'a str) -> Self {
        let line_starts = text.match_indices('\n').map(|(at, _)| at + 1).collect();
        Self {
            text,
            line_starts,
            problems: RefCell::default(),
            lines: RefCell::default(),
            asked: None,
        }
    }

    /// All of it.
    pub fn text(&self) -> &'a str {
        self.text
    }

    /// Counted from 1.
    fn line_of(&self, span: &Range<usize>) -> usize {
        self.line_starts.partition_point(|start| *start <= span.start) + 1
    }

    /// Reports a problem with a key, or with something in it, by its path.
    pub fn report(&self, key: String, value: String, text: String) {
        let value = if is_secret(&key) && !value.is_empty() { "…".to_owned() } else { value };
        let lines = self.lines.borrow();
        let mut path = key.as_str();
        // The key may be missing; what it would be in is not.
        let line = loop {
            match (lines.get(path), path.rfind(['.', '['])) {
                (Some(line), _) => break Some(*line),
                (None, Some(end)) => path = &path[..end],
                (None, None) => break None,
            }
        };
        self.problems.borrow_mut().push(Problem { line, key, value, text });
    }

    /// One that notes what is asked for.
    pub fn noting(text: &'a str) -> Self {
        Self { asked: Some(RefCell::default()), ..Self::new(text) }
    }

    /// All that was asked for.
    pub fn asked(&self) -> BTreeMap<String, Asked> {
        self.asked.as_ref().map(|asked| asked.borrow().clone()).unwrap_or_default()
    }

    /// Whether nothing is wrong so far.
    pub fn is_clean(&self) -> bool {
        self.problems.borrow().is_empty()
    }

    /// All that is wrong, by line.
    pub fn into_problems(self) -> Vec<Problem> {
        let mut problems = self.problems.into_inner();
        problems.sort_by_key(|problem| problem.line);
        problems
    }

    /// A value as it was written, or its beginning.
    fn written(&self, value: &Spanned<DeValue<'_>>) -> String {
        let text = self.text.get(value.span()).unwrap_or_default();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if text.chars().count() <= 60 {
            return text;
        }
        text.chars().take(57).chain(['…']).collect()
    }
}

/// A table being read. [`Reader::finish`] reports the keys that were not asked for.
pub struct Reader<'a> {
    table: &'a DeTable<'a>,
    path: String,
    source: &'a Source<'a>,
    known: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Reader<'a> {
    pub fn new(table: &'a DeTable<'a>, source: &'a Source<'a>) -> Self {
        Self { table, path: String::new(), source, known: RefCell::default() }
    }

    /// The full path of one of this table's keys.
    pub fn key(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Whether there is such a key, whatever its value.
    pub fn has(&self, key: &str) -> bool {
        self.table.get(key).is_some()
    }

    /// Reports a problem with the value of `key`.
    pub fn problem(&self, key: &str, text: impl Into<String>) {
        let value = self.table.get(key);
        let path = self.key(key);
        if let Some(value) = value {
            self.source.lines.borrow_mut().insert(path.clone(), self.source.line_of(&value.span()));
        }
        let value = value.map(|value| self.source.written(value)).unwrap_or_default();
        self.source.report(path, value, text.into());
    }

    /// The path of a key, the same for all tables of a list.
    fn unnumbered(&self, key: &str) -> String {
        let path = self.key(key);
        let parts = path.split('[');
        parts.map(|part| part.split_once(']').map_or(part, |(_, rest)| rest)).collect()
    }

    /// Notes what a key may be, unless something more exact is known.
    fn ask(&self, key: &'static str, kind: Kind) {
        let Some(asked) = &self.source.asked else { return };
        let path = self.unnumbered(key);
        let mut asked = asked.borrow_mut();
        let there =
            asked.entry(path).or_insert_with(|| Asked { kind: kind.clone(), required: false });
        if there.kind == Kind::Text {
            there.kind = kind;
        }
    }

    fn require(&self, key: &'static str) {
        self.ask(key, Kind::Text);
        if let Some(asked) = &self.source.asked
            && let Some(asked) = asked.borrow_mut().get_mut(&self.unnumbered(key))
        {
            asked.required = true;
        }
    }

    fn get(&self, key: &'static str) -> Option<&'a DeValue<'a>> {
        self.known.borrow_mut().insert(key);
        let value = self.table.get(key)?;
        self.source.lines.borrow_mut().insert(self.key(key), self.source.line_of(&value.span()));
        Some(value.get_ref())
    }

    /// An optional text.
    pub fn text(&self, key: &'static str) -> Option<&'a str> {
        self.ask(key, Kind::Text);
        match self.get(key)? {
            DeValue::String(text) => Some(text),
            _ => {
                self.problem(key, "must be a text in quotes");
                None
            }
        }
    }

    /// A text that has to be there. `example` says what to write.
    pub fn required_text(&self, key: &'static str, example: &str) -> Option<&'a str> {
        self.require(key);
        if self.get(key).is_none() {
            self.problem(key, format!("is missing; write {key} = {example:?}"));
        }
        self.text(key)
    }

    /// A text that `parse` understands; its error says what is wrong and what to write.
    pub fn parsed<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        parse(self.text(key)?).map_err(|e| self.problem(key, e)).ok()
    }

    /// Like [`Reader::parsed`], for a key that has to be there.
    pub fn required<T>(
        &self,
        key: &'static str,
        example: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        parse(self.required_text(key, example)?).map_err(|e| self.problem(key, e)).ok()
    }

    /// A list of texts that `parse` understands, empty if the key is not there.
    pub fn list<T>(
        &self,
        key: &'static str,
        example: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Vec<T> {
        self.ask(key, Kind::Texts);
        let Some(value) = self.get(key) else { return Vec::new() };
        let DeValue::Array(items) = value else {
            self.problem(key, format!("must be a list, [{example:?}]"));
            return Vec::new();
        };
        let one = |item: &toml::Spanned<DeValue<'_>>| match item.get_ref() {
            DeValue::String(text) => parse(text),
            _ => Err(format!("must be a list of texts, [{example:?}]")),
        };
        let parsed: Result<Vec<T>, String> = items.iter().map(one).collect();
        parsed.map_err(|text| self.problem(key, text)).unwrap_or_default()
    }

    /// One of a few words.
    pub fn choice<T: Copy>(&self, key: &'static str, choices: &[(&str, T)]) -> Option<T> {
        let names = choices.iter().map(|(name, _)| (*name).to_owned());
        self.ask(key, Kind::Choice(names.collect()));
        let text = self.text(key)?;
        let found = choices.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
        if found.is_none() {
            let names: Vec<_> = choices.iter().map(|(name, _)| format!("{name:?}")).collect();
            self.problem(key, format!("must be {}", names.join(" or ")));
        }
        found
    }

    /// An optional whole number within bounds.
    pub fn number<T: TryFrom<i64>>(
        &self,
        key: &'static str,
        range: RangeInclusive<i64>,
    ) -> Option<T> {
        self.ask(key, Kind::Number((*range.start(), *range.end())));
        match self.get(key)? {
            DeValue::Integer(n) if in_range(n, &range).is_some() => {
                in_range(n, &range).and_then(|n| T::try_from(n).ok())
            }
            _ => {
                let (low, high) = range.into_inner();
                self.problem(key, format!("must be a whole number from {low} to {high}"));
                None
            }
        }
    }

    /// An optional duration within bounds, such as "300ms" or "5m".
    pub fn duration(&self, key: &'static str, range: RangeInclusive<Duration>) -> Option<Duration> {
        self.ask(key, Kind::Duration);
        self.parsed(key, |text| {
            let (low, high) = (range.start(), range.end());
            match humantime::parse_duration(text) {
                Ok(duration) if range.contains(&duration) => Ok(duration),
                _ => Err(format!(
                    "must be a duration from {:?} to {:?}, such as \"300ms\" or \"5m\"",
                    humantime::format_duration(*low).to_string(),
                    humantime::format_duration(*high).to_string()
                )),
            }
        })
    }

    /// An optional true or false.
    pub fn flag(&self, key: &'static str) -> Option<bool> {
        self.ask(key, Kind::Flag);
        match self.get(key)? {
            DeValue::Boolean(value) => Some(*value),
            _ => {
                self.problem(key, "must be true or false, without quotes");
                None
            }
        }
    }

    /// An optional table.
    pub fn table(&self, key: &'static str) -> Option<Reader<'a>> {
        self.ask(key, Kind::Table);
        match self.get(key)? {
            DeValue::Table(table) => Some(self.child(table, self.key(key))),
            _ => {
                self.problem(key, format!("must be a table, [{}]", self.key(key)));
                None
            }
        }
    }

    /// A list of tables, empty if the key is not there.
    pub fn tables(&self, key: &'static str) -> Vec<Reader<'a>> {
        self.ask(key, Kind::Tables);
        let Some(value) = self.get(key) else { return Vec::new() };
        let DeValue::Array(items) = value else {
            self.problem(key, format!("must be a list of tables, [[{}]]", self.key(key)));
            return Vec::new();
        };
        let mut readers = Vec::new();
        for (i, item) in items.iter().enumerate() {
            let path = format!("{}[{i}]", self.key(key));
            let line = self.source.line_of(&item.span());
            self.source.lines.borrow_mut().insert(path.clone(), line);
            if let DeValue::Table(table) = item.get_ref() {
                readers.push(self.child(table, path));
            } else {
                let (value, text) = (self.source.written(item), "must be a table, { … }");
                self.source.report(path, value, text.to_owned());
            }
        }
        readers
    }

    fn child(&self, table: &'a DeTable<'a>, path: String) -> Reader<'a> {
        Reader { table, path, source: self.source, known: RefCell::default() }
    }

    /// Reports keys that mean nothing here, with the one that was probably meant.
    pub fn finish(self) {
        let known = self.known.borrow();
        let keys = self.table.keys().map(|key| key.get_ref().as_ref());
        for key in keys.filter(|key| !known.contains(key)) {
            let distance = |k: &&&str| strsim::levenshtein(k, key);
            let nearest = known.iter().min_by_key(distance);
            let text = match nearest.filter(|k| distance(k) <= 1 + key.len() / 3) {
                Some(k) => format!("unknown key; is {k:?} meant?"),
                None => format!(
                    "unknown key; known here: {}",
                    known.iter().copied().collect::<Vec<_>>().join(", ")
                ),
            };
            self.problem(key, text);
        }
    }
}

fn in_range(number: &toml::de::DeInteger<'_>, range: &RangeInclusive<i64>) -> Option<i64> {
    let number = i64::from_str_radix(number.as_str(), number.radix()).ok()?;
    range.contains(&number).then_some(number)
}
