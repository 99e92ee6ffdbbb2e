//! The simulated world of one worker: what the loop asks is answered by the [`World`].

use std::cell::RefCell;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant, SystemTime};

use crate::address::{Address, Host, TcpAddress, UnixAddress};
use crate::engine::admission::Gate;
use crate::engine::connection::{ConnectionSocket, Progress, transitions};
use crate::engine::forward::Forward;
use crate::engine::health::VmIdentity;
use crate::engine::id::ConnectionId;
use crate::engine::relay::Side;
use crate::engine::rule::Rule;
use crate::error::{Error, Operation, Result};
use crate::hyperkit;
use crate::listener::{self, FileAccess};
use crate::name::{PeerProcess, SocketName};
#[cfg(feature = "cli")]
use crate::proxy::driver::Lent;
use crate::proxy::driver::{Driver, DriverEvent, Found, ListenerId, StillWanted};
use crate::stream::endpoint::Endpoint;
use crate::stream::peer_names::ListenerName;
use crate::stream::socket::{Pipe, Socket};

use super::kernel::{ListenerKey, Owner, Place, SocketId};
use super::world::World;

/// Nothing of the simulated kernel goes through pipes.
#[derive(Debug)]
pub(super) enum NoPipe {}

impl Pipe for NoPipe {
    fn new() -> Option<NoPipe> {
        None
    }
}

/// The world of the sockets of this module.
pub(super) type SimWorld = World<SimStream, SimListener>;

/// A socket of the proxy. Dropped, it is closed.
#[derive(Debug)]
pub(super) struct SimStream {
    world: Rc<SimWorld>,
    pub(super) id: SocketId,
}

impl Drop for SimStream {
    fn drop(&mut self) {
        self.world.kernel().close(self.id);
    }
}

impl Socket for SimStream {
    type Pipe = NoPipe;

    const SHORT_WRITE_BLOCKS: bool = true;

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.world.kernel().read(self.id, buffer)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.world.kernel().write(self.id, bytes)
    }

    fn short_read_blocks(&self) -> bool {
        true
    }

    fn clock(&self) -> Instant {
        self.world.instant()
    }

    fn splice_in(&mut self, pipe: &mut NoPipe) -> io::Result<usize> {
        match *pipe {}
    }

    fn splice_out(&mut self, pipe: &mut NoPipe, _: usize) -> io::Result<usize> {
        match *pipe {}
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        self.world.kernel().shutdown_write(self.id)
    }

    fn peer_took_all(&self) -> bool {
        self.world.kernel().peer_took_all(self.id)
    }
}

impl ConnectionSocket for SimStream {
    fn connected(&self) -> io::Result<bool> {
        self.world.kernel().connected(self.id)
    }

    fn shutdown_read(&self) {
        self.world.kernel().shutdown_read(self.id);
    }

    fn unacknowledged(&self) -> usize {
        self.world.kernel().unacknowledged(self.id)
    }

    fn local_name(&self) -> Option<SocketName> {
        Some(self.world.kernel().name_of(self.id))
    }

    fn unix_peer_name(&self) -> Option<Vec<u8>> {
        let kernel = self.world.kernel();
        let path = kernel.listener_path(self.id)?;
        Some(path.as_os_str().as_encoded_bytes().to_vec())
    }

    fn is_guarded(&self) -> bool {
        false
    }

    fn peer_process(&self) -> Option<PeerProcess> {
        None
    }

    fn unread(&self) -> Option<u64> {
        None
    }

    fn is_from_this_process(&self) -> bool {
        self.world.kernel().owner_of_peer(self.id) == Some(Owner::Proxy)
    }
}

/// A listener of the proxy. Dropped, it is closed, and its file removed, unless that is left to the
/// housekeeper.
#[derive(Debug)]
pub(super) struct SimListener {
    world: Rc<SimWorld>,
    pub(super) key: ListenerKey,
    leaves_file: bool,
}

impl Drop for SimListener {
    fn drop(&mut self) {
        // Invariant 8: a worker leaves the file to the housekeeper.
        let is_watched = self.world.kernel().is_watched(self.key);
        assert!(
            self.leaves_file || !is_watched || self.world.is_cleared.get(),
            "a worker removes the file of {:?}",
            self.key
        );
        self.world.kernel().close_listener(self.key);
        self.world
            .log(|| format!("the proxy closes {:?}", self.key));
        if let (false, Place::Path(path)) = (self.leaves_file, self.place()) {
            remove_file(&self.world, self.key, &path);
        }
    }
}

impl SimListener {
    fn place(&self) -> Place {
        self.world.kernel().place_of(self.key)
    }

    /// Closes it; where its file is that is to be removed.
    fn shut(mut self) -> (ListenerKey, Option<PathBuf>) {
        self.leaves_file = true;
        let file = match self.place() {
            Place::Path(path) => Some(path),
            _ => None,
        };
        (self.key, file)
    }
}

/// Where an address listens, or is connected to.
pub(super) fn place_of(address: &Address) -> Place {
    match address {
        Address::Tcp(TcpAddress {
            host: Host::Ip(ip),
            port,
            ..
        }) => Place::Tcp((*ip, *port).into()),
        Address::Vsock(vsock) => Place::Vsock {
            cid: vsock.cid,
            port: vsock.port.0,
        },
        other => match other.listen_path() {
            Some(path) => Place::Path(path.into_owned()),
            None => panic!("{other} is not simulated"),
        },
    }
}

/// Plays until something has happened, but not beyond that time. Returns false once it has come.
type Step = fn(Duration) -> bool;

thread_local! {
    /// Where the functions without a driver find their world, and how it goes on: one run a thread.
    static WORLD: RefCell<Option<(Rc<SimWorld>, Step)>> = const { RefCell::new(None) };
}

/// Sets the world of this thread, and how it goes on.
pub(super) fn set_world(world: Option<Rc<SimWorld>>, step: Step) {
    WORLD.with(|it| *it.borrow_mut() = world.map(|world| (world, step)));
    transitions::report_to(note_transition);
}

/// Returns the world of this thread, and how it goes on.
fn this_run() -> (Rc<SimWorld>, Step) {
    WORLD.with(|it| it.borrow().clone().expect("no run on this thread"))
}

/// Returns the world of this thread.
fn this_world() -> Rc<SimWorld> {
    this_run().0
}

/// Notes that a connection goes from one state to another, if it is one of a run.
fn note_transition(from: &'static str, to: &'static str) {
    WORLD.with(|it| {
        if let Some((world, _)) = &*it.borrow() {
            world.note_transition(from, to);
        }
    });
}

pub(super) struct SimDriver {
    pub(super) world: Rc<SimWorld>,
    pub(super) worker: usize,
}

impl SimDriver {
    /// While the proxy stops, nothing is bound again.
    fn check_running(&self) {
        let has_stopped = self.world.has_stopped(self.worker);
        assert!(!has_stopped, "files are looked after at the end");
    }

    fn file_of(&self, key: ListenerKey) -> Option<PathBuf> {
        match self.world.kernel().place_of(key) {
            Place::Path(path) => Some(path),
            _ => None,
        }
    }
}

fn bind(world: &Rc<SimWorld>, address: &Address) -> Result<SimListener> {
    let bound = world.kernel().listen(&place_of(address), Owner::Proxy);
    world.log(|| format!("the proxy binds {address}: {bound:?}"));
    match bound {
        Ok(key) => Ok(SimListener {
            world: Rc::clone(world),
            key,
            leaves_file: false,
        }),
        Err(e) => Err(Error::new(Operation::Listen, address, e)),
    }
}

/// Who waits at a listener is accepted before it is closed, if there is room.
fn check_backlog(world: &SimWorld, key: ListenerKey) {
    let kernel = world.kernel();
    // Of guests their VM judges. What was never watched was bound for nothing.
    let is_guests =
        matches!(kernel.place_of(key), Place::Path(path) if path.starts_with("/sim/vm"));
    let has_room = world.has_room.get() && kernel.left > 500;
    assert!(
        kernel.waiting(key) == 0 || !has_room || is_guests || !kernel.is_watched(key),
        "{key:?} is closed, and clients wait there"
    );
}

fn found(bound: Result<SimListener>) -> Found<SimListener> {
    match bound {
        Ok(listener) => Found::Bound(listener),
        Err(error) => Found::Failed(error),
    }
}

/// Removes the file of a listener, if it is still its own.
fn remove_file(world: &SimWorld, key: ListenerKey, path: &PathBuf) {
    let mut kernel = world.kernel();
    if kernel.has_file(key) == Some(true) {
        kernel.files.remove(path);
    }
}

impl Driver for SimDriver {
    type Stream = SimStream;
    type Listener = SimListener;

    fn bind(address: &Address, _: FileAccess) -> Result<SimListener> {
        bind(&this_world(), address)
    }

    fn take_passed(_: listener::Listener) -> SimListener {
        unreachable!("no socket was passed")
    }

    fn bound(_: &SimListener, asked: &Address) -> Address {
        asked.clone()
    }

    fn note(_: &SimListener) -> Option<&'static str> {
        None
    }

    fn clock() -> Instant {
        this_world().instant()
    }

    fn descriptor_limit() -> Option<u64> {
        Some(this_world().kernel().habits.descriptors as u64)
    }

    /// The others have their turns until the answer has come.
    fn receive<T>(
        answers: &Receiver<T>,
        patience: Duration,
    ) -> std::result::Result<T, RecvTimeoutError> {
        let (world, step) = this_run();
        let end = world.now() + patience;
        loop {
            match answers.try_recv() {
                Ok(answer) => return Ok(answer),
                Err(std::sync::mpsc::TryRecvError::Disconnected) => {
                    return Err(RecvTimeoutError::Disconnected);
                }
                Err(std::sync::mpsc::TryRecvError::Empty) => {}
            }
            if !step(end) {
                return Err(RecvTimeoutError::Timeout);
            }
        }
    }

    fn now(&self) -> Instant {
        self.world.instant()
    }

    fn wall_time(&self) -> SystemTime {
        // No rule of the simulated world depends on it.
        SystemTime::UNIX_EPOCH
    }

    fn wait(
        &mut self,
        events: &mut Vec<DriverEvent<SimStream, SimListener>>,
        _: Option<Duration>,
    ) -> io::Result<()> {
        self.world
            .kernel()
            .take_events(self.worker, |token, readiness| {
                events.push(DriverEvent::Ready { token, readiness });
            });
        events.append(&mut self.world.take_mail(self.worker));
        Ok(())
    }

    fn watch_listener(
        &mut self,
        listener: &mut SimListener,
        token: usize,
        _: &Rule,
    ) -> io::Result<()> {
        let mut kernel = self.world.kernel();
        kernel.watch_listener(listener.key, self.worker, token)
    }

    fn accept(&mut self, listener: &SimListener) -> io::Result<(SimStream, SocketName)> {
        let id = self.world.kernel().accept(listener.key)?;
        let peer = self.world.kernel().peer_name_of(id);
        let world = Rc::clone(&self.world);
        Ok((SimStream { world, id }, peer))
    }

    fn check_file(&mut self, listener: &SimListener, of: ListenerId, rule: &Rule) -> bool {
        if self.file_of(listener.key).is_none() {
            return false;
        }
        self.check_running();
        let (key, address) = (listener.key, rule.listen.clone());
        self.world.ask_housekeeper(self.worker, move |world| {
            let there = world.kernel().has_file(key);
            let found = match there {
                Some(true) => Found::Ours,
                Some(false) => Found::Taken,
                None => found(bind(world, &address)),
            };
            Some(DriverEvent::Listener { of, found })
        });
        true
    }

    fn bind_again(&mut self, old: Option<SimListener>, of: ListenerId, rule: &Rule) {
        self.check_running();
        let old = old.map(SimListener::shut);
        let address = rule.listen.clone();
        let again = move |world: &Rc<SimWorld>| {
            if let Some((key, Some(path))) = &old {
                remove_file(world, *key, path);
            }
            let found = found(bind(world, &address));
            Some(DriverEvent::Listener { of, found })
        };
        self.world.ask_housekeeper(self.worker, again);
    }

    fn set_access(
        &mut self,
        listener: &SimListener,
        _: FileAccess,
        wanted: StillWanted,
        done: Sender<io::Result<()>>,
    ) {
        if self.file_of(listener.key).is_none() {
            return drop(done.send(Ok(())));
        }
        self.world.ask_housekeeper(self.worker, move |_| {
            if wanted.begin() {
                let _ = done.send(Ok(()));
            }
            None
        });
    }

    #[cfg(feature = "cli")]
    fn keep_listener(&mut self, _: &mut SimListener, _: &Rule) {}

    #[cfg(feature = "cli")]
    fn lend_listener(&self, _: &SimListener) -> io::Result<Lent> {
        Err(io::ErrorKind::Unsupported.into())
    }

    #[cfg(feature = "cli")]
    fn give_listener(&mut self, _: SimListener) {
        unreachable!("no listener is lent")
    }

    fn close_listener_then(&mut self, listener: SimListener, done: Sender<()>) {
        check_backlog(&self.world, listener.key);
        let (key, file) = listener.shut();
        // The thread that asked may have given up, or none has.
        let notify = move || {
            let _ = done.send(());
        };
        match file {
            Some(path) => self.world.ask_housekeeper(self.worker, move |world| {
                remove_file(world, key, &path);
                notify();
                None
            }),
            None => notify(),
        }
    }

    fn connect(
        &mut self,
        endpoint: &Endpoint,
        _patience: Duration,
    ) -> io::Result<(SimStream, Option<VmIdentity>)> {
        let place = match endpoint {
            Endpoint::Tcp(address) => Place::Tcp(*address),
            Endpoint::Unix(UnixAddress::Path(path)) => Place::Path(path.clone()),
            Endpoint::Unix(UnixAddress::Abstract(_)) => unreachable!("no such names"),
            Endpoint::Hyperkit(to) => Place::Path(to.vm.connect_path()),
            Endpoint::Vsock(to) => Place::Vsock {
                cid: to.cid,
                port: to.port.0,
            },
            Endpoint::VsockMux(to) => Place::Path(to.path.clone()),
        };
        let id = self.world.kernel().connect(&place, Owner::Proxy)?;
        let world = Rc::clone(&self.world);
        let mut stream = SimStream { world, id };
        let mut identity = None;
        if let Endpoint::Hyperkit(to) = endpoint {
            let line = hyperkit::connect_line(to.vm.cid, to.port.0);
            let written = stream.write(&line)?;
            assert_eq!(written, line.len(), "hyperkit reads its line at once");
            identity = self.world.identity_of_vm(&to.vm.clone().into());
        }
        if let Endpoint::VsockMux(to) = endpoint {
            identity = self.world.identity_of_vm(&to.clone().into());
        }
        self.world.dialled(id, &place);
        Ok((stream, identity))
    }

    fn explain(&mut self, token: usize, address: &Address, error: io::Error) -> Option<Error> {
        let error = Error::new(Operation::Connect, address, error);
        if !crate::dial::explanation_reads_files(address, error.cause()) {
            return Some(error);
        }
        self.world.ask_housekeeper(self.worker, move |_| {
            Some(DriverEvent::Explained { token, error })
        });
        None
    }

    fn name_of_listener(&mut self, listener: &SimListener) -> Option<ListenerName> {
        match self.world.kernel().place_of(listener.key) {
            Place::Tcp(address) => Some(ListenerName::Tcp(address)),
            Place::Vsock { port, .. } => Some(ListenerName::Vsock(port)),
            Place::Path(path) => Some(ListenerName::Unix(
                path.into_os_string().into_encoded_bytes(),
            )),
        }
    }

    fn watch(&mut self, stream: &mut SimStream, token: usize) -> io::Result<()> {
        let kernel = self.world.kernel();
        let is_kept_alive = kernel.is_unix(stream.id) || kernel.kept_alive.contains(&stream.id);
        drop(kernel);
        assert!(
            is_kept_alive,
            "whether a peer is there is asked from the start"
        );
        self.world.kernel().watch(stream.id, self.worker, token);
        Ok(())
    }

    fn set_keepalive(&mut self, stream: &SimStream, time: Option<Duration>) {
        assert_eq!(time, Some(Duration::from_secs(60)), "a rule's keepalive");
        self.world.kernel().kept_alive.insert(stream.id);
    }

    fn close(&mut self, stream: SimStream) {
        drop(stream);
    }

    fn reset(&mut self, stream: SimStream) {
        self.world.kernel().reset(stream.id);
    }

    fn leave(&mut self, _: SimStream) {
        unreachable!("there is no keeper");
    }

    fn resolve(&mut self, token: usize, host: &str, port: u16) {
        self.world.resolve(self.worker, token, host, port);
    }

    fn has_peer_ended(&mut self, stream: &SimStream) -> bool {
        let kernel = self.world.kernel();
        kernel.is_unix(stream.id) && kernel.is_peer_gone(stream.id)
    }

    fn release_unused(&mut self) {}

    fn look_at_vm(&mut self, gate: &Arc<Gate>) {
        let gate = Arc::clone(gate);
        self.world.ask_housekeeper(self.worker, move |world| {
            let look = world.look_at_vm(gate.vm());
            Some(DriverEvent::VmSeen { gate, look })
        });
    }

    fn dial(&mut self, _: usize, _: Option<ConnectionId>, forward: &Arc<Forward>, _: Duration) {
        unreachable!("nothing is dialled by threads: {}", forward.rule.connect)
    }

    fn start_threads(
        &mut self,
        _: usize,
        _: [SimStream; 2],
        _: &Arc<Forward>,
        _: Duration,
    ) -> io::Result<()> {
        unreachable!("nothing is carried by threads")
    }

    fn insert_adapter(&mut self, _: Side, _: &mut SimStream, _: Duration) -> io::Result<()> {
        unreachable!("nothing is carried by threads")
    }

    fn threads_progress(&self, _: usize) -> Option<Progress> {
        None
    }

    fn cut_threads(&mut self, _: usize) {}
}
