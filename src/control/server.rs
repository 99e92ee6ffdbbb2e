//! The sockets of the control interface: who is let in, and how long they may take.
//!
//! One thread takes clients, and each client has a short-lived one: a handful of them, now and then. None can hold up another for long: who keeps us
//! waiting while all places are taken is put out.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mio::{Events, Poll, Token, Waker};
use tracing::{error, warn};

use crate::address::{Address, UnixAddress};
use crate::error::{Error, Operation, Result};
use crate::listener::DEFAULT_MODE;
use crate::listener::lasting::FileWatch;
use crate::listener::nonblocking::Listener;
use crate::stream::Stream;
use crate::sys;

use super::api::Api;
use super::http::{self, NoRequest};
use super::place;

/// Clients of one socket that are served at a time; more wait in its backlog.
const MOST_CLIENTS: usize = 16;

/// How long we wait for a client, to send its request or to take its answer, while others wait for its place.
const CROWDED: Duration = Duration::from_millis(250);

/// How long a request may take to come, and an answer to go.
const REQUEST: Duration = Duration::from_secs(5);

/// How long, and for how many bytes, it is read on what a client sends behind its request: closed with bytes unread, a connection is
/// reset, and the client may never see its answer.
const LINGER: Duration = Duration::from_millis(500);
const MOST_LINGERING: u64 = 1024 * 1024;

/// How long answers under way may take when the server ends.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// When to look again at clients that wait for a place, or at a listener that could not accept.
const AGAIN: Duration = Duration::from_millis(50);

/// How often the socket's file is looked after.
const WATCH: Duration = Duration::from_secs(1);

const WAKE: Token = Token(usize::MAX);

/// What is served on a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Service {
    /// Everything, to this user.
    Control,
    /// The metrics alone, to whoever can connect.
    Metrics,
}

/// A client that is being served.
#[derive(Debug)]
struct Client {
    stream: Stream,
    since: Instant,
    phase: Mutex<Phase>,
}

/// How far a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Its request is awaited.
    Asking,
    /// It waits for us.
    Waiting,
    /// It is to take its answer and go.
    Hearing,
}

impl Client {
    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put_out(&self) {
        // It fails if the client has gone.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// The clients of one socket.
#[derive(Debug, Default)]
struct Crowd {
    clients: Mutex<Vec<Arc<Client>>>,
    left: Condvar,
}

impl Crowd {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Client>>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_room(&self) -> bool {
        self.lock().len() < MOST_CLIENTS
    }

    /// Puts those out who keep us waiting.
    fn make_room(&self) {
        for client in self.lock().iter() {
            if *client.phase() != Phase::Waiting && client.since.elapsed() >= CROWDED {
                client.put_out();
            }
        }
    }

    /// Puts out who hasn't asked yet, gives the others a moment for their answers, and then puts out all.
    fn end(&self) {
        for client in self.lock().iter() {
            if *client.phase() == Phase::Asking {
                client.put_out();
            }
        }
        let wait = self
            .left
            .wait_timeout_while(self.lock(), LAST_ANSWERS, |clients| !clients.is_empty());
        let (clients, _) = wait.unwrap_or_else(PoisonError::into_inner);
        for client in clients.iter() {
            client.put_out();
        }
    }
}

/// Has a client leave its crowd, whatever happens to its thread.
struct Leaving<'a> {
    crowd: &'a Crowd,
    client: &'a Arc<Client>,
    waker: &'a Waker,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.crowd.lock().retain(|it| !Arc::ptr_eq(it, self.client));
        self.crowd.left.notify_all();
        // It fails only when the server is gone.
        let _ = self.waker.wake();
    }
}

/// A listening socket, and who is being served there.
#[derive(Debug)]
struct Door {
    service: Service,
    listener: Listener,
    /// What was asked for.
    address: Address,
    /// Somebody may wait there.
    ready: bool,
    /// Not before this time.
    paused: Option<Instant>,
    watch: FileWatch,
    /// A stranger, or an error, was told of.
    complained: bool,
    crowd: Arc<Crowd>,
}

/// Bound sockets that nobody is served on yet: who connects waits.
#[derive(Debug)]
pub(super) struct Doors {
    doors: Vec<Door>,
    poll: Poll,
    waker: Arc<Waker>,
}

fn fail(cause: io::Error) -> Error {
    Error::new(Operation::Run, "the control socket", cause)
}

impl Doors {
    pub(super) fn new() -> Result<Doors> {
        let poll = Poll::new().map_err(fail)?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE).map_err(fail)?);
        Ok(Doors {
            doors: Vec::new(),
            poll,
            waker,
        })
    }

    /// Opens another one.
    ///
    /// # Errors
    /// As those of [`Listener::bind`].
    pub(super) fn open(&mut self, service: Service, address: &Address) -> Result<()> {
        let mut listener = Listener::bind(address, DEFAULT_MODE)?;
        let token = Token(self.doors.len());
        let watched = listener.watch(self.poll.registry(), token, || ());
        watched.map_err(fail)?;
        self.doors.push(Door {
            service,
            listener,
            address: address.clone(),
            ready: true,
            paused: None,
            watch: FileWatch::default(),
            complained: false,
            crowd: Arc::default(),
        });
        Ok(())
    }

    /// Where they are, with the ports that were chosen.
    pub(super) fn addresses(&self) -> Vec<Address> {
        let bound = |door: &Door| door.listener.bound(&door.address);
        self.doors.iter().map(bound).collect()
    }

    /// Begins to serve.
    pub(super) fn serve(self, api: Api) -> Result<Server> {
        let stop = Arc::new(AtomicBool::new(false));
        let waker = Arc::clone(&self.waker);
        let ended = Arc::clone(&stop);
        let run = move || self.run(&Arc::new(api), &ended);
        let thread = thread::Builder::new().name("hvsock-control".to_owned());
        Ok(Server {
            stop,
            waker,
            thread: Some(thread.spawn(run).map_err(fail)?),
        })
    }

    fn run(mut self, api: &Arc<Api>, stop: &AtomicBool) {
        let mut events = Events::with_capacity(8);
        while !stop.load(Ordering::Acquire) {
            if let Err(e) = self.poll.poll(&mut events, self.patience())
                && e.kind() != io::ErrorKind::Interrupted
            {
                error!("the control socket serves nobody any more: {e}");
                break;
            }
            for event in &events {
                if let Some(door) = self.doors.get_mut(event.token().0) {
                    door.ready = true;
                }
            }
            for index in 0..self.doors.len() {
                self.look_after(index, api);
                self.doors[index].take_clients(api, &self.waker);
            }
        }
        // First the listeners and their files: whoever sees none may take their place.
        let crowds: Vec<_> = self.doors.drain(..).map(|door| door.crowd).collect();
        for crowd in crowds {
            crowd.end();
        }
    }

    /// How long nothing need be done without an event.
    fn patience(&self) -> Option<Duration> {
        let wants = |door: &Door| match (door.ready, &door.address) {
            (true, _) => Some(AGAIN),
            (false, Address::Tcp(_)) => None,
            (false, _) => Some(WATCH),
        };
        self.doors.iter().filter_map(wants).min()
    }

    /// Makes a socket's file again that someone removed.
    fn look_after(&mut self, index: usize, api: &Arc<Api>) {
        let door = &mut self.doors[index];
        let state = || door.listener.file_state();
        let again = || {
            if let (Service::Control, Address::Unix(UnixAddress::Path(path))) =
                (door.service, &door.address)
            {
                // Its directory may be gone with it.
                place::prepare(path)?;
            }
            Listener::bind(&door.address, DEFAULT_MODE)
        };
        let Some(mut made) = door.watch.look(&door.address, state, again) else {
            return;
        };
        // Who came before the file was removed.
        door.ready = true;
        door.take_clients(api, &self.waker);
        let registry = self.poll.registry();
        // It is closed in a moment.
        let _ = door.listener.unwatch(registry);
        if let Err(e) = made.watch(registry, Token(index), || ()) {
            error!("cannot watch {}: {e}", door.address);
        }
        door.listener = made;
        door.ready = true;
    }
}

impl Door {
    fn take_clients(&mut self, api: &Arc<Api>, waker: &Arc<Waker>) {
        if self.paused.is_some_and(|until| Instant::now() < until) {
            return;
        }
        while self.ready {
            if !self.crowd.has_room() {
                return self.crowd.make_room();
            }
            let accepted = self.listener.accept();
            let stream = accepted.and_then(|(it, _)| Stream::from_nonblocking(it, &self.address));
            match stream {
                Ok(stream) => self.let_in(stream, api, waker),
                Err(e) => match e.kind() {
                    io::ErrorKind::WouldBlock => self.ready = false,
                    // The client left before it was accepted (InvalidInput is mio's word for it on macOS).
                    io::ErrorKind::Interrupted
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::InvalidInput => {}
                    _ => {
                        self.paused = Some(Instant::now() + AGAIN);
                        self.complain(format_args!("{e}; clients wait"));
                        return;
                    }
                },
            }
        }
    }

    /// Says something once.
    fn complain(&mut self, what: impl std::fmt::Display) {
        if !std::mem::replace(&mut self.complained, true) {
            warn!("{}: {what}", self.address);
        }
    }

    fn let_in(&mut self, stream: Stream, api: &Arc<Api>, waker: &Arc<Waker>) {
        if self.service == Service::Control
            && let Err(why) = check_connector(&stream)
        {
            return self.complain(format_args!("refused a client: {why}"));
        }
        let client = Arc::new(Client {
            stream,
            since: Instant::now(),
            phase: Mutex::new(Phase::Asking),
        });
        self.crowd.lock().push(Arc::clone(&client));
        let service = self.service;
        let (crowd, api, waker) = (self.crowd.clone(), Arc::clone(api), Arc::clone(waker));
        let spawned = {
            let client = Arc::clone(&client);
            let thread = thread::Builder::new().name("hvsock-client".to_owned());
            thread.spawn(move || {
                let leaving = Leaving {
                    crowd: &crowd,
                    client: &client,
                    waker: &waker,
                };
                // Who broke off needs no answer.
                let _ = serve(leaving.client, service, &api);
            })
        };
        if let Err(e) = spawned {
            self.crowd.lock().retain(|it| !Arc::ptr_eq(it, &client));
            self.complain(format_args!("no thread for a client: {e}"));
        }
    }
}

/// Refuses whom the kernel lets in though he must not be: another user (root), and whoever comes by way of this process,
/// which is a client of some forward: a guest.
fn check_connector(stream: &Stream) -> std::result::Result<(), String> {
    use std::os::fd::AsFd;
    let who = sys::connector(stream.as_fd())
        .map_err(|e| format!("the system doesn't say who it is: {e}"))?;
    if who.user != sys::user_id() {
        return Err(format!("it is user {}, and not ours", who.user));
    }
    if who.process == Some(std::process::id()) {
        return Err("it came through one of our own forwards".to_owned());
    }
    Ok(())
}

fn serve(client: &Client, service: Service, api: &Api) -> io::Result<()> {
    let mut stream = Timed {
        stream: &client.stream,
        until: client.since + REQUEST,
    };
    let response = match http::read(&mut stream) {
        Ok(request) => {
            *client.phase() = Phase::Waiting;
            match service {
                Service::Control => api.answer(&request),
                Service::Metrics => api.answer_metrics(&request),
            }
        }
        Err(NoRequest::Gone) => return Ok(()),
        Err(NoRequest::Refused(problem)) => problem.response(),
    };
    *client.phase() = Phase::Hearing;
    stream.until = Instant::now() + REQUEST;
    http::write(&mut stream, &response)?;
    client.stream.shutdown(Shutdown::Write)?;
    stream.until = Instant::now() + LINGER;
    io::copy(&mut stream.take(MOST_LINGERING), &mut io::sink())?;
    Ok(())
}

/// A stream with a time by which all must be done.
struct Timed<'a> {
    stream: &'a Stream,
    until: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.until.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(Some(left)),
        }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        let mut stream = self.stream;
        stream.read(buffer)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        let mut stream = self.stream;
        stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A server that runs until it is dropped.
#[derive(Debug)]
pub(super) struct Server {
    stop: Arc<AtomicBool>,
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // It fails only when the thread has ended, and nobody need be woken.
        let _ = self.waker.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
