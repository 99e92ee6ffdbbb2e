//! Hands over all listening sockets from a running hvsock to another process of the same user, so
//! that no client is refused while a new version takes the place of the old one.
//!
//! The successor makes a Unix socket in a private directory, and requests the sockets by `POST
//! /v1/take-over`. The predecessor connects to that socket. Then each line is one of JSON:
//!
//! | from | line | meaning |
//! |---|---|---|
//! | predecessor | [`Head`] | how many sockets follow |
//! | predecessor | [`SocketLine`], for each of them | a socket, with its descriptor (`SCM_RIGHTS`) |
//! | successor | [`TakenSockets`] | the sockets that it takes; it is ready to accept clients, and has accepted none yet |
//! | predecessor | [`Yours`] | the sockets and their files belong to the successor |
//! | successor | [`Mine`] | it accepts clients |
//! | predecessor | [`Done`] | it accepts no more clients |
//! | predecessor | [`Slots`], whenever they change | the slots of VMs that its connections still have |
//! | predecessor | [`EndedLine`], for each, if the successor accepts them | a connection of the predecessor that has ended |
//!
//! The conversation ends with the predecessor. The slots of a VM's device that the predecessor
//! still has are not used by the successor, so that together they don't use too many. The slots
//! sent with `yours` and `done` count at once.
//!
//! The predecessor serves all clients until `mine` has come. If the successor ends before, the
//! predecessor goes on as if nothing had happened. Its forwards can't be changed meanwhile. After
//! `done` it lets its connections finish, and ends. After `yours` the successor closes the
//! conversation only when it ends: a predecessor that sees neither a line nor an end assumes that
//! the successor has the sockets.
//!
//! If one of the two is killed in between, its keeper serves the ports that guests dial. The other
//! process takes them from the keeper.

pub(super) mod give;
pub(super) mod take;

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::address::{Address, UnixAddress};
use crate::app::control::added::Added;
use crate::app::control::model::EndedInfo;
use crate::engine::admission::sharing::{OtherSlots, Remainder};
use crate::keeper;
use crate::proxy::Handle;
use crate::sys::{self, Wanted};

/// The version of the protocol. A predecessor accepts no other.
pub(super) const PROTOCOL: u32 = 1;

/// How long each side waits for the other: the successor may need time to bind new sockets. The
/// forwards can't be changed meanwhile.
const PATIENCE: Duration = Duration::from_secs(8);

/// How often the predecessor checks its connections' slots, and which connections have ended.
pub(super) const TELL_PAUSE: Duration = Duration::from_millis(100);

/// The longest line in bytes: a rule has some hundred, and a path up to some thousand.
const LONGEST_LINE: usize = 64 * 1024;

/// The body of `POST /v1/take-over`.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct TakeOverRequest {
    pub(super) protocol: u32,
    /// The process id of the successor.
    pub(super) pid: u32,
    /// The address of the successor's socket.
    pub(super) socket: String,
}

/// The first line.
#[derive(Debug, Deserialize, Serialize)]
struct Head {
    sockets: usize,
}

/// What a socket is for.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Use {
    Forward,
    Control,
    GuestControl,
    Metrics,
}

/// A listening socket.
#[derive(Debug, Deserialize, Serialize)]
struct SocketLine {
    #[serde(rename = "use")]
    used_for: Use,
    /// The name of its rule.
    name: Option<String>,
    /// The address that was asked for; `null` if it isn't known.
    asked: Option<String>,
    bound: String,
    /// The file that the predecessor made for it.
    file: Option<FileLine>,
    /// Whether another program has bound it, such as a service manager.
    foreign: bool,
    /// The rule, if it was added by hand and is not in the configuration.
    added: Option<Value>,
    /// How it was added on the control socket. Earlier versions don't send it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    added_as: Option<Added>,
}

#[derive(Debug, Deserialize, Serialize)]
struct FileLine {
    /// Its path, as the address of a Unix socket.
    at: String,
    /// Its identity, as [`sys::Identity::to_text`] writes it.
    identity: String,
}

/// The numbers, from 0, of the sockets that the successor takes. The predecessor closes the others.
#[derive(Debug, Deserialize, Serialize)]
struct TakenSockets {
    taken: Vec<usize>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Yours {
    yours: bool,
    #[serde(default)]
    slots: Slots,
}

#[derive(Debug, Deserialize, Serialize)]
struct Mine {
    mine: bool,
    /// Whether it accepts an [`EndedLine`]. Earlier versions don't.
    #[serde(default)]
    hears_of_ended: bool,
    /// The forwards that it should carry and can't, each with the reason. Earlier versions don't
    /// send them.
    #[serde(default, skip_serializing_if = "FailedForwards::is_empty")]
    failed: FailedForwards,
}

/// Forwards that can't be had, by their names, each with the reason.
pub(crate) type FailedForwards = BTreeMap<String, String>;

/// A connection that ended before the hand-over, or while the predecessor finishes.
#[derive(Debug, Deserialize, Serialize)]
struct EndedLine {
    ended: EndedInfo,
}

/// A line of the predecessor while it finishes.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum FinalLine {
    Slots(Slots),
    Ended(Box<EndedLine>),
}

#[derive(Debug, Deserialize, Serialize)]
struct Done {
    done: bool,
    #[serde(default)]
    slots: Slots,
}

/// The slots of VMs that the predecessor still has. Earlier versions don't send them.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(transparent)]
struct Slots(Vec<VmSlots>);

#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
struct VmSlots {
    /// The path of the VM's own socket, as the address of a Unix socket.
    vm: String,
    /// The slots that are used, or may still be used by waiting clients.
    used: usize,
    lost: usize,
}

impl Slots {
    /// Reserves what this process may still use.
    fn reserve_in_proxy(handle: &Handle, what: Remainder) -> Slots {
        let kept = handle.shared_slots().keep_remainders(what).into_iter();
        let line = |(socket, slots): (PathBuf, OtherSlots)| VmSlots {
            vm: address_of(&socket),
            used: slots.used,
            lost: slots.lost,
        };
        Slots(kept.map(line).collect())
    }

    /// Excludes what the other process has.
    fn leave_out(&self, handle: &Handle) {
        for VmSlots { vm, used, lost } in &self.0 {
            let (used, lost) = (*used, *lost);
            // An invalid path is no VM of this process.
            if let Ok(socket) = path_of(vm) {
                let slots = OtherSlots { used, lost };
                handle.shared_slots().leave_out(&socket, slots);
            }
        }
    }
}

/// Returns the address of a path, which need not be UTF-8.
fn address_of(path: &Path) -> String {
    Address::Unix(UnixAddress::Path(path.to_owned())).to_string()
}

/// Returns the path of an address made by [`address_of`].
fn path_of(address: &str) -> io::Result<PathBuf> {
    let parsed = address.parse::<Address>().ok();
    let path = parsed.as_ref().and_then(Address::unix_path);
    path.map(Path::to_path_buf)
        .ok_or_else(|| invalid_data(format!("{address:?} is no path")))
}

/// Takes ports that guests dial, by the paths of their sockets, from a keeper that serves them for
/// a killed process.
fn take_from_keepers(ports: &[PathBuf]) {
    for taken in ports.iter().filter_map(|path| keeper::Taken::take(path)) {
        taken.release();
    }
}

/// Returns the path of the socket that a hyperkit guest dials, if the address is one of those.
fn guest_port(address: &Address) -> Option<PathBuf> {
    address.hyperkit_vm()?;
    address.listen_path().map(PathBuf::from)
}

fn invalid_data(why: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why.into())
}

/// The connection between predecessor and successor.
#[derive(Debug)]
struct Wire {
    stream: UnixStream,
    read: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl Wire {
    /// Makes a wire from a connection to a process of this user.
    ///
    /// # Errors
    /// Returns `PermissionDenied` if it is a process of another user, or the system's error.
    fn new(stream: UnixStream) -> io::Result<Wire> {
        let user = sys::connector(stream.as_fd())?.user;
        if user != sys::user_id() {
            let why = format!("it is a process of user {user}, and not ours");
            return Err(io::Error::new(ErrorKind::PermissionDenied, why));
        }
        sys::unless_ended(stream.set_write_timeout(Some(PATIENCE)))?;
        Ok(Wire {
            stream,
            read: Vec::new(),
            descriptors: VecDeque::new(),
        })
    }

    fn send(&mut self, line: &impl Serialize) -> io::Result<()> {
        self.stream.write_all(&to_line(line)?).map_err(name_timeout)
    }

    /// Sends a line with a descriptor.
    fn send_with(&mut self, line: &impl Serialize, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        let line = to_line(line)?;
        let end = Instant::now() + PATIENCE;
        let sent = loop {
            let socket = self.stream.as_fd();
            match sys::send(socket, &line, &[descriptor.as_raw_fd()]) {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(ErrorKind::TimedOut.into());
                    }
                    sys::wait(socket, Wanted::Writable, left)?;
                }
                sent => break sent?,
            }
        };
        // The descriptor was sent with the first byte.
        self.stream.write_all(&line[sent..]).map_err(name_timeout)
    }

    /// Returns the next line. Fails if it takes longer than [`PATIENCE`].
    fn next<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        let end = Instant::now() + PATIENCE;
        let length = loop {
            if let Some(length) = self.read.iter().position(|byte| *byte == b'\n') {
                break length;
            }
            if self.read.len() > LONGEST_LINE {
                return Err(invalid_data("a line has no end"));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            sys::unless_ended(self.stream.set_read_timeout(Some(left)))?;
            let mut buffer = [0; 16 * 1024];
            let received = match sys::receive(self.stream.as_fd(), &mut buffer) {
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                received => received.map_err(name_timeout)?,
            };
            if received.bytes == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            self.read.extend_from_slice(&buffer[..received.bytes]);
            self.descriptors.extend(received.descriptors);
        };
        let line: Vec<u8> = self.read.drain(..=length).collect();
        serde_json::from_slice(&line).map_err(|e| invalid_data(e.to_string()))
    }

    /// Returns the next line that has a descriptor, with it. Each such line has one, and both
    /// arrive in order.
    fn next_with<T: DeserializeOwned>(&mut self) -> io::Result<(T, OwnedFd)> {
        let line = self.next()?;
        let descriptor = self.descriptors.pop_front();
        // The process had no descriptor left for it.
        let descriptor = descriptor.ok_or_else(|| invalid_data("a socket was lost on its way"))?;
        Ok((line, descriptor))
    }
}

fn to_line(line: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Replaces `WouldBlock`, the system's error for a call that took too long, by `TimedOut`.
fn name_timeout(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::WouldBlock => ErrorKind::TimedOut.into(),
        _ => error,
    }
}
