//! What has been heard, and how fast it moves.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::app::control::{Connection, Forward, Status};

/// How many rates are kept of a forward: no sparkline is longer.
const HISTORY: usize = 120;

/// How many characters what a forward is called may have.
pub(super) const NAME: usize = 16;

/// What was heard at one time.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub(super) status: Status,
    pub(super) connections: Vec<Connection>,
    pub(super) at: Instant,
}

/// Bytes a second.
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

/// A forward, and how fast it was.
#[derive(Clone, Debug)]
pub(super) struct Lane {
    pub(super) forward: Forward,
    /// The latest is the last.
    pub(super) rates: VecDeque<Rate>,
}

impl Lane {
    pub(super) fn rate(&self) -> Rate {
        self.rates.back().copied().unwrap_or_default()
    }
}

/// A connection, and how fast it is.
#[derive(Clone, Debug)]
pub(super) struct Busy {
    pub(super) connection: Connection,
    /// What its forward is called.
    pub(super) forward: String,
    pub(super) rate: Rate,
}

/// By what the forwards are sorted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sort {
    #[default]
    Given,
    Rate,
    Live,
}

/// All there is to draw.
#[derive(Debug, Default)]
pub(super) struct Model {
    pub(super) status: Option<Status>,
    lanes: Vec<Lane>,
    /// The busiest first.
    pub(super) busiest: Vec<Busy>,
    /// Why nobody answers any more.
    pub(super) trouble: Option<String>,
    pub(super) sort: Sort,
    /// How many forwards are above those shown.
    pub(super) scrolled: usize,
    at: Option<Instant>,
}

impl Model {
    pub(super) fn heard(&mut self, sample: Sample) {
        let same = |it: &Status| it.pid == sample.status.pid;
        if !self.status.as_ref().is_some_and(same) {
            // Started anew: what was counted then says nothing.
            self.lanes.clear();
            self.busiest.clear();
            self.at = None;
        }
        let passed = self.at.map(|at| sample.at.saturating_duration_since(at));
        self.hear_forwards(&sample.status.forwards, passed);
        self.hear_connections(sample.connections, passed);
        self.at = Some(sample.at);
        self.status = Some(sample.status);
        self.trouble = None;
        self.scroll(0);
    }

    /// Nobody answers any more.
    pub(super) fn lost(&mut self, why: String) {
        self.trouble = Some(why);
    }

    fn hear_forwards(&mut self, forwards: &[Forward], passed: Option<Duration>) {
        let before = self.lanes.drain(..);
        let key = |it: &Forward| (it.id, it.id.is_none().then(|| it.label()));
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

    fn hear_connections(&mut self, connections: Vec<Connection>, passed: Option<Duration>) {
        let before = self.busiest.drain(..).map(|it| it.connection);
        let before: HashMap<u64, Connection> = before.map(|it| (it.id, it)).collect();
        let names = self.lanes.iter().map(|it| &it.forward);
        let names = names.filter_map(|it| Some((it.id?, called(it))));
        let names: HashMap<u64, String> = names.collect();
        let busy = |connection: Connection| {
            // A new one has moved all of it since we last heard.
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
        self.busiest = connections.into_iter().map(busy).collect();
        self.busiest.sort_by_key(|it| {
            let moved = it.connection.sent.saturating_add(it.connection.received);
            (Reverse((it.rate.sum(), moved)), it.connection.id)
        });
    }

    /// The forwards in the order that is wanted, from where it was scrolled to.
    pub(super) fn lanes(&self) -> Vec<&Lane> {
        let mut lanes: Vec<&Lane> = self.lanes.iter().collect();
        match self.sort {
            Sort::Given => {}
            Sort::Rate => lanes.sort_by_key(|it| Reverse(it.rate().sum())),
            Sort::Live => lanes.sort_by_key(|it| Reverse(it.forward.counters.live)),
        }
        lanes.split_off(self.scrolled.min(lanes.len()))
    }

    /// The rate of all forwards together.
    pub(super) fn rate(&self) -> Rate {
        let rates = self.lanes.iter().map(Lane::rate);
        rates.fold(Rate::default(), |sum, rate| Rate {
            sent: sum.sent.saturating_add(rate.sent),
            received: sum.received.saturating_add(rate.received),
        })
    }

    pub(super) fn scroll(&mut self, by: isize) {
        let last = self.lanes.len().saturating_sub(1);
        self.scrolled = self.scrolled.saturating_add_signed(by).min(last);
    }

    pub(super) fn sort_anew(&mut self) {
        self.sort = match self.sort {
            Sort::Given => Sort::Rate,
            Sort::Rate => Sort::Live,
            Sort::Live => Sort::Given,
        };
        self.scrolled = 0;
    }
}

/// Of what is heard first no rate is known.
fn rate(was: u64, is: u64, passed: Option<Duration>) -> u64 {
    match passed {
        Some(passed) if !passed.is_zero() => {
            (is.saturating_sub(was) as f64 / passed.as_secs_f64()) as u64
        }
        _ => 0,
    }
}

/// What a forward is called in a narrow column: by where it listens, if it has no name.
pub(super) fn called(forward: &Forward) -> String {
    if let Some(name) = &forward.name {
        return name.clone();
    }
    let listen = without_scheme(&forward.listen);
    // Of a path its end tells most.
    match listen.char_indices().nth_back(NAME - 2) {
        Some((start, _)) if start > 0 => format!("…{}", &listen[start..]),
        _ => listen.to_owned(),
    }
}

pub(super) fn without_scheme(address: &str) -> &str {
    address.strip_prefix("tcp://").unwrap_or(address)
}
