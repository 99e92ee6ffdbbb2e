//! The latest answers, the rates computed from them, and the user's choices.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::app::control::{ConnectionInfo, ForwardInfo, Status};

/// How many rates are kept of a forward: the longest sparkline.
const HISTORY: usize = 120;

/// The most characters of a forward's short name.
pub(super) const NAME: usize = 16;

/// The answers to one query.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub(super) status: Status,
    pub(super) connections: Vec<ConnectionInfo>,
    pub(super) at: Instant,
}

/// Bytes per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Rate {
    pub(super) sent: u64,
    pub(super) received: u64,
}

impl Rate {
    pub(super) fn sum(self) -> u64 {
        self.sent.saturating_add(self.received)
    }
}

/// A forward, and its latest rates.
#[derive(Clone, Debug)]
pub(super) struct Lane {
    pub(super) forward: ForwardInfo,
    /// The rates, the latest last.
    pub(super) rates: VecDeque<Rate>,
}

impl Lane {
    pub(super) fn rate(&self) -> Rate {
        self.rates.back().copied().unwrap_or_default()
    }
}

/// A connection, and its rate.
#[derive(Clone, Debug)]
pub(super) struct Busy {
    pub(super) connection: ConnectionInfo,
    /// The short name of its forward.
    pub(super) forward: String,
    pub(super) rate: Rate,
}

impl Busy {
    /// Returns whether its cells contain a lower-case text.
    fn has(&self, text: &str) -> bool {
        let it = &self.connection;
        let words = [
            it.id.to_string(),
            self.forward.to_lowercase(),
            it.peer_in_words().to_lowercase(),
            it.state.to_string(),
        ];
        words.iter().any(|word| word.contains(text))
    }
}

/// The order of the forwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sort {
    #[default]
    Given,
    Rate,
    Live,
}

/// The order of the connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum SortOrder {
    #[default]
    Busiest,
    LongestIdle,
    Oldest,
}

impl SortOrder {
    /// Returns the heading of the list.
    pub(super) fn heading(self) -> &'static str {
        match self {
            SortOrder::Busiest => "BUSIEST",
            SortOrder::LongestIdle => "LONGEST IDLE",
            SortOrder::Oldest => "OLDEST",
        }
    }
}

/// The list that has the focus of the keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Focus {
    #[default]
    Connections,
    Forwards,
}

/// What the next key is read as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mode {
    /// A command.
    #[default]
    Command,
    /// A character of the filter.
    Filter,
    /// The answer to whether the connection of that id is to be closed.
    Question(u64),
    /// Closes the help.
    Help,
}

/// All that is drawn.
#[derive(Debug, Default)]
pub(super) struct Model {
    pub(super) status: Option<Status>,
    lanes: Vec<Lane>,
    connections: Vec<Busy>,
    /// Why there is no answer any more.
    pub(super) trouble: Option<String>,
    pub(super) sort: Sort,
    /// The number of forwards above the first one shown.
    pub(super) scrolled: usize,
    pub(super) order: SortOrder,
    pub(super) focus: Focus,
    pub(super) mode: Mode,
    /// The id of the chosen connection.
    chosen: Option<u64>,
    /// The text that the shown connections contain.
    pub(super) filter: String,
    /// The result of the user's last request, until the next key.
    pub(super) note: Option<String>,
    at: Option<Instant>,
}

impl Model {
    pub(super) fn take_sample(&mut self, sample: Sample) {
        let same = |it: &Status| it.pid == sample.status.pid;
        if !self.status.as_ref().is_some_and(same) {
            // The process was restarted: the old counts say nothing.
            self.lanes.clear();
            self.connections.clear();
            self.chosen = None;
            self.at = None;
        }
        let passed = self.at.map(|at| sample.at.saturating_duration_since(at));
        self.take_forwards(&sample.status.forwards, passed);
        let place = self.chosen_place();
        self.take_connections(sample.connections, passed);
        self.keep_chosen(place);
        self.at = Some(sample.at);
        self.status = Some(sample.status);
        self.trouble = None;
        self.scroll(0);
    }

    /// Notes that there is no answer any more.
    pub(super) fn note_no_answer(&mut self, why: String) {
        self.trouble = Some(why);
    }

    fn take_forwards(&mut self, forwards: &[ForwardInfo], passed: Option<Duration>) {
        let before = self.lanes.drain(..);
        let key = |it: &ForwardInfo| (it.id, it.id.is_none().then(|| it.label()));
        let mut before: HashMap<_, Lane> = before.map(|it| (key(&it.forward), it)).collect();
        for forward in forwards {
            let mut lane = before.remove(&key(forward)).unwrap_or_else(|| Lane {
                forward: forward.clone(),
                rates: VecDeque::new(),
            });
            let (was, is) = (&lane.forward.counters, &forward.counters);
            lane.rates.push_back(Rate {
                sent: rate(was.sent, is.sent, passed),
                received: rate(was.received, is.received, passed),
            });
            if lane.rates.len() > HISTORY {
                lane.rates.pop_front();
            }
            lane.forward = forward.clone();
            self.lanes.push(lane);
        }
    }

    fn take_connections(&mut self, connections: Vec<ConnectionInfo>, passed: Option<Duration>) {
        let before = self.connections.drain(..).map(|it| it.connection);
        let before: HashMap<u64, ConnectionInfo> = before.map(|it| (it.id, it)).collect();
        let names = self.lanes.iter().map(|it| &it.forward);
        let names = names.filter_map(|it| Some((it.id?, short_name(it))));
        let names: HashMap<u64, String> = names.collect();
        let busy = |connection: ConnectionInfo| {
            // A new connection has moved all its bytes since the last sample.
            let was = before.get(&connection.id);
            let (sent, received) = was.map_or((0, 0), |was| (was.sent, was.received));
            let name = names.get(&connection.forward).cloned();
            Busy {
                forward: name.unwrap_or_else(|| "(removed)".to_owned()),
                rate: Rate {
                    sent: rate(sent, connection.sent, passed),
                    received: rate(received, connection.received, passed),
                },
                connection,
            }
        };
        self.connections = connections.into_iter().map(busy).collect();
    }

    /// Returns the connections that match the filter, in the chosen order.
    pub(super) fn shown(&self) -> Vec<&Busy> {
        let wanted = self.filter.to_lowercase();
        let all = self.connections.iter();
        let mut shown: Vec<&Busy> = all.filter(|it| it.has(&wanted)).collect();
        match self.order {
            SortOrder::Busiest => shown.sort_by_key(|it| {
                let moved = it.connection.sent.saturating_add(it.connection.received);
                (Reverse((it.rate.sum(), moved)), it.connection.id)
            }),
            SortOrder::LongestIdle => shown.sort_by(|a, b| {
                let (a, b) = (&a.connection, &b.connection);
                let longest = b.idle_seconds.total_cmp(&a.idle_seconds);
                longest.then(a.id.cmp(&b.id))
            }),
            SortOrder::Oldest => shown.sort_by_key(|it| it.connection.id),
        }
        shown
    }

    /// Returns the row of the chosen connection among those shown.
    pub(super) fn chosen_place(&self) -> Option<usize> {
        let chosen = self.chosen?;
        let shown = self.shown();
        shown.iter().position(|it| it.connection.id == chosen)
    }

    /// Chooses the connection in a row, or the last one if there are fewer.
    fn select_row(&mut self, place: usize) {
        let shown = self.shown();
        let id = shown.get(place).or(shown.last());
        self.chosen = id.map(|it| it.connection.id);
    }

    /// If the chosen connection is gone, chooses the one that is now in its row.
    fn keep_chosen(&mut self, place: Option<usize>) {
        if let Some(place) = place
            && self.chosen_place().is_none()
        {
            self.select_row(place);
        }
    }

    /// Moves up or down in the list that has the focus.
    pub(super) fn move_selection(&mut self, by: isize) {
        match self.focus {
            Focus::Forwards => self.scroll(by),
            Focus::Connections => match self.chosen_place() {
                None => self.select_row(0),
                Some(place) => self.select_row(place.saturating_add_signed(by)),
            },
        }
    }

    /// Changes the order of the list that has the focus.
    pub(super) fn sort_anew(&mut self) {
        match self.focus {
            Focus::Forwards => self.change_forward_order(),
            Focus::Connections => {
                self.order = match self.order {
                    SortOrder::Busiest => SortOrder::LongestIdle,
                    SortOrder::LongestIdle => SortOrder::Oldest,
                    SortOrder::Oldest => SortOrder::Busiest,
                };
            }
        }
    }

    /// Shows only the connections that contain this text.
    pub(super) fn set_filter(&mut self, text: String) {
        self.filter = text;
        if self.chosen_place().is_none() {
            self.chosen = None;
        }
    }

    /// Asks whether to close the chosen connection.
    pub(super) fn ask_to_close(&mut self) {
        match self.chosen_place().and(self.chosen) {
            Some(id) => self.mode = Mode::Question(id),
            None => self.note = Some("choose a connection first, with ↑ ↓".to_owned()),
        }
    }

    /// Returns the connection of that id, if it still exists.
    pub(super) fn connection(&self, id: u64) -> Option<&Busy> {
        self.connections.iter().find(|it| it.connection.id == id)
    }

    /// Returns the forwards in the chosen order, from the first one shown.
    pub(super) fn lanes(&self) -> Vec<&Lane> {
        let mut lanes: Vec<&Lane> = self.lanes.iter().collect();
        match self.sort {
            Sort::Given => {}
            Sort::Rate => lanes.sort_by_key(|it| Reverse(it.rate().sum())),
            Sort::Live => lanes.sort_by_key(|it| Reverse(it.forward.counters.live)),
        }
        lanes.split_off(self.scrolled.min(lanes.len()))
    }

    /// Returns the rate of all forwards together.
    pub(super) fn rate(&self) -> Rate {
        let rates = self.lanes.iter().map(Lane::rate);
        rates.fold(Rate::default(), |sum, rate| Rate {
            sent: sum.sent.saturating_add(rate.sent),
            received: sum.received.saturating_add(rate.received),
        })
    }

    fn scroll(&mut self, by: isize) {
        let last = self.lanes.len().saturating_sub(1);
        self.scrolled = self.scrolled.saturating_add_signed(by).min(last);
    }

    fn change_forward_order(&mut self) {
        self.sort = match self.sort {
            Sort::Given => Sort::Rate,
            Sort::Rate => Sort::Live,
            Sort::Live => Sort::Given,
        };
        self.scrolled = 0;
    }
}

/// Returns a rate in bytes per second; 0 in the first sample.
fn rate(was: u64, is: u64, passed: Option<Duration>) -> u64 {
    match passed {
        Some(passed) if !passed.is_zero() => {
            (is.saturating_sub(was) as f64 / passed.as_secs_f64()) as u64
        }
        _ => 0,
    }
}

/// Returns a forward's name for a narrow column, or the address on which it listens.
pub(super) fn short_name(forward: &ForwardInfo) -> String {
    if let Some(name) = &forward.name {
        return name.clone();
    }
    let listen = without_scheme(&forward.listen);
    // The end of a path says most.
    match listen.char_indices().nth_back(NAME - 2) {
        Some((start, _)) if start > 0 => format!("…{}", &listen[start..]),
        _ => listen.to_owned(),
    }
}

fn without_scheme(address: &str) -> &str {
    address.strip_prefix("tcp://").unwrap_or(address)
}
