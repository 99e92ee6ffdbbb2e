//! hyperkit's state directory: the names in it, and the line with which the host dials the guest.

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::packet::HOST_CID;

/// How long the line is: two numbers, a dot, a newline.
const LINE: usize = 18;

pub(crate) struct StateDir {
    path: PathBuf,
    guest_cid: u64,
    /// `connect`.
    pub(crate) listener: UnixListener,
}

impl StateDir {
    /// Takes the directory over: what an earlier device left there goes.
    pub(crate) fn open(path: &Path, guest_cid: u64) -> io::Result<StateDir> {
        fs::create_dir_all(path)?;
        let connect = path.join("connect");
        match fs::remove_file(&connect) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(connect)?;
        listener.set_nonblocking(true)?;
        fs::write(path.join("hyperkit.pid"), std::process::id().to_string())?;
        Ok(StateDir {
            path: path.to_owned(),
            guest_cid,
            listener,
        })
    }

    /// The port that the host asks for, in one read: it must be all there.
    pub(crate) fn read_line(&self, mut stream: &UnixStream) -> Option<u32> {
        let mut line = [0; LINE];
        if stream.read(&mut line).ok()? != LINE {
            return None;
        }
        let line = std::str::from_utf8(&line).ok()?.strip_suffix('\n')?;
        let (cid, port) = line.split_once('.')?;
        let hex = |digits: &str| {
            let exact = digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_hexdigit());
            exact
                .then(|| u32::from_str_radix(digits, 16).ok())
                .flatten()
        };
        (u64::from(hex(cid)?) == self.guest_cid).then_some(hex(port)?)
    }

    /// Connects to the host's program for this port, without waiting: a full backlog refuses, as on
    /// macOS.
    pub(crate) fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        let name = format!("{HOST_CID:08x}.{port:08x}");
        socket.connect(&SockAddr::unix(self.path.join(name))?)?;
        Ok(std::os::fd::OwnedFd::from(socket).into())
    }
}
