//! The successor's part of a hand-over: takes the sockets of a running hvsock.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;

use super::{
    Done, FailedForwards, FinalLine, Head, Mine, PATIENCE, PROTOCOL, SocketLine, TakeOverRequest,
};
use super::{LONGEST_LINE, address_of, guest_port, invalid_data, path_of, take_from_keepers};
use super::{TakenSockets, Use, Wire, Yours};
use crate::address::Address;
use crate::app::control::added::Added;
use crate::app::control::client::{Unanswered, ask};
use crate::app::control::inherited::Inherited;
use crate::app::control::model::{EndedInfo, read_rule};
use crate::app::control::problem::ApiProblem;
use crate::app::rule_options::RuleOptions;
use crate::listener::file::SocketFile;
use crate::listener::{FileAccess, Handed, Key, Listener, Ready};
use crate::proxy::{Handle, Rule};
use crate::sys::{self, Identity};

/// A running hvsock that offers its listening sockets. If dropped, it goes on as before.
#[derive(Debug)]
pub(crate) struct Predecessor {
    wire: Wire,
    sockets: Ready<PassedSocket>,
    taken: Vec<usize>,
    /// The files of the taken sockets, each with the change of its access.
    files: Vec<(Arc<SocketFile>, AccessChange)>,
    /// The paths of the taken sockets that guests dial.
    guest_ports: Vec<PathBuf>,
    /// How the forwards of these names were added to the predecessor.
    added_as: HashMap<String, Added>,
}

#[derive(Debug)]
struct PassedSocket {
    used_for: Use,
    listener: Listener,
    /// Its rule, if it was added by hand.
    added: Option<Rule>,
}

/// What happens to the access of a taken socket's file.
#[derive(Clone, Copy, Debug)]
enum AccessChange {
    Kept,
    Set(FileAccess),
}

/// The sockets to take.
struct WantedSockets {
    used_for: Use,
    keys: Vec<Key>,
    access: AccessChange,
}

impl Predecessor {
    /// Requests the sockets of the hvsock whose control socket is `control`.
    ///
    /// # Errors
    /// Returns an error if no hvsock is there, or if it refuses.
    pub(crate) fn ask(control: &Path) -> Result<Predecessor, Unanswered> {
        let fail = |e: io::Error| {
            let why = format!("its sockets can't be taken over: {e}");
            Unanswered::Refused(ApiProblem::new(500, why))
        };
        // Beside the control socket: both processes can get there, even if other directories are
        // private to one.
        let meeting = MeetingPoint::new(control).map_err(fail)?;
        let request = TakeOverRequest {
            protocol: PROTOCOL,
            pid: std::process::id(),
            socket: meeting.address.clone(),
        };
        let request = serde_json::to_string(&request).map_err(|e| fail(e.into()))?;
        ask(control, "POST", "/v1/take-over", &request)?;
        let mut wire = meeting.accept().map_err(fail)?;
        drop(meeting);
        let mut sockets = Vec::new();
        let head: Head = wire.next().map_err(fail)?;
        let mut added_as = HashMap::new();
        for _ in 0..head.sockets {
            let (line, descriptor): (SocketLine, _) = wire.next_with().map_err(fail)?;
            added_as.extend(line.name.clone().zip(line.added_as));
            sockets.push(read(line, descriptor).map_err(fail)?);
        }
        Ok(Predecessor {
            wire,
            sockets: Ready::new(sockets, |it| &it.listener),
            taken: Vec::new(),
            files: Vec::new(),
            guest_ports: Vec::new(),
            added_as,
        })
    }

    /// Takes the socket of an address of the control interface, if the predecessor has one.
    pub(in crate::app::control) fn take_endpoint(
        &mut self,
        service: Use,
        asked: &Address,
    ) -> Option<Listener> {
        let no_name = None;
        let wanted = WantedSockets {
            used_for: service,
            keys: Key::wanted(no_name, asked),
            access: AccessChange::Kept,
        };
        let mut listener = self.take_first(&wanted)?;
        let joins = |it: &Listener| listener.is_joined_by(asked, it);
        if let Some(other) = self.take_first_that(&wanted, joins) {
            listener.join(other);
        }
        listener.complete(asked);
        Some(listener)
    }

    /// Returns the rules that were added by hand.
    pub(crate) fn added_rules(&self) -> Vec<Rule> {
        let added = self.sockets.iter().filter_map(|it| it.added.clone());
        added.collect()
    }

    /// Returns how the forwards of these names were added on the predecessor's control socket.
    pub(in crate::app::control) fn ways_of_adding(&self) -> &HashMap<String, Added> {
        &self.added_as
    }

    /// Takes the sockets of these rules, and all sockets that another program has bound: clients
    /// that wait there may be served later.
    pub(crate) fn take_listeners(&mut self, rules: &[Rule]) -> Vec<Listener> {
        let mut listeners = Vec::new();
        for rule in rules {
            let wanted = WantedSockets {
                used_for: Use::Forward,
                keys: Key::wanted(rule.name.as_deref(), &rule.listen),
                access: AccessChange::Set(rule.access()),
            };
            let Some(first) = self.take_first(&wanted) else {
                continue;
            };
            let joins = |it: &Listener| first.is_joined_by(&rule.listen, it);
            let other = self.take_first_that(&wanted, joins);
            listeners.push(first);
            listeners.extend(other);
        }
        let is_kept = |it: &PassedSocket| it.used_for == Use::Forward && it.listener.is_foreign();
        for number in self.sockets.numbers(is_kept) {
            listeners.extend(self.take_numbered(number, AccessChange::Kept));
        }
        listeners
    }

    /// Takes the first of the wanted sockets.
    fn take_first(&mut self, wanted: &WantedSockets) -> Option<Listener> {
        let fits_always = |_: &Listener| true;
        self.take_first_that(wanted, fits_always)
    }

    /// Takes the first of the wanted sockets that `fits`.
    fn take_first_that(
        &mut self,
        wanted: &WantedSockets,
        fits: impl Fn(&Listener) -> bool,
    ) -> Option<Listener> {
        let fits = |it: &PassedSocket| it.used_for == wanted.used_for && fits(&it.listener);
        let number = self.sockets.find(&wanted.keys, fits)?;
        self.take_numbered(number, wanted.access)
    }

    fn take_numbered(&mut self, number: usize, access: AccessChange) -> Option<Listener> {
        let socket = self.sockets.remove(number)?;
        self.guest_ports
            .extend(guest_port(socket.listener.address()));
        self.taken.push(number);
        let file = socket.listener.file();
        self.files.extend(file.map(|file| (file, access)));
        Some(socket.listener)
    }

    /// Returns the addresses of the sockets that are not taken, and will be closed by the
    /// predecessor.
    pub(crate) fn untaken_addresses(&self) -> Vec<Address> {
        let left = self.sockets.iter();
        let left = left.filter(|it| it.used_for == Use::Forward);
        let mut left: Vec<_> = left.map(|it| it.listener.address().clone()).collect();
        // A forward may have two sockets.
        left.dedup();
        left
    }

    /// Sends which sockets are taken, all of which must be ready. Once this returns they belong to
    /// this process, which must accept clients. `handle` excludes the slots that the predecessor
    /// may still use.
    ///
    /// # Errors
    /// Returns why the predecessor keeps them as if nothing had happened: it has ended, its end was
    /// requested, or this took too long.
    pub(crate) fn agree_on_sockets(mut self, handle: &Handle) -> io::Result<Agreed> {
        self.wire.send(&TakenSockets {
            taken: std::mem::take(&mut self.taken),
        })?;
        let yours: Yours = self.wire.next()?;
        if !yours.yours {
            return Err(invalid_data("it keeps them"));
        }
        for (file, access) in self.files.drain(..) {
            file.own();
            if let AccessChange::Set(access) = access {
                // Serving with the wrong access is better than not serving.
                let _ = file.set_access(access);
            }
        }
        yours.slots.leave_out(handle);
        Ok(Agreed {
            wire: self.wire,
            guest_ports: self.guest_ports,
        })
    }
}

/// A hand-over on which both processes have agreed.
#[derive(Debug)]
pub(crate) struct Agreed {
    wire: Wire,
    guest_ports: Vec<PathBuf>,
}

impl Agreed {
    /// Reports that this process accepts clients, except at the forwards that have `failed`.
    /// Returns once the predecessor accepts none. Until the predecessor ends, its slots are
    /// excluded, and its ended connections are recorded.
    pub(crate) fn finish(
        mut self,
        handle: &Handle,
        process: u32,
        inherited: Inherited,
        mut failed: FailedForwards,
    ) {
        /// What fits into a line, even if all of it is escaped.
        const MOST_BYTES: usize = LONGEST_LINE / 8;
        let mut bytes = 0;
        failed.retain(|name, why| {
            bytes += name.len() + why.len();
            bytes <= MOST_BYTES
        });
        let done = self.wire.send(&Mine {
            mine: true,
            hears_of_ended: true,
            failed,
        });
        match done.and_then(|()| self.wire.next::<Done>()) {
            Ok(done) => {
                done.slots.leave_out(handle);
                let handle = handle.clone();
                let thread = std::thread::Builder::new().name("hvsock-handover".to_owned());
                // Without a thread the slots stay excluded for ever, which is safe.
                let hear = move || {
                    receive_final_lines(self.wire, &handle, |ended| {
                        inherited.add_ended(ended, process)
                    });
                };
                let _ = thread.spawn(hear);
            }
            Err(_) => {
                handle.shared_slots().forget_predecessor();
                // It was killed, or hangs. In either case it must have no sockets.
                take_from_keepers(&self.guest_ports);
            }
        }
    }
}

/// Receives the predecessor's remaining slots and ended connections, until the predecessor ends.
fn receive_final_lines(mut wire: Wire, handle: &Handle, note: impl Fn(EndedInfo)) {
    loop {
        match wire.next::<FinalLine>() {
            Ok(FinalLine::Slots(slots)) => slots.leave_out(handle),
            Ok(FinalLine::Ended(line)) => note(line.ended),
            Err(e) if e.kind() == ErrorKind::TimedOut => {}
            Err(_) => return handle.shared_slots().forget_predecessor(),
        }
    }
}

fn read(line: SocketLine, descriptor: OwnedFd) -> io::Result<PassedSocket> {
    let address = |text: &str| {
        text.parse::<Address>()
            .map_err(|e| invalid_data(e.to_string()))
    };
    let asked = line.asked.as_deref().map(address).transpose()?;
    let file = line.file.map(|file| {
        let identity = Identity::from_text(&file.identity);
        let identity = identity.ok_or_else(|| invalid_data("a file's identity is none"))?;
        Ok::<_, io::Error>((path_of(&file.at)?, identity))
    });
    let handed = Handed {
        wish: asked.map(|asked| (line.name, asked)),
        address: address(&line.bound)?,
        file: file.transpose()?,
        is_foreign: line.foreign,
    };
    let added = line.added.map(|body| {
        let rule = read_rule(body.to_string().as_bytes(), RuleOptions::default());
        rule.map_err(|problem| invalid_data(problem.to_string()))
    });
    Ok(PassedSocket {
        used_for: line.used_for,
        listener: Listener::handed(descriptor, handed).map_err(io::Error::other)?,
        added: added.transpose()?,
    })
}

/// A socket at a path that only this user can reach.
struct MeetingPoint {
    listener: UnixListener,
    address: String,
    _directory: TempDir,
}

impl MeetingPoint {
    fn new(beside: &Path) -> io::Result<MeetingPoint> {
        let beside = std::path::absolute(beside)?;
        let parent = beside.parent().unwrap_or(Path::new("/"));
        // Its mode is 0700.
        let directory = tempfile::Builder::new()
            .prefix(".hvsock-")
            .tempdir_in(parent)?;
        let path = directory.path().join("s");
        let listener = sys::with_short_path(&path, |short| UnixListener::bind(short))?;
        listener.set_nonblocking(true)?;
        Ok(MeetingPoint {
            listener,
            address: address_of(&path),
            _directory: directory,
        })
    }

    /// Accepts the predecessor, which connected before it answered the request.
    fn accept(&self) -> io::Result<Wire> {
        if !sys::wait(self.listener.as_fd(), sys::Wanted::Readable, PATIENCE)? {
            return Err(ErrorKind::TimedOut.into());
        }
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(false)?;
        Wire::new(stream)
    }
}
