//! The screen, of what there is to show: from 80 × 24 characters up.

use ratatui::Frame;
use ratatui::backend::TestBackend;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row, Table};

use crate::inspect::overview::Overview;

/// What [`plain`] draws on.
const PLAIN: (u16, u16) = (100, 40);

/// Lines that each table gets at least, its heading and a blank line included.
const TABLE_LEAST: u16 = 4;

/// A table that has the screen for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Focus {
    Groups,
    Reals,
    Topics,
    Clients,
}

/// What of it is shown.
#[derive(Debug, Clone, Copy, Default)]
pub struct View {
    /// None: all tables, each as far as it fits.
    pub focus: Option<Focus>,
    /// Rows of the one table that have been scrolled away.
    pub first: usize,
}

impl View {
    /// Of one table; of all, if that one is shown already.
    pub fn toggle(&mut self, focus: Focus) {
        let focus = (self.focus != Some(focus)).then_some(focus);
        *self = Self { focus, first: 0 };
    }

    /// Scrolls, as far as there are rows.
    pub fn scroll(&mut self, rows: isize, o: &Overview) {
        let last = match self.focus {
            Some(Focus::Groups) => o.groups.len(),
            Some(Focus::Reals) => o.reals.len(),
            Some(Focus::Topics) => o.topics.len(),
            Some(Focus::Clients) => o.multi_group.len(),
            None => return,
        };
        self.first = self.first.saturating_add_signed(rows).min(last.saturating_sub(1));
    }
}

/// The overview without the rows that were scrolled away.
fn scrolled(o: &Overview, view: View) -> Overview {
    let mut o = o.clone();
    let at = |len: usize| view.first.min(len);
    match view.focus {
        Some(Focus::Groups) => drop(o.groups.drain(..at(o.groups.len()))),
        Some(Focus::Reals) => drop(o.reals.drain(..at(o.reals.len()))),
        Some(Focus::Topics) => drop(o.topics.drain(..at(o.topics.len()))),
        Some(Focus::Clients) => drop(o.multi_group.drain(..at(o.multi_group.len()))),
        None => {}
    }
    o
}

pub fn draw(frame: &mut Frame<'_>, o: &Overview, view: View) {
    let Some(focus) = view.focus else {
        all(frame, o);
        return;
    };
    let parts = Layout::vertical([Constraint::Length(4), Constraint::Min(1)]).split(frame.area());
    let o = scrolled(o, view);
    head(frame, parts[0], &o);
    match focus {
        Focus::Groups => groups(frame, parts[1], &o),
        Focus::Reals => reals(frame, parts[1], &o),
        Focus::Topics => topics(frame, parts[1], &o),
        Focus::Clients => clients(frame, parts[1], &o),
    }
}

fn all(frame: &mut Frame<'_>, o: &Overview) {
    let height = |rows: usize| Constraint::Max(rows.max(1) as u16 + 2);
    let parts = Layout::vertical([
        Constraint::Length(4),
        height(o.groups.len()),
        height(o.reals.len()),
        Constraint::Min(TABLE_LEAST),
        Constraint::Max(if o.multi_group.is_empty() { 0 } else { o.multi_group.len() as u16 + 1 }),
    ])
    .split(frame.area());
    head(frame, parts[0], o);
    groups(frame, parts[1], o);
    reals(frame, parts[2], o);
    topics(frame, parts[3], o);
    if !o.multi_group.is_empty() {
        clients(frame, parts[4], o);
    }
}

/// The same as text.
pub fn plain(o: &Overview) -> String {
    let (width, height) = PLAIN;
    let Ok(mut terminal) = ratatui::Terminal::new(TestBackend::new(width, height));
    let Ok(_) = terminal.draw(|frame| all(frame, o));
    let cells = terminal.backend().buffer().content();
    let line = |cells: &[ratatui::buffer::Cell]| {
        cells.iter().map(ratatui::buffer::Cell::symbol).collect::<String>().trim_end().to_owned()
    };
    let text: Vec<_> = cells.chunks(usize::from(width)).map(line).collect();
    text.join("\n").trim_end().to_owned()
}

fn head(frame: &mut Frame<'_>, area: Rect, o: &Overview) {
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let state = match o.problems.as_slice() {
        [] => Span::styled("healthy", bold.fg(Color::Green)),
        [_] => Span::styled("1 PROBLEM", bold.fg(Color::Red)),
        more => Span::styled(format!("{} PROBLEMS", more.len()), bold.fg(Color::Red)),
    };
    let lines = vec![
        Line::from(vec![
            Span::styled(format!("mqtt-fwd on {}: ", o.interface), bold),
            state,
            Span::raw("    q ends; g r t c: one table, ↑ ↓"),
        ]),
        Line::from(format!(
            "{} packets/s   {} PUBLISH/s   {} misrouted/s   {} new flows/s",
            number(o.packets_s),
            number(o.publishes_s),
            number(o.misrouted_s),
            number(o.new_flows_s)
        )),
        match o.problems.first() {
            Some(problem) => Line::styled(problem.clone(), Style::new().fg(Color::Red)),
            None => {
                let fleet = o.fleet.as_ref().map(|fleet| format!("   fleet: {fleet}"));
                Line::from(format!(
                    "{} flows   {} clients{}",
                    o.flows,
                    o.clients,
                    fleet.unwrap_or_default()
                ))
            }
        },
    ];
    frame.render_widget(Paragraph::new(lines), area);
}

fn groups(frame: &mut Frame<'_>, area: Rect, o: &Overview) {
    let rows = o.groups.iter().map(|g| {
        Row::new([
            Cell::new(g.service.clone()),
            Cell::new(g.group.clone()),
            right(&or_unknown(g.packets_s), 11),
            right(&or_unknown(g.bytes_s), 11),
            right(&g.flows.to_string(), 9),
        ])
    });
    let widths = [
        Constraint::Min(12),
        Constraint::Min(16),
        Constraint::Length(11),
        Constraint::Length(11),
        Constraint::Length(9),
    ];
    let heading = ["SERVICE", "GROUP", "  PACKETS/S", "    BYTES/S", "    FLOWS"];
    frame.render_widget(table(rows, &widths, &heading), area);
}

fn reals(frame: &mut Frame<'_>, area: Rect, o: &Overview) {
    let rows = o.reals.iter().map(|r| {
        let style = match r.state.as_str() {
            "down" | "down, in use" => Style::new().fg(Color::Red),
            "drained" => Style::new().fg(Color::Yellow),
            _ => Style::new(),
        };
        Row::new([
            Cell::new(r.group.clone()),
            Cell::new(r.real.clone()),
            right(&r.weight.to_string(), 6),
            Cell::new(r.state.clone()).style(style),
            right(&or_unknown(r.packets_s), 9),
            right(&or_unknown(r.bytes_s), 8),
        ])
    });
    let widths = [
        Constraint::Min(12),
        Constraint::Min(16),
        Constraint::Length(6),
        Constraint::Length(12),
        Constraint::Length(9),
        Constraint::Length(8),
    ];
    let heading = ["GROUP", "REAL", "WEIGHT", "STATE", "PACKETS/S", " BYTES/S"];
    frame.render_widget(table(rows, &widths, &heading), area);
}

fn topics(frame: &mut Frame<'_>, area: Rect, o: &Overview) {
    let rows = o.topics.iter().map(|t| {
        let style = Style::new().fg(Color::Red);
        let misrouted = match t.misrouted {
            0 => right("-", 9),
            n => right(&n.to_string(), 9).style(style),
        };
        Row::new([
            Cell::new(t.topic.clone()),
            Cell::new(t.group.clone()),
            right(&t.flows.to_string(), 9),
            misrouted,
        ])
    });
    let widths =
        [Constraint::Min(30), Constraint::Length(16), Constraint::Length(9), Constraint::Length(9)];
    let heading = ["TOPIC", "GROUP", "    FLOWS", "MISROUTED"];
    frame.render_widget(table(rows, &widths, &heading), area);
}

fn clients(frame: &mut Frame<'_>, area: Rect, o: &Overview) {
    let rows = o.multi_group.iter().map(|c| {
        Row::new([
            Cell::new(c.client.clone()),
            Cell::new(c.topic.clone()),
            Cell::new(c.group.clone()),
            right(&c.changes.to_string(), 7),
        ])
    });
    let widths =
        [Constraint::Min(20), Constraint::Min(20), Constraint::Length(16), Constraint::Length(7)];
    let heading = ["CLIENT OF SEVERAL GROUPS", "LAST TOPIC", "GROUP", "CHANGES"];
    frame.render_widget(table(rows, &widths, &heading), area);
}

fn table<'a>(
    rows: impl Iterator<Item = Row<'a>>,
    widths: &[Constraint],
    heading: &[&'a str],
) -> Table<'a> {
    let style = Style::new().add_modifier(Modifier::REVERSED);
    Table::new(rows, widths).header(Row::new(heading.to_vec()).style(style)).column_spacing(2)
}

fn right(text: &str, width: usize) -> Cell<'static> {
    Cell::new(format!("{text:>width$}"))
}

fn or_unknown(n: Option<f64>) -> String {
    n.map_or_else(|| "?".to_owned(), number)
}

/// A rate in four digits at most.
fn number(n: f64) -> String {
    match n {
        ..10.0 if n.fract() > 0.05 => format!("{n:.1}"),
        ..10_000.0 => format!("{n:.0}"),
        ..1e6 => format!("{:.0} k", n / 1e3),
        ..1e9 => format!("{:.1} M", n / 1e6),
        _ => format!("{:.1} G", n / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::clients::MultiGroupClient;
    use crate::datapath::flows::TopicUse;
    use crate::inspect::overview::{GroupOverview, RealOverview};

    fn overview() -> Overview {
        let group = |name: &str, packets_s, flows| GroupOverview {
            service: "mqtt".into(),
            group: name.into(),
            packets_s,
            bytes_s: packets_s.map(|n| n * 240.0),
            flows,
        };
        let real = |group: &str, real: &str, state: &str| RealOverview {
            group: group.into(),
            real: real.into(),
            weight: 1,
            state: state.into(),
            packets_s: Some(1234.0),
            bytes_s: Some(98_765.0),
        };
        let topic = |topic: &str, group: &str, flows, misrouted| TopicUse {
            topic: topic.into(),
            group: group.into(),
            flows,
            misrouted,
        };
        Overview {
            interface: "eth0".into(),
            problems: Vec::new(),
            packets_s: 123_456.0,
            publishes_s: 60_123.0,
            misrouted_s: 0.5,
            new_flows_s: 12.0,
            flows: 1234,
            clients: 5678,
            fleet: None,
            groups: vec![
                group("temperature", Some(45_000.0), 1200),
                group("humidity", Some(9.3), 30),
                group("default", None, 4),
            ],
            reals: vec![
                real("temperature", "10.1.3.201", "up"),
                real("temperature", "10.1.3.202", "down"),
                real("default", "fd01:3::203", "drained"),
            ],
            topics: vec![
                topic("measurements/temperature", "temperature", 1200, 0),
                topic(&"long/".repeat(40), "humidity", 30, 7),
            ],
            multi_group: vec![MultiGroupClient {
                client: "gateway-17".into(),
                topic: "measurements/humidity".into(),
                group: "temperature".into(),
                changes: 9,
            }],
        }
    }

    fn screen(width: u16, height: u16, o: &Overview) -> String {
        let mut terminal = ratatui::Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, o, View::default())).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn all_fits_80_by_24() {
        insta::assert_snapshot!(screen(80, 24, &overview()));
    }

    #[test]
    fn problems_come_first_and_many_rows_leave_room_for_topics() {
        let mut o = overview();
        o.problems = vec!["no XDP program is on eth0".into(), "another".into()];
        o.groups = vec![o.groups[0].clone(); 30];
        insta::assert_snapshot!(screen(80, 24, &o));
    }

    #[test]
    fn a_table_that_does_not_fit_has_the_screen_for_itself_and_scrolls() {
        let mut o = overview();
        o.reals = vec![o.reals[0].clone(); 50];
        o.reals[40].real = "10.1.3.240".into();
        let mut view = View::default();
        view.toggle(Focus::Reals);
        let shown = |view| {
            let mut terminal = ratatui::Terminal::new(TestBackend::new(80, 24)).unwrap();
            terminal.draw(|frame| draw(frame, &o, view)).unwrap();
            terminal.backend().to_string()
        };
        assert!(!shown(view).contains("10.1.3.240"));
        view.scroll(30, &o);
        assert!(shown(view).contains("10.1.3.240"));
        view.scroll(1000, &o);
        assert_eq!(view.first, 49);
        view.toggle(Focus::Reals);
        assert!(view.focus.is_none() && view.first == 0);
    }

    #[test]
    fn numbers_have_four_digits_at_most() {
        let shown = [0.0, 0.25, 9.9, 10.0, 9999.0, 10_000.0, 999_400.0, 1.25e6, 2e9].map(number);
        let expected = ["0", "0.2", "9.9", "10", "9999", "10 k", "999 k", "1.2 M", "2.0 G"];
        assert_eq!(shown, expected);
    }
}
