//! Dials a file: its content is sent, and what comes is discarded.
//!
//! The connection is a Unix socket, as any other is. A thread is at its other end, since reading a
//! file may block.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::SockRef;

use crate::address::{Address, FileAddress};
use crate::error::{Error, Operation, Result};
use crate::{file, sys};

/// How many bytes are carried at once.
const BUFFER: usize = 64 * 1024;

/// Opens a file. Returns the connection on which it is sent.
///
/// # Errors
/// Returns why it can't be read: `NotFound` if it isn't there, `IsADirectory`, `InvalidInput` if it
/// is anything else but a file with content.
pub(super) fn connect(address: &Address, file: &FileAddress) -> Result<UnixStream> {
    let fail = |cause: io::Error| {
        let remedy = match cause.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                format!(
                    "there is no file {}: is the path right?",
                    file.path.display()
                )
            }
            io::ErrorKind::PermissionDenied => {
                format!("let the user who runs this read {}", file.path.display())
            }
            io::ErrorKind::IsADirectory => "name a file in it".to_owned(),
            io::ErrorKind::InvalidInput => "name a regular file".to_owned(),
            _ => return Error::new(Operation::Connect, address, cause),
        };
        Error::new(Operation::Connect, address, cause).with_remedy(remedy)
    };
    let file = file::open(&file.path).map_err(fail)?;
    let (near, ours) = UnixStream::pair().map_err(fail)?;
    for end in [&near, &ours] {
        sys::make_room(&SockRef::from(end));
    }
    ours.set_nonblocking(true).map_err(fail)?;
    let thread = thread::Builder::new().name("hvsock-file".into());
    // If sending fails, nobody is left to receive the rest.
    let send = move || drop(send(file, ours));
    thread.spawn(send).map_err(fail)?;
    Ok(near)
}

/// Sends a file, and discards what comes meanwhile and later, until the other end has closed.
fn send(mut file: File, mut socket: UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut left = 0..0;
    let (mut file_ended, mut input_ended) = (false, false);
    while !(file_ended && left.is_empty() && input_ended) {
        if left.is_empty() && !file_ended {
            left = 0..file.read(&mut buffer)?;
            file_ended = left.is_empty();
            if file_ended {
                socket.shutdown(Shutdown::Write)?;
            }
        }
        let mut events = PollFlags::empty();
        events.set(PollFlags::POLLIN, !input_ended);
        events.set(PollFlags::POLLOUT, !left.is_empty());
        let mut asked = [PollFd::new(socket.as_fd(), events)];
        match poll(&mut asked, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        if !left.is_empty() {
            match socket.write(&buffer[left.clone()]) {
                Ok(count) => left.start += count,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
        if !input_ended {
            match socket.read(&mut [0; 4096]) {
                Ok(count) => input_ended = count == 0,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}
