//! The driver for real sockets: mio's poller, the kernel's sockets, the monotonic clock, and a
//! housekeeper for calls that may block. It carries out what the loop asks for, and decides
//! nothing.

use std::collections::HashMap;
#[cfg(unix)]
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant, SystemTime};

use mio::event::Source;
use mio::{Events, Interest, Poll, Token, Waker};

use crate::address::Address;
#[cfg(unix)]
use crate::address::AnyVm;
use crate::engine::connection::{Progress, ThreadsResult};
use crate::engine::relay::{Readiness, Side};
use crate::error::{Error, Operation, Result};
#[cfg(unix)]
use crate::keeper::Link;
use crate::listener::FileAccess;
use crate::listener::file::{FileState, SocketFile};
use crate::listener::nonblocking::Listener;
use crate::name::SocketName;
use crate::stream::endpoint::{Endpoint, Target};
use crate::stream::nonblocking::Stream;
use crate::sys;
use crate::{dial, listener, stream};

use super::adapter::{self, Adapters};
#[cfg(all(unix, feature = "cli"))]
use super::driver::Lent;
use super::driver::StillWanted;
use super::driver::{Driver, DriverEvent, Found, ListenerId};
use super::housekeeper::Housekeeper;
use super::notifier::{Notifier, Report};
use super::relay_threads::{RelayThreads, Reporter};
use super::resolver::Resolver;
use super::vm_look;
use crate::engine::admission::Gate;
#[cfg(unix)]
use crate::engine::end_reason::ProgramFailure;
use crate::engine::forward::Forward;
use crate::engine::health::VmIdentity;
use crate::engine::id::ConnectionId;
use crate::engine::rule::Rule;
use crate::stream::peer_names::ListenerName;

/// The token of the waker.
const WAKER: Token = Token(usize::MAX);

/// The longest timeout of the poller. kevent accepts none above 100,000,000 seconds.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// How long, at the end of the proxy, peers of pipes and of adapters may take to receive what was
/// written to them.
const LAST_DELIVERY: Duration = Duration::from_secs(5);

/// How long, at the end of the proxy, the removal of socket files may take. A file system that
/// hangs delays the end no longer.
const LAST_FILES: Duration = Duration::from_secs(1);

/// How many processes of VMs are remembered. Each has a descriptor on Linux.
#[cfg(unix)]
const PROCESSES: usize = 4;

/// How many events one call of the poller returns at most.
const EVENTS: usize = 1024;

/// How often one wait calls the poller at most, which bounds its work. The remaining events come
/// with the next wait.
const WAITS: usize = 16;

/// Returns the interest with which streams are registered: with urgent data, where the poller knows
/// it.
fn interest() -> Interest {
    let both = Interest::READABLE | Interest::WRITABLE;
    #[cfg(target_os = "linux")]
    let both = both | Interest::PRIORITY;
    both
}

/// The driver for real sockets.
#[derive(Debug)]
pub(crate) struct MioDriver {
    poll: Poll,
    events: Events,
    notifier: Arc<Notifier<DriverEvent<Stream, Listener>>>,
    resolver: Resolver,
    /// The relay threads that have not reported their end.
    relay_threads: HashMap<usize, RelayThreads>,
    adapters: Arc<Adapters>,
    /// The programs that are connected.
    #[cfg(unix)]
    programs: Arc<dial::Programs>,
    housekeeper: Housekeeper,
    #[cfg(unix)]
    keeper: Option<Link>,
    #[cfg(unix)]
    processes: sys::Processes,
    /// The processes of VMs that were looked up last.
    #[cfg(unix)]
    recent: VecDeque<sys::Process>,
}

impl MioDriver {
    pub(crate) fn new(
        housekeeper: Housekeeper,
        #[cfg(unix)] keeper: Option<Link>,
    ) -> io::Result<MioDriver> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), WAKER)?;
        let events = Events::with_capacity(EVENTS);
        Ok(MioDriver {
            poll,
            events,
            notifier: Arc::new(Notifier::new(waker)),
            resolver: Resolver::default(),
            relay_threads: HashMap::new(),
            adapters: Arc::default(),
            #[cfg(unix)]
            programs: Arc::default(),
            housekeeper,
            #[cfg(unix)]
            keeper,
            #[cfg(unix)]
            processes: sys::Processes::open(),
            #[cfg(unix)]
            recent: VecDeque::new(),
        })
    }

    /// Has the housekeeper run a job in a directory, and the loop receive its result; that is
    /// `failure` if the job panics, since the loop waits for one.
    fn ask_housekeeper(
        &self,
        directory: &Path,
        failure: DriverEvent<Stream, Listener>,
        job: impl FnOnce() -> DriverEvent<Stream, Listener> + Send + 'static,
    ) {
        let notifier = Arc::clone(&self.notifier);
        let job = move || {
            // The panic was logged.
            let result = catch_unwind(AssertUnwindSafe(job)).unwrap_or(failure);
            notifier.notify(result);
        };
        self.housekeeper.run(directory, job);
    }

    /// Returns the waker, which ends a [`wait`](Driver::wait) from another thread.
    pub(crate) fn waker(&self) -> Arc<Waker> {
        Arc::clone(self.notifier.waker())
    }

    /// Closes a listener at once, so that its clients are refused. Returns its file, which is still
    /// to be removed.
    fn close_at_once(&self, mut listener: Listener) -> Option<Arc<SocketFile>> {
        let _ = listener.unwatch(self.poll.registry());
        listener.file()
    }

    /// Prepares a stream to be closed. epoll and kqueue forget a descriptor that is closed and was
    /// never dup'ed; mio's emulations must be told, and so must epoll if a keeper has a copy.
    fn unwatch(&self, stream: &mut Stream) {
        #[cfg(unix)]
        let is_kept = stream.is_kept();
        #[cfg(not(unix))]
        let is_kept = false;
        if is_kept || !sys::KERNEL_EDGES {
            let _ = stream.deregister(self.poll.registry());
        }
    }

    /// Appends the events of the last poll. Returns how many there were.
    fn take_events(&self, events: &mut Vec<DriverEvent<Stream, Listener>>) -> usize {
        let mut count = 0;
        for event in &self.events {
            count += 1;
            if event.token() == WAKER {
                continue;
            }
            let failed = event.is_error();
            let readiness = Readiness {
                readable: event.is_readable() || event.is_read_closed() || failed,
                writable: event.is_writable() || event.is_write_closed() || failed,
                failed,
                hidden: failed || event.is_read_closed(),
                urgent: event.is_priority(),
            };
            events.push(DriverEvent::Ready {
                token: event.token().0,
                readiness,
            });
        }
        count
    }
}

impl Drop for MioDriver {
    fn drop(&mut self) {
        self.housekeeper.finish(LAST_FILES);
        self.adapters.wait(LAST_DELIVERY);
        #[cfg(unix)]
        self.programs.wait();
        // What was written to a pipe and not read yet is delivered only while its poller lives.
        #[cfg(windows)]
        sys::wait_for_delivery(LAST_DELIVERY);
    }
}

/// Returns the directory of the socket file that an address stands for.
fn directory_of(address: &Address) -> Option<PathBuf> {
    #[cfg(unix)]
    {
        let path = address.listen_path()?;
        Some(path.parent().unwrap_or(Path::new("")).to_owned())
    }
    #[cfg(not(unix))]
    {
        let _ = address;
        None
    }
}

fn bind(address: &Address, access: FileAccess) -> Found<Listener> {
    match Listener::bind(address, access) {
        Ok(listener) => Found::Bound(listener),
        Err(error) => Found::Failed(error),
    }
}

/// Returns the result of a job for a listener that has failed.
fn nothing_found(of: ListenerId) -> DriverEvent<Stream, Listener> {
    let found = Found::Nothing;
    DriverEvent::Listener { of, found }
}

/// The relay threads' view of their connection.
struct ThreadsReporter {
    token: usize,
    forward: Arc<Forward>,
    drain: Duration,
    notifier: Arc<Notifier<DriverEvent<Stream, Listener>>>,
}

impl Reporter for ThreadsReporter {
    fn count_delivered(&self, side: Side, bytes: u64) {
        self.forward.tally.count_delivered(side, bytes);
    }

    fn drain_timeout(&self, side: Side) -> Option<Duration> {
        (self.forward.is_blocking(side) || self.forward.needs_graceful_close(side))
            .then_some(self.drain)
    }

    fn report_end(&self, result: ThreadsResult) {
        let token = self.token;
        self.notifier
            .notify(DriverEvent::ThreadsEnded { token, result });
    }
}

impl Driver for MioDriver {
    type Stream = Stream;
    type Listener = Listener;

    fn bind(address: &Address, access: FileAccess) -> Result<Listener> {
        Listener::bind(address, access)
    }

    fn take_passed(listener: listener::Listener) -> Listener {
        listener.into_nonblocking()
    }

    fn bound(listener: &Listener, asked: &Address) -> Address {
        listener.bound(asked)
    }

    fn note(listener: &Listener) -> Option<&'static str> {
        listener.note()
    }

    fn clock() -> Instant {
        Instant::now()
    }

    fn receive<T>(
        answers: &Receiver<T>,
        patience: Duration,
    ) -> std::result::Result<T, RecvTimeoutError> {
        answers.recv_timeout(patience)
    }

    fn descriptor_limit() -> Option<u64> {
        sys::descriptor_limit()
    }

    fn now(&self) -> Instant {
        MioDriver::clock()
    }

    fn wall_time(&self) -> SystemTime {
        SystemTime::now()
    }

    fn wait(
        &mut self,
        events: &mut Vec<DriverEvent<Stream, Listener>>,
        timeout: Option<Duration>,
    ) -> io::Result<()> {
        // As with the inbox, reports may be there although their wake-up was lost.
        let has_reports = self.notifier.has_reports();
        let timeout = match timeout {
            _ if has_reports => Some(Duration::ZERO),
            timeout => timeout.map(|timeout| timeout.min(LONGEST_WAIT)),
        };
        let mut timeout = timeout;
        for _ in 0..WAITS {
            match self.poll.poll(&mut self.events, timeout) {
                // SIGCONT interrupts, and what has come meanwhile was not fetched.
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
                Ok(()) if self.take_events(events) < EVENTS => break,
                Ok(()) => {}
            }
            timeout = Some(Duration::ZERO);
        }
        for report in self.notifier.take_reports() {
            match report {
                Report::Resolved(host, found) => {
                    let resolved = self.resolver.take_addresses(&host, &found).into_iter();
                    events.extend(
                        resolved
                            .map(|(token, addresses)| DriverEvent::Resolved { token, addresses }),
                    );
                }
                Report::Event(event) => {
                    if let DriverEvent::ThreadsEnded { token, .. } = &event {
                        self.relay_threads.remove(token);
                    }
                    events.push(event);
                }
            }
        }
        Ok(())
    }

    fn watch_listener(
        &mut self,
        listener: &mut Listener,
        token: usize,
        rule: &Rule,
    ) -> io::Result<()> {
        let notifier = Arc::clone(&self.notifier);
        let notify = move || {
            let readiness = Readiness {
                readable: true,
                ..Readiness::default()
            };
            notifier.notify(DriverEvent::Ready { token, readiness });
        };
        listener.watch(self.poll.registry(), Token(token), notify)?;
        #[cfg(unix)]
        if let Some(keeper) = &self.keeper {
            listener.keep(keeper, &rule.listen);
        }
        #[cfg(not(unix))]
        let _ = rule;
        Ok(())
    }

    #[cfg(all(unix, feature = "cli"))]
    fn keep_listener(&mut self, listener: &mut Listener, rule: &Rule) {
        if let Some(keeper) = self.keeper.as_ref().filter(|_| !listener.is_kept()) {
            listener.keep(keeper, &rule.listen);
        }
    }

    fn accept(&mut self, listener: &Listener) -> io::Result<(Stream, SocketName)> {
        let accepted = listener.accept();
        #[cfg(unix)]
        let accepted = accepted.map(|(mut stream, peer)| {
            if let Some(keeper) = self.keeper.as_ref().filter(|_| listener.is_kept()) {
                stream.keep(keeper);
            }
            (stream, peer)
        });
        accepted
    }

    fn check_file(&mut self, listener: &Listener, of: ListenerId, rule: &Rule) -> bool {
        let Some(file) = listener.file() else {
            return false;
        };
        let (address, access) = (rule.listen.clone(), rule.access());
        let directory = file.directory().to_owned();
        self.ask_housekeeper(&directory, nothing_found(of), move || {
            let found = match file.state() {
                FileState::Ours => Found::Ours,
                FileState::Taken => Found::Taken,
                FileState::Missing => bind(&address, access),
            };
            DriverEvent::Listener { of, found }
        });
        true
    }

    fn bind_again(&mut self, old: Option<Listener>, of: ListenerId, rule: &Rule) {
        let file = old.and_then(|old| self.close_at_once(old));
        let (address, access) = (rule.listen.clone(), rule.access());
        let directory = directory_of(&address);
        let bind_again = move || {
            drop(file);
            let found = bind(&address, access);
            DriverEvent::Listener { of, found }
        };
        match directory {
            Some(directory) => self.ask_housekeeper(&directory, nothing_found(of), bind_again),
            // Bound at once, since clients are refused until then.
            None => self.notifier.notify(bind_again()),
        }
    }

    fn set_access(
        &mut self,
        listener: &Listener,
        access: FileAccess,
        wanted: StillWanted,
        done: Sender<io::Result<()>>,
    ) {
        let Some(file) = listener.file() else {
            // The thread that asked may have given up.
            return drop(done.send(Ok(())));
        };
        let directory = file.directory().to_owned();
        self.housekeeper.run(&directory, move || {
            if wanted.begin() {
                let _ = done.send(file.set_access(access));
            }
        });
    }

    fn close_listener_then(&mut self, listener: Listener, done: Sender<()>) {
        #[cfg(unix)]
        listener.leave_file();
        let file = self.close_at_once(listener);
        let directory = file.as_ref().map(|file| file.directory().to_owned());
        let remove = move || {
            drop(file);
            // The thread that asked may have given up, or none has.
            let _ = done.send(());
        };
        match directory {
            Some(directory) => self.housekeeper.run(&directory, remove),
            None => remove(),
        }
    }

    #[cfg(all(unix, feature = "cli"))]
    fn lend_listener(&self, listener: &Listener) -> io::Result<Lent> {
        let sockets = listener.sockets().into_iter();
        Ok(Lent {
            sockets: sockets
                .map(|it| it.try_clone_to_owned())
                .collect::<io::Result<_>>()?,
            file: listener.file().map(|file| file.identity()),
        })
    }

    #[cfg(all(unix, feature = "cli"))]
    fn give_listener(&mut self, mut listener: Listener) {
        listener.forget();
        // The close unregisters it: the socket lives on in the other process, and would go on to
        // report clients here.
        if let Some(file) = self.close_at_once(listener) {
            file.leave();
        }
    }

    /// Connects, and looks the path up again for the VM's identity: connect(2) takes a path only.
    /// The file system may block both; where it is known to hang, the gate admits no dial.
    fn connect(
        &mut self,
        endpoint: &Endpoint,
        patience: Duration,
    ) -> io::Result<(Stream, Option<VmIdentity>)> {
        #[cfg(unix)]
        let stream = Stream::connect_kept(endpoint, patience, self.keeper.as_ref())?;
        #[cfg(not(unix))]
        let stream = Stream::connect(endpoint, patience)?;
        Ok((stream, vm_look::identity_behind(endpoint)))
    }

    fn explain(&mut self, token: usize, address: &Address, error: io::Error) -> Option<Error> {
        if !dial::explanation_reads_files(address, &error) {
            return Some(dial::explain(address, error));
        }
        let directory = match address {
            Address::Hyperkit(hyperkit) => hyperkit.vm.state_dir.clone(),
            other => directory_of(other).unwrap_or_default(),
        };
        let address = address.clone();
        let unexplained = Error::new(Operation::Connect, &address, error.kind().into());
        let failure = DriverEvent::Explained {
            token,
            error: unexplained,
        };
        self.ask_housekeeper(&directory, failure, move || {
            let error = dial::explain(&address, error);
            DriverEvent::Explained { token, error }
        });
        None
    }

    fn name_of_listener(&mut self, listener: &Listener) -> Option<ListenerName> {
        match listener.bound_name() {
            Some(name) => Some(ListenerName::Unix(name)),
            None => ListenerName::from_socket(listener.local_addr().ok()?),
        }
    }

    fn watch(&mut self, stream: &mut Stream, token: usize) -> io::Result<()> {
        self.poll
            .registry()
            .register(stream, Token(token), interest())
    }

    fn set_keepalive(&mut self, stream: &Stream, time: Option<Duration>) {
        stream.set_keepalive(time);
    }

    fn close(&mut self, mut stream: Stream) {
        self.unwatch(&mut stream);
        #[cfg(unix)]
        stream.end_kept();
        stream.close();
    }

    fn reset(&mut self, mut stream: Stream) {
        self.unwatch(&mut stream);
        #[cfg(unix)]
        stream.end_kept();
        stream.reset();
    }

    fn leave(&mut self, mut stream: Stream) {
        self.unwatch(&mut stream);
        #[cfg(unix)]
        stream.leave();
    }

    fn resolve(&mut self, token: usize, host: &str, port: u16) {
        self.resolver.resolve(token, host, port, &self.notifier);
    }

    #[cfg(unix)]
    fn has_peer_ended(&mut self, stream: &Stream) -> bool {
        let Some(id) = stream.peer_process().and_then(|it| it.id) else {
            return false;
        };
        let index = self.recent.iter().position(|it| it.id == id);
        let process = match index.and_then(|index| self.recent.remove(index)) {
            Some(process) => process,
            None => self.processes.get(id),
        };
        let is_ending = process.is_ending();
        // A process that has ended is not remembered: its number may be used again.
        if !is_ending {
            self.recent.push_front(process);
            self.recent.truncate(PROCESSES);
        }
        is_ending
    }

    #[cfg(not(unix))]
    fn has_peer_ended(&mut self, _: &Stream) -> bool {
        false
    }

    fn release_unused(&mut self) {
        #[cfg(unix)]
        self.recent.clear();
    }

    fn look_at_vm(&mut self, gate: &Arc<Gate>) {
        let gate = Arc::clone(gate);
        let directory = gate.vm().directory().to_owned();
        #[cfg(unix)]
        let keeper = self.keeper.as_ref().map(Link::view);
        let failure = DriverEvent::LookFailed {
            gate: Arc::clone(&gate),
        };
        self.ask_housekeeper(&directory, failure, move || {
            #[cfg(unix)]
            if let (AnyVm::Hyperkit(vm), Some(keeper)) = (gate.vm(), keeper) {
                keeper.look_after(&vm.state_dir);
            }
            let look = vm_look::look_at(gate.vm(), gate.process());
            DriverEvent::VmSeen { gate, look }
        });
    }

    #[cfg_attr(not(unix), allow(unused_variables))]
    fn dial(
        &mut self,
        token: usize,
        connection: Option<ConnectionId>,
        forward: &Arc<Forward>,
        timeout: Duration,
    ) {
        let notifier = Arc::clone(&self.notifier);
        let rule = Arc::clone(&forward.rule);
        #[cfg(unix)]
        let programs = Arc::clone(&self.programs);
        #[cfg(unix)]
        let tell_end = {
            let (notifier, forward) = (Arc::clone(&self.notifier), Arc::clone(forward));
            move |end| {
                if let Some(connection) = connection {
                    notifier.notify(DriverEvent::ProgramEnded {
                        token,
                        connection,
                        forward,
                        failure: failure_of(end),
                    });
                }
            }
        };
        let dial = move || {
            let target = &rule.connect;
            let stream = match Target::of(target) {
                #[cfg(unix)]
                Target::OnThread => dial::on_thread(target, &programs, tell_end),
                _ => stream::Stream::connect_timeout(target, timeout).map(Stream::Blocking),
            };
            notifier.notify(DriverEvent::Dialled { token, stream });
        };
        let thread = std::thread::Builder::new().name("hvsock-dial".into());
        if let Err(e) = thread.spawn(dial) {
            let stream = Err(Error::new(Operation::Connect, &forward.rule.connect, e));
            self.notifier.notify(DriverEvent::Dialled { token, stream });
        }
    }

    fn start_threads(
        &mut self,
        token: usize,
        streams: [Stream; 2],
        forward: &Arc<Forward>,
        drain: Duration,
    ) -> io::Result<()> {
        let [mut client, mut server] = streams;
        for stream in [&mut client, &mut server] {
            // A stream that was never registered returns an error here.
            let _ = stream.deregister(self.poll.registry());
        }
        let client = stream::Stream::from_nonblocking(client, &forward.rule.listen);
        let server = stream::Stream::from_nonblocking(server, &forward.rule.connect);
        let (client, server) = match (client, server) {
            (Ok(client), Ok(server)) => (client, server),
            (Ok(whole), Err(e)) | (Err(e), Ok(whole)) => {
                whole.abort();
                return Err(e);
            }
            (Err(e), Err(_)) => return Err(e),
        };
        let order = ThreadsReporter {
            token,
            forward: Arc::clone(forward),
            drain,
            notifier: Arc::clone(&self.notifier),
        };
        let threads = RelayThreads::start([client, server], order)?;
        self.relay_threads.insert(token, threads);
        Ok(())
    }

    fn insert_adapter(
        &mut self,
        side: Side,
        stream: &mut Stream,
        drain: Duration,
    ) -> io::Result<()> {
        adapter::insert(side, stream, drain, &self.adapters)
    }

    fn threads_progress(&self, token: usize) -> Option<Progress> {
        self.relay_threads.get(&token).map(RelayThreads::progress)
    }

    fn cut_threads(&mut self, token: usize) {
        if let Some(threads) = self.relay_threads.get(&token) {
            threads.cut();
        }
    }
}

/// Returns how a program has failed, if it is known to have.
#[cfg(unix)]
fn failure_of(end: dial::ProgramEnd) -> Option<ProgramFailure> {
    use std::os::unix::process::ExitStatusExt;
    let dial::ProgramEnd::Ended(Ok(status)) = end else {
        return None;
    };
    match (status.code(), status.signal()) {
        (Some(0), _) | (None, None) => None,
        (Some(code), _) => Some(ProgramFailure::Status(code)),
        (None, Some(signal)) => Some(ProgramFailure::Signal(signal)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::address::HyperkitVm;
    use crate::engine::admission::GateLimits;

    #[test]
    fn a_look_that_panics_has_a_result() {
        let housekeeper = Housekeeper::start().unwrap();
        let mut driver = MioDriver::new(
            housekeeper,
            #[cfg(unix)]
            None,
        )
        .unwrap();
        let limits = GateLimits {
            live: 1,
            unanswered: 1,
        };
        let gate = Arc::new(Gate::new(limits, HyperkitVm::new("/nowhere").into()));
        driver.ask_housekeeper(Path::new("/"), DriverEvent::LookFailed { gate }, || {
            panic!("as a test")
        });
        let mut events = Vec::new();
        let end = Instant::now() + Duration::from_secs(20);
        while events.is_empty() {
            assert!(Instant::now() < end, "no result came");
            let soon = Duration::from_millis(100);
            driver.wait(&mut events, Some(soon)).unwrap();
        }
        assert!(matches!(events[..], [DriverEvent::LookFailed { .. }]));
    }
}
