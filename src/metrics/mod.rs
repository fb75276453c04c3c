//! OpenMetrics over HTTP: what is measured at the moment of a scrape, in families, and the server.

mod http;
mod process;

pub use http::{Source, bind, serve};

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::{MetricType, TypedMetric as _};
use prometheus_client::registry::Registry;

/// A label's name and its value.
pub type Label = (&'static str, String);

/// A metric with all its label sets. Names are without the common prefix, and counters' without
/// `_total`, which the format adds.
#[derive(Debug, Clone)]
pub struct Family {
    name: &'static str,
    help: &'static str,
    counts: bool,
    samples: Vec<(Vec<Label>, f64)>,
}

impl Family {
    /// One that only grows.
    pub fn counter(name: &'static str, help: &'static str) -> Self {
        Self { name, help, counts: true, samples: Vec::new() }
    }

    /// One that goes up and down.
    pub fn gauge(name: &'static str, help: &'static str) -> Self {
        Self { name, help, counts: false, samples: Vec::new() }
    }

    /// With one more sample.
    #[must_use]
    pub fn with(mut self, labels: &[(&'static str, &str)], value: impl Into<f64>) -> Self {
        self.push(labels, value);
        self
    }

    /// Adds a sample.
    pub fn push(&mut self, labels: &[(&'static str, &str)], value: impl Into<f64>) {
        let labels = labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        self.samples.push((labels, value.into()));
    }
}

/// Counts are exact up to 2^53.
pub fn number(n: u64) -> f64 {
    n as f64
}

#[derive(Debug)]
struct Snapshot(Vec<Family>);

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for family in &self.0 {
            let kind =
                if family.counts { ConstCounter::<f64>::TYPE } else { ConstGauge::<f64>::TYPE };
            let mut metric = encoder.encode_descriptor(family.name, family.help, None, kind)?;
            for (labels, value) in &family.samples {
                match (labels.as_slice(), kind) {
                    ([], MetricType::Counter) => {
                        metric.encode_counter::<[Label; 0], _, u64>(value, None)?;
                    }
                    ([], _) => metric.encode_gauge(value)?,
                    (_, MetricType::Counter) => {
                        ConstCounter::new(*value).encode(metric.encode_family(labels)?)?;
                    }
                    _ => ConstGauge::new(*value).encode(metric.encode_family(labels)?)?,
                }
            }
        }
        Ok(())
    }
}

/// The exposition, as OpenMetrics 1.0 text.
pub fn text(families: Vec<Family>) -> String {
    // Those of the process have the names that they have everywhere.
    let (process, own): (Vec<_>, Vec<_>) =
        families.into_iter().partition(|family| family.name.starts_with("process_"));
    let mut text = String::new();
    for (mut registry, families) in
        [(Registry::with_prefix("mqtt_fwd"), own), (Registry::default(), process)]
    {
        registry.register_collector(Box::new(Snapshot(families)));
        // Only a writer that fails makes it fail, and a String does not.
        let _ = encoding::text::encode_registry(&mut text, &registry);
    }
    let _ = encoding::text::encode_eof(&mut text);
    text
}

/// What build this is.
pub fn build_info() -> Family {
    Family::gauge("build_info", "Version of this binary; always 1")
        .with(&[("version", env!("CARGO_PKG_VERSION"))], 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_written_as_openmetrics() {
        let reason = Family::counter("packets", "Packets by verdict")
            .with(&[("verdict", "data")], 3)
            .with(&[("verdict", "a \"quoted\"\n")], number(7));
        let fill = Family::gauge("map_entries", "Entries").with(&[], 1.5);
        assert_eq!(
            text(vec![reason, fill]),
            "# HELP mqtt_fwd_packets Packets by verdict\n\
             # TYPE mqtt_fwd_packets counter\n\
             mqtt_fwd_packets_total{verdict=\"data\"} 3.0\n\
             mqtt_fwd_packets_total{verdict=\"a \\\"quoted\\\"\\n\"} 7.0\n\
             # HELP mqtt_fwd_map_entries Entries\n\
             # TYPE mqtt_fwd_map_entries gauge\n\
             mqtt_fwd_map_entries 1.5\n\
             # EOF\n"
        );
    }
}
