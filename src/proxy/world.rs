//! The seam between the loop and the world (invariant 9): readiness, results of socket calls, and time come through
//! [`World`] and nowhere else, so that a whole worker can run against simulated sockets and a simulated clock.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mio::event::Source;
use mio::{Events, Interest, Poll, Token, Waker};

use crate::address::{Address, HyperkitVm};
use crate::error::Result;
use crate::listener::{FileState, Listener, Peer};
use crate::relay::{Readiness, Socket};
use crate::stream::{Endpoint, Stream};
use crate::sys::{self, Identity};

/// What the loop learns in one wait.
#[derive(Debug)]
pub(crate) enum Event {
    /// The socket registered under this token became ready.
    Ready { token: usize, readiness: Readiness },
    /// The name asked for with this token has these addresses.
    Resolved {
        token: usize,
        addresses: io::Result<Vec<SocketAddr>>,
    },
}

/// Everything a worker asks of its surroundings.
pub(crate) trait World {
    type Stream: Socket;
    type Listener;

    fn now(&self) -> Instant;
    /// Waits for events, at most `timeout`, and appends them.
    fn wait(&mut self, events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<()>;

    fn listen(&mut self, address: &Address, mode: u32) -> Result<Self::Listener>;
    fn watch_listener(&mut self, listener: &mut Self::Listener, token: usize) -> io::Result<()>;
    fn accept(&mut self, listener: &Self::Listener) -> io::Result<(Self::Stream, Peer)>;
    fn file_state(&mut self, listener: &Self::Listener) -> FileState;
    fn close_listener(&mut self, listener: Self::Listener);

    fn connect(&mut self, endpoint: &Endpoint) -> io::Result<Self::Stream>;
    /// Whether a connect that was begun is done.
    fn connected(&mut self, stream: &Self::Stream) -> io::Result<bool>;
    /// Registers a stream, readable and writable, once.
    fn watch(&mut self, stream: &mut Self::Stream, token: usize) -> io::Result<()>;
    /// Takes nothing more from the peer.
    fn shutdown_read(&mut self, stream: &Self::Stream);
    fn close(&mut self, stream: Self::Stream);
    /// Bytes written that a reset now would take away from the peer.
    fn unacknowledged(&mut self, stream: &Self::Stream) -> usize;
    /// Closes so that the peer reads a reset, where the family can.
    fn reset(&mut self, stream: Self::Stream);

    /// Asks for the addresses of `host`; [`Event::Resolved`] answers.
    fn resolve(&mut self, token: usize, host: &str, port: u16);
    /// Which VM stands behind the state directory now; `None` if none does.
    fn vm_identity(&mut self, vm: &HyperkitVm) -> Option<Identity>;
}

/// Token of the waker.
const WAKER: Token = Token(usize::MAX);

/// kevent takes no timeout above 100,000,000 seconds.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// How many events one wait takes.
const EVENTS: usize = 1024;

type Answer = (usize, io::Result<Vec<SocketAddr>>);

/// The real world: mio, the kernel's sockets, the monotonic clock.
#[derive(Debug)]
pub(crate) struct MioWorld {
    poll: Poll,
    events: Events,
    waker: Arc<Waker>,
    resolver: Option<Sender<(usize, String, u16)>>,
    answers: Arc<Mutex<Vec<Answer>>>,
}

impl MioWorld {
    pub(crate) fn new() -> io::Result<MioWorld> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
        let events = Events::with_capacity(EVENTS);
        Ok(MioWorld {
            poll,
            events,
            waker,
            resolver: None,
            answers: Arc::default(),
        })
    }

    /// Ends a [`wait`](World::wait) from another thread.
    pub(crate) fn waker(&self) -> Arc<Waker> {
        Arc::clone(&self.waker)
    }

    /// Starts the thread that asks for names: `getaddrinfo` blocks, and has no other form.
    fn start_resolver(&self) -> io::Result<Sender<(usize, String, u16)>> {
        let (questions, inbox): (_, Receiver<(usize, String, u16)>) = channel();
        let (answers, waker) = (Arc::clone(&self.answers), self.waker());
        std::thread::Builder::new()
            .name("hvsock-resolver".into())
            .spawn(move || {
                for (token, host, port) in inbox {
                    let found = (host.as_str(), port)
                        .to_socket_addrs()
                        .map(Iterator::collect);
                    answers
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push((token, found));
                    // The loop is gone if it can't be woken.
                    if waker.wake().is_err() {
                        return;
                    }
                }
            })?;
        Ok(questions)
    }
}

impl World for MioWorld {
    type Stream = Stream;
    type Listener = Listener;

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn wait(&mut self, events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<()> {
        // As with the inbox: an answer may be there although its wake-up was lost.
        let answered = self.resolver.is_some()
            && !self
                .answers
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .is_empty();
        let timeout = match timeout {
            _ if answered => Some(Duration::ZERO),
            timeout => timeout.map(|timeout| timeout.min(LONGEST_WAIT)),
        };
        match self.poll.poll(&mut self.events, timeout) {
            Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e),
            _ => {}
        }
        for event in &self.events {
            if event.token() == WAKER {
                continue;
            }
            let failed = event.is_error();
            let readiness = Readiness {
                readable: event.is_readable() || event.is_read_closed() || failed,
                writable: event.is_writable() || event.is_write_closed() || failed,
                failed,
            };
            events.push(Event::Ready {
                token: event.token().0,
                readiness,
            });
        }
        if self.resolver.is_some() {
            let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
            let resolved = |(token, addresses)| Event::Resolved { token, addresses };
            events.extend(answers.drain(..).map(resolved));
        }
        Ok(())
    }

    fn listen(&mut self, address: &Address, mode: u32) -> Result<Listener> {
        Listener::bind(address, mode)
    }

    fn watch_listener(&mut self, listener: &mut Listener, token: usize) -> io::Result<()> {
        self.poll
            .registry()
            .register(listener, Token(token), Interest::READABLE)
    }

    fn accept(&mut self, listener: &Listener) -> io::Result<(Stream, Peer)> {
        listener.accept()
    }

    fn file_state(&mut self, listener: &Listener) -> FileState {
        listener.file_state()
    }

    fn close_listener(&mut self, mut listener: Listener) {
        let _ = listener.deregister(self.poll.registry());
    }

    fn connect(&mut self, endpoint: &Endpoint) -> io::Result<Stream> {
        Stream::connect(endpoint)
    }

    fn connected(&mut self, stream: &Stream) -> io::Result<bool> {
        stream.connected()
    }

    fn watch(&mut self, stream: &mut Stream, token: usize) -> io::Result<()> {
        stream.set_nodelay();
        self.poll.registry().register(
            stream,
            Token(token),
            Interest::READABLE | Interest::WRITABLE,
        )
    }

    fn shutdown_read(&mut self, stream: &Stream) {
        stream.shutdown_read();
    }

    fn unacknowledged(&mut self, stream: &Stream) -> usize {
        stream.unacknowledged()
    }

    fn close(&mut self, mut stream: Stream) {
        // epoll and kqueue forget a descriptor that is closed and was never dup'ed; mio's emulations must be told.
        if !sys::KERNEL_EDGES {
            let _ = stream.deregister(self.poll.registry());
        }
    }

    fn reset(&mut self, mut stream: Stream) {
        if !sys::KERNEL_EDGES {
            let _ = stream.deregister(self.poll.registry());
        }
        stream.reset();
    }

    fn resolve(&mut self, token: usize, host: &str, port: u16) {
        if self.resolver.is_none() {
            match self.start_resolver() {
                Ok(resolver) => self.resolver = Some(resolver),
                Err(e) => return self.answer(token, Err(e)),
            }
        }
        if let Some(resolver) = &self.resolver
            && resolver.send((token, host.to_owned(), port)).is_err()
        {
            self.answer(
                token,
                Err(io::Error::other("the resolver's thread has ended")),
            );
        }
    }

    fn vm_identity(&mut self, vm: &HyperkitVm) -> Option<Identity> {
        // A VM with `guest_forwards` alone has no `connect` socket.
        let of = |path: PathBuf| Identity::of(&path).ok();
        of(vm.connect_path()).or_else(|| of(vm.pid_path()))
    }
}

impl MioWorld {
    fn answer(&self, token: usize, answer: io::Result<Vec<SocketAddr>>) {
        self.answers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((token, answer));
        let _ = self.waker.wake();
    }
}
