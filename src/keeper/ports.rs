//! The ports that guests dial, as the keeper has them: held while the proxy listens there, served
//! when it does no more.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::hyperkit::state::running_pid;
use crate::sys::{self, Identity, Place};

use super::protocol::GuestPort;
use super::status::{KeptPort, PortState};

/// How many connections one port accepts in a turn.
const BATCH: usize = 64;

/// How long a port doesn't accept when there is no descriptor for it.
const PAUSE: Duration = Duration::from_millis(50);

/// The VM behind a port, as it was when the keeper began to serve it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ServedVm {
    Socket(Identity),
    Process(i32),
}

/// Returns the VM whose socket is `connect`, or that has a pid file beside it; `None` if none runs.
fn find_vm(connect: &Path) -> Option<ServedVm> {
    match Identity::of(connect) {
        Ok(identity) => {
            // A socket that may not be connected to (permissions) may live.
            let lives = sys::is_socket_alive(connect).unwrap_or(true);
            lives.then_some(ServedVm::Socket(identity))
        }
        // A VM with `guest_forwards` alone has no such socket.
        Err(_) => {
            let pid = running_pid(connect.parent()?)?;
            Some(ServedVm::Process(pid))
        }
    }
}

/// The keeper's copy of a listening socket that guests dial.
#[derive(Debug)]
pub(super) struct KeptListener {
    listener: UnixListener,
    port: GuestPort,
    /// The VM for which it is served; `None`: it is held, for the proxy listens there.
    served: Option<Served>,
    /// The client of the status socket that has reserved it: a successor of the proxy.
    pub(super) taken_by: Option<u64>,
}

#[derive(Debug)]
struct Served {
    vm: Option<ServedVm>,
    not_before: Option<Instant>,
}

/// Whether a served port stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Stays,
    /// It is to be closed: nobody can reach it any more, or its VM has ended.
    Closed,
}

impl KeptListener {
    pub(super) fn new(listener: OwnedFd, port: GuestPort) -> KeptListener {
        KeptListener {
            listener: UnixListener::from(listener),
            port,
            served: None,
            taken_by: None,
        }
    }

    pub(super) fn status(&self) -> KeptPort {
        KeptPort {
            port: self.port.port,
            path: self.port.path.clone(),
            socket: self.inode(),
            state: match self.served {
                Some(_) => PortState::Serving,
                None => PortState::Held,
            },
        }
    }

    pub(super) fn inode(&self) -> u64 {
        self.port.identity.inode()
    }

    /// Begins to serve it for the VM that runs now.
    pub(super) fn serve(&mut self) {
        if self.served.is_none() {
            self.served = Some(Served {
                vm: find_vm(&self.port.connect),
                not_before: None,
            });
        }
    }

    pub(super) fn is_served(&self) -> bool {
        self.served.is_some()
    }

    /// Returns whether it accepts now, and when it does again if not.
    pub(super) fn accepts(&self, now: Instant) -> Result<bool, Instant> {
        match &self.served {
            None => Ok(false),
            Some(served) => match served.not_before {
                Some(at) if at > now => Err(at),
                _ => Ok(true),
            },
        }
    }

    /// Accepts the guests that wait.
    pub(super) fn accept(&mut self, now: Instant, mut end: impl FnMut(OwnedFd)) -> Fate {
        for _ in 0..BATCH {
            match self.listener.accept() {
                Ok((guest, _)) => end(guest.into()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    // Linux returns this for ever for a socket that was shut down.
                    return match sys::is_shut_down(self.listener.as_fd()) {
                        true => Fate::Closed,
                        false => Fate::Stays,
                    };
                }
                Err(e) if is_of_one_client(&e) => {}
                Err(e) if e.raw_os_error() == Some(nix::libc::EINVAL) => return Fate::Closed,
                Err(_) => {
                    if let Some(served) = &mut self.served {
                        served.not_before = Some(now + PAUSE);
                    }
                    return Fate::Stays;
                }
            }
        }
        Fate::Stays
    }

    /// Returns whether the VM still runs and can still reach the port. If not, removes its file.
    pub(super) fn look(&self) -> Fate {
        let Some(served) = &self.served else {
            return Fate::Stays;
        };
        if self.taken_by.is_some() {
            return Fate::Stays;
        }
        let is_ours = match Identity::of(&self.port.path) {
            Ok(now) => now == self.port.identity,
            // A file that can't be looked at is assumed to be as it was.
            Err(e) => e.kind() != io::ErrorKind::NotFound,
        };
        let has_vm = served.vm.is_some() && find_vm(&self.port.connect) == served.vm;
        match is_ours && has_vm {
            true => Fate::Stays,
            false => {
                self.remove_file();
                Fate::Closed
            }
        }
    }

    /// Removes the file, if it is still this port's.
    pub(super) fn remove_file(&self) {
        let place = Place::of(&self.port.path);
        let _ = place.and_then(|place| place.remove(self.port.identity));
    }
}

impl AsFd for KeptListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Returns whether an accept error concerns one client only, and the next one may be there.
fn is_of_one_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionReset | Interrupted
    )
}
