//! Listening on named pipes.
//!
//! A pipe has an instance for each client. [`WAITING`] of them wait; when a client has come to one,
//! another is made.

use std::io;
use std::os::windows::io::{AsHandle, OwnedHandle};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use mio::event::Source;
use mio::windows::NamedPipe;
use mio::{Interest, Registry, Token};

use super::defaults::{DEFAULT_MODE, FileAccess};
use super::file::SocketFile;
use crate::address::Address;
use crate::error::{Error, Operation, Result};
use crate::lock::lock;
use crate::name::SocketName;
use crate::stream::endpoint::not_carried;
use crate::stream::local::Local;
use crate::sys::{self, Access};

/// How many instances wait, for as many clients at a time. More find the pipe busy, and try again.
const WAITING: usize = 16;

/// A listening pipe, for a caller that blocks or for a loop.
#[derive(Debug)]
pub(crate) struct LocalListener {
    name: String,
    access: Access,
    waiting: Mutex<WaitingInstances>,
}

/// The instances that wait for a client.
#[derive(Debug, Default)]
struct WaitingInstances {
    /// The instances at which no client was asked for yet. Clients find them all the same.
    made: Vec<OwnedHandle>,
    /// Those at which a caller that blocks waits for a client.
    operations: Vec<sys::OverlappedOperation>,
    /// Those that the event loop watches.
    watched: Vec<NamedPipe>,
    /// Those with a client that came before it was asked for.
    taken: Vec<OwnedHandle>,
    watcher: Option<(Registry, Token)>,
}

impl WaitingInstances {
    fn count(&self) -> usize {
        self.made.len() + self.operations.len() + self.watched.len()
    }

    /// Begins to wait for clients at those that were made, for a caller that blocks.
    fn begin_operations(&mut self) -> io::Result<()> {
        for pipe in self.made.drain(..) {
            let mut operation = sys::OverlappedOperation::new(Arc::new(pipe))?;
            match operation.connect()? {
                true => self.taken.extend(operation.into_handle()),
                false => self.operations.push(operation),
            }
        }
        Ok(())
    }

    /// Begins to wait for clients at those that were made, in an event loop.
    fn watch_made(&mut self) -> io::Result<()> {
        let Some((registry, token)) = &self.watcher else {
            return Ok(());
        };
        for pipe in self.made.drain(..) {
            let mut pipe = sys::into_named_pipe(pipe);
            pipe.register(registry, *token, Interest::READABLE | Interest::WRITABLE)?;
            match pipe.connect() {
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
                _ => self.watched.push(pipe),
            }
        }
        Ok(())
    }

    fn accept_operation(&mut self) -> io::Result<Option<Local>> {
        let begun = self.begin_operations();
        if let Some(pipe) = self.taken.pop() {
            return Local::new(pipe).map(Some);
        }
        let mut index = 0;
        while let Some(operation) = self.operations.get_mut(index) {
            let connected = match operation.outcome() {
                None => Ok(false),
                Some(Ok(_)) => Ok(true),
                // The thread that began it has ended.
                Some(Err(e)) if sys::is_cancelled(&e) => operation.connect(),
                Some(Err(e)) => Err(e),
            };
            match connected {
                Ok(false) => index += 1,
                Ok(true) => {
                    let pipe = self.operations.swap_remove(index).into_handle();
                    return pipe.map(Local::new).transpose();
                }
                // Its client has gone already.
                Err(_) => drop(self.operations.swap_remove(index)),
            }
        }
        begun.map(|()| None)
    }

    fn accept_watched(&mut self) -> io::Result<Option<Local>> {
        let watched = self.watch_made();
        let mut index = 0;
        while let Some(pipe) = self.watched.get(index) {
            let failed = !matches!(pipe.take_error(), Ok(None));
            match pipe.connect() {
                _ if failed => drop(self.watched.swap_remove(index)),
                Ok(()) => return Ok(Some(Local::accepted(self.watched.swap_remove(index)))),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => index += 1,
                Err(_) => drop(self.watched.swap_remove(index)),
            }
        }
        watched.map(|()| None)
    }
}

impl LocalListener {
    pub(super) fn bind(address: &Address, access: FileAccess) -> Result<LocalListener> {
        let Address::Npipe(pipe) = address else {
            return Err(not_carried(Operation::Listen, address));
        };
        let fail = |e| Error::new(Operation::Listen, address, e);
        if access.mode != DEFAULT_MODE {
            let why = "a pipe has no octal permissions";
            let error = fail(io::Error::new(io::ErrorKind::InvalidInput, why));
            return Err(error.with_remedy(
                "say in its address who may connect, you included, as in ?sddl=D:P(A;;GA;;;BA) for administrators",
            ));
        }
        let access = Access::new(pipe.sddl.as_deref()).map_err(|e| match pipe.sddl {
            Some(_) => fail(e).with_remedy("is sddl a security descriptor in Microsoft's SDDL?"),
            None => fail(e),
        })?;
        let first = sys::create_pipe(&pipe.name, &access, true);
        let first = first.map_err(|e| match e.kind() {
            io::ErrorKind::AddrInUse => {
                fail(e).with_remedy("another program has that pipe: choose another name")
            }
            _ => fail(e),
        })?;
        let listener = LocalListener {
            name: pipe.name.clone(),
            access,
            waiting: Mutex::new(WaitingInstances {
                made: vec![first],
                ..WaitingInstances::default()
            }),
        };
        listener
            .fill_up(&mut listener.lock())
            .map_err(|e| match e.kind() {
                io::ErrorKind::PermissionDenied => {
                    fail(e).with_remedy("sddl has to let the user who listens do all, too (GA)")
                }
                _ => fail(e),
            })?;
        Ok(listener)
    }

    fn lock(&self) -> MutexGuard<'_, WaitingInstances> {
        lock(&self.waiting)
    }

    /// Makes as many instances as are to wait.
    fn fill_up(&self, waiting: &mut WaitingInstances) -> io::Result<()> {
        while waiting.count() < WAITING {
            let pipe = sys::create_pipe(&self.name, &self.access, false)?;
            waiting.made.push(pipe);
        }
        Ok(())
    }

    pub(super) fn accept(&self) -> io::Result<(Local, SocketName)> {
        let mut waiting = self.lock();
        // An error matters only when no client has come to the instances that wait.
        let _ = self.fill_up(&mut waiting);
        let accepted = match waiting.watcher {
            Some(_) => waiting.accept_watched()?,
            None => waiting.accept_operation()?,
        };
        let Some(pipe) = accepted else {
            // Some instances may have failed.
            self.fill_up(&mut waiting)?;
            waiting.watch_made()?;
            return Err(io::ErrorKind::WouldBlock.into());
        };
        // Another instead of it, before the next accept. Without it clients would find the pipe
        // busy, and try again.
        let _ = self
            .fill_up(&mut waiting)
            .and_then(|()| waiting.watch_made());
        Ok((pipe, SocketName::Unnamed))
    }

    /// Waits until a client may have come, at most `timeout`.
    pub(super) fn wait(&self, timeout: Duration) -> io::Result<()> {
        let mut waiting = self.lock();
        waiting.begin_operations()?;
        if !waiting.taken.is_empty() {
            return Ok(());
        }
        let events = waiting
            .operations
            .iter()
            .map(|it| it.event().try_clone_to_owned());
        let events = events.collect::<io::Result<Vec<OwnedHandle>>>()?;
        drop(waiting);
        let events: Vec<_> = events.iter().map(AsHandle::as_handle).collect();
        sys::wait_for_any(&events, Some(timeout)).map(drop)
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketName> {
        Ok(SocketName::Unnamed)
    }

    pub(super) fn file(&self) -> Option<Arc<SocketFile>> {
        None
    }

    pub(super) fn with_source<T>(&mut self, f: impl FnOnce(&mut dyn Source) -> T) -> T {
        f(self)
    }
}

impl Source for LocalListener {
    fn register(&mut self, registry: &Registry, token: Token, _: Interest) -> io::Result<()> {
        let mut waiting = self.lock();
        waiting.watcher = Some((registry.try_clone()?, token));
        waiting.watch_made()
    }

    fn reregister(&mut self, registry: &Registry, token: Token, what: Interest) -> io::Result<()> {
        let mut waiting = self.lock();
        for pipe in &mut waiting.watched {
            pipe.reregister(registry, token, what)?;
        }
        waiting.watcher = Some((registry.try_clone()?, token));
        Ok(())
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        let mut waiting = self.lock();
        waiting.watcher = None;
        let mut pipes = waiting.watched.iter_mut();
        pipes.try_for_each(|pipe| pipe.deregister(registry))
    }
}
