//! Reads TOML tables key by key and collects what is wrong, instead of stopping at the first.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use toml::{Table, Value};

use super::Problem;

/// A table being read. [`Reader::finish`] reports the keys that nobody asked for.
pub struct Reader<'a> {
    table: &'a Table,
    path: String,
    problems: &'a RefCell<Vec<Problem>>,
    known: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Reader<'a> {
    pub fn new(table: &'a Table, problems: &'a RefCell<Vec<Problem>>) -> Self {
        Self { table, path: String::new(), problems, known: RefCell::default() }
    }

    /// The full path of one of this table's keys.
    pub fn key(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Reports a problem with the value of `key`.
    pub fn problem(&self, key: &str, text: impl Into<String>) {
        let value = self.table.get(key).map(short).unwrap_or_default();
        self.problems.borrow_mut().push(Problem { key: self.key(key), value, text: text.into() });
    }

    fn get(&self, key: &'static str) -> Option<&'a Value> {
        self.known.borrow_mut().insert(key);
        self.table.get(key)
    }

    /// An optional text.
    pub fn text(&self, key: &'static str) -> Option<&'a str> {
        match self.get(key)? {
            Value::String(text) => Some(text),
            _ => {
                self.problem(key, "must be a text in quotes");
                None
            }
        }
    }

    /// A text that has to be there. `example` says what to write.
    pub fn required_text(&self, key: &'static str, example: &str) -> Option<&'a str> {
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

    /// One of a few words.
    pub fn choice<T: Copy>(&self, key: &'static str, choices: &[(&str, T)]) -> Option<T> {
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
        match self.get(key)? {
            Value::Integer(n) if range.contains(n) => T::try_from(*n).ok(),
            _ => {
                let (low, high) = range.into_inner();
                self.problem(key, format!("must be a whole number from {low} to {high}"));
                None
            }
        }
    }

    /// An optional table.
    pub fn table(&self, key: &'static str) -> Option<Reader<'a>> {
        match self.get(key)? {
            Value::Table(table) => Some(self.child(table, self.key(key))),
            _ => {
                self.problem(key, format!("must be a table, [{}]", self.key(key)));
                None
            }
        }
    }

    /// A list of tables, empty if the key is not there.
    pub fn tables(&self, key: &'static str) -> Vec<Reader<'a>> {
        let Some(value) = self.get(key) else { return Vec::new() };
        let Value::Array(items) = value else {
            self.problem(key, format!("must be a list of tables, [[{}]]", self.key(key)));
            return Vec::new();
        };
        let mut readers = Vec::new();
        for (i, item) in items.iter().enumerate() {
            if let Value::Table(table) = item {
                readers.push(self.child(table, format!("{}[{i}]", self.key(key))));
            } else {
                self.problems.borrow_mut().push(Problem {
                    key: format!("{}[{i}]", self.key(key)),
                    value: short(item),
                    text: "must be a table, { … }".to_owned(),
                });
            }
        }
        readers
    }

    fn child(&self, table: &'a Table, path: String) -> Reader<'a> {
        Reader { table, path, problems: self.problems, known: RefCell::default() }
    }

    /// Reports keys that mean nothing here, with the one that was probably meant.
    pub fn finish(self) {
        let known = self.known.borrow();
        for key in self.table.keys().filter(|k| !known.contains(k.as_str())) {
            let nearest = known.iter().min_by_key(|k| distance(k, key));
            let text = match nearest.filter(|k| distance(k, key) <= 1 + key.len() / 3) {
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

/// A value as it was written, or its beginning.
fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 {
        return text;
    }
    let mut start: String = text.chars().take(57).collect();
    start.push('…');
    start
}

/// Levenshtein's edit distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
