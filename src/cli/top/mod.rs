//! `top`: groups, reals, topics and clients on one screen, anew every second.

mod draw;

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use super::block_on;
use crate::config::Config;
use crate::control::Error;
use crate::control::overview::{Overview, Sample};
use crate::datapath::Datapath;

/// Reading is at most this part of the time: a million flows take a second.
const PART: u32 = 4;

#[derive(Debug, Args)]
pub struct Top {
    /// Seconds from one look to the next
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS", value_parser = seconds)]
    interval: f64,

    /// Print this many looks as plain text, and end
    #[arg(long, short = 'n', value_name = "N")]
    iterations: Option<u32>,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("write a number from 0.1 to 3600".to_owned()),
    }
}

impl Top {
    pub fn run(&self, config: &Config) -> Result<(), Error> {
        let datapath = Datapath::open(&config.pins())?;
        let mut looks = Looks { config, datapath, before: None };
        looks.next()?;
        if let Some(iterations) = self.iterations {
            for _ in 0..iterations {
                std::thread::sleep(Duration::from_secs_f64(self.interval));
                super::table::line(&draw::plain(&looks.next()?));
            }
            return Ok(());
        }
        if !std::io::stdout().is_terminal() {
            return Err(Error::Refused(
                "standard output is no terminal; --iterations N prints text".to_owned(),
            ));
        }
        let failed = |source| Error::Io { what: "the terminal".to_owned(), source };
        let mut terminal = ratatui::try_init().map_err(failed)?;
        let ended = self.show(&mut looks, &mut terminal);
        ratatui::restore();
        ended
    }

    fn show(
        &self,
        looks: &mut Looks<'_>,
        terminal: &mut ratatui::DefaultTerminal,
    ) -> Result<(), Error> {
        let failed = |source| Error::Io { what: "the terminal".to_owned(), source };
        let mut overview = Overview::default();
        let mut due = Instant::now() + Duration::from_millis(200);
        loop {
            terminal.draw(|frame| draw::draw(frame, &overview)).map_err(failed)?;
            while event::poll(due.saturating_duration_since(Instant::now())).map_err(failed)? {
                let event = event::read().map_err(failed)?;
                if ends(&event) {
                    return Ok(());
                }
                if matches!(event, Event::Resize(..)) {
                    terminal.draw(|frame| draw::draw(frame, &overview)).map_err(failed)?;
                }
            }
            let started = Instant::now();
            overview = looks.next()?;
            due = Instant::now()
                + Duration::from_secs_f64(self.interval).max(started.elapsed() * PART);
        }
    }
}

fn ends(event: &Event) -> bool {
    let Event::Key(key) = event else { return false };
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind == KeyEventKind::Press
        && (matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)
            || (control && key.code == KeyCode::Char('c')))
}

/// One look after the other: rates are of two.
struct Looks<'a> {
    config: &'a Config,
    datapath: Datapath,
    before: Option<Sample>,
}

impl Looks<'_> {
    fn next(&mut self) -> Result<Overview, Error> {
        let pins = self.config.pins();
        if !self.datapath.is_pinned(&pins) {
            self.datapath = Datapath::open(&pins)?;
            self.before = None;
        }
        block_on(async {
            let now = Sample::read(self.config, &self.datapath).await?;
            let before = self.before.as_ref().unwrap_or(&now);
            let overview = Overview::read(self.config, &self.datapath, before, &now).await?;
            self.before = Some(now);
            Ok(overview)
        })
    }
}
