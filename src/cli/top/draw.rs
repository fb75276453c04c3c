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

pub fn draw(frame: &mut Frame<'_>, o: &Overview) {
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
    let Ok(_) = terminal.draw(|frame| draw(frame, o));
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
            Span::raw("    q ends"),
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
            None => Line::from(format!("{} flows   {} clients", o.flows, o.clients)),
        },
    ];
    frame.render_widget(Paragraph::new(lines), area);
}

fn groups(frame: &mut Frame<'_>, area: Rect, o: &Overview) {
    let or_unknown = |n: Option<f64>| n.map_or_else(|| "?".to_owned(), number);
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
        ])
    });
    let widths =
        [Constraint::Min(16), Constraint::Min(24), Constraint::Length(6), Constraint::Length(13)];
    frame.render_widget(table(rows, &widths, &["GROUP", "REAL", "WEIGHT", "STATE"]), area);
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
        terminal.draw(|frame| draw(frame, o)).unwrap();
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
    fn numbers_have_four_digits_at_most() {
        let shown = [0.0, 0.25, 9.9, 10.0, 9999.0, 10_000.0, 999_400.0, 1.25e6, 2e9].map(number);
        let expected = ["0", "0.2", "9.9", "10", "9999", "10 k", "999 k", "1.2 M", "2.0 G"];
        assert_eq!(shown, expected);
    }
}
