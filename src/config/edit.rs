//! Changes of a configuration's text: a route, a real, a group more or less. The rest of it stays as it was
//! written, comments included.

use std::fmt;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::Path;

use toml_edit::{Array, DocumentMut, Item, RawString, Table, TableLike, Value};

/// One change of one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    AddRoute { route: RouteKey, group: String },
    RemoveRoute { route: RouteKey },
    AddGroup { group: String, vip: IpAddr, reals: Vec<IpAddr> },
    RemoveGroup { group: String },
    AddReal { group: String, real: IpAddr, weight: u32, vip: Option<IpAddr> },
    RemoveReal { group: String, real: IpAddr },
    SetWeight { group: String, real: IpAddr, weight: u32 },
}

/// What a route goes by, as the configuration names it: `topic`, `client_id`, `username`, `sni` or `alpn`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteKey {
    pub by: &'static str,
    pub pattern: String,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddRoute { route, group } => write!(f, "add route {route} to {group}"),
            Self::RemoveRoute { route } => write!(f, "remove route {route}"),
            Self::AddGroup { group, vip, reals } => {
                let reals: Vec<_> = reals.iter().map(IpAddr::to_string).collect();
                write!(f, "add group {group} at {vip} with {}", reals.join(", "))
            }
            Self::RemoveGroup { group } => write!(f, "remove group {group}"),
            Self::AddReal { group, real, weight, .. } => {
                write!(f, "add {real}, weight {weight}, to group {group}")
            }
            Self::RemoveReal { group, real } => write!(f, "remove {real} from group {group}"),
            Self::SetWeight { group, real, weight } => {
                write!(f, "set the weight of {real} in group {group} to {weight}")
            }
        }
    }
}

impl fmt::Display for RouteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {:?}", self.by, self.pattern)
    }
}

/// Why a change cannot be made. What is wrong with the result is a [`super::ConfigError`] of its own.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    #[error("the text is no TOML: {0}")]
    Syntax(#[from] toml_edit::TomlError),
    #[error("there are several services ({}); name one with --service", .0.join(", "))]
    WhichService(Vec<String>),
    #[error("there is no service {0}")]
    NoService(String),
    #[error("service {service} has no group {group}")]
    NoGroup { service: String, group: String },
    #[error("group {group} has no real {real}")]
    NoReal { group: String, real: IpAddr },
    #[error("service {service} has no route with {route}")]
    NoRoute { service: String, route: RouteKey },
    #[error("service {service} has a route with {route} already, to {group}")]
    RouteExists { service: String, route: RouteKey, group: String },
    #[error(
        "{what} is written in a way that cannot be edited; edit the file, and `mqtt-fwd apply`"
    )]
    Shape { what: &'static str },
}

/// The text with a change of a service, or of the only one.
pub fn edit(text: &str, service: Option<&str>, change: &Change) -> Result<String, EditError> {
    let mut document: DocumentMut = text.trim_start_matches(BOM).parse()?;
    let service = find_service(&mut document, service)?;
    change.make(service)?;
    let mut changed = document.to_string();
    if text.contains("\r\n") {
        changed = changed.replace("\r\n", "\n").replace('\n', "\r\n");
    }
    if text.starts_with(BOM) {
        changed.insert(0, BOM);
    }
    Ok(changed)
}

/// Some editors put it in front.
const BOM: char = '\u{feff}';

/// Replaces a file, whole or not at all; owner and permissions stay.
pub fn replace_file(path: &Path, text: &str) -> io::Result<()> {
    // What a symbolic link leads to is replaced, and not the link.
    let path = std::fs::canonicalize(path)?;
    let old = std::fs::metadata(&path)?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(text.as_bytes())?;
    file.as_file().set_permissions(old.permissions())?;
    {
        use std::os::unix::fs::MetadataExt as _;
        std::os::unix::fs::fchown(file.as_file(), Some(old.uid()), Some(old.gid()))?;
    }
    file.as_file().sync_all()?;
    file.persist(&path)?;
    Ok(())
}

type Found<'a> = Result<&'a mut dyn TableLike, EditError>;

fn name_of(table: &dyn TableLike) -> String {
    text_of(table, "name").to_owned()
}

fn text_of<'a>(table: &'a dyn TableLike, key: &str) -> &'a str {
    table.get(key).and_then(Item::as_str).unwrap_or_default()
}

fn find_service<'a>(document: &'a mut DocumentMut, wanted: Option<&str>) -> Found<'a> {
    let mut services = tables(document.as_table_mut(), "service");
    let names: Vec<String> = services.iter().map(|s| name_of(*s)).collect();
    let at = match wanted {
        Some(wanted) => names
            .iter()
            .position(|name| name == wanted)
            .ok_or_else(|| EditError::NoService(wanted.to_owned()))?,
        None if names.len() == 1 => 0,
        None => return Err(EditError::WhichService(names)),
    };
    Ok(services.swap_remove(at))
}

fn find_group<'a>(service: &'a mut dyn TableLike, wanted: &str) -> Found<'a> {
    let of_service = name_of(service);
    let mut groups = tables(service, "group").into_iter();
    groups
        .find(|group| name_of(*group) == wanted)
        .ok_or_else(|| EditError::NoGroup { service: of_service, group: wanted.to_owned() })
}

fn is_real(table: &dyn TableLike, real: IpAddr) -> bool {
    text_of(table, "address").parse() == Ok(real)
}

fn is_route(table: &dyn TableLike, route: &RouteKey) -> bool {
    table.get(route.by).and_then(Item::as_str) == Some(&route.pattern)
}

impl Change {
    fn make(&self, service: &mut dyn TableLike) -> Result<(), EditError> {
        let of_service = name_of(service);
        match self {
            Self::AddRoute { route, group } => {
                let mut routes = tables(service, "route").into_iter();
                if let Some(there) = routes.find(|there| is_route(*there, route)) {
                    let group = text_of(there, "group").to_owned();
                    let (service, route) = (of_service, route.clone());
                    return Err(EditError::RouteExists { service, route, group });
                }
                if group != "any" {
                    find_group(service, group)?;
                }
                push(service, "route", &[(route.by, text(&route.pattern)), ("group", text(group))])
            }
            Self::RemoveRoute { route } => {
                let removed = remove(service, "route", |there| is_route(there, route));
                removed
                    .ok_or_else(|| EditError::NoRoute { service: of_service, route: route.clone() })
            }
            Self::AddGroup { group, vip, reals } => {
                let reals: Array =
                    reals.iter().map(|real| inline(&[("address", text(real))])).collect();
                let vip = text(vip);
                push(
                    service,
                    "group",
                    &[("name", text(group)), ("vip", vip), ("reals", reals.into())],
                )
            }
            Self::RemoveGroup { group } => {
                let removed = remove(service, "group", |there| name_of(there) == *group);
                removed
                    .ok_or_else(|| EditError::NoGroup { service: of_service, group: group.clone() })
            }
            Self::AddReal { group, real, weight, vip } => {
                let group = find_group(service, group)?;
                let mut keys = vec![("address", text(real))];
                keys.extend((*weight != 1).then(|| ("weight", i64::from(*weight).into())));
                keys.extend(vip.map(|vip| ("vip", text(&vip))));
                push(group, "reals", &keys)
            }
            Self::RemoveReal { group, real } => {
                let table = find_group(service, group)?;
                let removed = remove(table, "reals", |there| is_real(there, *real));
                removed.ok_or_else(|| EditError::NoReal { group: group.clone(), real: *real })
            }
            Self::SetWeight { group, real, weight } => {
                let table = find_group(service, group)?;
                let mut reals = tables(table, "reals").into_iter();
                let there = reals
                    .find(|there| is_real(*there, *real))
                    .ok_or_else(|| EditError::NoReal { group: group.clone(), real: *real })?;
                let mut value: Value = i64::from(*weight).into();
                if let Some(before) = there.get("weight").and_then(Item::as_value) {
                    *value.decor_mut() = before.decor().clone();
                }
                there.insert("weight", Item::Value(value));
                Ok(())
            }
        }
    }
}

fn text(value: &impl ToString) -> Value {
    value.to_string().into()
}

fn inline(keys: &[(&str, Value)]) -> Value {
    Value::InlineTable(keys.iter().cloned().collect())
}

/// The tables of a list, however it is written: `[[key]]`, or `key = [{ … }]`.
fn tables<'a>(parent: &'a mut dyn TableLike, list: &str) -> Vec<&'a mut dyn TableLike> {
    match parent.get_mut(list) {
        Some(Item::ArrayOfTables(list)) => {
            list.iter_mut().map(|table| table as &mut dyn TableLike).collect()
        }
        Some(Item::Value(Value::Array(list))) => list
            .iter_mut()
            .filter_map(|value| value.as_inline_table_mut())
            .map(|table| table as &mut dyn TableLike)
            .collect(),
        _ => Vec::new(),
    }
}

/// Puts a table at the end of a list.
fn push(
    parent: &mut dyn TableLike,
    list: &'static str,
    keys: &[(&str, Value)],
) -> Result<(), EditError> {
    if parent.get(list).is_none_or(Item::is_none) {
        parent.insert(list, Item::Value(Array::new().into()));
    }
    match parent.get_mut(list) {
        Some(Item::ArrayOfTables(tables)) => {
            tables.push(keys.iter().cloned().collect::<Table>());
        }
        Some(Item::Value(Value::Array(values))) => {
            let mut gaps = Gaps::of(values);
            gaps.push();
            values.push_formatted(inline(keys));
            gaps.put_into(values);
        }
        _ => return Err(EditError::Shape { what: list }),
    }
    Ok(())
}

/// What stands between an array's brackets and values: spaces, line ends and comments. A comment behind a value on its
/// line is that value's, comments on lines before it, too.
struct Gaps(Vec<String>);

impl Gaps {
    fn of(values: &Array) -> Self {
        let text = |raw: Option<&RawString>| {
            raw.and_then(RawString::as_str).unwrap_or_default().to_owned()
        };
        let mut gaps = Vec::new();
        let mut behind = String::new();
        for value in values {
            gaps.push(behind + &text(value.decor().prefix()));
            behind = text(value.decor().suffix());
        }
        gaps.push(behind + &text(Some(values.trailing())));
        Self(gaps)
    }

    /// For a value more at the end: on a line of its own, where the others are.
    fn push(&mut self) {
        let gaps = &mut self.0;
        let end = gaps.pop().unwrap_or_default();
        let indent =
            gaps.iter().rev().find_map(|gap| gap.rsplit_once('\n')).map(|(_, indent)| indent);
        let Some(indent) = indent.map(str::to_owned) else {
            gaps.push(if gaps.is_empty() { "" } else { " " }.to_owned());
            gaps.push(end);
            return;
        };
        let (before, closing) = end.rsplit_once('\n').unwrap_or((&end, ""));
        gaps.push(format!("{before}\n{indent}"));
        gaps.push(if end.contains('\n') { format!("\n{closing}") } else { String::new() });
    }

    fn remove(&mut self, i: usize) {
        let (own, next) = (self.0.remove(i), std::mem::take(&mut self.0[i]));
        let is_last = i + 1 == self.0.len();
        self.0[i] = match (own.split_once('\n'), next.split_once('\n')) {
            // What is behind the value before it stays; what is behind it goes with it.
            (Some((before, _)), Some((_, rest))) => format!("{before}\n{rest}"),
            (None, Some((_, rest))) => format!("\n{rest}"),
            (_, None) if is_last => next,
            (_, None) => own,
        };
    }

    fn put_into(self, values: &mut Array) {
        let mut gaps = self.0.into_iter();
        for (value, gap) in values.iter_mut().zip(&mut gaps) {
            value.decor_mut().set_prefix(gap);
            value.decor_mut().set_suffix("");
        }
        values.set_trailing(gaps.next().unwrap_or_default());
    }
}

/// Takes the tables out of a list that `is_meant`; `None`: there was none.
fn remove(
    parent: &mut dyn TableLike,
    list: &str,
    is_meant: impl Fn(&dyn TableLike) -> bool,
) -> Option<()> {
    let mut removed = false;
    let mut stays = |table: &dyn TableLike| {
        let meant = is_meant(table);
        removed |= meant;
        !meant
    };
    match parent.get_mut(list) {
        Some(Item::ArrayOfTables(tables)) => tables.retain(|table| stays(table)),
        Some(Item::Value(Value::Array(values))) => {
            let mut gaps = Gaps::of(values);
            for i in (0..values.len()).rev() {
                let table = values.get(i).and_then(Value::as_inline_table);
                if table.is_some_and(|table| !stays(table)) {
                    values.remove(i);
                    gaps.remove(i);
                }
            }
            gaps.put_into(values);
        }
        _ => {}
    }
    removed.then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"# of ours
interface = "eth0"
balancer = "embedded"

[[service]]
name = "mqtt" # the one
address = "10.1.50.200"
default_group = "default"
group = [
    { name = "a", vip = "10.1.50.1", reals = [{ address = "10.1.3.201" }] }, # first
    { name = "default", vip = "10.1.50.250", reals = [
        { address = "10.1.3.205" },
        { address = "10.1.3.206", weight = 2 },
    ] },
]

[[service.route]]
topic = "sensor/a"
group = "a"
"#;

    fn route(pattern: &str) -> RouteKey {
        RouteKey { by: "topic", pattern: pattern.to_owned() }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn changes() -> Vec<(Change, Change)> {
        let (a, real) = ("a".to_owned(), ip("10.1.3.207"));
        vec![
            (
                Change::AddRoute { route: route("sensor/b"), group: a.clone() },
                Change::RemoveRoute { route: route("sensor/b") },
            ),
            (
                Change::AddGroup { group: "c".into(), vip: ip("10.1.50.3"), reals: vec![real] },
                Change::RemoveGroup { group: "c".into() },
            ),
            (
                Change::AddReal { group: "default".into(), real, weight: 3, vip: None },
                Change::RemoveReal { group: "default".into(), real },
            ),
        ]
    }

    #[test]
    fn what_is_added_is_valid_and_removed_again_leaves_the_text_as_it_was() {
        for (change, back) in changes() {
            let changed = edit(TEXT, None, &change).unwrap();
            assert_ne!(changed, TEXT);
            crate::config::Config::parse(Path::new("test.toml"), &changed).unwrap();
            let lost = TEXT.lines().filter(|line| !changed.contains(line.trim_end_matches(',')));
            assert_eq!(lost.count(), 0, "{changed}");
            assert_eq!(edit(&changed, Some("mqtt"), &back).unwrap(), TEXT);
        }
    }

    /// With comments everywhere, and a comma behind the last value or not.
    #[test]
    fn comments_stay_with_what_they_are_about() {
        const ROUTES: &str = "\
route = [
    # of the first
    { topic = \"x\", group = \"a\" }, # x
    { topic = \"y\", group = \"a\" }COMMA # y
    # at the end
]
";
        for comma in [",", ""] {
            let routes = ROUTES.replace("COMMA", comma);
            let (head, _) = TEXT.split_once("\n[[service.route]]").unwrap();
            let text = format!("{head}{routes}");
            let add = Change::AddRoute { route: route("z"), group: "a".into() };
            let added = edit(&text, None, &add).unwrap();
            let with_z = ROUTES.replace("COMMA # y", ", # y").replace(
                "    # at the end\n",
                &format!("    # at the end\n    {{ topic = \"z\", group = \"a\" }}{comma}\n"),
            );
            assert_eq!(added, format!("{head}{with_z}"));
            let remove = |topic| Change::RemoveRoute { route: route(topic) };
            let without_y = edit(&text, None, &remove("y")).unwrap();
            assert!(without_y.contains("group = \"a\" }"), "{without_y}");
            assert!(without_y.contains(" # x\n") && !without_y.contains("# y"), "{without_y}");
            let without_x = edit(&text, None, &remove("x")).unwrap();
            assert!(without_x.contains(" # y\n") && !without_x.contains("# x"), "{without_x}");
            for text in [without_x, without_y] {
                crate::config::Config::parse(Path::new("test.toml"), &text).unwrap();
            }
        }
    }

    #[test]
    fn line_ends_and_a_byte_order_mark_stay() {
        let text = format!("{BOM}{}", TEXT.replace('\n', "\r\n"));
        let add = Change::AddRoute { route: route("z"), group: "a".into() };
        let changed = edit(&text, None, &add).unwrap();
        assert!(changed.starts_with(BOM) && !changed.replace("\r\n", "").contains('\n'));
        assert_eq!(edit(&changed, None, &Change::RemoveRoute { route: route("z") }).unwrap(), text);
    }

    #[test]
    fn a_weight_is_changed_in_its_place() {
        let real = ip("10.1.3.206");
        let change = Change::SetWeight { group: "default".into(), real, weight: 0 };
        let changed = edit(TEXT, None, &change).unwrap();
        assert_eq!(changed, TEXT.replace("weight = 2", "weight = 0"));
    }

    #[test]
    fn what_is_not_there_is_named() {
        let (none, real) = ("none".to_owned(), ip("10.9.9.9"));
        let a = "a".to_owned();
        for (change, expected) in [
            (
                Change::AddRoute { route: route("x"), group: none.clone() },
                "service mqtt has no group none",
            ),
            (
                Change::AddRoute { route: route("sensor/a"), group: a.clone() },
                "service mqtt has a route with topic = \"sensor/a\" already, to a",
            ),
            (
                Change::RemoveRoute { route: route("x") },
                "service mqtt has no route with topic = \"x\"",
            ),
            (Change::RemoveGroup { group: none }, "service mqtt has no group none"),
            (
                Change::SetWeight { group: a.clone(), real, weight: 1 },
                "group a has no real 10.9.9.9",
            ),
            (Change::RemoveReal { group: a, real }, "group a has no real 10.9.9.9"),
        ] {
            assert_eq!(edit(TEXT, None, &change).unwrap_err().to_string(), expected);
        }
        let change = Change::RemoveGroup { group: "a".into() };
        let missing = edit(TEXT, Some("other"), &change).unwrap_err();
        assert_eq!(missing.to_string(), "there is no service other");
    }
}
