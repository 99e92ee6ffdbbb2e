//! Named pipes for an event loop.
//!
//! mio reads ahead, and takes a write whole before it is done: what it has taken goes out though
//! the pipe is dropped, as long as the loop lives. A zero-byte message, the peer's half-close, is
//! read as EOF.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::windows::io::OwnedHandle;
use std::sync::OnceLock;
use std::time::Duration;

use mio::event::Source;
use mio::windows::NamedPipe;
use mio::{Interest, Registry, Token};

use crate::sys::{self, Last, LastWord, PipeKind};

use super::endpoint::Endpoint;

/// A connected pipe.
#[derive(Debug)]
pub(crate) struct Local {
    pipe: PipeState,
    kind: PipeKind,
    /// Whether the peer may have something unread.
    has_written: bool,
    last: OnceLock<LastWord>,
}

#[derive(Debug)]
enum PipeState {
    /// No event loop has it yet.
    Free(OwnedHandle),
    Watched(NamedPipe),
    Gone,
}

impl Local {
    pub(super) fn connect(endpoint: &Endpoint, _patience: Duration) -> io::Result<Local> {
        match endpoint {
            Endpoint::Npipe(address) if address.sddl.is_some() => {
                let why =
                    "sddl says who may connect: it belongs to the address that is listened on";
                Err(io::Error::new(io::ErrorKind::InvalidInput, why))
            }
            Endpoint::Npipe(address) => Local::new(sys::open_pipe(&address.name)?),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Makes a stream of a pipe that no loop watches.
    pub(crate) fn new(pipe: OwnedHandle) -> io::Result<Local> {
        Ok(Local {
            kind: PipeKind::of(&pipe)?,
            pipe: PipeState::Free(pipe),
            has_written: false,
            last: OnceLock::new(),
        })
    }

    /// Makes a stream of a listener's pipe, which the loop has watched since before its client
    /// came.
    pub(crate) fn accepted(pipe: NamedPipe) -> Local {
        Local {
            pipe: PipeState::Watched(pipe),
            kind: PipeKind {
                is_server: true,
                has_half_close: true,
            },
            has_written: false,
            last: OnceLock::new(),
        }
    }

    pub(super) fn connected(&self) -> io::Result<bool> {
        Ok(true)
    }

    /// Returns whether a poller watches it already: no other can any more.
    pub(super) fn is_settled(&self) -> bool {
        matches!(self.pipe, PipeState::Watched(_))
    }

    pub(super) fn has_half_close(&self) -> bool {
        self.kind.has_half_close
    }

    /// Half-closes, where the pipe can. Only a close can refuse what the peer writes.
    pub(super) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        if how != Shutdown::Read && self.kind.has_half_close && self.last.get().is_none() {
            self.send_last(Last::HalfClose)?;
        }
        Ok(())
    }

    /// Closes so that a client reads an error and no EOF, after what was sent before. A server
    /// reads EOF.
    pub(super) fn reset(self) {
        if self.kind.is_server && self.last.get().is_none() {
            let _ = self.send_last(Last::Disconnect);
        }
    }

    fn send_last(&self, last: Last) -> io::Result<()> {
        let pipe = match &self.pipe {
            PipeState::Free(pipe) => pipe.try_clone()?,
            PipeState::Watched(pipe) => sys::clone_handle(pipe)?,
            PipeState::Gone => return Ok(()),
        };
        if self.has_written {
            // It is set once: each caller has checked that it is not.
            let _ = self.last.set(LastWord::begin(pipe, last));
        } else {
            sys::say_at_once(&pipe, last);
        }
        Ok(())
    }

    /// Returns the pipe, if no loop has it.
    pub(super) fn into_free(mut self) -> Option<(OwnedHandle, PipeKind)> {
        match std::mem::replace(&mut self.pipe, PipeState::Gone) {
            PipeState::Free(pipe) => Some((pipe, self.kind)),
            _ => None,
        }
    }

    pub(super) fn source(&mut self) -> &mut dyn Source {
        self
    }
}

fn would_block() -> io::Error {
    io::ErrorKind::WouldBlock.into()
}

impl Read for Local {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.pipe {
            PipeState::Watched(pipe) => pipe.read(buffer),
            _ => Err(would_block()),
        }
    }
}

impl Write for Local {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.pipe {
            // A message of no bytes would be a half-close.
            PipeState::Watched(_) if bytes.is_empty() => Ok(0),
            PipeState::Watched(pipe) => {
                let written = pipe.write(bytes)?;
                self.has_written = true;
                Ok(written)
            }
            _ => Err(would_block()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Source for Local {
    fn register(&mut self, registry: &Registry, token: Token, what: Interest) -> io::Result<()> {
        self.pipe = match std::mem::replace(&mut self.pipe, PipeState::Gone) {
            PipeState::Free(pipe) => PipeState::Watched(sys::into_named_pipe(pipe)),
            PipeState::Watched(pipe) => {
                // Until now its events were the listener's.
                self.pipe = PipeState::Watched(pipe);
                return self.reregister(registry, token, what);
            }
            PipeState::Gone => PipeState::Gone,
        };
        match &mut self.pipe {
            PipeState::Watched(pipe) => pipe.register(registry, token, what),
            _ => Ok(()),
        }
    }

    fn reregister(&mut self, registry: &Registry, token: Token, what: Interest) -> io::Result<()> {
        match &mut self.pipe {
            PipeState::Watched(pipe) => pipe.reregister(registry, token, what),
            _ => Ok(()),
        }
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        match &mut self.pipe {
            PipeState::Watched(pipe) => pipe.deregister(registry),
            _ => Ok(()),
        }
    }
}
