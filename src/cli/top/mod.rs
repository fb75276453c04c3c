//! `top`: groups, reals, topics and clients on one screen, updated every second.

mod draw;

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use self::draw::{Focus, View};
use crate::api::{Overviews, Run};
use crate::cli::error::Error;
use crate::config::Config;
use crate::inspect::Context;
use crate::inspect::overview::{self, Overview, Sampler};

/// From one poll of the keyboard to the next.
const KEYS: Duration = Duration::from_millis(20);

/// Rows of a page.
const PAGE: isize = 20;

#[derive(Debug, Args)]
pub struct Top {
    /// Seconds from one sample to the next
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS", value_parser = seconds)]
    interval: f64,

    /// Print this many samples as plain text, and end
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
        let executor = crate::cli::executor()?;
        let interval = Duration::from_secs_f64(self.interval);
        let mut source = executor.block_on(Source::of(config, interval))?;
        // Rates are of two samples.
        executor.block_on(source.next())?;
        if let Some(iterations) = self.iterations {
            for _ in 0..iterations {
                crate::cli::table::line(&draw::plain(&executor.block_on(source.next())?));
            }
            return Ok(());
        }
        if !std::io::stdout().is_terminal() {
            return Err(Error::Usage(
                "standard output is no terminal; --iterations N prints text".to_owned(),
            ));
        }
        let failed = |source| Error::Io { what: "the terminal".to_owned(), source };
        let mut terminal = ratatui::try_init().map_err(failed)?;
        let ended = executor.block_on(show(source, &mut terminal));
        ratatui::restore();
        ended
    }
}

async fn show(mut source: Source, terminal: &mut ratatui::DefaultTerminal) -> Result<(), Error> {
    let failed = |source| Error::Io { what: "the terminal".to_owned(), source };
    let first = source.next().await?;
    let (to_screen, mut samples) = tokio::sync::watch::channel(first);
    let reading = async {
        loop {
            let overview = source.next().await?;
            to_screen.send_replace(overview);
        }
    };
    let showing = async {
        let mut view = View::default();
        loop {
            let overview = samples.borrow_and_update().clone();
            terminal.draw(|frame| draw::draw(frame, &overview, view)).map_err(failed)?;
            loop {
                if samples.has_changed().unwrap_or(true) {
                    break;
                }
                if !event::poll(Duration::ZERO).map_err(failed)? {
                    tokio::time::sleep(KEYS).await;
                    continue;
                }
                let event = event::read().map_err(failed)?;
                if ends(&event) {
                    return Ok(());
                }
                if matches!(event, Event::Resize(..)) || turns(&event, &mut view, &overview) {
                    break;
                }
            }
        }
    };
    tokio::select! {
        failed = reading => failed,
        ended = showing => ended,
    }
}

/// Whether something else is to be shown now.
fn turns(event: &Event, view: &mut View, overview: &Overview) -> bool {
    let Event::Key(key) = event else { return false };
    if key.kind == KeyEventKind::Release {
        return false;
    }
    match key.code {
        KeyCode::Char('g') => view.toggle(Focus::Groups),
        KeyCode::Char('r') => view.toggle(Focus::Reals),
        KeyCode::Char('t') => view.toggle(Focus::Topics),
        KeyCode::Char('c') => view.toggle(Focus::Clients),
        KeyCode::Up | KeyCode::Char('k') => view.scroll(-1, overview),
        KeyCode::Down | KeyCode::Char('j') => view.scroll(1, overview),
        KeyCode::PageUp => view.scroll(-PAGE, overview),
        KeyCode::PageDown => view.scroll(PAGE, overview),
        _ => return false,
    }
    true
}

fn ends(event: &Event) -> bool {
    let Event::Key(key) = event else { return false };
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind == KeyEventKind::Press
        && (matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)
            || (control && key.code == KeyCode::Char('c')))
}

/// Where samples come from: `run`, or the maps.
enum Source {
    Run(Box<Overviews>),
    Here { context: Context, sampler: Box<Sampler>, interval: Duration, due: Instant },
}

impl Source {
    async fn of(config: &Config, interval: Duration) -> Result<Self, Error> {
        if let Some(mut run) = Run::find(config).await? {
            return Ok(Self::Run(Box::new(run.overviews(interval).await?)));
        }
        let context = Context::outside(config.clone());
        let sampler = Box::new(Sampler::new(&context)?);
        Ok(Self::Here { context, sampler, interval, due: Instant::now() })
    }

    /// The next one, once it is due.
    async fn next(&mut self) -> Result<Overview, Error> {
        match self {
            Self::Run(overviews) => {
                overviews.next().await?.ok_or_else(|| Error::Failed("`run` has ended".to_owned()))
            }
            Self::Here { context, sampler, interval, due } => {
                tokio::time::sleep_until((*due).into()).await;
                let started = Instant::now();
                let overview = sampler.next(context).await?;
                *due = started + (*interval).max(started.elapsed() * overview::PART);
                Ok(overview)
            }
        }
    }
}
