//! The JSON Schema of the configuration, for editors: made of what the reader asks for. What must hold between keys only
//! `mqtt-fwd check` knows.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::read;
use super::reader::{Asked, Kind};

/// A file that has every table, so that the reader looks into each.
const EVERYTHING: &str = r#"
interface = "eth0"
balancer = "katran"
[api]
[maps]
[limits]
[relay]
[fleet]
[[service]]
name = "s"
address = "10.0.0.1"
binding = "delayed"
default_group = "g"
relay = "r"
health_check = { type = "mqtt" }
group = [
    { name = "g", vip = "10.0.0.2", tls = { certificate = "" }, reals = [{}] },
    { name = "r", vip = "10.0.0.3", reals = [{}] },
]
route = [{ topic = "t" }, { client_id = "c" }, { username = "u" }, { sni = "n" }, { alpn = "a" }]
listener = [{ tls = { certificate = "/c", key = "/k", additional = [{}] } }]
"#;

/// The schema.
pub fn schema() -> Value {
    let asked = read::asked(EVERYTHING);
    let mut schema = object("", &asked);
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema".into();
    schema["title"] = "Configuration of mqtt-fwd".into();
    schema
}

/// The same, as a file.
pub fn text() -> String {
    format!("{:#}", schema())
}

/// A table, by its path.
fn object(path: &str, asked: &BTreeMap<String, Asked>) -> Value {
    let inside = |key: &str| -> Option<String> {
        let rest = if path.is_empty() { key } else { key.strip_prefix(path)?.strip_prefix('.')? };
        (!rest.contains('.')).then(|| rest.to_owned())
    };
    let mut properties = serde_json::Map::new();
    let mut required = Vec::new();
    for (key, what) in asked {
        let Some(name) = inside(key) else { continue };
        let value = match &what.kind {
            Kind::Text => json!({ "type": "string" }),
            Kind::Duration => json!({
                "type": "string",
                "description": "a duration, such as \"300ms\" or \"5m\"",
            }),
            Kind::Choice(words) => json!({ "enum": words }),
            Kind::Number((low, high)) => {
                json!({ "type": "integer", "minimum": low, "maximum": high })
            }
            Kind::Flag => json!({ "type": "boolean" }),
            Kind::Texts => json!({ "type": "array", "items": { "type": "string" } }),
            Kind::Table => object(key, asked),
            Kind::Tables => json!({ "type": "array", "items": object(key, asked) }),
        };
        // Of a route, one of five.
        if what.required && !(path == "service.route" && name != "group") {
            required.push(name.clone());
        }
        properties.insert(name, value);
    }
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_is_looked_into_and_every_key_is_documented() {
        let asked = read::asked(EVERYTHING);
        let docs = include_str!("../../docs/configuration.md");
        for (path, what) in &asked {
            if matches!(what.kind, Kind::Table | Kind::Tables) {
                let below = format!("{path}.");
                assert!(
                    asked.keys().any(|key| key.starts_with(&below)),
                    "{path} is not in EVERYTHING"
                );
            }
            let name = path.rsplit('.').next().unwrap();
            assert!(docs.contains(name), "{path} is not in docs/configuration.md");
        }
    }

    /// What a schema of this kind says of a value.
    fn is_valid(schema: &Value, value: &toml::Value) -> bool {
        match value {
            toml::Value::Table(table) => {
                let known = |(key, value): (&String, &toml::Value)| {
                    schema["properties"].get(key).is_some_and(|schema| is_valid(schema, value))
                };
                let required = schema["required"].as_array().unwrap();
                table.iter().all(known)
                    && required.iter().all(|key| table.contains_key(key.as_str().unwrap()))
            }
            toml::Value::Array(items) => items.iter().all(|item| is_valid(&schema["items"], item)),
            toml::Value::String(text) => match schema["enum"].as_array() {
                Some(words) => words.contains(&text.clone().into()),
                None => schema["type"] == "string",
            },
            toml::Value::Integer(n) => {
                schema["type"] == "integer"
                    && schema["minimum"].as_i64().unwrap() <= *n
                    && *n <= schema["maximum"].as_i64().unwrap()
            }
            toml::Value::Boolean(_) => schema["type"] == "boolean",
            _ => false,
        }
    }

    #[test]
    fn what_is_shipped_is_valid_by_it_and_mistakes_are_not() {
        let schema = schema();
        for text in
            [include_str!("../../scripts/example.toml"), include_str!("../../scripts/lab.toml")]
        {
            let with_relay = text.replace("#relay#", "");
            for text in [text, &with_relay] {
                assert!(is_valid(&schema, &text.parse::<toml::Table>().unwrap().into()));
            }
            for (right, wrong) in [
                ("balancer =", "balanser ="),
                ("balancer = \"embedded\"", "balancer = \"other\""),
                ("interface = \"eth0\"", ""),
                ("port = 1883", "port = 70000"),
            ] {
                let text = text.replace(right, wrong);
                assert!(
                    !is_valid(&schema, &text.parse::<toml::Table>().unwrap().into()),
                    "{wrong}"
                );
            }
        }
    }
}
