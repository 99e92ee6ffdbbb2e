//! Stress tests and measurement of a path: clients that send, and a server that answers; every byte
//! is compared.

mod client;
mod data;
mod exchange;
mod report;
mod server;

use std::ops::RangeInclusive;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use crate::address::Address;

pub(crate) use client::{MOST_PARALLEL, run};
pub(crate) use report::StressReport;
pub(crate) use server::serve;

/// What a client does with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// Sends while it receives the echo, and half-closes when all is sent.
    Echo,
    /// Sends only.
    Up,
    /// Receives only.
    Down,
    /// Sends a message and waits for its echo, so many times.
    RoundTrips(u64),
}

/// What the clients are to do.
#[derive(Clone, Debug)]
pub(crate) struct StressPlan {
    pub(crate) address: Address,
    pub(crate) load: Load,
    /// The number of connections.
    pub(crate) connections: u64,
    /// The number of connections at a time.
    pub(crate) parallel: usize,
    /// The bytes of a connection in each direction; of a message in round trips.
    pub(crate) size: RangeInclusive<u64>,
    /// The bytes of a read or a write, at least 1.
    pub(crate) buffer: RangeInclusive<u64>,
    /// The seed of the sizes and of the data.
    pub(crate) seed: u64,
    /// The pause between a connection and the next one in its place.
    pub(crate) pause: Duration,
    /// How long a connect may take, and how long no byte may move.
    pub(crate) timeout: Duration,
    /// Whether the first failure ends the run.
    pub(crate) fail_fast: bool,
    /// Whether a line is printed for each connection.
    pub(crate) verbose: bool,
}

/// The progress of the clients.
#[derive(Debug, Default)]
pub(crate) struct StressProgress {
    /// The number of ended connections.
    pub(crate) ended: AtomicU64,
    /// The number of failed connections.
    pub(crate) failed: AtomicU64,
    /// The bytes of both directions.
    pub(crate) moved: AtomicU64,
}
