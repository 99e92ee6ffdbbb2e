//! Clients besides the crowd: of forwards that have nothing to do with the VM, that wait for it,
//! that cut off who is silent, and that come and go.

use crate::child::wait_until;
use crate::client::{self, Conn, End, Place};
use crate::crowd::World;
use crate::guest::{LONG, pattern, request};
use crate::hvsock::IDLE;
use crate::vm::Doors;
use std::convert::Infallible;
use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Between two blocks of one stream: it is to last, not to fill the machine.
const PACE: Duration = Duration::from_millis(3);

/// What the clients of one forward count themselves.
#[derive(Debug, Default)]
pub(crate) struct Count {
    pub(crate) opened: AtomicU64,
    /// Those that were served whole, and their bytes.
    pub(crate) whole: AtomicU64,
    /// Cut off by the VM's end, which looked like a guest's.
    pub(crate) clean: AtomicU64,
    pub(crate) sent: AtomicU64,
    pub(crate) received: AtomicU64,
}

impl Count {
    fn open(&self, place: &Place) -> io::Result<Conn> {
        let conn = Conn::open(place);
        let made = Conn::was_made(&conn);
        self.opened.fetch_add(made.into(), Ordering::SeqCst);
        conn
    }

    fn moved(&self, sent: usize, received: usize) {
        self.sent.fetch_add(sent as u64, Ordering::SeqCst);
        self.received.fetch_add(received as u64, Ordering::SeqCst);
    }

    fn enter(&self, sent: usize, received: usize) {
        self.moved(sent, received);
        self.whole.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn of(&self, counter: fn(&Count) -> &AtomicU64) -> u64 {
        counter(self).load(Ordering::SeqCst)
    }
}

#[derive(Debug)]
pub(crate) struct Others<'a> {
    pub(crate) world: &'a World<'a, Doors>,
    pub(crate) plain: (SocketAddr, Count),
    pub(crate) waiting: (SocketAddr, Count),
    pub(crate) idle: (SocketAddr, Count),
    pub(crate) changed: (PathBuf, Count),
    /// Forwards that are there at times.
    pub(crate) passing: [(PathBuf, Count); 2],
    /// No VM is there, for certain.
    pub(crate) gone: AtomicBool,
    /// Clients that came when it was gone, and were held until it was back.
    pub(crate) held: AtomicU64,
    /// Held for writing while no byte may move.
    pub(crate) stillness: RwLock<()>,
    /// The long streams are to end.
    pub(crate) end: AtomicBool,
}

impl Others<'_> {
    fn fail(&self, kind: &str, number: u64, error: &io::Error) {
        let text = format!("{kind}, number {number}: {error} ({:?})", error.kind());
        self.world.fail(text);
    }

    /// Runs one client after the other until it is over.
    fn repeat(&self, seed: u64, mut client: impl FnMut(&mut fastrand::Rng, u64)) {
        let mut rng = fastrand::Rng::with_seed(self.world.seed ^ seed);
        while !self.world.is_over() {
            let number = rng.u64(..);
            client(&mut rng, number);
            thread::sleep(PACE);
        }
    }

    /// A stream that nothing may ever break, from the first second to the last.
    pub(crate) fn stream(&self, number: u64) {
        let (address, count) = &self.plain;
        let mut rng = fastrand::Rng::with_seed(self.world.seed ^ (number << 40));
        let run = || -> io::Result<()> {
            let mut conn = count.open(&Place::Tcp(*address))?;
            while !self.end.load(Ordering::SeqCst) {
                let bytes = pattern(rng.u64(..), rng.usize(1..60_000));
                {
                    let _moving = self.stillness.read().unwrap();
                    client::echo(&mut conn, &bytes, false)?;
                    count.moved(bytes.len(), bytes.len());
                }
                thread::sleep(PACE);
            }
            conn.half_close()?;
            client::expect_end(&mut conn)?;
            count.enter(0, 0);
            Ok(())
        };
        if let Err(error) = { run }() {
            self.fail("stream beside the VM", number, &error);
        }
    }

    /// Short connections beside the VM: each is whole.
    pub(crate) fn visitors(&self) {
        let (address, count) = &self.plain;
        self.repeat(1, |rng, number| {
            let bytes = pattern(number, rng.usize(..30_000));
            let echo = |mut conn| client::echo(&mut conn, &bytes, true);
            match count.open(&Place::Tcp(*address)).and_then(echo) {
                Ok(()) => count.enter(bytes.len(), bytes.len()),
                Err(error) => self.fail("visitor beside the VM", number, &error),
            }
        });
    }

    /// Clients that are held while the VM is gone.
    pub(crate) fn patient(&self, thread: u64) {
        let (address, count) = &self.waiting;
        self.repeat(2 ^ (thread << 20), |rng, number| {
            // Between its end and its being gone nobody can say what a client will find.
            let known = || {
                self.gone.load(Ordering::SeqCst)
                    || self.world.changes().is_multiple_of(2)
                    || self.world.is_over()
            };
            wait_until(LONG, known);
            let changes = self.world.changes();
            let gone = self.gone.load(Ordering::SeqCst);
            let length = rng.usize(1..200_000);
            let download = |mut conn| client::download(&mut conn, number, length, rng.bool());
            match count.open(&Place::Tcp(*address)).and_then(download) {
                Ok(()) => {
                    self.held.fetch_add(gone.into(), Ordering::SeqCst);
                    count.enter(request(0, 0).len(), length);
                }
                Err(error) => {
                    // Who came to a VM that was gone has until the next one goes.
                    let cut = match gone {
                        true => self.world.changes() > changes + 1,
                        false => self.ended(changes),
                    };
                    if !cut || error.kind() == ErrorKind::InvalidData {
                        let kind = if gone {
                            "held"
                        } else {
                            "of a forward that waits"
                        };
                        self.fail(kind, number, &error);
                    } else if error.kind() == ErrorKind::UnexpectedEof {
                        count.clean.fetch_add(1, Ordering::SeqCst);
                    }
                }
            }
        });
    }

    /// Clients that fall silent, and are cut off for it.
    pub(crate) fn silent(&self) {
        let (address, count) = &self.idle;
        self.repeat(3, |_, number| {
            let changes = self.world.changes();
            let before = Instant::now();
            let run = || -> io::Result<Infallible> {
                let mut conn = count.open(&Place::Tcp(*address))?;
                client::echo(&mut conn, &pattern(number, 500), false)?;
                count.moved(500, 500);
                match client::refused(&mut conn, &[], false)? {
                    End::Reset => Err(ErrorKind::ConnectionReset.into()),
                    End::Eof => Err(ErrorKind::UnexpectedEof.into()),
                }
            };
            let Err(error) = run();
            let reset = error.kind() == ErrorKind::ConnectionReset;
            let time = before.elapsed().as_secs_f64();
            if self.ended(changes) && error.kind() != ErrorKind::InvalidData {
                return;
            }
            match reset {
                // On a machine that is busy it may have been silent before it was heard.
                true if time >= IDLE => count.enter(0, 0),
                true => self.fail("silent", number, &client::wrong(format!("after {time} s"))),
                false => self.fail("silent", number, &error),
            }
        });
    }

    /// A connection that is to stay whatever becomes of its forward.
    pub(crate) fn begin(&self, (path, count): &(PathBuf, Count)) -> Result<Conn, String> {
        let begun = count.open(&Place::Unix(path.clone())).and_then(|mut conn| {
            client::echo(&mut conn, b"before", false)?;
            Ok(conn)
        });
        begun.map_err(|error| format!("{}: {error}", path.display()))
    }

    /// It goes on, now that this has happened, and ends as it should.
    pub(crate) fn go_on(&self, mut conn: Conn, what: &str) -> Result<(), String> {
        client::echo(&mut conn, b"afterwards", true)
            .map_err(|error| format!("{what}, and a client that was there: {error}"))
    }

    fn ended(&self, changes: usize) -> bool {
        self.world.changes() != changes || !changes.is_multiple_of(2)
    }

    /// Clients of a forward that leads elsewhere every now and then, and refuses nobody for that.
    pub(crate) fn followers(&self) {
        let (path, count) = &self.changed;
        self.repeat(4, |rng, number| {
            let changes = self.world.changes();
            let bytes = pattern(number, rng.usize(1..60_000));
            let echo = |mut conn| client::echo(&mut conn, &bytes, true);
            match count.open(&Place::Unix(path.clone())).and_then(echo) {
                Ok(()) => count.enter(bytes.len(), bytes.len()),
                Err(error) if self.ended(changes) && error.kind() != ErrorKind::InvalidData => {}
                Err(error) => self.fail("of a forward that changes", number, &error),
            }
        });
    }

    /// Clients of forwards that may not be there: those that get in are served.
    pub(crate) fn passers(&self) {
        self.repeat(5, |rng, number| {
            let (path, count) = &self.passing[rng.usize(..2)];
            let bytes = pattern(number, rng.usize(1..60_000));
            let Ok(mut conn) = count.open(&Place::Unix(path.clone())) else {
                return;
            };
            // Who still stood in the backlog when the forward went was never let in.
            let mut first = [0];
            let admitted = conn
                .write_all(&bytes[..1])
                .and_then(|()| conn.read_exact(&mut first));
            if admitted.is_err() {
                return;
            }
            let rest = client::echo(&mut conn, &bytes[1..], true);
            let right = first[0] == bytes[0];
            let rest = rest.and_then(|()| match right {
                true => Ok(()),
                false => Err(client::wrong("wrong first byte")),
            });
            match rest {
                Ok(()) => count.enter(bytes.len(), bytes.len()),
                Err(error) => self.fail("of a forward that goes", number, &error),
            }
        });
    }
}
