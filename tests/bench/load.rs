//! The clients, and what they measure. Every byte that arrives is compared: fast losses are
//! failures.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::server::Service;

/// How much is read or written at once, one way.
pub(crate) const CHUNK: usize = 256 << 10;

/// Random bytes; all that is sent is this, over and over.
pub(crate) fn block() -> &'static [u8] {
    static BLOCK: OnceLock<Vec<u8>> = OnceLock::new();
    BLOCK.get_or_init(|| {
        let mut block = vec![0; CHUNK - 13];
        fastrand::Rng::with_seed(1).fill(&mut block);
        block
    })
}

/// The bytes from `position` on, at least one and at most `most`.
pub(crate) fn bytes_at(position: u64, most: u64) -> &'static [u8] {
    let block = block();
    let rest = &block[(position % block.len() as u64) as usize..];
    &rest[..rest.len().min(most as usize)]
}

/// Compares what comes.
#[derive(Debug, Default)]
pub(crate) struct Check {
    pub(crate) bytes: u64,
}

impl Check {
    pub(crate) fn add(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let right = bytes_at(self.bytes, bytes.len() as u64);
            let (now, rest) = bytes.split_at(right.len());
            if now != right {
                let why = format!("a wrong byte behind {}", self.bytes);
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
            self.bytes += now.len() as u64;
            bytes = rest;
        }
        Ok(())
    }
}

/// What the clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// So many bytes in all, over so many connections, at most `write` at a time.
    Up {
        bytes: u64,
        connections: u64,
        write: usize,
    },
    Down {
        bytes: u64,
        connections: u64,
    },
    /// So many messages of this size there and back in all.
    Trips {
        size: usize,
        count: u64,
        connections: u64,
    },
    /// Connections of one small message, so many at a time.
    Connects {
        count: u64,
        at_a_time: u64,
    },
}

impl Load {
    pub(crate) fn service(self) -> Service {
        match self {
            Load::Up { .. } => Service::Sink,
            Load::Down { .. } => Service::Source,
            Load::Trips { .. } | Load::Connects { .. } => Service::Echo,
        }
    }

    /// What the rate counts, and what it is called: GiB, or thousands.
    pub(crate) fn amount(self) -> (f64, &'static str) {
        match self {
            Load::Up { bytes, .. } | Load::Down { bytes, .. } => {
                (bytes as f64 / (1_u64 << 30) as f64, "GiB")
            }
            Load::Trips { count, .. } => (count as f64 / 1e5, "100k trips"),
            Load::Connects { count, .. } => (count as f64 / 1e5, "100k connects"),
        }
    }

    pub(crate) fn name(self) -> String {
        match self {
            Load::Up {
                connections, write, ..
            } if write < CHUNK => format!("up in writes of {write} B, {connections}"),
            Load::Up { connections, .. } => format!("up, {connections}"),
            Load::Down { connections, .. } => format!("down, {connections}"),
            Load::Trips {
                size, connections, ..
            } => format!("trips of {size} B, {connections}"),
            Load::Connects { at_a_time, .. } => format!("connect-echo-close, {at_a_time}"),
        }
    }

    /// Does it against the service at `port`.
    ///
    /// # Errors
    /// The first thing that went wrong.
    pub(crate) fn run(self, port: u16) -> io::Result<Measured> {
        let next = AtomicU64::new(0);
        let lanes = match self {
            Load::Up { connections, .. }
            | Load::Down { connections, .. }
            | Load::Trips { connections, .. } => connections,
            Load::Connects { at_a_time, .. } => at_a_time,
        };
        let begun = Instant::now();
        let outcomes: Vec<_> = thread::scope(|scope| {
            let lane = |_| {
                let thread = thread::Builder::new().stack_size(128 << 10);
                let lane = || self.lane(port, &next);
                thread.spawn_scoped(scope, lane).expect("a thread")
            };
            let lanes: Vec<_> = (0..lanes).map(lane).collect();
            let joined = lanes.into_iter().map(|lane| lane.join().expect("no panic"));
            joined.collect()
        });
        let took = begun.elapsed();
        let mut trips = Vec::new();
        for outcome in outcomes {
            trips.append(&mut outcome?);
        }
        trips.sort_unstable();
        Ok(Measured { took, trips })
    }

    fn lane(self, port: u16, next: &AtomicU64) -> io::Result<Vec<Duration>> {
        let mut trips = Vec::new();
        match self {
            Load::Up {
                bytes,
                connections,
                write,
            } => up(port, bytes / connections, write)?,
            Load::Down { bytes, connections } => down(port, bytes / connections)?,
            Load::Trips {
                size,
                count,
                connections,
            } => {
                let stream = connect(port)?;
                let mut buffer = vec![0; size];
                for _ in 0..count / connections {
                    trips.push(trip(&stream, &mut buffer)?);
                }
            }
            Load::Connects { count, .. } => {
                while next.fetch_add(1, Ordering::Relaxed) < count {
                    let begun = Instant::now();
                    let stream = connect(port)?;
                    trip(&stream, &mut [0; 64])?;
                    stream.shutdown(Shutdown::Write)?;
                    if (&stream).read(&mut [0])? != 0 {
                        return Err(io::ErrorKind::InvalidData.into());
                    }
                    trips.push(begun.elapsed());
                }
            }
        }
        Ok(trips)
    }
}

/// What came of a load.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    pub(crate) took: Duration,
    /// How long each trip or connection took, the shortest first.
    pub(crate) trips: Vec<Duration>,
}

impl Measured {
    pub(crate) fn quantile(&self, share: f64) -> Option<Duration> {
        let last = self.trips.len().checked_sub(1)?;
        Some(self.trips[(last as f64 * share) as usize])
    }
}

pub(crate) fn connect(port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_nodelay(true)?;
    let patience = Some(Duration::from_secs(60));
    stream.set_read_timeout(patience)?;
    stream.set_write_timeout(patience)?;
    Ok(stream)
}

fn up(port: u16, bytes: u64, write: usize) -> io::Result<()> {
    let mut stream = connect(port)?;
    let mut sent = 0;
    while sent < bytes {
        sent += stream.write(bytes_at(sent, (bytes - sent).min(write as u64)))? as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut taken = [0; 8];
    stream.read_exact(&mut taken)?;
    match u64::from_le_bytes(taken) == bytes {
        true => Ok(()),
        false => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn down(port: u16, bytes: u64) -> io::Result<()> {
    let mut stream = connect(port)?;
    stream.write_all(&bytes.to_le_bytes())?;
    let mut check = Check::default();
    let mut buffer = vec![0; CHUNK];
    loop {
        match stream.read(&mut buffer)? {
            0 if check.bytes == bytes => return Ok(()),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => check.add(&buffer[..n])?,
        }
    }
}

/// A message there and back.
pub(crate) fn trip(mut stream: &TcpStream, buffer: &mut [u8]) -> io::Result<Duration> {
    let begun = Instant::now();
    let message = bytes_at(0, buffer.len() as u64);
    stream.write_all(message)?;
    stream.read_exact(buffer)?;
    let took = begun.elapsed();
    match buffer == message {
        true => Ok(took),
        false => Err(io::ErrorKind::InvalidData.into()),
    }
}
