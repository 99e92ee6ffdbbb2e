//! The crowd: polite clients, whose bytes must be right, and every kind of rude one.

use crate::child::{LOOK, Places, wait_until};
use crate::client::{self, Conn, End, Place, Unanswered};
use crate::guest::{
    CHARGEN, CLOSER, COUNT, DISCARD, DOWNLOAD, EARLY, ECHO, HTTP, LATE, LONG, NEVER, REFUSED,
    STUBBORN, early_answer, pattern,
};
use hvsock::simulate::Vm;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, RwLock};
use std::thread;
use std::time::{Duration, Instant};

/// Host ports that the guest dials.
pub(crate) const HOST_ECHO_TCP: u32 = 5000;
pub(crate) const HOST_ECHO_UNIX: u32 = 5001;
pub(crate) const HOST_REFUSED: u32 = 5002;

/// Connections that one thread keeps and neglects.
const PARKED: usize = 12;

/// How long a listener that was shut down may take to be bound again.
const BOUND_AGAIN: Duration = Duration::from_secs(1);

/// How long a client may have to wait until it is accepted.
const ACCEPTED: Duration = Duration::from_millis(250);

/// How one kind of client fared.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) done: u64,
    /// Ended by the proxy's end.
    pub(crate) cut: u64,
    /// Those of them that could take it for a whole answer.
    pub(crate) clean: u64,
}

/// Programs in a guest that dial the host.
pub(crate) trait Guests: Sync {
    fn dial(&self, port: u32) -> io::Result<UnixStream>;
}

impl Guests for Vm {
    fn dial(&self, port: u32) -> io::Result<UnixStream> {
        Vm::dial(self, port)
    }
}

#[derive(Debug)]
pub(crate) struct World<'a, V = Vm> {
    pub(crate) vm: &'a V,
    pub(crate) places: &'a Places,
    pub(crate) seed: u64,
    pub(crate) total: usize,
    pub(crate) begun: Instant,
    pub(crate) issued: AtomicUsize,
    pub(crate) tcp: HashMap<u32, SocketAddr>,
    /// Ends and starts of the proxy (or of the VM, whichever is ended) so far: odd while it is
    /// ending or gone.
    pub(crate) changes: AtomicUsize,
    /// What ends can't say so: a VM's death is an EOF on all of its sockets, as a guest's close is,
    /// and the death of a proxy on all of those.
    pub(crate) ends_silently: bool,
    /// Whether the guest may dial; held for reading while it does.
    pub(crate) may_dial: RwLock<bool>,
    /// How long each program in the guest is idle between two dials.
    pub(crate) between_dials: Duration,
    /// Nothing more is begun: a failure, or the end.
    pub(crate) over: AtomicBool,
    pub(crate) tallies: Mutex<BTreeMap<&'static str, Tally>>,
    pub(crate) failures: Mutex<Vec<String>>,
    /// Refusals that a half-closing client could not tell from an empty answer, and all of them.
    pub(crate) late_refusals: [AtomicUsize; 2],
    /// Connections made, by guest port and whether over TCP.
    pub(crate) opened: Mutex<HashMap<(u32, bool), u64>>,
    /// When each listener was last shut down from outside.
    pub(crate) shut_down: Mutex<HashMap<Place, Instant>>,
    /// Clients that came at such a moment, and came again.
    pub(crate) came_again: AtomicUsize,
}

impl<'a, V: Guests> World<'a, V> {
    /// A world in which nothing has happened yet, and `total` clients are to come.
    pub(crate) fn new(
        vm: &'a V,
        places: &'a Places,
        seed: u64,
        total: usize,
        tcp: HashMap<u32, SocketAddr>,
    ) -> World<'a, V> {
        World {
            vm,
            places,
            seed,
            total,
            begun: Instant::now(),
            issued: 0.into(),
            tcp,
            changes: 0.into(),
            ends_silently: false,
            may_dial: true.into(),
            between_dials: Duration::ZERO,
            over: false.into(),
            tallies: Default::default(),
            failures: Default::default(),
            late_refusals: Default::default(),
            opened: Default::default(),
            shut_down: Default::default(),
            came_again: 0.into(),
        }
    }

    pub(crate) fn changes(&self) -> usize {
        self.changes.load(Ordering::SeqCst)
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    pub(crate) fn fail(&self, text: String) {
        self.over.store(true, Ordering::SeqCst);
        let time = self.begun.elapsed().as_secs_f64();
        self.failures
            .lock()
            .unwrap()
            .push(format!("after {time:.3} s: {text}"));
    }

    /// Waits until a proxy runs; how many changes there were until it did.
    fn wait_for_proxy(&self) -> usize {
        let up = || self.changes().is_multiple_of(2) || self.is_over();
        if !wait_until(LONG, up) {
            self.fail("no proxy came back".into());
        }
        self.changes()
    }

    /// Enters how a client fared that was begun after `changes`.
    pub(crate) fn enter(
        &self,
        kind: &'static str,
        what: &str,
        changes: usize,
        outcome: io::Result<()>,
        tcp: bool,
    ) {
        let (mut cut, mut clean) = (false, false);
        if let Err(error) = outcome {
            // Over TCP, what is cut off must look so. Unix sockets have no way to say it.
            clean = error.kind() == ErrorKind::UnexpectedEof && tcp;
            let ending = self.changes() != changes || !changes.is_multiple_of(2);
            let lie = clean && !self.ends_silently;
            cut = ending && error.kind() != ErrorKind::InvalidData && !lie;
            if !cut {
                self.fail(format!("{kind} {what}: {error} ({:?})", error.kind()));
            }
        }
        let mut tallies = self.tallies.lock().unwrap();
        let tally = tallies.entry(kind).or_default();
        tally.done += u64::from(!cut);
        tally.cut += u64::from(cut);
        tally.clean += u64::from(clean);
    }

    pub(crate) fn place(&self, port: u32, tcp: bool) -> Place {
        if tcp {
            Place::Tcp(self.tcp[&port])
        } else {
            Place::Unix(self.places.unix(port))
        }
    }

    pub(crate) fn open(&self, port: u32, tcp: bool) -> io::Result<Conn> {
        let conn = Conn::open(&self.place(port, tcp));
        let made = u64::from(Conn::was_made(&conn));
        *self.opened.lock().unwrap().entry((port, tcp)).or_default() += made;
        conn
    }

    /// Runs a client, and again if it came when its listener was shut down: then it was the kernel
    /// that refused it.
    pub(crate) fn served<T>(&self, mut client: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        loop {
            match client() {
                Err(error) if self.met_no_listener(&error) => {
                    self.came_again.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(LOOK);
                }
                outcome => return outcome,
            }
        }
    }

    fn met_no_listener(&self, error: &io::Error) -> bool {
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
        let Some(Unanswered { place, begun, .. }) = cause else {
            return false;
        };
        let shut_down = self.shut_down.lock().unwrap().get(place).copied();
        shut_down.is_some_and(|at| match error.kind() {
            ErrorKind::ConnectionRefused | ErrorKind::NotFound => at.elapsed() < BOUND_AGAIN,
            // It was connected, and waited to be accepted.
            _ => at < *begun + ACCEPTED && *begun < at + ACCEPTED,
        })
    }

    /// One thread's clients, until all have been.
    pub(crate) fn clients(&self) {
        let mut parked = Vec::new();
        while !self.is_over() {
            let number = self.issued.fetch_add(1, Ordering::SeqCst);
            if number >= self.total {
                break;
            }
            let mut rng = fastrand::Rng::with_seed(self.seed.wrapping_mul(31) ^ number as u64);
            let now = Instant::now();
            parked.retain(|(until, _)| *until > now);
            if parked.len() >= PARKED {
                parked.remove(0);
            }
            let tcp = rng.bool();
            let changes = self.wait_for_proxy();
            let mut kind = "";
            let outcome = self.served(|| {
                let (it, outcome) = self.client(&mut rng.clone(), tcp, &mut parked);
                kind = it;
                outcome
            });
            let over = if tcp { "over TCP" } else { "over Unix" };
            self.enter(
                kind,
                &format!("{over}, number {number}"),
                changes,
                outcome,
                tcp,
            );
        }
    }

    fn client(
        &self,
        rng: &mut fastrand::Rng,
        tcp: bool,
        parked: &mut Vec<(Instant, Conn)>,
    ) -> (&'static str, io::Result<()>) {
        let length = match rng.u32(..100) {
            0..10 => rng.usize(..2),
            10..70 => rng.usize(..4_000),
            70..97 => rng.usize(..150_000),
            _ => rng.usize(..1_500_000),
        };
        let seed = rng.u64(..);
        let choice = rng.u32(..100);
        if choice < 55 {
            let open = |port| self.open(port, tcp);
            let half_close = rng.bool();
            match choice {
                0..14 => {
                    let bytes = pattern(seed, length);
                    let run = |mut conn| client::echo(&mut conn, &bytes, half_close);
                    ("echo", open(ECHO).and_then(run))
                }
                14..24 => {
                    // An empty answer can't be told from a refusal.
                    let length = length.max(1);
                    let run = |mut conn| client::download(&mut conn, seed, length, half_close);
                    ("download", open(DOWNLOAD).and_then(run))
                }
                24..32 => {
                    let run = |mut conn| client::upload(&mut conn, &pattern(seed, length));
                    ("upload", open(COUNT).and_then(run))
                }
                32..36 => {
                    let run = |mut conn| client::discard(&mut conn, &pattern(seed, length));
                    ("discard", open(DISCARD).and_then(run))
                }
                36..42 => {
                    let run = |mut conn| client::http(&mut conn, length);
                    ("http", open(HTTP).and_then(run))
                }
                42..46 => {
                    let run = |mut conn| client::late(&mut conn, &pattern(seed, length));
                    ("late guest", open(LATE).and_then(run))
                }
                46..48 => {
                    let run =
                        |mut conn| client::slow_download(&mut conn, seed, length.clamp(1, 100_000));
                    ("slow reader", open(DOWNLOAD).and_then(run))
                }
                _ => {
                    let port = if choice < 53 { REFUSED } else { CLOSER };
                    let bytes = pattern(seed, length.min(10_000));
                    // What one that closes at once took is no refusal: it accepts, and the device
                    // takes it.
                    let taken = port == CLOSER && !bytes.is_empty();
                    let run = |mut conn| self.refused(&mut conn, &bytes, half_close, tcp && !taken);
                    let outcome = match open(port) {
                        // The reset may come before the connect is over.
                        Err(error) if tcp && error.kind() == ErrorKind::ConnectionReset => Ok(()),
                        conn => conn.and_then(run),
                    };
                    ("refused", outcome)
                }
            }
        } else {
            // The proxy may have gone; rude clients don't care, as long as somebody was there to be
            // rude to.
            let (kind, outcome) = self.rude(rng, choice, seed, length, tcp, parked);
            let outcome = match outcome {
                Err(error) if gone(&error) => Ok(()),
                outcome => outcome,
            };
            (kind, outcome)
        }
    }

    fn refused(
        &self,
        conn: &mut Conn,
        bytes: &[u8],
        half_close: bool,
        tcp: bool,
    ) -> io::Result<()> {
        let end = client::refused(conn, bytes, half_close)?;
        if half_close && tcp {
            // hyperkit says no by EOF only. It may come too late to be told from an answer to the
            // half-close.
            self.late_refusals[0].fetch_add((end == End::Eof).into(), Ordering::Relaxed);
            self.late_refusals[1].fetch_add(1, Ordering::Relaxed);
        } else if tcp && end == End::Eof {
            let text = "a refusal looked like a clean EOF";
            return Err(io::Error::new(ErrorKind::UnexpectedEof, text));
        }
        Ok(())
    }

    fn rude(
        &self,
        rng: &mut fastrand::Rng,
        choice: u32,
        seed: u64,
        length: usize,
        tcp: bool,
        parked: &mut Vec<(Instant, Conn)>,
    ) -> (&'static str, io::Result<()>) {
        let open = |port| self.open(port, tcp);
        let mut park = |conn, time| {
            parked.push((Instant::now() + Duration::from_millis(time), conn));
            Ok(())
        };
        let reset = rng.bool();
        let vanish = |conn: Conn| {
            if reset {
                conn.reset();
            }
            Ok(())
        };
        let some = 1 + length.min(60_000);
        let hold = rng.u64(20..600);
        match choice {
            55..60 => (
                "vanishes in mid-download",
                open(CHARGEN).and_then(|mut conn| {
                    conn.read_exact(&mut vec![0; some])?;
                    vanish(conn)
                }),
            ),
            60..63 => (
                "vanishes in mid-upload",
                open(COUNT).and_then(|mut conn| {
                    conn.write_all(&pattern(seed, some))?;
                    vanish(conn)
                }),
            ),
            63..67 => (
                "never reads",
                open(CHARGEN).and_then(|conn| park(conn, hold)),
            ),
            67..72 => (
                "closes at once",
                open([ECHO, CHARGEN, REFUSED, NEVER][seed as usize % 4]).and_then(vanish),
            ),
            72..76 => (
                "sends and closes",
                open(ECHO).and_then(|mut conn| {
                    conn.write_all(&pattern(seed, some))?;
                    vanish(conn)
                }),
            ),
            76..80 => (
                "half-closes first, closes unread",
                open(DOWNLOAD).and_then(|mut conn| {
                    conn.write_all(&client_request(seed, length))?;
                    conn.half_close()?;
                    if hold < 300 {
                        park(conn, 20)
                    } else {
                        vanish(conn)
                    }
                }),
            ),
            80..84 => (
                "half-closes last, closes unread",
                open(CHARGEN).and_then(|mut conn| {
                    conn.read_exact(&mut vec![0; some])?;
                    conn.half_close()?;
                    if hold < 300 {
                        park(conn, 20)
                    } else {
                        vanish(conn)
                    }
                }),
            ),
            84..87 => (
                "sends to a refused port and goes",
                open(REFUSED).and_then(|mut conn| {
                    conn.write_all(&pattern(seed, some))?;
                    vanish(conn)
                }),
            ),
            87..89 => ("says nothing", open(ECHO).and_then(|conn| park(conn, hold))),
            89..92 => (
                "early guest",
                open(EARLY).and_then(|mut conn| {
                    // The guest's reset may overtake what we send.
                    let _ = conn.write_all(&pattern(seed, some));
                    let mut answer = Vec::new();
                    let end = conn.read_to_end(&mut answer);
                    if !early_answer().starts_with(&answer) {
                        return Err(client::wrong("another answer"));
                    }
                    end.map(drop)
                }),
            ),
            92..94 => (
                "early guest, unread",
                open(EARLY).and_then(|mut conn| {
                    conn.write_all(&pattern(seed, some))?;
                    park(conn, hold)
                }),
            ),
            94 => (
                "vanishes from a stubborn guest",
                open(STUBBORN).and_then(|mut conn| {
                    conn.read_exact(&mut vec![0; some])?;
                    vanish(conn)
                }),
            ),
            95..97 => (
                "silent guest",
                open(NEVER).and_then(|mut conn| {
                    conn.write_all(&pattern(seed, some))?;
                    if hold < 300 {
                        conn.half_close()?
                    }
                    if hold.is_multiple_of(2) {
                        park(conn, hold)
                    } else {
                        vanish(conn)
                    }
                }),
            ),
            _ => (
                "reads nothing of its echo",
                open(ECHO).and_then(|mut conn| {
                    conn.set_timeout(Duration::from_millis(hold));
                    // It blocks, since nobody reads the echo.
                    let _ = conn.write_all(&pattern(seed, 3_000_000));
                    vanish(conn)
                }),
            ),
        }
    }

    /// One thread's programs in the guest, that dial the host until the clients are through.
    pub(crate) fn guests(&self, thread: u64) {
        let mut rng = fastrand::Rng::with_seed(self.seed ^ (thread << 32));
        let mut parked: Vec<UnixStream> = Vec::new();
        while !self.is_over() && self.issued.load(Ordering::SeqCst) < self.total {
            if parked.len() > 5 {
                parked.remove(0);
            }
            if !self.between_dials.is_zero() {
                thread::sleep(self.between_dials);
            }
            let changes = self.changes();
            let choice = rng.u32(..10);
            let port = match choice {
                0..4 => HOST_ECHO_TCP,
                4..8 => HOST_ECHO_UNIX,
                _ => HOST_REFUSED,
            };
            let length = rng.usize(..30_000);
            let bytes = pattern(rng.u64(..), length);
            let stream = {
                let may_dial = self.may_dial.read().unwrap();
                (*may_dial).then(|| self.vm.dial(port))
            };
            let Some(stream) = stream else {
                parked.clear();
                wait_until(LONG, || *self.may_dial.read().unwrap() || self.is_over());
                continue;
            };
            let rude = rng.u32(..3);
            let (kind, outcome) = match (port, rude) {
                (HOST_REFUSED, _) => (
                    "guest dials a refused target",
                    stream.and_then(guest_refused),
                ),
                (_, 0) => (
                    "guest vanishes",
                    stream.map(|mut stream| {
                        let _ = stream.write_all(&bytes);
                        if length.is_multiple_of(2) {
                            parked.push(stream);
                        }
                    }),
                ),
                _ => (
                    "guest dials an echo",
                    stream.and_then(|stream| guest_echo(stream, &bytes)),
                ),
            };
            self.enter(kind, &format!("port {port}"), changes, outcome, false);
        }
    }
}

fn client_request(seed: u64, length: usize) -> [u8; 16] {
    crate::guest::request(seed, length)
}

/// Whether the peer's going is all that went wrong.
fn gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::BrokenPipe
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::NotConnected
    )
}

fn guest_echo(mut stream: UnixStream, bytes: &[u8]) -> io::Result<()> {
    let _ = stream.set_read_timeout(Some(LONG));
    let _ = stream.set_write_timeout(Some(LONG));
    stream.write_all(bytes)?;
    stream.shutdown(Shutdown::Write)?;
    let mut back = Vec::new();
    stream.read_to_end(&mut back)?;
    match back == bytes {
        true => Ok(()),
        false if bytes.starts_with(&back) => {
            let text = format!("EOF after {} of {} bytes", back.len(), bytes.len());
            Err(io::Error::new(ErrorKind::UnexpectedEof, text))
        }
        false => Err(client::wrong("another echo")),
    }
}

fn guest_refused(mut stream: UnixStream) -> io::Result<()> {
    let _ = stream.set_read_timeout(Some(LONG));
    match stream.read(&mut [0]) {
        Ok(0) => Ok(()),
        Ok(_) => Err(client::wrong("bytes from a target that refuses")),
        Err(error) if gone(&error) => Ok(()),
        Err(error) => Err(error),
    }
}
