//! Draws a [`Model`] on a terminal of any size.

use std::time::{Duration, SystemTime};

use indicatif::{HumanBytes, HumanDuration};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::symbols::bar::NINE_LEVELS;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Gauge, Row, Table};

use super::model::{Busy, Focus, Lane, Mode, Model, NAME, Sort, short_name};
use crate::app::control::{Status, VmInfo, age};
use crate::error::counted;
use crate::proxy::ConnectionState;

/// The least widths for columns of forwards: its connections, its refusals, a sparkline, the
/// address on which it listens, and its target.
const LIVE: u16 = 52;
const REFUSED: u16 = 60;
const SPARKS: u16 = 76;
const LISTEN: u16 = 110;
const CONNECT: u16 = 140;

/// The least widths for columns of connections: the forward, the rate, the rate in each direction,
/// the bytes and age, and the full state.
const FORWARD: u16 = 54;
const RATE: u16 = 66;
const RATES: u16 = 80;
const DETAILS: u16 = 100;
const STATES: u16 = 120;

/// The width of the columns that are always shown.
const FIXED: u16 = 70;

const SENT: Color = Color::Green;
const RECEIVED: Color = Color::Cyan;

/// Draws the whole screen.
pub(super) fn draw(frame: &mut Frame<'_>, model: &Model) {
    let lanes = model.lanes();
    let vms = model.status.as_ref().map(Status::vms).unwrap_or_default();
    let area = frame.area();
    // Gauges and forwards may take half of the height; the connections get the rest.
    let gauges = length(vms.len()).min(area.height / 5);
    let half = (area.height / 2).saturating_sub(gauges);
    let [title, trouble, gauges, forwards, connections, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(u16::from(model.trouble.is_some())),
        Constraint::Length(gauges),
        Constraint::Length(length(lanes.len().max(1) + 2).min(half)),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(heading(model, area.width), title);
    if let Some(why) = &model.trouble {
        let text = format!("no answer any more: {why}; trying on");
        frame.render_widget(Line::from(text).red().bold(), trouble);
    }
    for (row, vm) in gauges.rows().zip(&vms) {
        draw_vm(frame, row, vm);
    }
    match model.mode {
        Mode::Help => draw_help(frame, forwards.union(connections)),
        _ => {
            draw_forwards(frame, forwards, model.scrolled, &lanes);
            draw_connections(frame, connections, model);
        }
    }
    frame.render_widget(last_line(model, area.width), keys);
}

fn length(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

fn heading(model: &Model, width: u16) -> Line<'static> {
    let Some(status) = &model.status else {
        return Line::from("hvsock");
    };
    let rate = model.rate();
    let mut said = vec![Span::from("hvsock").bold()];
    if status.stopping {
        said.push(Span::from(" stopping").red().bold());
    }
    if width < REFUSED {
        said.push(Span::from(format!(" {} live", status.live)));
        said.push(Span::from(format!(" ↑{}", format_rate(rate.sent))).fg(SENT));
        said.push(Span::from(format!(" ↓{}", format_rate(rate.received))).fg(RECEIVED));
        return Line::from(said);
    }
    let uptime = Duration::try_from_secs_f64(status.uptime_seconds).unwrap_or_default();
    said.extend([
        Span::from(format!(" {}", counted(status.live as u64, "connection"))),
        Span::from(format!("  sent {}", format_rate(rate.sent))).fg(SENT),
        Span::from(format!("  received {}", format_rate(rate.received))).fg(RECEIVED),
        Span::from(format!("  up {}", HumanDuration(uptime))),
    ]);
    Line::from(said)
}

/// Returns the bottom line: a question, the filter being typed, the result of a request, or the
/// keys.
fn last_line(model: &Model, width: u16) -> Line<'static> {
    if let Mode::Question(id) = model.mode {
        let of = model.connection(id).map_or_else(String::new, |it| {
            let peer = it.connection.peer_in_short();
            match width {
                FORWARD.. => format!(" of {}, from {peer}", it.forward),
                _ => format!(", {peer}"),
            }
        });
        return Line::from(format!("close {id}{of}? y/n")).red().bold();
    }
    if model.mode == Mode::Filter {
        return Line::from(format!("find: {}▏", model.filter)).bold();
    }
    if let Some(note) = &model.note {
        return Line::from(note.clone()).bold();
    }
    let sorted = match (model.focus, model.sort) {
        (Focus::Connections, _) => "",
        (Focus::Forwards, Sort::Given) => "   forwards as given",
        (Focus::Forwards, Sort::Rate) => "   forwards by rate",
        (Focus::Forwards, Sort::Live) => "   forwards by connections",
    };
    let keys = match (width, model.focus) {
        (RATE.., Focus::Connections) => {
            "q end   ? help   ↑↓ choose   s sort   / find   k close   Tab forwards"
        }
        (RATE.., Focus::Forwards) => "q end   ? help   ↑↓ scroll   s sort   Tab connections",
        _ => "q end  ? help  s sort  / find  k close",
    };
    Line::from(format!("{keys}{sorted}")).dim()
}

/// The keys, and what each does.
const KEYS: [(&str, &str); 8] = [
    ("↑ ↓", "choose a connection"),
    ("PgUp PgDn", "ten further; Home, End"),
    ("s", "busiest, longest idle, oldest"),
    ("/", "those with a text in them"),
    ("Esc", "all again; or end"),
    ("k", "close the chosen one"),
    ("Tab", "↑ ↓ s are for the forwards"),
    ("q", "end"),
];

fn draw_help(frame: &mut Frame<'_>, area: Rect) {
    let rows = KEYS.map(|(key, what)| Row::new([Cell::from(key).bold(), Cell::from(what)]));
    let widths = [Constraint::Length(9), Constraint::Fill(1)];
    frame.render_widget(Table::new(rows, widths), area);
}

fn draw_vm(frame: &mut Frame<'_>, area: Rect, vm: &VmInfo) {
    let name = match vm.directory.starts_with('/') {
        true => vm.directory.rsplit('/').find(|part| !part.is_empty()),
        false => Some(vm.directory.as_str()),
    };
    let name = format!("VM {} ", name.unwrap_or("/"));
    let width = length(name.chars().count()).min(area.width / 2);
    let sides = [Constraint::Length(width), Constraint::Min(0)];
    let [left, right] = Layout::horizontal(sides).areas(area);
    frame.render_widget(Line::from(name), left);
    let status = &vm.status;
    let taken = status.connections + status.lost + status.predecessor + status.probes;
    let taken = taken as f64;
    let used = status.limit.map_or(0.0, |most| taken / most.max(1) as f64);
    let color = match status.up {
        Some(false) => Color::Red,
        _ if used >= 0.9 => Color::Red,
        _ if used >= 0.7 => Color::Yellow,
        _ => Color::Green,
    };
    let connections = status.connections;
    let slots = match status.limit {
        Some(limit) => format!("{connections} of {limit} slots"),
        None => counted(connections as u64, "connection"),
    };
    let health = vm.health(SystemTime::now());
    let lost = match status.lost {
        0 => String::new(),
        lost => format!(", {lost} lost"),
    };
    let probes = match status.probes {
        0 => String::new(),
        probes => format!(", {}", counted(probes as u64, "probe")),
    };
    let text = match area.width {
        REFUSED.. => format!("{slots}{probes}{lost}; {health}"),
        _ => format!("{slots}{probes}{lost}"),
    };
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
    let rates: &[&str] = match width {
        LIVE.. => &["SENT", "RECEIVED"],
        _ => &["RATE"],
    };
    for heading in rates {
        column(heading, Constraint::Length(12));
        if spark > 0 {
            column("", Constraint::Length(spark));
        }
    }
    let rows = lanes.iter().map(|lane| {
        let it = &lane.forward;
        let mut cells = vec![Cell::from(short_name(it))];
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
        if width < LIVE {
            cells.push(Cell::from(format_rate(lane.rate().sum())));
            return Row::new(cells);
        }
        let sent: Vec<u64> = lane.rates.iter().map(|it| it.sent).collect();
        let received: Vec<u64> = lane.rates.iter().map(|it| it.received).collect();
        for (color, rates) in [(SENT, sent), (RECEIVED, received)] {
            let now = rates.last().copied().unwrap_or(0);
            cells.push(Cell::from(format_rate(now)).fg(color));
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

fn draw_connections(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let width = area.width;
    let shown = model.shown();
    // The chosen connection is in the middle, except near the ends of the list.
    let room = usize::from(area.height.saturating_sub(1));
    let chosen = model.chosen_place();
    let above = chosen.unwrap_or(0).saturating_sub(room / 2);
    let above = above.min(shown.len().saturating_sub(room));
    let mut first = model.order.heading().to_owned();
    if !model.filter.is_empty() {
        first += &format!(": {}", model.filter);
    }
    if above > 0 {
        first += &format!(" +{above}↑");
    }
    let mut headings = vec![first];
    let mut widths = vec![Constraint::Fill(1)];
    let mut column = |from: u16, heading: &str, length| {
        if width >= from {
            headings.push(heading.to_owned());
            widths.push(length);
        }
    };
    column(FORWARD, "FORWARD", Constraint::Max(NAME as u16));
    let state = if width >= STATES { 21 } else { 12 };
    column(0, "STATE", Constraint::Length(state));
    column(0, "IDLE", Constraint::Length(6));
    if width < RATES {
        column(RATE, "RATE", Constraint::Length(12));
    }
    column(RATES, "SENT", Constraint::Length(12));
    column(RATES, "RECEIVED", Constraint::Length(12));
    column(DETAILS, "IN ALL", Constraint::Length(12));
    column(DETAILS, "AGE", Constraint::Length(6));
    let visible = shown.iter().enumerate().skip(above).take(room);
    let rows = visible.map(|(place, busy)| {
        let row = Row::new(cells_of(busy, width));
        match Some(place) == chosen {
            true => row.reversed(),
            false => row,
        }
    });
    let table = Table::new(rows, widths);
    frame.render_widget(table.header(Row::new(headings).bold().underlined()), area);
}

/// Returns the cells of a connection at that width.
fn cells_of(busy: &Busy, width: u16) -> Vec<Cell<'_>> {
    let it = &busy.connection;
    let mut cells = vec![Cell::from(it.peer_in_short())];
    if width >= FORWARD {
        cells.push(Cell::from(busy.forward.as_str()));
    }
    cells.push(match width {
        STATES.. => Cell::from(it.state.to_string()),
        _ => Cell::from(shorten_state(it.state)),
    });
    cells.push(Cell::from(age(it.idle_seconds as u64)));
    if (RATE..RATES).contains(&width) {
        cells.push(Cell::from(format_rate(busy.rate.sum())));
    }
    if width >= RATES {
        cells.push(Cell::from(format_rate(busy.rate.sent)).fg(SENT));
        cells.push(Cell::from(format_rate(busy.rate.received)).fg(RECEIVED));
    }
    if width >= DETAILS {
        let moved = it.sent.saturating_add(it.received);
        cells.push(Cell::from(HumanBytes(moved).to_string()));
        cells.push(Cell::from(age(it.age_seconds as u64)));
    }
    cells
}

/// Returns a connection's state in at most 12 letters.
fn shorten_state(state: ConnectionState) -> String {
    match state {
        ConnectionState::HalfClosedByClient => "client ended".to_owned(),
        ConnectionState::HalfClosedByServer => "server ended".to_owned(),
        other => other.to_string(),
    }
}

fn format_rate(rate: u64) -> String {
    match rate {
        0 => "-".to_owned(),
        rate => format!("{}/s", HumanBytes(rate)),
    }
}

/// Draws the latest values as bars in eighths of the highest value.
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
    // Rounded up, so that any traffic is seen.
    let bar = |value: &u64| bars[(u128::from(*value) * 8).div_ceil(most.into()) as usize];
    let drawn: String = shown.iter().map(bar).collect();
    " ".repeat(width - shown.len()) + &drawn
}
