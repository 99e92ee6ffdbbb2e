//! Stress and measurement of a path: clients that send and a server that answers, every byte
//! compared.

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

/// What a client does with each connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// Sends, while the server sends it back, and half-closes when all is sent.
    Echo,
    /// Sends only.
    Up,
    /// Receives only.
    Down,
    /// Sends a message when the one before has come back, so many times.
    RoundTrips(u64),
}

/// What a client is to do.
#[derive(Clone, Debug)]
pub(crate) struct StressPlan {
    pub(crate) address: Address,
    pub(crate) load: Load,
    /// Connections in all.
    pub(crate) connections: u64,
    /// Connections at a time.
    pub(crate) parallel: usize,
    /// Bytes of a connection each way; of round trips, of a message.
    pub(crate) size: RangeInclusive<u64>,
    /// Bytes of a read or a write, at least 1.
    pub(crate) buffer: RangeInclusive<u64>,
    /// What the sizes and the bytes are drawn from.
    pub(crate) seed: u64,
    /// Between the end of a connection and the beginning of the next in its place.
    pub(crate) pause: Duration,
    /// How long a connect may take, and how long nothing may move.
    pub(crate) timeout: Duration,
    /// End with the first failure.
    pub(crate) fail_fast: bool,
    /// A line for each connection.
    pub(crate) verbose: bool,
}

/// How far the clients are.
#[derive(Debug, Default)]
pub(crate) struct StressProgress {
    /// Connections that ended.
    pub(crate) ended: AtomicU64,
    /// Those of them that failed.
    pub(crate) failed: AtomicU64,
    /// Bytes of both ways.
    pub(crate) moved: AtomicU64,
}
