//! A guard against getting slower: BENCH_BASELINE names a file. Where there is none, a run writes it; where there is,
//! a run compares, and fails if an instruction count, or a row's ratio, is more than 10 % above. It is one machine's:
//! ratios differ between processors.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

/// 10 %.
const TOLERATED: f64 = 1.1;
/// Less than a few nanoseconds is noise, whatever its share.
const NOISE: f64 = 0.04;

pub struct Baseline {
    path: Option<PathBuf>,
    before: Option<BTreeMap<String, f64>>,
    now: BTreeMap<String, f64>,
}

impl Baseline {
    pub fn open() -> Self {
        let path: Option<PathBuf> = std::env::var_os("BENCH_BASELINE").map(Into::into);
        let text = path.as_ref().and_then(|path| std::fs::read_to_string(path).ok());
        let before =
            text.map(|text| serde_json::from_str(&text).expect("BENCH_BASELINE is no baseline"));
        Self { path, before, now: BTreeMap::new() }
    }

    pub fn instructions(&mut self, program: &str, count: u32) {
        self.now.insert(format!("{program}: instructions"), f64::from(count));
    }

    /// Rows with many flows depend on what ran before them, and are not kept.
    pub fn row(&mut self, name: &str, clients: u32, ratio: f64) {
        if clients == 1 {
            self.now.insert(name.to_owned(), ratio);
        }
    }

    /// Writes or compares.
    pub fn finish(self) -> ExitCode {
        let Some(path) = self.path else { return ExitCode::SUCCESS };
        let Some(before) = self.before else {
            std::fs::write(&path, serde_json::to_string_pretty(&self.now).unwrap()).unwrap();
            println!("baseline of {} rows written to {}", self.now.len(), path.display());
            return ExitCode::SUCCESS;
        };
        let mut dearer = 0;
        for (name, now) in &self.now {
            let Some(before) = before.get(name) else { continue };
            if *now > before * TOLERATED && now - before > NOISE {
                println!("DEARER than the baseline: {name}: {before:.2} → {now:.2}");
                dearer += 1;
            }
        }
        if dearer > 0 {
            return ExitCode::FAILURE;
        }
        println!("none of {} rows is more than 10 % above {}", self.now.len(), path.display());
        ExitCode::SUCCESS
    }
}
