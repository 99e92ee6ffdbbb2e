//! Drawing a [`Model`], on whatever size of terminal there is.

use std::time::{Duration, SystemTime};

use indicatif::{HumanBytes, HumanDuration};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::symbols::bar::NINE_LEVELS;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Gauge, Row, Table};

use super::model::{Busy, Lane, Model, NAME, Sort, called, without_scheme};
use crate::app::control::{Status, Vm, age};
use crate::error::plural;

/// From these widths on there is room for how many connections a forward has; for how many it refused; for sparklines; for more of a connection; for where a forward listens; and for
/// where it connects to.
const LIVE: u16 = 52;
const REFUSED: u16 = 60;
const SPARKS: u16 = 76;
const DETAILS: u16 = 100;
const LISTEN: u16 = 110;
const CONNECT: u16 = 140;

/// What the columns take that stand there always.
const FIXED: u16 = 70;

const SENT: Color = Color::Green;
const RECEIVED: Color = Color::Cyan;

/// Draws all of it.
pub(super) fn draw(frame: &mut Frame<'_>, model: &Model) {
    let lanes = model.lanes();
    let vms = model.status.as_ref().map(Status::vms).unwrap_or_default();
    let area = frame.area();
    // The gauges and the forwards may have half of it; the connections get what is left.
    let gauges = length(vms.len()).min(area.height / 5);
    let half = (area.height / 2).saturating_sub(gauges);
    let [title, trouble, gauges, forwards, busiest, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(u16::from(model.trouble.is_some())),
        Constraint::Length(gauges),
        Constraint::Length(length(lanes.len().max(1) + 2).min(half)),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(heading(model), title);
    if let Some(why) = &model.trouble {
        let text = format!("no answer any more: {why}; trying on");
        frame.render_widget(Line::from(text).red().bold(), trouble);
    }
    for (row, vm) in gauges.rows().zip(&vms) {
        draw_vm(frame, row, vm);
    }
    draw_forwards(frame, forwards, model.scrolled, &lanes);
    draw_busiest(frame, busiest, &model.busiest);
    frame.render_widget(help(model.sort), keys);
}

fn length(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

fn heading(model: &Model) -> Line<'static> {
    let Some(status) = &model.status else {
        return Line::from("hvsock");
    };
    let rate = model.rate();
    let uptime = Duration::try_from_secs_f64(status.uptime_seconds).unwrap_or_default();
    let mut said = vec![
        Span::from("hvsock").bold(),
        Span::from(format!(
            " {} connection{}",
            status.live,
            plural(status.live as u64)
        )),
        Span::from(format!("  sent {}", speed(rate.sent))).fg(SENT),
        Span::from(format!("  received {}", speed(rate.received))).fg(RECEIVED),
        Span::from(format!("  up {}", HumanDuration(uptime))),
    ];
    if status.stopping {
        said.insert(1, Span::from(" stopping").red().bold());
    }
    Line::from(said)
}

fn help(sort: Sort) -> Line<'static> {
    let by = match sort {
        Sort::Given => "as given",
        Sort::Rate => "by rate",
        Sort::Live => "by connections",
    };
    Line::from(format!("q end   s sort: {by}   ↑↓ scroll")).dim()
}

fn draw_vm(frame: &mut Frame<'_>, area: Rect, vm: &Vm) {
    let name = vm.directory.rsplit('/').find(|part| !part.is_empty());
    let name = format!("VM {} ", name.unwrap_or("/"));
    let width = length(name.chars().count()).min(area.width / 2);
    let sides = [Constraint::Length(width), Constraint::Min(0)];
    let [left, right] = Layout::horizontal(sides).areas(area);
    frame.render_widget(Line::from(name), left);
    let status = &vm.status;
    let used = status.connections as f64 / status.limit.max(1) as f64;
    let color = match status.up {
        Some(false) => Color::Red,
        _ if used >= 0.9 => Color::Red,
        _ if used >= 0.7 => Color::Yellow,
        _ => Color::Green,
    };
    let (connections, limit) = (status.connections, status.limit);
    let health = vm.health(SystemTime::now());
    let text = format!("{connections} of {limit} slots; {health}");
    let gauge = Gauge::default().ratio(used.clamp(0.0, 1.0)).label(text);
    let style = Style::new().fg(color).bg(Color::Black);
    frame.render_widget(gauge.gauge_style(style), right);
}

fn draw_forwards(frame: &mut Frame<'_>, area: Rect, scrolled: usize, lanes: &[&Lane]) {
    let width = area.width;
    let spark = match width {
        CONNECT.. => (width - CONNECT) / 4 + 10,
        LISTEN.. => 8,
        SPARKS.. => (width - FIXED) / 2,
        _ => 0,
    };
    let name = match scrolled {
        0 => "NAME".to_owned(),
        above => format!("NAME (+{above}↑)"),
    };
    let mut headings = vec![Cell::from(name)];
    let mut widths = vec![Constraint::Max(NAME as u16)];
    let mut column = |heading: &'static str, width| {
        headings.push(Cell::from(heading));
        widths.push(width);
    };
    if width >= LISTEN {
        column("LISTEN", Constraint::Fill(1));
    }
    if width >= CONNECT {
        column("CONNECT", Constraint::Fill(1));
    }
    column("STATE", Constraint::Length(9));
    if width >= LIVE {
        column("LIVE", Constraint::Length(5));
    }
    if width >= REFUSED {
        column("REFUSED", Constraint::Length(7));
    }
    for heading in ["SENT", "RECEIVED"] {
        column(heading, Constraint::Length(12));
        if spark > 0 {
            column("", Constraint::Length(spark));
        }
    }
    let rows = lanes.iter().map(|lane| {
        let it = &lane.forward;
        let mut cells = vec![Cell::from(called(it))];
        if width >= LISTEN {
            cells.push(Cell::from(it.listen.as_str()));
        }
        if width >= CONNECT {
            cells.push(Cell::from(it.connect.as_str()));
        }
        let state = Cell::from(it.state.as_str());
        cells.push(match it.state.as_str() {
            "listening" => state,
            _ => state.red().bold(),
        });
        if width >= LIVE {
            cells.push(Cell::from(it.counters.live.to_string()));
        }
        if width >= REFUSED {
            cells.push(Cell::from(it.counters.refused.to_string()));
        }
        let sent: Vec<u64> = lane.rates.iter().map(|it| it.sent).collect();
        let received: Vec<u64> = lane.rates.iter().map(|it| it.received).collect();
        for (color, rates) in [(SENT, sent), (RECEIVED, received)] {
            let now = rates.last().copied().unwrap_or(0);
            cells.push(Cell::from(speed(now)).fg(color));
            if spark > 0 {
                cells.push(Cell::from(sparkline(&rates, spark.into())).fg(color));
            }
        }
        Row::new(cells)
    });
    let none = lanes
        .is_empty()
        .then(|| Row::new(["none; `hvsock add` adds some"]).dim());
    if none.is_some() {
        widths = vec![Constraint::Fill(1)];
        headings.truncate(1);
    }
    let table = Table::new(rows.chain(none), widths);
    frame.render_widget(table.header(Row::new(headings).bold().underlined()), area);
}

fn draw_busiest(frame: &mut Frame<'_>, area: Rect, busiest: &[Busy]) {
    let wide = area.width >= DETAILS;
    let mut headings = vec!["CONNECTION", "FORWARD", "SENT", "RECEIVED"];
    let mut widths = vec![
        Constraint::Fill(1),
        Constraint::Max(NAME as u16),
        Constraint::Length(12),
        Constraint::Length(12),
    ];
    if wide {
        headings.extend(["STATE", "IN ALL", "FOR"]);
        widths.extend([9, 12, 8].map(Constraint::Length));
    }
    let shown = busiest.iter().take(area.height.into());
    let rows = shown.map(|busy| {
        let it = &busy.connection;
        let peer = match &it.peer {
            Some(peer) => without_scheme(peer).to_owned(),
            None => format!("number {}", it.id),
        };
        let mut cells = vec![
            Cell::from(peer),
            Cell::from(busy.forward.as_str()),
            Cell::from(speed(busy.rate.sent)).fg(SENT),
            Cell::from(speed(busy.rate.received)).fg(RECEIVED),
        ];
        if wide {
            let moved = it.sent.saturating_add(it.received);
            cells.push(Cell::from(it.state.as_str()));
            cells.push(Cell::from(HumanBytes(moved).to_string()));
            cells.push(Cell::from(age(it.age_seconds as u64)));
        }
        Row::new(cells)
    });
    let table = Table::new(rows, widths);
    frame.render_widget(table.header(Row::new(headings).bold().underlined()), area);
}

fn speed(rate: u64) -> String {
    match rate {
        0 => "-".to_owned(),
        rate => format!("{}/s", HumanBytes(rate)),
    }
}

/// The latest values as bars of eighths, the highest of them full.
pub(super) fn sparkline(values: &[u64], width: usize) -> String {
    let shown = &values[values.len().saturating_sub(width)..];
    let most = shown.iter().copied().max().unwrap_or(0).max(1);
    let bars = [
        NINE_LEVELS.empty,
        NINE_LEVELS.one_eighth,
        NINE_LEVELS.one_quarter,
        NINE_LEVELS.three_eighths,
        NINE_LEVELS.half,
        NINE_LEVELS.five_eighths,
        NINE_LEVELS.three_quarters,
        NINE_LEVELS.seven_eighths,
        NINE_LEVELS.full,
    ];
    // Rounded up: what moved at all is seen.
    let bar = |value: &u64| bars[(u128::from(*value) * 8).div_ceil(most.into()) as usize];
    let drawn: String = shown.iter().map(bar).collect();
    " ".repeat(width - shown.len()) + &drawn
}
